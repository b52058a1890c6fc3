"""What only the obstore path does: pieces, handing over, and lending a body. The rest is in the suites for every path."""

import asyncio
import itertools
import logging
import os
import socket
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from aws_stub import Stub
from fault_server import Fault, cut
from hypothesis import given
from hypothesis import strategies as st
from s3_lab import (  # noqa: F401 (pytest looks for the fixtures here)
    PATIENT,
    QUICK,
    Lab,
    lab_fixture,
    lab_on,
    read_there,
    refused,
)

from benchmarks.servers import SeaweedFS
from objectcache.config import parse
from objectcache.errors import Corrupt, Denied, NotFound, Unavailable
from objectcache.stores.base import Store
from objectcache.stores.s3 import S3Store
from objectcache.stores.s3_obstore import ObstoreStore, pieces

MIB = 1 << 20
LARGE = os.urandom(4096 + 9 * MIB)
MARKS = [4096 + i * MIB for i in range(10)]


def _store(endpoint_url: str, keys_s: float = 20.0, **options: object) -> ObstoreStore:
    settings = {"url": "s3://faults/lab", "endpoint_url": endpoint_url, **PATIENT, **options}
    return ObstoreStore(S3Store(parse(settings)), parse(settings), keys_s)


@pytest.fixture(scope="module", name="module_lab")
def module_lab_fixture(weed: SeaweedFS) -> Iterator[Lab]:
    with lab_on(weed, "obstore", "large", LARGE) as lab:
        yield lab


async def _read_large(store: Store) -> None:
    into = bytearray(len(LARGE))
    await store.read("large", memoryview(into), marks=MARKS)
    assert into == LARGE


@given(
    st.integers(0, 40 * MIB),
    st.lists(st.integers(1, 8 * MIB), max_size=40),
)
def test_pieces_are_all_of_it_in_order_and_none_too_large(size: int, slices: list[int]) -> None:
    marks, at = [], 0
    for n in slices:
        at = min(at + n, size)
        marks.append(at)
    ends = list(pieces(size, marks))
    assert ends[-1] == size
    starts = [0, *ends[:-1]]
    for start, end in zip(starts, ends, strict=True):
        assert start < end or size == 0
        assert end - start <= 4 * MIB + (64 << 10)
        # Cut inside of a slice only where one slice is too large for a piece.
        if end not in (*marks, size):
            assert not any(start < mark <= end for mark in marks)


def test_a_large_read_is_a_row_of_small_ones_of_one_object(lab: Lab) -> None:
    lab.run(_read_large)
    ranges = [request.headers["range"] for request in lab.proxy.requests]
    bounds = [0, MARKS[4], MARKS[8], len(LARGE)]
    assert ranges == [f"bytes={a}-{b - 1}" for a, b in itertools.pairwise(bounds)]
    first, *others = (request.headers.get("if-match") for request in lab.proxy.requests)
    assert first is None
    assert others[0] == others[1] is not None


def test_a_piece_that_breaks_is_asked_for_again_and_none_before_it(lab: Lab) -> None:
    lab.proxy.script.extend([None, cut(MIB)])

    async def scenario(store: Store) -> None:
        await _read_large(store)
        assert store.counters.handed_over == 1
        assert store.counters.get_requests == 3

    lab.run(scenario)
    last = lab.proxy.requests[-1].headers
    assert last["range"] == f"bytes={MARKS[4]}-{len(LARGE) - 1}"
    assert last["if-match"] == lab.proxy.requests[1].headers["if-match"]


def test_an_etag_that_never_matches_is_not_asked_for(lab: Lab) -> None:
    lab.proxy.fault = Fault(headers={"ETag": 'W/"weak"'})
    lab.run(_read_large)
    assert all("if-match" not in request.headers for request in lab.proxy.requests)
    assert lab.proxy.count() == 3


def test_silence_inside_of_a_piece_is_noticed_in_time(lab: Lab) -> None:
    lab.proxy.script.append(cut(2 * MIB, "stall"))
    assert lab.run(_read_large, **QUICK) < 3 * 0.4 + 1


@pytest.mark.parametrize(
    ("fault", "how"),
    [
        (Fault(status=404, code="NoSuchKey"), "read"),
        (Fault(status=404), "head"),
        (Fault(status=412, code="PreconditionFailed"), "write"),
    ],
)
def test_what_is_clear_is_asked_once(lab: Lab, fault: Fault, how: str) -> None:
    lab.proxy.fault = fault

    async def scenario(store: Store) -> None:
        if how == "read":
            await refused(NotFound, store.read("absent", memoryview(bytearray(1))))
        elif how == "head":
            await refused(NotFound, store.head("absent"))
        else:
            assert await store.write("large", memoryview(b"x")) is False
        assert store.counters.handed_over == 0

    lab.run(scenario)
    assert lab.proxy.count() == 1


def test_handing_over_is_told_once_for_each_reason_and_counted(
    lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(store: Store) -> None:
        for status in (403, 403, 400, 403):
            lab.proxy.fault = Fault(status=status, code="AccessDenied", text="<Message>s3cr3t")
            error = await refused(Denied, store.read("large", memoryview(bytearray(9)), start=1))
            assert "s3cr3t" not in str(error)
        assert store.counters.handed_over == 4

    with caplog.at_level(logging.INFO, "vllm.objectcache"):
        lab.run(scenario, read_timeout_ms=5001)  # a store of its own
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert "403" in told[0] and "400" in told[1] and "aiobotocore" in told[0]
    assert "s3cr3t" not in str(told)


def test_what_is_asked_again_goes_by_the_other_path(lab: Lab) -> None:
    lab.proxy.script.extend([Fault(status=503), None])

    async def scenario(store: Store) -> None:
        await store.head("large")
        assert store.counters.handed_over == 1

    lab.run(scenario)
    first, second = (request.headers["user-agent"] for request in lab.proxy.requests)
    assert "object_store" in first
    assert "Botocore" in second


@pytest.mark.parametrize("cancelled_after_s", [0, 0.001, 0.05])
def test_a_cancelled_write_gives_its_body_back(cancelled_after_s: float) -> None:
    """Also if the server reads nothing, so that most of the body is still to be sent."""

    async def scenario(endpoint_url: str) -> None:
        store = _store(endpoint_url, anonymous=True)
        body = bytearray(64 * MIB)
        view = memoryview(body)
        writing = asyncio.ensure_future(store.write("key", view))
        await asyncio.sleep(cancelled_after_s)
        writing.cancel()
        await asyncio.wait([writing])
        view.release()
        body.append(0)  # BufferError if somebody still looks at it
        await store.close()

    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        asyncio.run(scenario(f"http://127.0.0.1:{deaf.getsockname()[1]}"))


def test_a_body_is_given_back_before_the_call_ends(lab: Lab) -> None:
    async def scenario(store: Store) -> None:
        for fault in (None, Fault(status=412), Fault(status=503), Fault(delay_s=1)):
            lab.proxy.fault = fault
            body = bytearray(MIB)
            view = memoryview(body)
            await asyncio.wait([asyncio.ensure_future(store.write("given-back", view))])
            view.release()
            body.append(0)

    lab.run(scenario, limit_s=8, attempts=1, **QUICK)


def test_keys_that_change_are_used_soon() -> None:
    before = dict(os.environ)
    with Stub() as stub:
        for name in [name for name in before if name.startswith("AWS_")]:
            del os.environ[name]
        os.environ["AWS_CONTAINER_CREDENTIALS_FULL_URI"] = f"{stub.url}/container"
        stub.keys_end = (datetime.now(UTC) + timedelta(minutes=5)).isoformat()  # renewed each time

        async def scenario() -> None:
            store = _store(stub.url, keys_s=0.1)
            await refused(NotFound, store.head("objectcache-check"))
            stub.container = "other"
            await asyncio.sleep(0.3)
            await refused(NotFound, store.head("objectcache-check"))
            for secret in ("container-secret", "other-secret", "other-token"):
                assert secret not in f"{store!r} {vars(store)!r}"
            await store.close()

        try:
            asyncio.run(scenario())
        finally:
            os.environ.clear()
            os.environ.update(before)
    assert [request.access_key for request in stub.s3] == ["AKIDCONTAINER", "AKIDOTHER"]


def test_close_ends_the_threads_and_the_connections(lab: Lab) -> None:
    async def scenario(_: Store) -> None:
        before = set(threading.enumerate())
        store = _store(lab.proxy.url)
        await _read_large(store)
        await store.close()
        assert set(threading.enumerate()) <= before
        await refused(Unavailable, store.head("large"))
        await refused(Unavailable, read_there(store))

    lab.run(scenario)


def test_news_are_told_off_the_loop(lab: Lab) -> None:
    """So that checksums hold up no lookup."""

    async def scenario(store: Store) -> None:
        seen = set()
        into = memoryview(bytearray(len(LARGE)))
        await store.read(
            "large", into, marks=MARKS, landed=lambda n: seen.add(threading.get_ident())
        )
        assert threading.get_ident() not in seen

    lab.run(scenario)


def test_a_range_ends_with_the_object(lab: Lab) -> None:
    """S3 answers with a shorter range then, which is not what was asked for."""

    async def scenario(store: Store) -> None:
        into = memoryview(bytearray(100))
        error = await refused(Corrupt, store.read("large", into, start=len(LARGE) - 99))
        assert str(len(LARGE)) in str(error)
        assert store.counters.handed_over == 0

    lab.run(scenario)
