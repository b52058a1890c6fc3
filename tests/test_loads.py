"""How much of a prefix is loaded, and when, under vLLM's real Scheduler: right KV whatever is chosen, given up or put off, and nothing left behind.

The toy engine raises on any wrong row. What is known of the wire and of computing is given here, so
that a choice is sure; the choices themselves: test_worth.py, test_choosing.py, test_turns.py.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scheduling_lab import (  # noqa: F401 (pytest looks for the fixtures here)
    BLOCK,
    CHUNK,
    Engines,
    engine_fixture,
    model_fixture,
    objects,
    prefix_order,
    told,
    warm_and_want,
)
from toy_engine import ToyEngine, prompt

from objectcache.compute import ComputeModel, Costs, Work
from objectcache.flow import StoreModel
from objectcache.wire import Wire

PASS_S, TOKEN_S = 24.0, 2e-2  # so long that no busy machine changes a choice
PROMPT = prompt(400)  # 6 chunks
OBJECT = 16 << 10  # about
PATIENT = {"lookup_timeout_ms": 30_000, "stage_timeout_ms": 60_000}
NONE, ALL = Wire(StoreModel(900.0, 950.0, 1e6), 32), Wire(StoreModel(1e-3, 2e-3, 1e9), 32)
# 5 s for each chunk: with passes of 160 tokens the first 4 are loaded, and the rest is one pass.
SPLIT = Wire(StoreModel(1e-3, 2e-3, 1e9, OBJECT / 5), 32)


class Passes(ComputeModel):
    """Passes take a long time and tokens little, whatever is timed."""

    def __init__(self, token_s: float = TOKEN_S) -> None:
        super().__init__(Costs(PASS_S, token_s, 0.0, 0.0))
        for tokens in range(1, 200):
            super().timed(Work(1, tokens, 200.0 * tokens), PASS_S + token_s * tokens)

    def timed(self, work: Work, seconds: float) -> None:
        pass


def know(one: ToyEngine, wire: Wire | None, token_s: float = TOKEN_S) -> ToyEngine:
    loading = one.connector._scheduler.loading
    loading.timely.compute = Passes(token_s)
    if wire is not None:
        loading.timely.heard(0, wire)
    return one


@pytest.fixture(name="sooner")
def sooner_fixture(engine: Engines) -> Callable[..., ToyEngine]:
    def make(wire: Wire | None, extra: dict[str, Any] | None = None, **more: Any) -> ToyEngine:
        options = PATIENT | {"load": "sooner"} | (extra or {})
        return know(engine(options, max_batched_tokens=160, **more), wire)

    return make


def quiet(one: ToyEngine) -> bool:
    half = one.connector._scheduler
    return half.loading.turns.idle and not half._jobs and not half.loading._bringing


@pytest.mark.parametrize(("wire", "chunks"), [(NONE, 0), (SPLIT, 4), (ALL, 6), (None, 6)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_as_much_is_loaded_as_is_sooner_and_the_rest_is_computed(
    sooner: Callable[..., ToyEngine],
    engine: Engines,
    tmp_path: Path,
    wire: Wire | None,
    chunks: int,
    ranks: int,
) -> None:
    want = warm_and_want(engine, PROMPT, ranks=ranks)
    before = objects(tmp_path)
    second = sooner(wire, ranks=ranks)
    with told() as lines:
        assert second.generate(PROMPT) == want
    second.settle()
    assert second.cached["r1"] == chunks * CHUNK
    assert second.stats.get("get_requests", 0) == chunks * ranks
    assert second.stats.get("put_requests", 0) == 0 and objects(tmp_path) == before
    assert second.totals.get("recomputed_tokens", 0) == (6 - chunks) * CHUNK
    said = f"Load {chunks or 'none'} of 6 chunks" if wire is not None else "Load all 6 chunks: "
    assert sum(f"request r1: {said}" in line for line in lines) == 1
    assert quiet(second)


def test_what_is_not_loaded_is_not_saved_again_although_it_is_forgotten(
    sooner: Callable[..., ToyEngine], engine: Engines
) -> None:
    want = warm_and_want(engine, PROMPT)
    second = sooner(SPLIT, {"known_ttl_s": 0})
    assert second.generate(PROMPT) == want
    second.settle()
    assert second.stats.get("put_requests", 0) == second.stats.get("head_requests", 0) == 0


def test_a_chunk_that_was_chosen_and_is_broken_is_healed(
    sooner: Callable[..., ToyEngine], engine: Engines, tmp_path: Path
) -> None:
    want = warm_and_want(engine, PROMPT)
    path = next(o for o in objects(tmp_path) if prefix_order(PROMPT)[2] in o.name)
    good = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    second = sooner(SPLIT, {"known_ttl_s": 0})
    assert second.generate(PROMPT) == want and second.cached["r1"] == 2 * CHUNK
    second.settle()
    assert path.read_bytes() == good


def test_identical_prefixes_together_fetch_what_is_chosen_once(
    sooner: Callable[..., ToyEngine], engine: Engines
) -> None:
    prompts = [PROMPT, PROMPT, PROMPT[:330] + prompt(60, seed=7)]
    want = warm_and_want(engine, *prompts)
    for wire, least, most in ((SPLIT, 4, 7), (NONE, 0, 0), (ALL, 6, 7)):
        second = sooner(wire)
        assert second.generate(*prompts) == want
        assert least <= second.stats.get("get_requests", 0) <= most
        assert least <= second.cached["r1"] // CHUNK <= most
        assert quiet(second)


@pytest.mark.parametrize("wire", [SPLIT, ALL, NONE])
@pytest.mark.parametrize("steps", range(6))
def test_abort_at_any_moment(
    sooner: Callable[..., ToyEngine], engine: Engines, wire: Wire, steps: int
) -> None:
    kept = prompt(300, seed=5)
    want = warm_and_want(engine, PROMPT, kept)
    second = sooner(wire, {"ring_bytes": "1MiB"}, layers=3)
    names = [second.add(PROMPT), second.add(kept), second.add(PROMPT[:390])]
    for _ in range(steps):
        second.step()
    for name in (names[0], names[2]):
        if name in second.scheduler.requests:
            second.abort(name)
    second.run()
    assert second.outputs[names[1]] == want[1]
    assert second.generate(PROMPT) == want[:1]
    assert quiet(second)


def test_a_deadline_comes_with_the_request_and_nonsense_is_ignored_with_one_warning(
    sooner: Callable[..., ToyEngine], engine: Engines
) -> None:
    want = warm_and_want(engine, PROMPT)
    second = sooner(ALL)
    with told(logging.WARNING) as lines:
        for value in ("soon", -1, True):
            second.add(PROMPT, transfer={"objectcache.deadline_ms": value})
    kept = second.add(PROMPT, transfer={"objectcache.deadline_ms": 700.5})
    tracked = second.connector._scheduler._requests
    assert [tracked[f"r{n}"].deadline_s for n in (1, 2, 3)] == [float("inf")] * 3
    assert 0.6 < tracked[kept].deadline_s - tracked[kept].arrived_s < 0.701
    second.run()
    assert all([second.outputs[name]] == want for name in ("r1", "r2", "r3", kept))
    assert len(lines) == 1 and "deadline_ms is no number" in lines[0] and "soon" not in lines[0]


# ---- whose load begins

SHAPE: dict[str, Any] = {"layers": 24, "failure_policy": "fail"}
FULL = PATIENT | {
    "ring_bytes": "1MiB",
    "save": False,
}  # with 24 layers an object is 100 KiB: 8 for loads


def warm(engine: Engines, *prompts: list[int]) -> list[list[int]]:
    """As warm_and_want, with room for all to be saved."""
    first = engine({"ring_bytes": "64MiB"}, blocks=512, **SHAPE)
    first.generate(*prompts)
    first.settle()
    return engine(off=True, blocks=512, **SHAPE).generate(*prompts)


def looked_up(one: ToyEngine) -> None:
    """All that was found is known, before vLLM asks for the first."""
    half = one.connector._scheduler
    end = time.monotonic() + 10
    while half._lookups and time.monotonic() < end:
        half._take_lookups()


def held(one: ToyEngine) -> int:
    return sum(len(tracked.job_hashes) for tracked in one.connector._scheduler._jobs.values())


def begun(one: ToyEngine, names: list[str], timeout_s: float = 60.0) -> list[str]:
    """Run to the end; in which order their loads began."""
    jobs: dict[int, str] = {}
    end = time.monotonic() + timeout_s
    while one.step():
        assert time.monotonic() < end
        half = one.connector._scheduler
        assert held(one) <= one.workers[0].connector._worker.stage_chunks
        jobs |= {job: tracked.request.request_id for job, tracked in half._jobs.items()}
    assert set(jobs.values()) == set(names)
    return [jobs[job] for job in sorted(jobs)]


@pytest.mark.parametrize("load", ["always", "sooner"])
def test_of_a_burst_only_what_fits_begins_the_smallest_first(engine: Engines, load: str) -> None:
    prompts = [prompt(n * CHUNK + 1, seed=n) for n in (5, 8, 3, 4, 1, 2)]
    want = warm(engine, *prompts)
    one = engine(FULL | {"load": load}, blocks=512, **SHAPE)
    assert one.workers[0].connector._worker.stage_chunks == 8
    if load == "sooner":
        know(one, ALL, token_s=100.0)
    names = [one.add(p) for p in prompts]
    looked_up(one)
    order = begun(one, names)
    assert [one.outputs[name] for name in names] == want
    assert set(order[:3]) == {"r3", "r5", "r6"} and order[3:] == ["r4", "r1", "r2"]
    assert [one.cached[name] // CHUNK for name in names] == [5, 8, 3, 4, 1, 2]
    assert quiet(one)


def test_no_more_begin_than_there_are_blocks_for(engine: Engines) -> None:
    prompts = [prompt(2 * CHUNK + 1, seed=n) for n in range(8)]
    want = warm_and_want(engine, *prompts)
    one = engine(PATIENT | {"save": False}, blocks=24)
    names = [one.add(p, max_tokens=4) for p in prompts]
    most = 0
    while one.step():
        most = max(most, held(one))
    assert [one.outputs[name] for name in names] == want
    assert most <= 2 * (24 // 9), "fetched although their blocks are not there"
    assert one.totals["hit_tokens"] == 8 * 2 * CHUNK
    assert quiet(one)


@pytest.mark.parametrize("policy", ["priority", "fcfs"])
def test_with_vllms_priorities_the_urgent_ones_are_fetched_first(
    engine: Engines, policy: str
) -> None:
    sizes = (3, 5, 7)
    prompts = [prompt(n * CHUNK + 1, seed=n) for n in sizes]
    want = warm(engine, *prompts)
    one = engine(FULL, policy=policy, **SHAPE)
    names = [one.add(p, priority=-n) for n, p in enumerate(prompts)]
    looked_up(one)
    order = begun(one, names)
    assert [one.outputs[name] for name in names] == want
    assert order == (["r3", "r2", "r1"] if policy == "priority" else ["r1", "r2", "r3"])
    assert quiet(one)


def test_an_abort_of_one_that_waits_for_its_turn_lets_the_next_begin(engine: Engines) -> None:
    prompts = [prompt(n * CHUNK + 1, seed=n) for n in (5, 6, 7)]
    want = warm(engine, *prompts)
    for steps in range(5):
        one = engine(FULL, **SHAPE)
        names = [one.add(p) for p in prompts]
        for _ in range(steps):
            one.step()
        one.abort(names[1])
        one.run()
        assert [one.outputs[names[n]] for n in (0, 2)] == [want[0], want[2]]
        assert quiet(one)
