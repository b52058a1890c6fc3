"""A benchmark run as a person runs it, with tiny sizes. No tests here."""

import subprocess
import sys

from benchmarks.results import ROOT


def smoke_run(benchmark: str, *options: str, limit_s: float) -> str:
    """What it told, of which nothing may be a failure."""
    return run(benchmark, "--smoke", *options, limit_s=limit_s)


def run(benchmark: str, *options: str, limit_s: float) -> str:
    """The same with sizes of the caller's."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{benchmark}", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr
