"""Prefixes longer than the ring under vLLM's real Scheduler: they stream through it, or end where it ends."""

import time
from pathlib import Path
from typing import Any

import pytest
from scheduling_lab import (  # noqa: F401 (pytest looks for the fixtures here)
    BLOCK,
    CHUNK,
    Engines,
    break_object,
    engine_fixture,
    model_fixture,
    objects,
    prefix_order,
    warm_and_want,
)
from toy_engine import prompt


def long_ago(engine: Engines, *prompts: list[int], **more: Any) -> list[list[int]]:
    """As warm_and_want, by an engine whose ring has room for all that it saves."""
    first = engine({"ring_bytes": "64MiB"}, **more)
    first.generate(*prompts)
    first.settle()
    return engine(off=True, **more).generate(*prompts)


# 1 MiB holds 64 objects of 16 KiB, 48 of them on their way in, 6 of those for streams.
LONG = prompt(3500)
LONG_CHUNKS = 3500 // CHUNK


def test_a_prefix_larger_than_the_ring_is_loaded_in_part_if_vllm_would_fail_the_request(
    engine: Engines,
) -> None:
    want = long_ago(engine, LONG)
    small = engine(failure_policy="fail")
    assert small.generate(LONG) == want
    assert small.cached == {"r1": 48 * CHUNK}


def test_a_prefix_larger_than_the_ring_streams_through_it(engine: Engines) -> None:
    want = long_ago(engine, LONG)
    small = engine()
    assert small.generate(LONG) == want
    assert small.cached == {"r1": LONG_CHUNKS * CHUNK}
    assert small.totals["hit_tokens"] == LONG_CHUNKS * CHUNK
    assert small.stats["staged_chunks"] == small.stats["get_requests"] == LONG_CHUNKS


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("local", [0, BLOCK, CHUNK + BLOCK, 2 * CHUNK])
def test_a_stream_goes_on_where_the_local_prefix_ends(
    engine: Engines, local: int, ranks: int
) -> None:
    p = LONG[: (46 + local // CHUNK) * CHUNK + BLOCK + 1]  # ends inside of a chunk
    want = long_ago(engine, p, ranks=ranks)
    second = engine(kv_role="kv_consumer", ranks=ranks)
    second.generate([*p[:local], 7], max_tokens=1)  # whole blocks of it stay in vLLM's own cache
    before = second.totals.get("hit_tokens", 0)
    assert second.generate(p) == want
    assert second.cached["r2"] == (46 + local // CHUNK) * CHUNK
    assert second.totals["hit_tokens"] - before == second.cached["r2"] - local


@pytest.mark.parametrize("kind", ["missing", "flipped in the last layer", "truncated"])
@pytest.mark.parametrize("which", [0, 1, 30, LONG_CHUNKS - 1])
def test_a_broken_object_ends_the_stream_and_is_healed(
    engine: Engines, tmp_path: Path, kind: str, which: int
) -> None:
    want = long_ago(engine, LONG)
    good = {o: o.read_bytes() for o in objects(tmp_path)}
    name = prefix_order(LONG)[which]
    path = next(o for o in good if name in o.name)
    break_object(kind, path, list(good))
    second = engine()
    assert second.generate(LONG) == want
    assert second.cached["r1"] == which * CHUNK
    assert second.totals.get("hit_tokens", 0) == which * CHUNK
    second.settle()
    assert {o: o.read_bytes() for o in objects(tmp_path)} == good
    third = engine()
    assert third.generate(LONG) == want and third.cached["r1"] == LONG_CHUNKS * CHUNK


@pytest.mark.parametrize("which", [0, 1, 3])
def test_an_object_that_vanishes_after_its_lookup_ends_the_stream(
    engine: Engines, tmp_path: Path, which: int
) -> None:
    """The engine knows it, so it does not ask; a ring of 4 slots does not hold it any more."""
    p = prompt(7 * CHUNK + 1)
    want = long_ago(engine, p, layers=60)
    one = engine(layers=60)
    assert one.generate(p) == want and one.cached["r1"] == 7 * CHUNK
    one.forget()
    next(o for o in objects(tmp_path) if prefix_order(p)[which] in o.name).unlink()
    assert one.generate(p) == want
    assert one.cached["r2"] == which * CHUNK
    assert one.totals["hit_tokens"] == (7 + which) * CHUNK and one.totals["missing_chunks"] == 1
    one.settle()
    one.forget()
    # Of those behind it knows what found room to be written again: for one chunk it does not ask first.
    assert one.generate(p) == want and one.cached["r3"] in (6 * CHUNK, 7 * CHUNK)
    other = engine(layers=60)
    assert other.generate(p) == want and other.cached["r1"] == 7 * CHUNK, "saved anew"


def test_ranks_that_come_to_different_ends(engine: Engines, tmp_path: Path) -> None:
    want = long_ago(engine, LONG, ranks=2)
    names = prefix_order(LONG)
    for which, rank in ((20, 0), (10, 1), (30, 1)):
        next(o for o in objects(tmp_path) if f"{names[which]}.r{rank}of2" in o.name).unlink()
    second = engine(ranks=2)
    assert second.generate(LONG) == want
    assert second.cached["r1"] == 10 * CHUNK and second.totals["hit_tokens"] == 10 * CHUNK


def test_those_behind_wait_for_a_stream_and_find_its_blocks(engine: Engines) -> None:
    prompts = [LONG, LONG[:3300] + prompt(20, seed=8), prompt(200, seed=9)]
    want = long_ago(engine, *prompts, blocks=512)
    second = engine(blocks=512)
    assert second.generate(*prompts) == want
    assert second.stats["get_requests"] == LONG_CHUNKS + 3
    assert second.cached == {"r1": LONG_CHUNKS * CHUNK, "r2": 3300 // BLOCK * BLOCK, "r3": 192}


@pytest.mark.parametrize("blocks", [45, 200])
@pytest.mark.parametrize("caching", [True, False])
def test_streams_and_stages_share_a_tiny_ring(engine: Engines, caching: bool, blocks: int) -> None:
    """Two slots for stages and one for streams; with few blocks those that are staged wait for the
    blocks of those that stream, which wait for slots."""
    prompts = [prompt(7 * CHUNK + 1, seed=s) for s in (1, 2)]
    prompts += [prompt(2 * CHUNK + 1, seed=s) for s in (3, 4, 5)]
    prompts = [prompts[at] for at in (2, 0, 3, 1, 4)]
    want = long_ago(engine, *prompts, layers=60)  # an object is a quarter of 1 MiB
    began = time.monotonic()
    small = engine(blocks=blocks, prefix_caching=caching, layers=60)
    assert small.generate(*prompts) == want
    assert time.monotonic() - began < 5, "they waited for each other"
    assert small.totals["hit_tokens"] == (2 * 7 + 3 * 2) * CHUNK
    assert "failed_reads" not in small.totals


@pytest.mark.parametrize("steps", [*range(8), 12, 20, 40])
def test_abort_at_any_moment_of_a_stream(engine: Engines, steps: int) -> None:
    want = long_ago(engine, LONG)
    second = engine()
    doomed = second.add(LONG)
    for _ in range(steps):
        second.step()
    if doomed in second.scheduler.requests:
        second.abort(doomed)
    second.run()
    assert doomed not in second.scheduler.requests
    assert second.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 255
    assert second.generate(LONG) == want
    # Of one that came to compute before it was aborted vLLM has more itself.
    computed = doomed in second.cached
    assert (second.cached["r2"] == LONG_CHUNKS * CHUNK) != computed


def test_a_preempted_request_streams_again(engine: Engines) -> None:
    """Two requests of 29 blocks that grow to 35, in a cache of 63, and a tiny ring."""
    prompts = [prompt(7 * CHUNK + 1, seed=s) for s in (1, 2)]
    long_ago(engine, *prompts, layers=60)
    want = engine(off=True, layers=60).generate(*prompts, max_tokens=100)
    tight = engine({"save": False}, blocks=64, layers=60, prefix_caching=False)
    assert tight.generate(*prompts, max_tokens=100) == want
    assert tight.totals["hit_tokens"] == 3 * 7 * CHUNK


# 54 chunks, of which a step copies 16: it is parked for four steps at least.
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_reset_while_a_prefix_streams(engine: Engines, steps: int) -> None:
    """What was under way counts for nothing, and the request is computed."""
    want = long_ago(engine, LONG)
    one = engine()
    name = one.add(LONG)
    parked = 0
    while parked < steps and one.step():
        parked += (
            name in one.scheduler.requests
            and one.scheduler.requests[name].status.name == "WAITING_FOR_REMOTE_KVS"
        )
    assert parked == steps
    one.connector.reset_cache()
    one.run()
    assert [one.outputs[name]] == want
    assert one.cached == {"r1": 0} and "hit_tokens" not in one.totals
