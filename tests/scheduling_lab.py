"""Toy engines under vLLM's real Scheduler that share one bucket, for the suites of scheduling. No tests here."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from toy_engine import ToyEngine

from benchmarks.tiny_model import write_model
from objectcache.report import log

CHUNK, BLOCK = 64, 16
Engines = Callable[..., ToyEngine]


@pytest.fixture(name="model", scope="session")
def model_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(name="engine")
def engine_fixture(model: Path, tmp_path: Path) -> Iterator[Engines]:
    """Make engines that share one bucket; at the end all stop and no slot is in use."""
    made: list[ToyEngine] = []

    def make(
        extra: dict[str, Any] | None = None, *, off: bool = False, of: Path = model, **more: Any
    ) -> ToyEngine:
        options = {"url": f"file://{tmp_path}/store", "chunk_tokens": CHUNK, "ring_bytes": 1 << 20}
        made.append(ToyEngine(of, None if off else options | (extra or {}), **more))
        return made[-1]

    yield make
    for one in made:
        one.settle()
        assert all(worker.leased_slots == 0 for worker in one.workers)
        one.stop()


def objects(tmp_path: Path) -> list[Path]:
    return sorted(p for p in (tmp_path / "store").rglob("*.r*of*") if p.is_file())


def warm_and_want(engine: Engines, *prompts: list[int], **more: Any) -> list[list[int]]:
    """Fill the bucket from one engine, and say what an engine without a connector answers."""
    first = engine(**more)
    first.generate(*prompts)
    first.settle()
    return engine(off=True, **more).generate(*prompts)


def prefix_order(tokens: list[int]) -> list[str]:
    """Hex names of the chunks of a prompt, in prefix order."""
    from objectcache.keys import chunk_hashes, root_hash

    return [h.hex() for h in chunk_hashes(tokens, CHUNK, root_hash())]


def break_object(kind: str, path: Path, objs: list[Path]) -> None:
    body = bytearray(path.read_bytes())
    if kind == "missing":
        path.unlink()
        return
    if kind == "truncated":
        del body[len(body) // 2 :]
    elif kind == "longer":
        body += b"x"
    elif kind == "empty":
        body.clear()
    elif kind == "flipped in the last layer":
        body[-1] ^= 1
    elif kind == "flipped in the header":
        body[100] ^= 1
    elif kind == "foreign":
        others = [other for other in objs if other != path]
        body = bytearray(others[0].read_bytes() if others else b"another")
    elif kind == "zeros":
        body = bytearray(len(body))
    path.chmod(0o644)
    path.write_bytes(body)


@contextmanager
def told(level: int = logging.DEBUG) -> Iterator[list[str]]:
    """What the log is told meanwhile."""
    lines: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    ear, before = Ear(level), log.level
    log.addHandler(ear)
    log.setLevel(level)
    try:
        yield lines
    finally:
        log.setLevel(before)
        log.removeHandler(ear)
