"""The simulator: does it still run, is it the same each time, and does it find what the documents say? Short."""

import random
import statistics
from pathlib import Path

import pytest

from benchmarks.results import Lines, read
from benchmarks.simulate import Case, cases, measure
from benchmarks.simulate_report import write
from benchmarks.simulated import S3, S3Law, Timeline, Wire
from benchmarks.simulated_engine import Engine
from benchmarks.simulated_paper import RULES, TABLE_A12, WORKLOADS, added_ms
from benchmarks.simulated_prompts import CHUNK_TOKENS, RECOMPUTE, Request, Setting
from objectcache.moment import AT_ONCE, JUST_IN_TIME, STAGED

FREE = S3Law(requests_per_s=1e9, tail=0.0)


def run(mode: str, prompts: list[tuple[float, int, float]], **setting: object) -> Engine:
    line = Timeline()
    engine = Engine(line, S3(line, FREE, 0), Setting(mode=mode, **setting), 0)  # type: ignore[arg-type]
    for number, (at_s, tokens, hit) in enumerate(prompts):
        engine.arrive(Request(number, at_s, tokens, int(tokens * hit) // CHUNK_TOKENS, 8))
    line.run()
    return engine


def first_s(engine: Engine) -> list[float]:
    return [r.first_token_s for r in sorted(engine.tally.requests, key=lambda r: r.number)]


@pytest.mark.parametrize("workload", list(WORKLOADS))
def test_the_papers_sums_are_found_and_ours_are_less(workload: str) -> None:
    best = min(TABLE_A12[rule][workload] for rule in TABLE_A12)
    for rule, printed in TABLE_A12.items():
        if rule in ("equal", "stall-optimal", "calibrated"):
            found = sum(added_ms(workload, rule, shared=False, seeds=10))
            assert found == pytest.approx(printed[workload], rel=0.15)
    shared = {rule: sum(added_ms(workload, rule, shared=True, seeds=3)) for rule in RULES}
    assert shared["ours"] < best
    assert shared["ours"] == min(shared.values())


def test_bodies_share_a_wire_and_none_is_faster_than_its_connection() -> None:
    line = Timeline()
    wire = Wire(line, 10.0, 4.0)
    ends: list[float] = []

    def body(at_s: float, size: float) -> None:
        def end() -> None:
            wire.end()
            ends.append(line.now)

        line.at(at_s, lambda: wire.when(wire.begin() + size, end))

    body(0.0, 8.0)  # alone: 4 a second
    line.run()
    assert ends == [2.0]
    ends.clear()
    for _ in range(5):
        body(3.0, 8.0)  # 2 a second each
    body(5.0, 8.0)  # they share 10, six now
    line.run()
    assert ends[:5] == pytest.approx([3.0 + 2.0 + 4 / (10 / 6)] * 5)
    assert ends[5] == pytest.approx(7.4 + (8 - 4) / 4.0)


def test_a_prefix_takes_so_many_requests_and_refuses_more() -> None:
    line = Timeline()
    s3 = S3(line, S3Law(requests_per_s=100.0, prefixes=2), 0)
    taken = sum(s3.get(lambda: None) for _ in range(1000))
    assert taken == 100 and s3.refused == 900  # half a second's worth for each
    waits: list[float] = []
    open_ = S3(line, FREE, 1)
    began = line.now
    for _ in range(3000):
        open_.get(lambda: waits.append(line.now - began))
    line.run()
    assert statistics.median(waits) == pytest.approx(0.027, rel=0.1)
    assert sorted(waits)[int(0.99 * len(waits))] == pytest.approx(0.114, rel=0.2)


def test_the_simulated_gpu_is_the_one_that_was_measured() -> None:
    alone = run(RECOMPUTE, [(0.0, 65536, 0.0), (10.0, 16384, 0.0), (20.0, 4096, 0.0)])
    assert first_s(alone) == pytest.approx([3.3, 0.48, 0.1], rel=0.1)


def test_modes_of_admission_are_in_their_order() -> None:
    """A long hit while others decode: just in time is nearly as soon as at once, and stalls nobody."""
    prompts = [(5.0 * n, 65536, 0.875) for n in range(6)]
    prompts += [(5.0 * n + 0.01, 4096, 0.0) for n in range(6)]
    setting = {"wire_bytes_per_s": 12.5e9, "split": False}
    modes = {mode: run(mode, prompts, **setting) for mode in (STAGED, JUST_IN_TIME, AT_ONCE)}
    last = {mode: statistics.mean(first_s(engine)[3:6]) for mode, engine in modes.items()}
    assert last[JUST_IN_TIME] < 0.85 * last[STAGED]
    assert last[JUST_IN_TIME] < 1.3 * last[AT_ONCE]
    assert modes[AT_ONCE].tally.stalled_s > 1.0
    assert modes[JUST_IN_TIME].tally.stalled_s < 0.1 * modes[AT_ONCE].tally.stalled_s


def test_everything_is_given_back() -> None:
    chance = random.Random(3)
    prompts = [
        (chance.uniform(0, 2), chance.choice((4096, 16384, 65536)), chance.random())
        for _ in range(24)
    ]
    for mode in (STAGED, JUST_IN_TIME, AT_ONCE):
        engine = run(mode, prompts, ring_slots=300, gpu_blocks=9000)
        assert len(engine.tally.requests) == 24
        assert engine.tally.ring_most <= 300
        assert (engine._free_slots, engine._free_blocks) == (300, 9000)
        assert not engine._fetches and not engine._bodies


def test_a_smoke_of_every_group_is_the_same_twice_and_makes_a_report(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    few: dict[str, Case] = {}
    for case in cases(smoke=True):
        if case.group != "paper" and case.system in ("just in time", "ours"):
            few.setdefault(case.group, case)
    assert set(few) == {"modes", "bursts", "rules", "fleet"}
    once = {group: measure(case) for group, case in few.items() if group != "modes"}
    assert once == {group: measure(case) for group, case in few.items() if group != "modes"}
    for case in cases(smoke=True):
        metrics = once.get(case.group, {})
        if case.group == "paper":
            metrics = {"added_ms": 1.0, "worst_ms": 1.0, "printed_ms": 2}
        if case.group == "modes":
            metrics = once["rules"]
        line = {
            "benchmark": "simulate",
            "machine": "a model",
            "commit": "0",
            "system": case.system,
            "case": {"group": case.group, **case.case},
            "metrics": metrics,
        }
        Lines(tmp_path / f"simulate-{case.group}.jsonl").put(line)
    assert read(tmp_path / "simulate-fleet.jsonl")
    write(tmp_path)
    text = (tmp_path / "simulate.md").read_text()
    assert "| ours |" in text and "engines on one bucket" in text and "who ask at once" in text
    assert (tmp_path / "simulate.svg").stat().st_size > 1000
