"""A sick S3 server, at any moment: right answers, a living engine, one warning that says what to do, and hits again afterwards.

The server is a real one behind a proxy that breaks what it is told to; the engine is vLLM's real
Scheduler around a toy model that raises on a wrong KV row.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fakes import eventually
from fault_server import Fault, FaultProxy, Request, cut
from sick_server_lab import (  # noqa: F401 (pytest looks for the fixtures here)
    model_fixture,
    proxy_fixture,
)
from toy_engine import ToyEngine, prompt

from objectcache.streamer import StageResult

CHUNK = 64
PROMPT = prompt(1000)  # 15 chunks
FAULTS: dict[str, Fault] = {
    "403": Fault(status=403, code="AccessDenied"),
    "403 wrong key": Fault(status=403, code="InvalidAccessKeyId"),
    "404": Fault(status=404, code="NoSuchKey"),
    "404 bucket": Fault(status=404, code="NoSuchBucket"),
    "416": Fault(status=416, code="InvalidRange"),
    "500": Fault(status=500, code="InternalError"),
    "503": Fault(status=503, code="SlowDown"),
    "503 later": Fault(status=503, code="SlowDown", headers={"Retry-After": "30"}),
    "redirect": Fault(status=301, code="PermanentRedirect"),
    "reset": Fault(reset=True),
    "garbage": Fault(raw=b"what?\r\n\r\n"),
    "empty": Fault(raw=b""),
    "slow": Fault(delay_s=3.0),
    "cut": cut(5000),
    "reset in the body": cut(5000, "reset"),
    "stall": cut(100, "stall"),
    "crawl": Fault(bytes_per_s=3000),
    "truncated": Fault(keep=5000),
    "empty body": Fault(keep=0),
    "too long": Fault(extra=b"more"),
    "flipped": Fault(flip=7000),
    "flipped header": Fault(flip=40),
}
BENIGN_FOR_HEAD = {
    "cut",
    "reset in the body",
    "stall",
    "crawl",
    "truncated",
    "empty body",
    "too long",
    "flipped",
    "flipped header",
}


class Warnings(logging.Handler):
    """What a user would see of us."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def warnings() -> Iterator[Warnings]:
    handler = Warnings()
    logger = logging.getLogger("vllm.objectcache")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


@pytest.fixture
def engine(model: Path, proxy: FaultProxy) -> Iterator[Callable[..., ToyEngine]]:
    made: list[ToyEngine] = []

    def make(prefix: str = "warm", layers: int = 3, **more: object) -> ToyEngine:
        extra = {
            "url": f"s3://kvcache/{prefix}", "endpoint_url": proxy.url, "chunk_tokens": CHUNK, "ring_bytes": "4MiB",
            "lookup_timeout_ms": 700, "stage_timeout_ms": 900, "connect_timeout_ms": 300, "read_timeout_ms": 400, "attempts": 2,
        }  # fmt: skip
        made.append(ToyEngine(model, extra | more, layers=layers))
        return made[-1]

    yield make
    proxy.fault = None
    proxy.script.clear()
    for one in made:
        one.settle(timeout_s=20)
        began = time.monotonic()
        one.stop()
        assert time.monotonic() - began < 5, "vLLM gives 5 s"


@pytest.fixture(scope="module")
def want(model: Path) -> list[list[int]]:
    return ToyEngine(model, None).generate(PROMPT)


@pytest.fixture
def warm(engine: Callable[..., ToyEngine], proxy: FaultProxy) -> None:
    first = engine()
    first.generate(PROMPT)
    first.settle()


def only(method: str, fault: Fault) -> Callable[[Request], Fault | None]:
    return lambda request: fault if request.method == method else None


def assert_one_warning_each(warnings: Warnings) -> None:
    """No line twice, each with what happens and what to do."""
    doing = [line.split(":")[0] for line in warnings.lines]
    assert len(doing) == len(set(doing)), warnings.lines
    for line in warnings.lines:
        assert "objectcache could not" in line and "computed instead" in line
        assert "Traceback" not in line and os.environ["AWS_SECRET_ACCESS_KEY"] not in line


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.usefixtures("warm")
def test_reads_that_fail(
    name: str,
    engine: Callable[..., ToyEngine],
    proxy: FaultProxy,
    want: list[list[int]],
    warnings: Warnings,
) -> None:
    one = engine()
    proxy.fault = only("GET", FAULTS[name])
    began = time.monotonic()
    assert one.generate(PROMPT) == want
    assert time.monotonic() - began < 6
    assert one.cached["r1"] == 0
    if name != "404":
        assert len(warnings.lines) == 1, warnings.lines
    assert_one_warning_each(warnings)


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.usefixtures("warm")
def test_reads_that_fail_in_the_middle(
    name: str, engine: Callable[..., ToyEngine], proxy: FaultProxy, want: list[list[int]]
) -> None:
    """The 6th chunk cannot be had: the five before it are used."""
    one = engine()
    gets: list[str] = []

    def sixth(request: Request) -> Fault | None:
        if request.method == "GET" and request.path not in gets:
            gets.append(request.path)
        return FAULTS[name] if request.method == "GET" and gets.index(request.path) == 5 else None

    proxy.fault = sixth
    assert one.generate(PROMPT) == want
    assert one.cached["r1"] % CHUNK == 0 and one.cached["r1"] < 15 * CHUNK


@pytest.mark.parametrize("name", [name for name in FAULTS if name not in BENIGN_FOR_HEAD])
@pytest.mark.usefixtures("warm")
def test_lookups_that_fail(
    name: str,
    engine: Callable[..., ToyEngine],
    proxy: FaultProxy,
    want: list[list[int]],
    warnings: Warnings,
) -> None:
    one = engine()
    proxy.fault = only("HEAD", FAULTS[name])
    began = time.monotonic()
    assert one.generate(PROMPT) == want
    assert time.monotonic() - began < 3
    assert one.cached["r1"] == 0
    if not name.startswith("404"):  # the answer to a HEAD has no body to say what is missing

        def warned() -> bool:
            one.generate(PROMPT[:9])  # the end of a lookup is heard in a step
            return any("look up chunks" in line for line in warnings.lines)

        assert eventually(warned)
    assert_one_warning_each(warnings)


@pytest.mark.parametrize("tail", [100, 1200])
@pytest.mark.usefixtures("warm")
def test_a_short_new_end_does_not_wait_for_a_slow_lookup(
    engine: Callable[..., ToyEngine], proxy: FaultProxy, tail: int
) -> None:
    """The chunks before it are known to be there. A long end may be in the bucket: that is asked first."""
    one = engine(lookup_timeout_ms=5000, read_timeout_ms=5000)
    one.generate(PROMPT)  # now it knows them
    one.settle()
    one.forget()
    heads = proxy.count("HEAD")
    proxy.fault = only("HEAD", Fault(delay_s=2.0))
    name = one.add(PROMPT[: 12 * CHUNK] + prompt(tail, seed=tail), max_tokens=1)
    began = time.monotonic()
    while name not in one.cached:
        one.step()
    waited_s = time.monotonic() - began
    assert one.cached[name] == 12 * CHUNK
    assert (waited_s >= 1.9) == (tail == 1200)
    assert proxy.count("HEAD") > heads, "what the bucket has is learned all the same"
    one.run()


@pytest.mark.parametrize("name", FAULTS)
def test_saves_that_fail(
    name: str,
    engine: Callable[..., ToyEngine],
    proxy: FaultProxy,
    want: list[list[int]],
    warnings: Warnings,
) -> None:
    one = engine(prefix=f"saves-{name.replace(' ', '-')}")
    proxy.fault = only("PUT", FAULTS[name])
    assert one.generate(PROMPT) == want
    proxy.fault = None
    one.settle(timeout_s=20)
    assert_one_warning_each(warnings)
    one.forget()
    assert one.generate(PROMPT) == want  # whatever was or was not written


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.usefixtures("warm")
def test_everything_fails_from_the_start_and_then_heals(
    name: str,
    engine: Callable[..., ToyEngine],
    proxy: FaultProxy,
    want: list[list[int]],
    warnings: Warnings,
) -> None:
    proxy.fault = FAULTS[name]
    one = engine()
    for _ in range(3):
        assert one.generate(PROMPT) == want
        one.forget()
    assert_one_warning_each(warnings)
    proxy.fault = None
    _wait_for_a_hit(one, want)


@pytest.mark.usefixtures("warm")
def test_a_server_that_goes_down_and_comes_back(
    engine: Callable[..., ToyEngine], proxy: FaultProxy, want: list[list[int]], warnings: Warnings
) -> None:
    one = engine()
    assert one.generate(PROMPT) == want and one.cached["r1"] == 960
    proxy.down()
    took = []
    for _ in range(6):
        one.forget()
        began = time.monotonic()
        assert one.generate(PROMPT) == want
        took.append(time.monotonic() - began)
    assert took[-1] < 0.3, "a store known to be down must not be waited for"
    assert_one_warning_each(warnings)
    proxy.up()
    _wait_for_a_hit(one, want)


def _wait_for_a_hit(one: ToyEngine, want: list[list[int]]) -> None:
    end = time.monotonic() + 15
    while True:
        one.forget()
        name = one.add(PROMPT)
        one.run()
        assert [one.outputs[name]] == want
        if one.cached[name] == 960:
            return
        assert time.monotonic() < end, "the store is well again, and nothing hits"
        time.sleep(0.2)


@pytest.mark.usefixtures("warm")
def test_down_between_staging_and_the_load(
    engine: Callable[..., ToyEngine], proxy: FaultProxy, want: list[list[int]]
) -> None:
    """Once tokens were promised no server is needed any more."""
    one = engine()
    name = one.add(PROMPT)
    while not any(worker.leased_slots for worker in one.workers):
        one.step()

    # Until all is staged, though the scheduler has not heard of it.
    def staged(events: list) -> bool:
        return any(isinstance(event, StageResult) for event in events)

    assert eventually(lambda: all(staged(w.connector._worker._mover._events) for w in one.workers))
    proxy.down()
    try:
        one.run()
        assert [one.outputs[name]] == want and one.cached[name] == 960
    finally:
        proxy.up()


@pytest.mark.parametrize("came", [1, 4, 8])
def test_down_while_a_prefix_streams(
    engine: Callable[..., ToyEngine],
    proxy: FaultProxy,
    want: list[list[int]],
    warnings: Warnings,
    came: int,
) -> None:
    """15 chunks through a ring of 4: what came is used, the rest is computed, and later it hits again."""
    first = engine("streams", layers=60, ring_bytes="64MiB")
    first.generate(PROMPT)
    first.settle()
    one = engine("streams", layers=60, ring_bytes="1MiB", lookup_timeout_ms=5000)
    name = one.add(PROMPT)
    while one.stats.get("get_requests", 0) < came:
        assert one.step()
    assert one.scheduler.requests[name].status.name == "WAITING_FOR_REMOTE_KVS"
    proxy.down()
    one.run()
    assert [one.outputs[name]] == want
    assert one.cached[name] % CHUNK == 0 and one.cached[name] < 960
    assert one.totals.get("hit_tokens", 0) == one.cached[name]
    assert_one_warning_each(warnings)
    proxy.up()
    _wait_for_a_hit(one, want)


def test_the_start_is_refused_if_the_user_wants_it_so(
    engine: Callable[..., ToyEngine], proxy: FaultProxy
) -> None:
    proxy.fault = FAULTS["403"]
    with pytest.raises(Exception, match=r"objectcache cannot use s3://kvcache/warm.*hint:"):
        engine(startup_check="require")
