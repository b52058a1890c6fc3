"""The picture of a trace: which requests are drawn, what is read from their events, and that there is a picture."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.timeline import chosen, draw, landed, layers, of, records


def record(name: str, arrived_s: float, *events: list[Any]) -> dict[str, Any]:
    return {
        "request": name,
        "prompt_tokens": 100,
        "arrived_s": arrived_s,
        "events": [[0.0, "arrived"], *events, [0.5, "ended", {"how": "x"}]],
    }


WAITS = [[0.12, 0.1], [0.2, 50.0], [0.3, 0.1]]
COLD = record("cold", 1.0, [0.1, "found", {"chunks": 0}])
WARM = record(
    "warm",
    3.0,
    [0.01, "found", {"chunks": 2}],
    [0.02, "staging", {"chunks": 2}],
    [0.05, "progress", {"ready": 1, "share": 0.4}],
    [0.10, "admitted", {"loaded": 64, "steps": 3}],
    [0.11, "pass", {"step": 9, "took_ms": 300.0, "waits": WAITS, "ready": [1, 1, 3]}],
    [0.45, "first token"],
)
STAGED = record("staged", 2.0, [0.2, "staged", {"chunks": 2}])
FAILED = record("failed", 4.0, [0.2, "staged", {"chunks": 0, "error": "NotFound"}])


def test_the_last_that_loaded_are_drawn_or_those_that_were_asked_for() -> None:
    all_ = [COLD, WARM, STAGED]
    assert chosen(all_, [], 1) == [STAGED]
    assert chosen(all_, [], 5) == [STAGED, WARM]  # as they arrived
    assert chosen(all_, ["cold", "warm"], 1) == [COLD, WARM]
    assert chosen([COLD], [], 1) == [COLD]


def test_half_a_line_is_left_out() -> None:
    text = json.dumps(COLD) + "\n" + json.dumps(WARM)
    assert records(text.splitlines(keepends=True)) == [COLD]


def test_layers_and_when_they_landed() -> None:
    assert layers(WARM) == 3 and layers(COLD) == 1
    assert of(WARM, "found") == [(10.0, {"chunks": 2})]
    there = dict(landed(WARM))
    assert there[50.0] == there[120.0] == there[200.0] == 1
    assert there[250.0] == 2 and there[300.0] == 3
    assert landed(STAGED) == [(200.0, 1)] and landed(FAILED) == []


def test_there_is_a_picture_the_same_each_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("a.svg", "b.svg"):
        draw([COLD, STAGED, WARM, FAILED], tmp_path / name)
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    assert len(text) > 5000 and "warm: 100 tokens" in text
