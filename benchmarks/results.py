"""The files of results: one JSON line for each system and case, and what was measured already. How they are shown: transport_report.py."""

import json
import os
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(__file__).resolve().parent / "results"
_GIT_LIMIT_S = 10.0


def commit() -> str:
    """What is measured: OBJECTCACHE_COMMIT where there is no git; a `+` says that files are changed."""
    told = os.environ.get("OBJECTCACHE_COMMIT")
    if told:
        return told
    name = _git("rev-parse", "--short=12", "HEAD")
    changed = _git("status", "--porcelain", "--", "objectcache", "benchmarks/*.py")
    return f"{name}+" if name and changed else name or "unknown"


def machine() -> str:
    """A name for this machine by what matters here: its cores and its GPU."""
    cores = f"{len(os.sched_getaffinity(0))}-core"
    try:
        told = _run("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    except FileNotFoundError:
        return cores
    words = told.splitlines()[0].lower().split() if told else []
    model = next((word for word in words if word not in ("nvidia", "geforce", "tesla")), "")
    return f"{cores}-{model}" if model else cores


class Lines:
    """The lines of one file. `put` replaces what was said of the same thing and writes at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: dict[str, dict[str, Any]] = {}
        for line in read(path):
            self._lines[_identity(line)] = line

    def has(self, line: Mapping[str, Any]) -> bool:
        return _identity(line) in self._lines

    def put(self, line: dict[str, Any]) -> None:
        self._lines[_identity(line)] = line
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self._path.with_suffix(".new")
        fresh.write_text("".join(json.dumps(kept) + "\n" for kept in self._lines.values()))
        fresh.replace(self._path)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; none if there is no file."""
    if not path.exists():
        return []
    return [json.loads(text) for text in path.read_text().splitlines() if text]


def latest(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each machine, system and case the line that came last, whatever the commit."""
    found = {_identity(line | {"commit": ""}): line for line in lines}
    return list(found.values())


def rounded(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Four digits say all that such a measurement knows."""
    return {
        name: float(f"{value:.4g}") if isinstance(value, float) else value
        for name, value in metrics.items()
    }


def _identity(line: Mapping[str, Any]) -> str:
    parts = [line[name] for name in ("benchmark", "machine", "commit", "system", "case")]
    return json.dumps(parts, sort_keys=True)


def _git(*args: str) -> str:
    try:
        return _run("git", "-C", str(ROOT), *args)
    except FileNotFoundError:
        return ""


def _run(*command: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=_GIT_LIMIT_S, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else ""
