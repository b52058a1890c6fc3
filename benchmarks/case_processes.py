"""A process for each case of a check, some side by side, and what becomes of those that die or hang. What is checked: gpu_check.py."""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

CASE_LIMIT_S = 300  # kernels may have to be compiled
LAST_START_S = 30  # before the time is up
Case = dict[str, Any]
Judge = Callable[[Case], dict[str, Any]]  # in a process of its own; the verdict says `right`


@dataclass
class _Running:
    case: Case
    process: BaseProcess
    folder: Path
    began: float
    limit_s: float


def _child(case: Case, judge: Judge, folder: Path) -> None:
    """A fork: what takes long to import was imported before. Ends the process."""
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        verdict = judge(case)
    except BaseException:  # it is told, and the process ends
        verdict = {"case": case, "right": False, "error": traceback.format_exc()[-2500:]}
    (folder / "verdict").write_text(json.dumps(verdict))
    os._exit(0)  # an engine takes seconds to end, and holds nothing that matters


def _start(case: Case, judge: Judge, folder: Path, limit_s: float) -> _Running:
    folder.mkdir()
    process = multiprocessing.get_context("fork").Process(target=_child, args=(case, judge, folder))
    process.start()
    return _Running(case, process, folder, time.monotonic(), limit_s)


def _ended(running: _Running) -> dict[str, Any] | None:
    """The verdict of a process that ended, or had to."""
    took = time.monotonic() - running.began
    if running.process.is_alive():
        if took < running.limit_s:
            return None
        running.process.kill()
    running.process.join()
    told = running.folder / "verdict"
    if told.exists():
        line: dict[str, Any] = json.loads(told.read_text())
    else:
        why = f"no verdict after {took:.0f} s"
        line = {"case": running.case, "right": False, "error": why}
    if not line["right"]:
        log = (running.folder / "log").read_text(errors="replace").splitlines()
        line["log"] = [text[:300] for text in log if "ERROR" in text][:10] or log[-15:]
    return line | {"seconds": round(took, 1)}


def run_all(
    cases: list[Case], judge: Judge, parallel: int, seconds: float, out: Path | None
) -> tuple[int, int]:
    """How many were wrong, and how many there was no time for. Prints a line of JSON for each, and adds it to `out`."""
    end = time.monotonic() + seconds
    left, running, wrong = list(cases), [], 0
    with tempfile.TemporaryDirectory() as folder:
        while left or running:
            while left and len(running) < parallel and time.monotonic() < end - LAST_START_S:
                case = left.pop(0)
                limit_s = min(CASE_LIMIT_S, end - time.monotonic())
                running.append(_start(case, judge, Path(folder) / str(len(left)), limit_s))
            time.sleep(0.1)
            for one in list(running):
                line = _ended(one)
                if line is None:
                    continue
                running.remove(one)
                wrong += not line["right"]
                print(json.dumps(line), flush=True)
                if out is not None:
                    with out.open("a") as file:
                        file.write(json.dumps(line) + "\n")
            if not running and time.monotonic() >= end - LAST_START_S:
                break
    return wrong, len(left)
