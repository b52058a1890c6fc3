"""The connector under vLLM's real Scheduler: right KV in every situation, and nothing left behind.

The toy engine raises WrongKV if a page is not what its tokens demand; here the situations are made,
and it is checked that the store was really used (a connector that never hits is right too).
"""

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
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
from toy_engine import ToyEngine, prompt

from benchmarks.tiny_model import write_model
from objectcache.errors import Misconfigured


def test_a_second_engine_computes_only_what_the_bucket_lacks(
    engine: Engines, tmp_path: Path
) -> None:
    p = prompt(300)
    want = warm_and_want(engine, p)
    assert len(objects(tmp_path)) == 300 // CHUNK
    second = engine()
    assert second.generate(p) == want
    assert second.cached == {"r1": 256}
    assert second.stats["get_requests"] == 4 and second.stats.get("put_requests", 0) == 0


def test_an_engine_finds_its_own_chunks_after_forgetting(engine: Engines) -> None:
    one = engine()
    p = prompt(300)
    want = one.generate(p)
    one.settle()
    one.forget()
    assert one.generate(p) == want
    assert one.cached == {"r1": 0, "r2": 256}


@pytest.mark.parametrize("length", [n * CHUNK + d for n in (1, 2, 3) for d in (-1, 0, 1)])
def test_prompts_of_every_length_around_a_chunk(engine: Engines, length: int) -> None:
    p = prompt(length)
    want = warm_and_want(engine, p)
    second = engine()
    assert second.generate(p) == want
    whole = min(length // CHUNK * CHUNK, (length - 1) // BLOCK * BLOCK)
    assert second.cached["r1"] == whole


@pytest.mark.parametrize("shared", [n * CHUNK + d for n in (1, 2, 3) for d in (-1, 0, 1)])
def test_prefixes_shared_up_to_every_place_around_a_chunk(engine: Engines, shared: int) -> None:
    base = prompt(256)
    other = base[:shared] + prompt(100, seed=9)
    warm_and_want(engine, base)
    want = engine(off=True).generate(other)
    second = engine()
    assert second.generate(other) == want
    assert second.cached["r1"] == shared // CHUNK * CHUNK


@pytest.mark.parametrize("length", [CHUNK, 4 * CHUNK, 4 * CHUNK + BLOCK, 4 * CHUNK + 1])
def test_a_full_prompt_hit_still_computes_a_token(engine: Engines, length: int) -> None:
    p = prompt(length)
    want = warm_and_want(engine, p)
    second = engine()
    assert second.generate(p) == want
    assert 0 < length - second.cached["r1"] <= CHUNK


def test_a_prompt_shorter_than_a_chunk_asks_the_store_nothing(engine: Engines) -> None:
    one = engine()
    one.generate(prompt(CHUNK - 10), max_tokens=2)
    stats = one.connector.get_kv_connector_stats()
    assert stats is None or not stats.data.get("lookups")
    assert "get_requests" not in one.stats and "put_requests" not in one.stats


def test_generated_tokens_are_saved_as_well(engine: Engines, tmp_path: Path) -> None:
    p = prompt(CHUNK)
    one = engine()
    (answer,) = one.generate(p, max_tokens=CHUNK + 1)
    one.settle()
    assert len(objects(tmp_path)) == 2
    follow_up = p + answer + prompt(20, seed=3)
    want = engine(off=True).generate(follow_up)
    second = engine()
    assert second.generate(follow_up) == want
    assert second.cached["r1"] == 2 * CHUNK


def test_concurrent_requests_fetch_a_shared_chunk_once(engine: Engines) -> None:
    base = prompt(256)
    prompts = [base + prompt(30, seed=s) for s in range(1, 6)] + [
        prompt(200, seed=50),
        prompt(90, seed=51),
    ]
    want = warm_and_want(engine, *prompts)
    second = engine()
    assert second.generate(*prompts) == want
    # 256 // 64 shared ones, 3 of the 200-token prompt, 1 of the 90-token prompt.
    assert second.stats["get_requests"] == 4 + 3 + 1
    assert [second.cached[f"r{n}"] for n in range(1, 8)] == [256] * 5 + [192, 64]


def test_without_local_prefix_caching_each_request_fetches_for_itself(engine: Engines) -> None:
    base = prompt(256)
    prompts = [base + prompt(30, seed=s) for s in range(1, 4)]
    want = warm_and_want(engine, *prompts)
    second = engine(prefix_caching=False)
    assert second.generate(*prompts) == want
    assert [second.cached[f"r{n}"] for n in range(1, 4)] == [256] * 3


@pytest.mark.parametrize("local", [BLOCK, CHUNK, CHUNK + BLOCK, 2 * CHUNK + 3 * BLOCK])
def test_a_load_goes_on_where_the_local_prefix_ends(engine: Engines, local: int) -> None:
    p = prompt(300)
    want = warm_and_want(engine, p)
    second = engine(kv_role="kv_consumer")
    second.generate([*p[:local], 7], max_tokens=1)  # whole blocks of it stay in vLLM's own cache
    before = second.stats.get("get_requests", 0)
    assert second.generate(p) == want
    assert second.cached["r2"] == 256
    assert second.stats["get_requests"] - before == 4 - local // CHUNK


@pytest.mark.parametrize("length", [2 * CHUNK + more for more in (-BLOCK, -1, 0, 1, BLOCK, 63)])
def test_a_prefix_that_is_known_is_neither_asked_nor_waited_for(
    engine: Engines, length: int
) -> None:
    p = prompt(length)
    want = warm_and_want(engine, p)
    second = engine(kv_role="kv_consumer")
    hits, asked = [], []
    for _ in range(2):
        began = time.monotonic()
        assert second.generate(p) == want
        assert time.monotonic() - began < 0.9, "a lookup has a second"
        hits.append(second.cached[f"r{len(hits) + 1}"])
        asked.append(second.totals.get("head_requests", 0))
        second.forget()
    assert hits == [min(length // CHUNK * CHUNK, (length - 1) // BLOCK * BLOCK)] * 2
    assert asked[0] == asked[1] > 0


@pytest.mark.parametrize("budget", [16, 48, 100])
def test_chunked_prefill(engine: Engines, budget: int) -> None:
    prompts = [prompt(300), prompt(300)[:200] + prompt(150, seed=4)]
    want = warm_and_want(engine, *prompts, max_batched_tokens=budget)
    second = engine(max_batched_tokens=budget)
    assert second.generate(*prompts) == want
    assert second.cached["r1"] == 256


def test_preemption_and_coming_back(engine: Engines) -> None:
    prompts = [prompt(150, seed=s) for s in range(4)]
    want = engine(off=True, blocks=256).generate(*prompts, max_tokens=60)
    # 4 requests of 210 tokens need 53 blocks; there are 33.
    for _ in range(2):
        tight = engine(blocks=34)
        names = [tight.add(p, max_tokens=60) for p in prompts]
        preempted = set()
        while tight.step():
            preempted |= {
                n
                for n in names
                if n in tight.scheduler.requests and tight.scheduler.requests[n].num_preemptions
            }
        assert preempted
        assert [tight.outputs[n] for n in names] == want
        tight.settle()


@pytest.mark.parametrize("steps", range(8))
def test_abort_at_any_moment_of_a_load(engine: Engines, steps: int) -> None:
    p, q = prompt(400), prompt(300, seed=5)
    want = warm_and_want(engine, p, q)
    second = engine()
    doomed, kept = second.add(p), second.add(q)
    for _ in range(steps):
        second.step()
    if doomed in second.scheduler.requests:
        second.abort(doomed)
    second.run()
    assert second.outputs[kept] == want[1]
    assert second.generate(p) == want[:1]


def test_abort_of_the_only_request_frees_its_slots(engine: Engines) -> None:
    p = prompt(400)
    warm_and_want(engine, p)
    second = engine()
    doomed = second.add(p)
    for _ in range(3):
        second.step()
    second.abort(doomed)
    second.run()
    second.settle()


def test_priority_scheduling(engine: Engines) -> None:
    prompts = [prompt(200, seed=s) for s in range(5)]
    want = warm_and_want(engine, *prompts)
    second = engine(policy="priority", blocks=40)
    names = [second.add(p, priority=-n) for n, p in enumerate(prompts)]
    second.run()
    assert [second.outputs[n] for n in names] == want


def test_salts_do_not_share(engine: Engines, tmp_path: Path) -> None:
    p = prompt(200)
    first = engine()
    first.generate(p, salt="a")
    first.settle()
    second = engine()
    for salt in (None, "b", ""):
        second.forget()
        second.generate(p, salt=salt, max_tokens=1)
    assert second.cached == {"r1": 0, "r2": 0, "r3": 0}
    second.settle()
    second.forget()
    second.generate(p, salt="a", max_tokens=1)
    assert second.cached["r4"] == 192
    assert len(objects(tmp_path)) == 4 * 3


def test_other_weights_or_blocks_never_hit(engine: Engines, tmp_path: Path) -> None:
    p = prompt(200)
    warm_and_want(engine, p)
    others = [
        engine(of=write_model(tmp_path / "other", seed=1), seed=1),
        engine(block_tokens=32),
        engine({"chunk_tokens": 32}),
        engine({"model_id": "my-model"}),
        engine(ranks=2),
        engine(layers=4),
    ]
    for other in others:
        other.generate(p)
        assert other.cached == {"r1": 0}


def test_two_ranks_each_keep_their_part(engine: Engines, tmp_path: Path) -> None:
    p = prompt(300)
    want = warm_and_want(engine, p, ranks=2)
    assert len(objects(tmp_path)) == 2 * 4
    second = engine(ranks=2)
    assert second.generate(p) == want and second.cached == {"r1": 256}
    second.settle()
    # One rank's part of the third chunk is lost: both ranks load two chunks.
    third = prefix_order(p)[2]
    next(o for o in objects(tmp_path) if third in o.name and ".r1of2" in o.name).unlink()
    third_engine = engine(ranks=2)
    assert third_engine.generate(p) == want
    assert third_engine.cached == {"r1": 128}


BROKEN = [
    "missing",
    "truncated",
    "longer",
    "empty",
    "flipped in the last layer",
    "flipped in the header",
    "foreign",
    "zeros",
]


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("which", [0, 2, 3])
def test_a_broken_object_ends_the_hit_and_is_healed(
    engine: Engines, tmp_path: Path, kind: str, which: int
) -> None:
    p = prompt(300)
    want = warm_and_want(engine, p)
    good = {o: o.read_bytes() for o in objects(tmp_path)}
    name = prefix_order(p)[which]
    path = next(o for o in good if name in o.name)
    break_object(kind, path, list(good))
    second = engine()
    assert second.generate(p) == want
    assert second.cached["r1"] == which * CHUNK
    second.settle()
    assert {o: o.read_bytes() for o in objects(tmp_path)} == good
    third = engine()
    assert third.generate(p) == want and third.cached["r1"] == 256


def test_no_hooks_means_everything_is_loaded_before_the_forward(engine: Engines) -> None:
    p = prompt(300)
    want = warm_and_want(engine, p)
    second = engine(hooks_fire=False)
    assert second.generate(p) == want and second.cached["r1"] == 256


def test_roles(engine: Engines, tmp_path: Path) -> None:
    p = prompt(200)
    reader = engine(kv_role="kv_consumer")
    reader.generate(p)
    reader.settle()
    assert objects(tmp_path) == []
    engine({"save": False}).generate(p)
    assert objects(tmp_path) == []
    writer = engine(kv_role="kv_producer")
    writer.generate(p)
    writer.settle()
    assert len(objects(tmp_path)) == 3
    again = engine(kv_role="kv_producer")
    again.generate(p)
    assert again.cached == {"r1": 0}
    late = engine(kv_role="kv_consumer")
    late.generate(p)
    assert late.cached == {"r1": 192}


def test_a_ring_for_one_object_is_refused(engine: Engines) -> None:
    with pytest.raises(Misconfigured, match=r"ring_bytes.*hint: raise ring_bytes"):
        engine({"chunk_tokens": 4096, "ring_bytes": 1 << 20})


def test_a_chunk_of_broken_blocks_is_refused(engine: Engines) -> None:
    with pytest.raises(Misconfigured, match=r"'chunk_tokens' is 100.*set it to 96"):
        engine({"chunk_tokens": 100})


def test_resetting_the_connector_takes_a_new_name(engine: Engines) -> None:
    p = prompt(200)
    want = warm_and_want(engine, p)
    one = engine()
    assert one.scheduler.reset_prefix_cache(reset_connector=True)
    assert one.generate(p) == want
    assert one.cached == {"r1": 0}
    one.settle()
    one.forget()
    assert one.generate(p) == want
    assert one.cached["r2"] == 192


def test_random_life(model: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever users and the bucket do, in any order: right KV, right tokens, and an empty ledger."""
    reference = ToyEngine(model, None)
    answers: dict[tuple[int, int], list[int]] = {}
    prefixes = [prompt(400, seed=s) for s in range(3)]
    action = st.one_of(
        st.tuples(st.just("add"), st.integers(0, 2), st.integers(1, 400), st.integers(1, 20)),
        st.tuples(st.just("step"), st.integers(1, 12)),
        st.tuples(st.just("abort"), st.integers(0, 5)),
        st.tuples(st.just("break"), st.sampled_from(BROKEN), st.integers(0, 20)),
        st.tuples(st.just("forget")),
        st.tuples(st.just("restart")),
        st.tuples(st.just("reset")),
    )

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.lists(action, min_size=5, max_size=30),
        st.sampled_from([40, 200]),
        st.sampled_from([48, 4096]),
        st.sampled_from([3, 3, 3, 60]),  # with 60 a ring holds 4 chunks: most prefixes stream
    )
    def live(actions: list[tuple[Any, ...]], blocks: int, budget: int, layers: int) -> None:
        folder = tmp_path_factory.mktemp("life")
        extra = {"url": f"file://{folder}/store", "chunk_tokens": CHUNK, "ring_bytes": 1 << 20}

        def start() -> ToyEngine:
            return ToyEngine(model, extra, blocks=blocks, max_batched_tokens=budget, layers=layers)

        one, asked = start(), {}

        def end() -> None:
            one.run()
            one.settle()
            one.stop()
            for name, (which, length, count) in asked.items():
                key = (which, length)
                if len(answers.get(key, [])) < count:
                    (answers[key],) = reference.generate(prefixes[which][:length], max_tokens=20)
                assert one.outputs[name] == answers[key][:count]

        for kind, *args in actions:
            if kind == "add":
                which, length, count = args
                asked[one.add(prefixes[which][:length], count)] = (which, length, count)
            elif kind == "step":
                for _ in range(args[0]):
                    one.step()
            elif kind == "abort":
                live_now = [n for n in asked if n in one.scheduler.requests]
                if live_now:
                    one.abort(live_now[args[0] % len(live_now)])
                    del asked[live_now[args[0] % len(live_now)]]
            elif kind == "break":
                there = objects(folder)
                if there:
                    break_object(args[0], there[args[1] % len(there)], there)
            elif kind == "reset":
                one.connector.reset_cache()
            elif kind == "forget" and not one.scheduler.has_requests():
                one.forget()
            elif kind == "restart":
                end()
                one, asked = start(), {}
        end()
        shutil.rmtree(folder)

    live()
    reference.stop()
