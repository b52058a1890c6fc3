# What a contributor and CI type. How each thing is done lives in install.py, benchmarks/ and tests/.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
RUN := .venv/bin/python

.PHONY: help setup demo test lint types clean

help:
	@echo 'make demo    one prompt, three engines, one bucket: the main job, end to end'
	@echo 'make test    all tests (PYTEST_ARGS="-k name" for some of them)'
	@echo 'make lint    ruff, rules and format'
	@echo 'make types   mypy, strict, on the package'
	@echo 'make clean   remove .venv and caches'

setup:
	@$(PYTHON) install.py

demo: setup
	@$(RUN) -m benchmarks.demo

test: setup
	@$(PYTHON) install.py --ceph
	@$(RUN) -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: setup
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .

types: setup
	@$(RUN) -m mypy --strict objectcache

clean:
	@rm -rf .venv .demo .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
