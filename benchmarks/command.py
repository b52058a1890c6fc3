"""What the commands of the benchmarks share: arguments, what is told to a person, and the file that results go to. Not what is measured; its form: results.py."""

import argparse
import importlib.metadata
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks import results

_TCP_RULE = Path("/proc/sys/net/ipv4/tcp_congestion_control")
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "systems": {"default": "", "help": "names with commas between"},
    "rounds": {"type": int, "default": 3},
    "seconds": {"type": float, "default": 3600.0, "help": "start nothing new after this time"},
    "machine": {"help": "name for the results, such as 16-core-h100"},
    "out": {"type": Path, "help": "file for the results"},
    "again": {"action": "store_true", "help": "measure also what this commit has results of"},
    "report": {"action": "store_true", "help": "make the table and the plots from the results"},
}


def parser(about: str | None, *shared: str, systems: Iterable[str] = ()) -> argparse.ArgumentParser:
    """One that takes these of the arguments that mean the same everywhere, and prints `about` as it stands."""
    found = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawTextHelpFormatter
    )
    for name in shared:
        found.add_argument(f"--{name}", **_ARGUMENTS[name])
    if systems:
        found.set_defaults(systems=",".join(systems))
    return found


def begin(
    benchmark: str, args: argparse.Namespace, smoke: bool = False
) -> tuple[Path, results.Lines, dict[str, str]]:
    """The file for the results, its lines, and what each line says of the run. Those of a smoke run never mix with others."""
    name = "smoke" if smoke else args.machine or results.machine()
    path = args.out or results.FOLDER / f"{benchmark}-{name}.jsonl"
    about = {"benchmark": benchmark, "machine": name, "commit": results.commit()}
    return path, results.Lines(path), about


def versions(names: Iterable[str]) -> dict[str, str]:
    """Of those that are installed; and by which rule the kernel paces what a server here sends. Over loopback
    56 bodies came at 2.6 GB/s by bbr, at 4.8 by cubic (2 cores): compare like with like."""
    found = {}
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if _TCP_RULE.exists():
        found["tcp"] = _TCP_RULE.read_text().strip()
    return found


def clean(why: str) -> str:
    """A reason as it may stand in a file: no paths of this machine in it, and not long."""
    return re.sub(r"(/[\w.+-]+){2,}", "...", why)[:200]


def say(text: str) -> None:
    """Tell a person; stdout is left to the results' path."""
    print(text, file=sys.stderr, flush=True)
