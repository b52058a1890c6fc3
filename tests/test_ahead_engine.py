"""Prefixes that are copied while others compute, under vLLM's real Scheduler: right KV, nobody waits for them, and a failed read fails one request."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fault_server import Fault, FaultProxy, Request, cut
from timely_lab import (  # noqa: F401 (pytest looks for the fixtures here)
    LAYERS,
    PROMPT,
    SLOW,
    Engines,
    engine_fixture,
    get_is,
    model_fixture,
    proxy_fixture,
    want_fixture,
)
from toy_engine import ToyEngine, prompt
from vllm.v1.request import RequestStatus

from objectcache.moment import Moment
from objectcache.timely import Timely

BESIDE = prompt(50, seed=4)


class Early(Timely):
    """Parks a request as soon as all of its chunks are known to be right, not just before the last bytes."""

    def when(self, job: int, *what: Any) -> Moment | None:
        moment = super().when(job, *what)
        return replace(moment, at_s=what[2]) if moment is not None and moment.ahead else moment


def by_a_slow_bus(one: ToyEngine, admits: bool = True, kind: type[Timely] = Timely) -> ToyEngine:
    """As if all would wait for seconds for a prefix that is copied in its own step."""
    loading = one.connector._scheduler.loading
    slices = one.workers[0].connector._worker.slice_bytes
    timely = kind(slices, 4096, len(one.workers), admits=admits, bus_bytes_per_s=10_000)
    before = loading.timely
    if before is not None:
        timely.compute, timely.store = before.compute, before.store
    loading.timely = timely
    return one


def busy(one: ToyEngine, tokens: int = 3000) -> str:
    """Somebody who decodes for as long as a test takes."""
    name = one.add(BESIDE, max_tokens=tokens)
    for _ in range(3):
        one.step()
    return name


def until_over(one: ToyEngine, *names: str, timeout_s: float = 20.0) -> None:
    end = time.monotonic() + timeout_s
    while any(name in one.scheduler.requests for name in names):
        one.step()
        assert time.monotonic() < end, "it never ends"


def parked(one: ToyEngine) -> tuple[str, Any]:
    """A request whose prefix is being copied."""
    name = one.add(PROMPT)
    request = one.scheduler.requests[name]
    while request.status is not RequestStatus.WAITING_FOR_REMOTE_KVS:
        one.step()
    return name, request


def warm(engine: Engines, ranks: int) -> None:
    if ranks > 1:
        first = engine(ranks=ranks, admission="staged")
        first.generate(PROMPT)
        first.settle()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("slow", [True, False])
def test_a_prefix_is_copied_while_others_decode(
    engine: Engines, proxy: FaultProxy, want: list[list[int]], ranks: int, slow: bool
) -> None:
    warm(engine, ranks)
    one = by_a_slow_bus(engine(ranks=ranks))
    other = busy(one)
    proxy.fault = get_is(SLOW) if slow else None
    name = one.add(PROMPT)
    parked = 0
    while name in one.scheduler.requests:
        before = len(one.outputs[other])
        one.step()
        status = getattr(one.scheduler.requests.get(name), "status", None)
        if status is RequestStatus.WAITING_FOR_REMOTE_KVS:
            parked += 1
            assert len(one.outputs[other]) == before + 1, "it held up who decodes"
    assert [one.outputs[name]] == want and one.cached[name] == 384 and parked
    assert one.totals["ahead_prompts"] == 1 and one.totals["hit_tokens"] == 384
    assert not one.totals.get("waited_layers") and not one.totals.get("failed_prompts")
    one.abort(other)


def test_who_is_alone_or_beside_a_fast_bus_is_copied_in_its_own_step(
    engine: Engines, want: list[list[int]]
) -> None:
    alone = by_a_slow_bus(engine())
    assert alone.generate(PROMPT) == want and "ahead_prompts" not in alone.totals
    fast = engine()
    other = busy(fast)
    name = fast.add(PROMPT)
    until_over(fast, name)
    assert [fast.outputs[name]] == want and fast.cached[name] == 384
    assert "ahead_prompts" not in fast.totals
    fast.abort(other)


@pytest.mark.parametrize("admission", ["just-in-time", "staged"])
def test_what_lies_in_host_memory_is_copied_ahead_as_well(
    engine: Engines, want: list[list[int]], admission: str
) -> None:
    one = by_a_slow_bus(engine(admission=admission), admits=admission != "staged")
    other = busy(one)
    first = one.add(PROMPT, transfer={"objectcache.admission": "staged"})
    until_over(one, first)
    assert [one.outputs[first]] == want and one.cached[first] == 384
    assert one.totals["ahead_prompts"] == 1 and "timely_prompts" not in one.totals
    one.abort(other)


def test_what_vllm_has_of_it_itself_is_not_copied(engine: Engines, want: list[list[int]]) -> None:
    one = by_a_slow_bus(engine())
    other = busy(one)
    half = one.add(PROMPT[:150], max_tokens=1, transfer={"objectcache.save": False})
    until_over(one, half)
    name = one.add(PROMPT)
    until_over(one, name)
    assert [one.outputs[name]] == want and one.cached[name] == 384
    assert one.totals["hit_tokens"] < 384 + 150
    one.abort(other)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "fault", [cut(60_000), cut(60_000, "stall"), Fault(flip=60_000, bytes_per_s=300_000)], ids=str
)
def test_a_read_that_fails_while_it_is_copied_fails_the_request_and_no_other(
    engine: Engines, proxy: FaultProxy, want: list[list[int]], fault: Fault, ranks: int
) -> None:
    warm(engine, ranks)
    one = by_a_slow_bus(engine(ranks=ranks), kind=Early)
    other = busy(one)
    gets = 0

    def script(request: Request) -> Fault | None:
        nonlocal gets
        if request.method != "GET":
            return None
        gets += 1
        return replace(fault, bytes_per_s=300_000) if gets == 3 else SLOW

    proxy.fault = script
    name = one.add(PROMPT)
    request = one.scheduler.requests[name]
    until_over(one, name)
    assert request.status is RequestStatus.FINISHED_ERROR and one.outputs[name] == []
    assert one.totals["ahead_prompts"] == 1 and one.totals["failed_prompts"] >= 1
    assert "hit_tokens" not in one.totals or one.totals["hit_tokens"] == 0
    proxy.fault = None
    again = one.add(PROMPT)
    until_over(one, again)
    assert [one.outputs[again]] == want, "what failed stayed in vLLM's cache"
    assert other in one.scheduler.requests
    one.abort(other)


@pytest.mark.parametrize("steps", [1, 5, 30])
def test_an_abort_while_it_is_copied(
    engine: Engines, proxy: FaultProxy, want: list[list[int]], steps: int
) -> None:
    one = by_a_slow_bus(engine(), kind=Early)
    other = busy(one)
    proxy.fault = get_is(SLOW)
    name, _request = parked(one)
    for _ in range(steps):
        one.step()
    one.abort(name)
    proxy.fault = None
    again = one.add(PROMPT)
    until_over(one, again)
    assert [one.outputs[again]] == want
    one.abort(other)


def test_two_with_the_same_prefix_bring_and_copy_it_once(
    engine: Engines, proxy: FaultProxy, want: list[list[int]], model: Path
) -> None:
    prompts = [PROMPT, PROMPT[:384] + prompt(30, seed=8)]
    off = ToyEngine(model, None, layers=LAYERS)
    right = off.generate(*prompts)
    off.stop()
    one = by_a_slow_bus(engine(hedge_percent=0), kind=Early)
    other = busy(one)
    proxy.fault = get_is(SLOW)
    names = [one.add(tokens) for tokens in prompts]
    until_over(one, *names)
    assert [one.outputs[name] for name in names] == right and right[0] == want[0]
    assert one.stats["get_requests"] == 6 and one.totals["hit_tokens"] == 384
    one.abort(other)


def test_a_reset_of_the_cache_while_it_is_copied(
    engine: Engines, proxy: FaultProxy, want: list[list[int]]
) -> None:
    """The weights changed: what is on its way must not count."""
    one: Any = by_a_slow_bus(engine(), kind=Early)
    other = busy(one)
    proxy.fault = get_is(SLOW)
    name, request = parked(one)
    one.connector.reset_cache()
    until_over(one, name)
    assert request.status is RequestStatus.FINISHED_ERROR
    one.abort(other)


def test_blocks_come_back_soon_after_a_reset_however_slow_the_store_is(
    engine: Engines, proxy: FaultProxy, want: list[list[int]]
) -> None:
    """The read belongs to the name that was just given up."""
    one = by_a_slow_bus(engine(read_timeout_ms=8000), kind=Early)
    other = busy(one)
    proxy.fault = get_is(Fault(bytes_per_s=30_000))
    name, _request = parked(one)
    began = time.monotonic()
    one.connector.reset_cache()
    until_over(one, name)
    assert time.monotonic() < began + 0.5
    end = time.monotonic() + 1.0
    while one.workers[0].leased_slots and time.monotonic() < end:
        one.step()
    assert one.workers[0].leased_slots == 0, "it is still read"
    one.abort(other)


class Silent:
    """A mover that says nothing more."""

    def __init__(self, mover: Any) -> None:
        self._mover = mover

    def take(self) -> list[Any]:
        return []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mover, name)


@pytest.mark.parametrize("hangs_up", [True, False])
def test_a_mover_that_hangs_holds_nobody(
    engine: Engines, proxy: FaultProxy, want: list[list[int]], hangs_up: bool
) -> None:
    one = by_a_slow_bus(engine(stage_timeout_ms=500), kind=Early)
    other = busy(one, tokens=100_000)
    proxy.fault = get_is(Fault(bytes_per_s=200_000))
    name, request = parked(one)
    half = one.workers[0].connector._worker
    mover = half._mover
    half._mover = Silent(mover)
    if hangs_up:
        one.abort(name)
    until_over(one, name, timeout_s=5.0)
    assert request.status is not RequestStatus.WAITING_FOR_REMOTE_KVS
    half._mover = mover
    one.abort(other)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("ahead", [True, False])
def test_a_spoilt_object_fails_one_request_and_is_replaced_by_the_next(
    engine: Engines, proxy: FaultProxy, want: list[list[int]], ahead: bool, ranks: int
) -> None:
    """Who meets it early fails; who comes after that waits until all is there, and computes what is wrong."""
    warm(engine, ranks)
    one = engine(ranks=ranks)
    if ahead:
        by_a_slow_bus(one, kind=Early)
    other = busy(one)
    if not ahead:
        one.abort(other)
    paths: list[str] = []

    def script(request: Request) -> Fault | None:
        if request.method != "GET":
            return None
        path = request.path.partition("?")[0]
        if path not in paths:
            paths.append(path)
        return Fault(flip=95_000, bytes_per_s=300_000) if path == paths[2] else SLOW

    proxy.fault = script
    seen = []
    for _ in range(3):
        name = one.add(PROMPT, transfer={"objectcache.save": False})
        request = one.scheduler.requests[name]
        until_over(one, name)
        seen.append(request.status is RequestStatus.FINISHED_ERROR)
        if not seen[-1]:
            assert [one.outputs[name]] == want
    assert seen == [True, False, False]
    if ahead:
        one.abort(other)
