"""What is read out of a profile of a GPU, and that a picture comes of it."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu_timeline import joined, metrics, profile, row_of, steps


def event(kind: str, name: str, at_us: float, took_us: float, size: int = 0) -> dict[str, Any]:
    return {
        **{"ph": "X", "cat": kind, "name": name, "ts": 1e9 + at_us, "dur": took_us},
        "args": {"bytes": size} if kind == "gpu_memcpy" else {},
    }


EVENTS = [
    event("kernel", "flash_attn", 900, 100),
    event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 0, 1000, 50 << 20),
    event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 0, 2, 512),
    event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 50, 5000, 50 << 20),
    event("kernel", "index_copy_kernel", 1000, 50),
    event("kernel", "gemm", 1500, 500),
    event("kernel", "norm", 1900, 200),
    event("cpu_op", "aten::copy_", 0, 9999),
    {"ph": "M", "name": "process_name"},
]


def test_copies_pages_and_computing_are_told_apart() -> None:
    assert [row_of(one) for one in EVENTS[:8]] == [
        *("computes", "bus", "", "", "pages", "computes", "computes", "")
    ]


def test_times_are_those_of_the_union_and_gaps_those_of_computing() -> None:
    assert metrics(profile(EVENTS)) == {
        **{"bus_busy_ms": 1.0, "pages_busy_ms": 0.05, "computes_busy_ms": 0.7, "spans_ms": 2.1},
        **{"bus_bytes": 50 << 20, "bus_gb_per_s": 52.43},
        "computes_not_ms": [[0.0, 0.9], [1.0, 1.5]],
    }
    assert metrics(profile([]))["spans_ms"] == 0.0


def test_near_spans_are_joined() -> None:
    assert joined([(3.0, 4.0), (0.0, 1.0), (1.04, 2.0)], near_ms=0.05) == [(0.0, 2.0), (3.0, 4.0)]


def test_the_command_draws_and_adds_lines(tmp_path: Path) -> None:
    file, picture, lines = (tmp_path / name for name in ("a.pt.trace.json.gz", "a.svg", "a.jsonl"))
    with gzip.open(file, "wt") as out:
        json.dump({"traceEvents": EVENTS}, out)
    command = [sys.executable, "-m", "benchmarks.gpu_timeline", file, "--lines", lines]
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        pass
    else:
        command += ["--out", picture]
    subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parents[1])
    line = json.loads(lines.read_text())
    assert line["case"] == {"name": "a"} and line["metrics"]["computes_busy_ms"] == 0.7
    if "--out" in command:
        assert picture.read_text().count("<path") > 3


def test_steps_beside_copies_are_told_apart_from_those_before() -> None:
    """Two layers: steps of 7 ms, then of 9 in which the layers lie 4 ms apart."""
    begins = [0, 7, 14, 21, 30, 39, 48]
    writes = [(at, at + (3 if at < 21 else 4)) for at in begins]
    events = [event("kernel", "reshape_and_cache_x", 1e3 * ms, 10) for two in writes for ms in two]
    events.append(event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 20_500, 20_000, 50 << 20))
    assert steps(events, layers=2) == {
        **{"before_steps": 2, "before_step_p50_ms": 7.0, "before_layers_p50_ms": 3.0},
        **{"before_step_max_ms": 7.0, "copying_steps": 3, "copying_step_p50_ms": 9.0},
        **{"copying_layers_p50_ms": 4.0, "copying_step_max_ms": 9.0},
    }
    assert steps([], layers=2) == {}
