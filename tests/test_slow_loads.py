"""A store that is slow for a while: loads are given up, it is left alone, tried and used again; what the workers say of it; and what a preempted request finds late. With a real server behind a proxy."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_server import Fault, FaultProxy, Request
from scheduling_lab import told
from sick_server_lab import (  # noqa: F401 (pytest looks for the fixtures here)
    model_fixture,
    proxy_fixture,
)
from toy_engine import ToyEngine, prompt
from vllm.v1.request import RequestStatus

from objectcache.admission import Phase
from objectcache.compute import ComputeModel, Costs, Work
from objectcache.flow import StoreModel
from objectcache.wire import Wire

CHUNK, LAYERS = 64, 24
PROMPT = prompt(400)  # 6 chunks of 100 KiB
FAST = Wire(StoreModel(1e-3, 2e-3, 1e9), 32)
SLOW = Fault(bytes_per_s=8_000)  # a chunk in 13 s
SHAPE = ("blocks", "layers", "prefix_caching", "failure_policy")
Engines = Callable[..., ToyEngine]


class Known(ComputeModel):
    """All of the prompt takes 1.04 s to compute, and what a whole hit leaves of it 0.27."""

    def __init__(self, token_s: float) -> None:
        super().__init__(Costs(pass_s=0.24, token_s=token_s, pair_s=0.0, read_s=0.0))
        for tokens in range(1, 200):
            super().timed(Work(1, tokens, 200.0 * tokens), 0.24 + token_s * tokens)

    def timed(self, work: Work, seconds: float) -> None:
        pass


@pytest.fixture
def engine(model: Path, proxy: FaultProxy) -> Iterator[Engines]:
    made: list[ToyEngine] = []

    def make(**more: Any) -> ToyEngine:
        shape = {k: more.pop(k) for k in SHAPE if k in more}
        extra = {
            **{"url": "s3://kvcache/slow", "endpoint_url": proxy.url, "chunk_tokens": CHUNK},
            # The library path tells of layers as they come, however small they are.
            **{"ring_bytes": "16MiB", "transport": "aiobotocore", "load": "sooner"},
            **{"lookup_timeout_ms": 30_000},
        }
        made.append(ToyEngine(model, extra | more, **{"layers": LAYERS} | shape))
        return made[-1]

    yield make
    proxy.fault = None
    for one in made:
        one.settle()
        half = one.connector._scheduler
        assert half.loading.turns.idle and not half._jobs
        assert all(worker.leased_slots == 0 for worker in one.workers)
        one.stop()


@pytest.fixture(scope="module")
def want(model: Path, proxy: FaultProxy) -> list[int]:
    """What an engine says that computes; and the chunks are in the bucket."""
    extra = {"url": "s3://kvcache/slow", "endpoint_url": proxy.url, "chunk_tokens": CHUNK}
    one = ToyEngine(model, extra | {"ring_bytes": "16MiB"}, layers=LAYERS)
    (answer,) = one.generate(PROMPT)
    one.settle()
    one.stop()
    return answer


def know(one: ToyEngine, token_s: float = 2e-3) -> ToyEngine:
    loading = one.connector._scheduler.loading
    loading.timely.compute = Known(token_s)
    loading.timely.heard(0, FAST)
    return one


def gets(fault: Fault) -> Callable[[Request], Fault | None]:
    return lambda request: fault if request.method == "GET" else None


def ask(one: ToyEngine, want: list[int]) -> int:
    """The prompt as if it came for the first time; how many tokens of it were loaded."""
    one.forget()
    name = one.add(PROMPT)
    one.run()
    assert one.outputs[name] == want
    return one.cached[name]


@pytest.mark.parametrize("admission", ["staged", "just-in-time"])
def test_a_load_that_is_slow_is_given_up_and_the_prompt_is_computed(
    engine: Engines, proxy: FaultProxy, want: list[int], admission: str
) -> None:
    policy = "fail" if admission == "just-in-time" else "recompute"
    one = know(engine(admission=admission, failure_policy=policy))
    proxy.fault = gets(SLOW)
    began = time.monotonic()
    assert ask(one, want) == 0
    assert time.monotonic() - began < 9, "it waited for the store"
    assert one.totals["given_up_prompts"] == 1
    one.settle()
    assert one.stats.get("put_requests", 0) == 0, "what the store has is not saved again"


def test_a_deadline_that_computing_keeps_gives_up_sooner(
    engine: Engines, proxy: FaultProxy, want: list[int]
) -> None:
    proxy.fault = gets(Fault(bytes_per_s=27_000))  # 4 s: not twice what computing takes
    one = know(engine(), token_s=5e-3)
    with told() as lines:
        name = one.add(PROMPT, transfer={"objectcache.deadline_ms": 3500})
        one.run()
    assert one.outputs[name] == want and one.cached[name] == 0
    assert one.totals["given_up_prompts"] == 1
    assert any("Give up its load, to keep its deadline" in line for line in lines)


def test_a_slow_store_is_left_alone_and_used_again_when_it_is_well(
    engine: Engines, proxy: FaultProxy, want: list[int]
) -> None:
    one = know(engine())
    use = one.connector._scheduler.loading.choosing._use
    proxy.fault = gets(SLOW)
    use._pause_s, asked = 60.0, []
    for _ in range(4):
        before = proxy.count("GET")
        assert ask(one, want) == 0
        asked.append(proxy.count("GET") > before)
    assert asked[0] and not asked[-1] and one.totals["given_up_prompts"] == sum(asked)
    proxy.fault = None
    use._pause_s = 0.0  # it is time to try
    one.connector._scheduler.loading.timely.heard(0, FAST)
    before = proxy.count("GET")
    for _ in range(30):
        loaded = ask(one, want)
        if loaded == 384:
            break
        use._pause_s = 0.0
    assert loaded == 384 and not use.off
    assert proxy.count("GET") > before


@pytest.mark.parametrize("mover", ["thread", "process"])
def test_workers_say_what_the_wire_gives(
    engine: Engines, proxy: FaultProxy, want: list[int], mover: str
) -> None:
    one = engine(mover=mover, processes=2, transport="auto")
    timely = one.connector._scheduler.loading.timely
    proxy.fault = gets(Fault(delay_s=0.3))
    assert timely.wire is None and ask(one, want) == 384
    one.idle_step()
    wire = timely.wire
    assert wire is not None
    assert 0.3 <= wire.store.first_byte_s <= wire.store.first_byte_p99_s < 5.0
    assert wire.connections >= 32 and wire.bytes_per_s > 0.0
    told = one.workers[0].connector._worker._told
    assert told == wire and one.workers[0].connector._worker.report() is None, "said again"


def test_a_preempted_request_finds_what_was_written_after_it_was_asked_for(
    engine: Engines, proxy: FaultProxy
) -> None:
    """Its first answer is that there is nothing, as its chunks are still on their way out; vLLM has no
    blocks for it until the other one has ended."""
    proxy.fault = lambda request: Fault(delay_s=4.0) if request.method == "PUT" else None
    prompts = [prompt(150, seed=s) for s in (31, 32)]
    one = engine(blocks=22, layers=3, prefix_caching=False, load="always")
    names = [one.add(p, max_tokens=170) for p in prompts]
    half = one.connector._scheduler
    low = one.scheduler.requests[names[1]]
    while not low.num_preemptions:
        assert one.step()
    one.step()
    tracked = half._requests[names[1]]
    while tracked.admission.phase in (Phase.LOOKUP, Phase.FOUND):
        one.step()
    assert tracked.admission.phase is Phase.OVER and tracked.found == 0
    chunk = tracked.chain.hashes[1]
    end = time.monotonic() + 20
    while not half._known.has(chunk, time.monotonic()):
        assert one.step() and time.monotonic() < end
        assert low.status is RequestStatus.PREEMPTED, "the other one ended too soon"
        time.sleep(0.1)
    one.run()
    assert one.totals["hit_tokens"] >= 2 * CHUNK
    off = ToyEngine.__new__(ToyEngine)  # its answers need no engine
    off.seed = 0
    for name, tokens in zip(names, prompts, strict=True):
        seen = list(tokens)
        for token in one.outputs[name]:
            assert token == ToyEngine.next_token(off, seen)
            seen.append(token)


def test_in_a_line_before_a_silent_store_nobody_waits_for_all_before_it(
    engine: Engines, proxy: FaultProxy
) -> None:
    """The ring holds one prefix. Each load ends after a second; the last of eight does not wait for eight."""
    prompts = [prompt(400, seed=20 + n) for n in range(8)]
    first = engine(load="always")
    right = first.generate(*prompts)
    first.settle()
    one = engine(load="always", ring_bytes="1MiB", stage_timeout_ms=1000)
    proxy.fault = gets(Fault(delay_s=30.0))
    began = time.monotonic()
    assert one.generate(*prompts) == right
    assert time.monotonic() - began < 5.0
    proxy.fault = None
