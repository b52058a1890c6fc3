"""Requests admitted before all of their prefix is there: right KV, no wait that never ends, and a failed read fails one request.

The prefix comes slowly from a real server; the toy engine raises on any wrong row. The decision itself
is tested in test_moment.py, test_arrival.py and test_compute.py.
"""

import itertools
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fault_server import Fault, FaultProxy, Request, cut
from timely_lab import (  # noqa: F401 (pytest looks for the fixtures here)
    CHUNK,
    LAYERS,
    PROMPT,
    SLOW,
    Engines,
    engine_fixture,
    get_is,
    model_fixture,
    proxy_fixture,
    want_fixture,
    warm,
)
from toy_engine import ToyEngine, prompt
from vllm.v1.request import RequestStatus

from objectcache.admission import Phase
from objectcache.errors import Misconfigured
from objectcache.messages import Coming, StepReport
from objectcache.moment import Moment
from objectcache.ring import FAILED
from objectcache.timely import Timely


class AtOnce(Timely):
    """Admits as soon as all chunks are known to be right, to be copied in its own step."""

    def when(self, job: int, *what: Any) -> Moment | None:
        moment = super().when(job, *what)
        return moment and replace(moment, at_s=what[2], ahead=False)


class Hangs(ToyEngine):
    """A client hangs up while the step runs in which its request fails: vLLM ends it before it hears of that."""

    leaves: str | None = None

    def _sampled(self, output: Any, reports: list[Any]) -> Any:
        sampled = super()._sampled(output, reports)
        if self.leaves is not None and any(report.invalid_block_ids for report in reports):
            self.abort(self.leaves)
            self.leaves = None
        return sampled


def at_once(one: ToyEngine) -> ToyEngine:
    scheduler = one.connector._scheduler
    slices = one.workers[0].connector._worker.slice_bytes
    scheduler.loading.timely = AtOnce(slices, 4096, len(one.workers))
    return one


def test_what_was_due_waits_again_when_workers_tell_of_a_chunk_that_failed(
    engine: Engines, proxy: FaultProxy, want: list[list[int]]
) -> None:
    """Before the job has ended, and as long as vLLM has no blocks for it."""
    one = engine()
    proxy.fault = get_is(SLOW)
    name = one.add(PROMPT)
    scheduler = one.connector._scheduler
    until = time.monotonic() + 5.0
    while not scheduler._jobs and time.monotonic() < until:
        one.step()
    ((job, tracked),) = scheduler._jobs.items()
    tracked.admission.due()
    assert tracked.admission.phase is Phase.READY
    for other in (job + 1, job):  # of a job that is not known nothing follows
        scheduler.reported(StepReport(coming=[Coming(other, len(tracked.job_hashes), FAILED, 0)]))
        assert (tracked.admission.phase is Phase.STAGING) == (other == job)
    proxy.fault = None
    one.run()
    assert [one.outputs[name]] == want


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_waits_for_layers_that_are_late(
    engine: Engines, proxy: FaultProxy, want: list[list[int]], ranks: int
) -> None:
    warm(engine, ranks)
    one = at_once(engine(ranks=ranks))
    proxy.fault = get_is(replace(SLOW, bytes_per_s=100_000))  # slower than a busy machine computes
    name = one.add(PROMPT)
    one.run()
    assert [one.outputs[name]] == want and one.cached[name] == 384
    assert one.totals["timely_prompts"] == 1 and one.totals["waited_layers"] >= 2
    assert one.totals.get("failed_prompts", 0) == 0


@pytest.mark.parametrize("hooks_fire", [True, False])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_request_computes_while_its_last_layers_come(
    engine: Engines, proxy: FaultProxy, want: list[list[int]], hooks_fire: bool, ranks: int
) -> None:
    warm(engine, ranks)
    one = engine(hooks_fire=hooks_fire, ranks=ranks)
    proxy.fault = get_is(SLOW)
    name = one.add(PROMPT)
    one.run()
    assert [one.outputs[name]] == want and one.cached[name] == 384
    assert one.totals["timely_prompts"] == 1
    assert one.totals.get("failed_prompts", 0) == 0


def test_staged_prefixes_need_no_wait(
    engine: Engines, proxy: FaultProxy, want: list[list[int]]
) -> None:
    one = engine(admission="staged")
    proxy.fault = get_is(SLOW)
    assert one.generate(PROMPT) == want
    assert one.totals.get("timely_prompts", 0) == one.totals.get("waited_layers", 0) == 0


@pytest.mark.parametrize(
    "fault", [cut(60_000), cut(60_000, "stall"), Fault(flip=60_000, bytes_per_s=300_000)], ids=str
)
def test_a_read_that_fails_after_admission_fails_the_request_and_no_other(
    engine: Engines, proxy: FaultProxy, want: list[list[int]], fault: Fault
) -> None:
    one = at_once(engine())
    one.generate(prompt(60, seed=3))  # nothing of it is in the bucket
    other = one.add(prompt(50, seed=4), max_tokens=2000)
    for _ in range(3):
        one.step()
    gets = 0

    def script(request: Request) -> Fault | None:
        nonlocal gets
        if request.method != "GET":
            return None
        gets += 1
        slow = Fault(bytes_per_s=300_000, **{k: getattr(fault, k) for k in ("flip",)})
        if gets != 3:
            return SLOW
        return (
            slow if fault.flip else Fault(bytes_per_s=300_000, stop_after=60_000, stop=fault.stop)
        )

    proxy.fault = script
    name = one.add(PROMPT)
    request = one.scheduler.requests[name]
    began = time.monotonic()
    while name in one.scheduler.requests and time.monotonic() < began + 10:
        one.step()
    assert request.status is RequestStatus.FINISHED_ERROR
    assert one.totals["failed_prompts"] == 1
    tokens = len(one.outputs[other])
    for _ in range(5):
        one.step()
    assert len(one.outputs[other]) > tokens, "others do not go on"
    one.scheduler.finish_requests(other, RequestStatus.FINISHED_ABORTED)
    proxy.fault = None
    again = one.add(PROMPT)
    one.run()
    assert [one.outputs[again]] == want, "what failed stayed in vLLM's cache"


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_computed_on_bytes_that_do_not_come_is_kept_nowhere(
    engine: Engines, proxy: FaultProxy, model: Path, want: list[list[int]], ranks: int
) -> None:
    """Neither in the bucket nor in vLLM's own cache, of the request itself nor of one that shares its blocks."""
    bucket = f"s3://kvcache/misled-{ranks}"
    one = at_once(engine(ranks=ranks, url=bucket))
    one.generate(PROMPT)
    one.settle()
    one.forget()
    tail = prompt(150, seed=9)
    prompts = [PROMPT[:384] + tail, PROMPT[:384] + tail[:90] + prompt(100, seed=10)]
    gets = itertools.count()

    def script(request: Request) -> Fault | None:
        if request.method != "GET":
            return None
        return replace(SLOW, stop_after=60_000) if next(gets) == 2 else SLOW

    proxy.fault = script
    names = [one.add(tokens, max_tokens=3) for tokens in prompts]
    requests = [one.scheduler.requests[name] for name in names]
    one.run()
    proxy.fault = None
    assert requests[0].status is RequestStatus.FINISHED_ERROR
    one.settle()
    off = ToyEngine(model, None, layers=LAYERS)
    right = off.generate(*prompts)
    off.stop()
    assert one.generate(*prompts) == right, "vLLM kept it"  # the toy raises on a wrong row
    one.settle()
    other = engine(ranks=ranks, url=bucket, admission="staged")
    assert other.generate(*prompts) == right, "it went to the bucket"
    assert other.cached["r1"] == 512, "what was computed on bytes that came is in the bucket"
    assert not one.connector._scheduler._unsure


def test_who_hangs_up_as_its_load_is_lost_leaves_nothing_behind(
    engine: Engines, proxy: FaultProxy, model: Path
) -> None:
    """vLLM then evicts nothing, and the read that did not come is still going on."""
    bucket = "s3://kvcache/hangs-up"
    one = at_once(engine(kind=Hangs, url=bucket, late_timeout_ms=300, read_timeout_ms=3000))
    one.generate(PROMPT)
    one.settle()
    one.forget()
    gets = itertools.count()

    def script(request: Request) -> Fault | None:
        if request.method != "GET":
            return None
        stops = next(gets) == 2
        return replace(SLOW, stop_after=60_000, stop="stall") if stops else SLOW

    proxy.fault = script
    tokens = PROMPT[:384] + prompt(150, seed=11)
    one.leaves = one.add(tokens, max_tokens=3)
    while one.leaves is not None:
        one.step()
    proxy.fault = None
    off = ToyEngine(model, None, layers=LAYERS)
    right = off.generate(tokens, max_tokens=80)
    off.stop()
    one.connector._scheduler.loading.timely.admits = False  # the read is not over: no second loss
    assert one.generate(tokens, max_tokens=80) == right, "vLLM kept it"
    one.settle()
    other = engine(url=bucket, admission="staged")
    assert other.generate(tokens, max_tokens=80) == right, "it went to the bucket"


def test_an_abort_while_the_last_layers_come(
    engine: Engines, proxy: FaultProxy, want: list[list[int]]
) -> None:
    one = at_once(engine())
    proxy.fault = get_is(SLOW)
    name = one.add(PROMPT)
    for _ in range(30):
        one.step()
        time.sleep(0.005)
    one.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
    one.run()
    proxy.fault = None
    assert one.generate(PROMPT) == want


@pytest.mark.parametrize(("usual", "asked"), [("at-once", None), ("at-once", "at-once")])
def test_at_once_is_admitted_with_its_first_layer_and_waits_for_the_others(
    engine: Engines, proxy: FaultProxy, want: list[list[int]], usual: str, asked: str | None
) -> None:
    one = engine(admission=usual)
    proxy.fault = get_is(replace(SLOW, bytes_per_s=100_000))  # slower than a busy machine computes
    transfer = {"objectcache.admission": asked} if asked is not None else None
    name = one.add(PROMPT, transfer=transfer)
    one.run()
    assert [one.outputs[name]] == want and one.cached[name] == 384
    assert one.totals["timely_prompts"] == 1 and one.totals["waited_layers"] >= 2
    assert one.totals.get("failed_prompts", 0) == 0


def test_a_request_may_ask_to_be_admitted_when_all_is_there(
    engine: Engines, proxy: FaultProxy, want: list[list[int]]
) -> None:
    one = engine(admission="at-once")
    proxy.fault = get_is(SLOW)
    name = one.add(PROMPT, transfer={"objectcache.admission": "staged"})
    one.run()
    assert [one.outputs[name]] == want and one.cached[name] == 384
    assert "timely_prompts" not in one.totals and "waited_layers" not in one.totals


@pytest.mark.parametrize("admission", ["just-in-time", "at-once"])
def test_vllm_must_not_recompute_what_a_running_request_lacks(model: Path, admission: str) -> None:
    extra = {"url": "memory://x", "chunk_tokens": CHUNK, "admission": admission}
    with pytest.raises(Misconfigured) as refused:
        ToyEngine(model, extra, failure_policy="recompute")
    assert "kv_load_failure_policy to fail" in refused.value.hint
