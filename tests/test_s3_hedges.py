"""A GET that is late is asked a second time, on each data path to a real S3 server: which answer counts, and what the other does to memory. When: test_hedge.py."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from fault_server import Fault, cut
from s3_lab import (  # noqa: F401 (pytest looks for the fixtures here)
    BODY,
    PATIENT,
    Lab,
    lab_fixture,
    module_lab_fixture,
    opened,
    read_there,
    refused,
)

from objectcache.config import parse
from objectcache.errors import NotFound
from objectcache.hedge import Race
from objectcache.stores.base import Store, StoreCounters
from objectcache.stores.fill import Fill
from objectcache.stores.gate import Gate
from objectcache.stores.hedged import Leg
from objectcache.stores.http1 import Head
from objectcache.stores.receiver import Exchange
from objectcache.stores.s3 import S3Store
from objectcache.stores.s3_direct import DirectStore, _Answer, _Read

LATE_S = 0.25  # twice what the store is told to have taken so far
LONG_S = 3.0  # an answer that nobody waits for
POISON = 0xAA


def gate_of(store: Store) -> Gate:
    library = store if isinstance(store, S3Store) else store._library  # type: ignore[attr-defined]
    return library.gate


def know(store: Store, late_s: float) -> None:
    hedging = gate_of(store).hedging
    for _ in range(512):
        hedging.began()
        hedging.looked(False)
        hedging.flowed(1 << 20, 0.001)
        hedging.came(late_s / 2)


@asynccontextmanager
async def knowing(lab: Lab, percent: int = 20, late_s: float = LATE_S) -> AsyncIterator[Store]:
    """A store of its own that has seen enough, and has connections."""
    slow = {"read_timeout_ms": 8000, "attempts": 2, "hedge_percent": percent}
    async with opened(lab.proxy.url, "s3://faults/lab", lab.path, **slow) as store:
        script = list(lab.proxy.script)
        lab.proxy.script.clear()
        await asyncio.gather(*(read_there(store, 0, 1000) for _ in range(2)))
        know(store, late_s)
        store.counters = StoreCounters()
        lab.proxy.requests.clear()
        lab.proxy.script.extend(script)
        yield store


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 30))


def counted(store: Store) -> tuple[int, int, int]:
    of = store.counters
    return of.get_requests, of.hedged_requests, of.hedges_won


@pytest.mark.parametrize("start", [None, 1000])
def test_the_first_answer_is_late_and_the_second_counts(lab: Lab, start: int | None) -> None:
    async def scenario() -> None:
        lab.proxy.script.extend([Fault(delay_s=LONG_S), None])
        async with knowing(lab) as store:
            began = time.monotonic()
            await read_there(store, start, len(BODY) - (start or 0))
            assert LATE_S <= time.monotonic() - began < LONG_S
            assert counted(store) == (2, 1, 1)
            assert store.counters.read_bytes == len(BODY) - (start or 0)
            ranges = [request.headers.get("range") for request in lab.proxy.requests]
            assert ranges[0] == ranges[1] and len(ranges) == 2

    run(scenario)


def test_the_first_answer_comes_just_after_the_second_was_sent(lab: Lab) -> None:
    async def scenario() -> None:
        lab.proxy.script.extend([Fault(delay_s=LATE_S + 0.4), Fault(delay_s=LONG_S)])
        async with knowing(lab) as store:
            began = time.monotonic()
            await read_there(store)
            assert time.monotonic() - began < LONG_S
            assert counted(store) == (2, 1, 0)

    run(scenario)


def test_late_bytes_of_the_other_answer_change_nothing(lab: Lab) -> None:
    """Its body is of wrong bytes: had one been written, it would be seen."""

    async def scenario() -> None:
        wrong = Fault(delay_s=LATE_S + 0.4, flip=0)
        for faults in ([wrong, Fault(bytes_per_s=1_000_000)], [Fault(delay_s=LATE_S * 2), wrong]):
            lab.proxy.script.extend(faults)
            async with knowing(lab) as store:
                into = bytearray([POISON]) * len(BODY)
                await store.read("there", memoryview(into))
                assert into == BODY
                into[:] = bytes([POISON]) * len(BODY)
                await asyncio.sleep(0.7)  # whatever was on its way has come
                assert into == bytes([POISON]) * len(BODY)
                await read_there(store)

    run(scenario)


@pytest.mark.parametrize("status", [500, 503])
def test_both_fail_and_the_next_attempt_does_not(lab: Lab, status: int) -> None:
    async def scenario() -> None:
        late_s = 3 * LATE_S  # so late that the third is not, on a busy machine
        lab.proxy.script.extend([Fault(delay_s=late_s + 0.3, status=500), Fault(status=status)])
        async with knowing(lab, late_s=late_s) as store:
            await read_there(store)
            assert counted(store) == (3, 1, 0)
            assert lab.proxy.count("GET") == 3

    run(scenario)


def test_a_refusal_of_the_second_leaves_the_first_to_count(lab: Lab) -> None:
    async def scenario() -> None:
        lab.proxy.script.extend([Fault(delay_s=LATE_S + 0.4), Fault(status=503, code="SlowDown")])
        async with knowing(lab) as store:
            limit = gate_of(store).bulk_limit
            await read_there(store)
            assert counted(store) == (2, 1, 0)
            assert gate_of(store).bulk_limit < limit  # it was heard
            # For a while nobody is asked twice.
            lab.proxy.script.append(Fault(delay_s=LATE_S + 0.3))
            await read_there(store)
            assert counted(store) == (3, 1, 0)

    run(scenario)


def test_a_503_stops_it(lab: Lab) -> None:
    async def scenario() -> None:
        slow_down = Fault(status=503, code="SlowDown")
        lab.proxy.script.extend([slow_down, None, Fault(delay_s=LATE_S + 0.3)])
        async with knowing(lab) as store:
            await read_there(store)
            await read_there(store)
            assert counted(store) == (3, 0, 0)

    run(scenario)


def test_what_is_absent_is_absent_whoever_says_so(lab: Lab) -> None:
    async def scenario() -> None:
        absent = Fault(status=404, code="NoSuchKey")
        lab.proxy.script.extend([Fault(delay_s=LONG_S), absent])
        async with knowing(lab) as store:
            began = time.monotonic()
            await refused(NotFound, store.read("there", memoryview(bytearray(len(BODY)))))
            assert time.monotonic() - began < LONG_S
            assert counted(store) == (2, 1, 1)

    run(scenario)


@pytest.mark.parametrize("begun", [False, True])
def test_cancelled_while_both_are_out_nothing_is_written(lab: Lab, begun: bool) -> None:
    async def scenario() -> None:
        first = Fault(delay_s=LATE_S + 0.5, bytes_per_s=500_000 if begun else 0)
        lab.proxy.script.extend([first, Fault(delay_s=LATE_S + 0.5)])
        async with knowing(lab) as store:
            into = bytearray([POISON]) * len(BODY)
            reading = asyncio.ensure_future(store.read("there", memoryview(into)))
            while lab.proxy.count("GET") < 2:
                await asyncio.sleep(0.005)
            if begun:
                while into[0] == POISON == into[1] and not reading.done():
                    await asyncio.sleep(0.005)
                    if lab.path == "obstore":  # which writes when all is there
                        await asyncio.sleep(0.6)
                        break
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            left = bytes(into)
            await asyncio.sleep(1.0)
            assert into == left
            await read_there(store)
            gate = gate_of(store)
            assert gate._seconds == gate._bulk.held == 0

    run(scenario)


def test_the_budget_ends(lab: Lab) -> None:
    async def scenario() -> None:
        async with knowing(lab, percent=4) as store:
            hedging = gate_of(store).hedging
            hedging._budget = 2.5
            for _ in range(4):
                lab.proxy.script.extend([Fault(delay_s=LATE_S + 0.3), None])
                await read_there(store)
                lab.proxy.script.clear()
                for _ in range(8):
                    hedging.looked(False)
            assert counted(store) == (6, 2, 2)

    run(scenario)


def test_many_reads_at_once_each_get_their_own(lab: Lab) -> None:
    async def scenario() -> None:
        # Later than it takes the proxy to answer them all, or it would be said that all are late.
        async with knowing(lab, late_s=1.0) as store:
            slow = {5, 11, 17, 23}
            lab.proxy.script.extend(
                [Fault(delay_s=LONG_S) if i in slow else None for i in range(28)]
            )
            began = time.monotonic()
            spans = [(1000 * i, 20_000 + i) for i in range(28)]
            await asyncio.gather(*(read_there(store, *span) for span in spans))
            assert time.monotonic() - began < LONG_S
            requests, hedged, won = counted(store)
            assert requests == 28 + hedged and hedged >= won >= len(slow)

    run(scenario)


def test_a_body_that_stalls_goes_on_elsewhere(lab: Lab) -> None:
    async def scenario() -> None:
        lab.proxy.script.extend([cut(300_000, "stall"), None])
        async with knowing(lab) as store:
            began = time.monotonic()
            await read_there(store)
            assert time.monotonic() - began < 6.0  # of 8 that silence may last
            assert counted(store) == (2, 1, 0)
        asked = lab.proxy.requests[1].headers.get("range")
        # obstore has a body only as a whole.
        whole = None if lab.path == "obstore" else f"bytes=300000-{len(BODY) - 1}"
        assert asked == whole

    run(scenario)


def test_without_a_share_nobody_is_asked_twice(lab: Lab) -> None:
    async def scenario() -> None:
        lab.proxy.script.extend([Fault(delay_s=LATE_S * 4)])
        async with knowing(lab, percent=0) as store:
            await read_there(store)
            assert counted(store) == (1, 0, 0)

    run(scenario)


def test_an_answer_that_comes_second_gets_no_memory() -> None:
    """Of the direct path, whose threads may have both heads before the loop hears of either."""
    race, memory = Race(), bytearray([POISON]) * 100
    fill = Fill(memoryview(memory), None, None)
    read = _Read("there", fill, ())
    late, other = (_Answer(read, Leg(race, number, time.monotonic, 0.0)) for number in (0, 1))

    def head(etag: str) -> Head:
        return Head(200, 100, "", etag, "", coded=False, keep=True, rest=b"late bytes")

    sink = other.accept(head("one"))
    assert sink is not None and len(sink.view) == 100
    assert late.accept(head("two")) is None
    assert late.lost and not other.lost
    assert (fill.have, fill.etag) == (0, "one")
    exchange = Exchange(b"", (0, ()), late.accept)
    exchange.have = 50
    assert late.received(exchange) == 0 and fill.have == 0
    assert memory == bytes([POISON]) * 100


def test_an_address_that_does_not_answer_is_remembered_although_the_second_request_won(
    lab: Lab,
) -> None:
    """Else each new connection would try it again, and cost a second request."""
    if lab.path != "direct":
        return  # the others leave connections to their libraries

    async def scenario() -> None:
        with socket.create_server(("127.0.0.9", lab.proxy.port), backlog=0) as silent:
            full = [socket.socket() for _ in range(4)]  # its queue: it hears nobody else
            for one in full:
                one.setblocking(False)
                one.connect_ex(silent.getsockname())
            peers = [
                (socket.AF_INET, (host, lab.proxy.port)) for host in ("127.0.0.9", "127.0.0.1")
            ]
            options = parse(
                {"url": "s3://faults/lab", "endpoint_url": lab.proxy.url, **PATIENT}
                | {"hedge_percent": 20}
            )
            library = S3Store(options)
            store = DirectStore(library, library, options, look_up=lambda *_: peers)
            know(store, LATE_S)
            await read_there(store)
            assert store.counters.hedges_won == 1
            endpoint = store._endpoint
            assert endpoint is not None and peers[0] in endpoint.connections._dead_until
            await store.close()
            for one in full:
                one.close()

    run(scenario)
