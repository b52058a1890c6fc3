"""What the direct path does by itself, what it hands over, and that it leaves nothing behind. What any path does: test_stores_contract.py, test_s3_faults.py, test_s3_bounds.py."""

import asyncio
import gc
import logging
import os
import socket
import threading
import time

import pytest
from fault_server import Fault
from origin_lab import Origin, direct, run, whole
from s3_lab import (  # noqa: F401 (pytest looks for the fixtures here)
    BODY,
    PATIENT,
    QUICK,
    Lab,
    lab_fixture,
    module_lab_fixture,
    read_there,
    refused,
)

from objectcache.config import parse
from objectcache.errors import Denied, NotFound, ObjectCacheError, Unavailable
from objectcache.stores.base import Store
from objectcache.stores.gate import Gate
from objectcache.stores.memory import MemoryStore
from objectcache.stores.s3 import S3Store
from objectcache.stores.s3_direct import DirectStore


async def read(store: Store, key: str = "there") -> None:
    into = bytearray(len(BODY))
    await store.read(key, memoryview(into))
    assert into == BODY


# ---- addresses and connections


def test_a_connection_that_died_in_the_pool_costs_no_attempt() -> None:
    def once_each(number: int, count: int, head: str) -> bytes | None:
        return whole() if count == 0 else None

    async def scenario() -> None:
        origin = Origin(once_each)
        await origin.listen("127.0.0.1")
        async with direct(f"http://127.0.0.1:{origin.port}") as store:
            for _ in range(3):
                await read(store)
            assert origin.connections == 3
            assert len(origin.requests) == 5
            assert store.counters.get_requests == 3
        await origin.close()

    run(scenario)


def test_a_new_connection_that_dies_costs_one() -> None:
    async def scenario() -> None:
        origin = Origin(lambda *_: None)
        await origin.listen("127.0.0.1")
        async with direct(f"http://127.0.0.1:{origin.port}") as store:
            await refused(Unavailable, read(store))
            assert len(origin.requests) == 1
        await origin.close()

    run(scenario)


def test_connections_are_kept_and_no_more_than_allowed() -> None:
    async def scenario() -> None:
        origin = Origin(whole)
        await origin.listen("127.0.0.1")
        async with direct(f"http://127.0.0.1:{origin.port}", max_connections=3) as store:
            for _ in range(3):
                await asyncio.gather(*(read(store) for _ in range(7)))
            assert origin.connections <= 3
            assert len(origin.requests) == 21
        await origin.close()

    run(scenario)


def test_ipv6() -> None:
    async def scenario() -> None:
        origin = Origin(whole)
        await origin.listen("::1")
        async with direct(f"http://[::1]:{origin.port}") as store:
            await read(store)
        assert f"Host: [::1]:{origin.port}\r\n" in origin.requests[0][1]
        assert origin.requests[0][1].startswith("GET /some-bucket/there HTTP/1.1\r\n")
        assert "uthorization" not in origin.requests[0][1]
        await origin.close()

    run(scenario)


def test_all_addresses_of_a_name_are_used_and_dead_ones_passed_over() -> None:
    async def scenario() -> None:
        origin = Origin(whole)
        for host in ("127.0.0.1", "127.0.0.2", "::1"):
            await origin.listen(host)
        dead = [(socket.AF_INET, ("127.0.0.3", origin.port))]
        alive = [
            (socket.AF_INET, ("127.0.0.1", origin.port)),
            (socket.AF_INET, ("127.0.0.2", origin.port)),
            (socket.AF_INET6, ("::1", origin.port, 0, 0)),
        ]

        def look_up(host: str, port: int, flags: int) -> list[tuple[int, tuple[object, ...]]]:
            return [*dead, *alive]

        parsed = parse(
            {"url": "s3://some-bucket", "endpoint_url": f"http://store:{origin.port}"}
            | {"anonymous": True, "attempts": 1}
        )
        library = S3Store(parsed)
        store = DirectStore(library, library, parsed, look_up=look_up)
        await asyncio.gather(*(read(store) for _ in range(12)))
        await store.close()
        assert {host for host, _ in origin.requests} == {"127.0.0.1", "127.0.0.2", "::1"}
        assert len(origin.requests) == 12
        await origin.close()

    run(scenario)


# ---- heads


def sized(number: int = 0, count: int = 0, head: str = "") -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: 12345\r\n\r\n"


def test_a_head_has_no_body_and_its_connection_goes_on() -> None:
    async def scenario() -> None:
        origin = Origin(sized)
        await origin.listen("127.0.0.1")
        async with direct(f"http://127.0.0.1:{origin.port}", max_connections=3) as store:
            for _ in range(3):
                sizes = await asyncio.gather(*(store.head(f"ns/{i}") for i in range(7)))
                assert sizes == [12345] * 7
            assert origin.connections <= 3
            assert store.counters.head_requests == len(origin.requests) == 21
            assert store.counters.handed_over == store.counters.read_bytes == 0
            assert origin.requests[0][1].startswith("HEAD /some-bucket/ns/0 HTTP/1.1\r\n")
        await origin.close()

    run(scenario)


def test_a_head_by_a_connection_that_died_costs_no_attempt() -> None:
    async def scenario() -> None:
        origin = Origin(lambda number, count, head: sized() if count == 0 else None)
        await origin.listen("127.0.0.1")
        async with direct(f"http://127.0.0.1:{origin.port}") as store:
            for _ in range(3):
                assert await store.head("there") == 12345
            assert origin.connections == 3
            assert len(origin.requests) == 5
            assert store.counters.head_requests == 3
        await origin.close()

    run(scenario)


@pytest.mark.parametrize("behind", [b"abc", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"])
def test_a_body_behind_a_head_costs_the_connection(behind: bytes) -> None:
    async def scenario() -> None:
        origin = Origin(lambda *_: sized() + behind)
        await origin.listen("127.0.0.1")
        async with direct(f"http://127.0.0.1:{origin.port}") as store:
            for _ in range(3):
                assert await store.head("there") == 12345
            assert origin.connections == 3
        await origin.close()

    run(scenario)


HEADS = [
    # answer, sizes of two handed over, error
    (b"HTTP/1.1 404 Not Found\r\nContent-Length: 300\r\n\r\n", 0, NotFound),
    (b"HTTP/1.1 403 Forbidden\r\nTransfer-Encoding: chunked\r\n\r\n", 0, Denied),
    (b"HTTP/1.1 503 Slow Down\r\nRetry-After: 9\r\n\r\n", 0, Unavailable),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", 2, None),
    (b"HTTP/1.1 400 Bad Request\r\n\r\n", 2, Denied),
    (b"HTTP/1.1 206 Partial Content\r\nContent-Length: 7\r\n\r\n", 2, None),
    (b"SSH-2.0-OpenSSH_9.2\r\n", 2, Unavailable),
]


@pytest.mark.parametrize(("answer", "handed_over", "kind"), HEADS, ids=lambda x: str(x)[9:16])
def test_what_is_odd_about_a_head_is_handed_over_and_said_once(
    answer: bytes,
    handed_over: int,
    kind: type[ObjectCacheError] | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        origin = Origin(lambda *_: answer)
        await origin.listen("127.0.0.1")
        async with direct(f"http://127.0.0.1:{origin.port}") as store:
            for _ in range(2):
                if kind is None:
                    assert await store.head("there") in (0, 7)
                else:
                    await refused(kind, store.head("there"))
            assert store.counters.handed_over == handed_over
            if not handed_over:
                assert origin.connections == 1  # with nothing behind it
        await origin.close()

    with caplog.at_level(logging.INFO):
        run(scenario)
    said = [r for r in caplog.records if "slower path" in r.getMessage()]
    assert len(said) == (1 if handed_over else 0)


# ---- what is handed over


@pytest.mark.parametrize(
    ("endpoint_url", "env", "why"),
    [
        ("https://store.invalid", {}, "is https"),
        ("http://store.invalid", {"HTTP_PROXY": "http://127.0.0.1:1"}, "proxy"),
        ("http://store.invalid", {"http_proxy": "http://127.0.0.1:1"}, "proxy"),
    ],
)
def test_an_endpoint_that_is_not_for_us(
    endpoint_url: str, env: dict[str, str], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        others = MemoryStore(f"others-{time.monotonic_ns()}")
        await others.write("there", memoryview(BODY))
        async with direct(endpoint_url, others) as store:
            for _ in range(3):
                await read(store)
            assert await store.head("there") == len(BODY)
            assert store.counters.handed_over == 0  # nothing was tried in vain
            assert store.counters.get_requests == 0

    with caplog.at_level(logging.INFO):
        run(scenario, **env)
    said = [r for r in caplog.records if r.name == "vllm.objectcache.stores"]
    assert len(said) == 1 and why in said[0].getMessage()
    assert said[0].levelno == logging.INFO


def test_a_proxy_for_others_is_none_for_us() -> None:
    async def scenario() -> None:
        origin = Origin(whole)
        await origin.listen("127.0.0.1")
        async with direct(f"http://127.0.0.1:{origin.port}") as store:
            await read(store)
            assert store.counters.handed_over == 0
        await origin.close()

    run(scenario, HTTP_PROXY="http://127.0.0.1:1", NO_PROXY="127.0.0.1")
    run(scenario, HTTPS_PROXY="http://127.0.0.1:1")


ODD = [
    # answer, reads of two handed over, whether they work
    (Fault(), 0, True),
    (Fault(status=404, code="NoSuchKey"), 0, False),
    (Fault(status=404), 0, False),
    (Fault(status=503, code="SlowDown"), 0, False),
    (Fault(status=500), 0, False),
    (Fault(status=403, code="AccessDenied"), 2, False),
    (Fault(status=307, headers={"Location": "http://127.0.0.1:1/"}), 2, False),
    (Fault(raw=b"SSH-2.0-OpenSSH_9.2\r\n"), 2, False),
    (Fault(chunked=True), 2, True),
    (Fault(ignore_range=True), 2, True),
    (Fault(keep=99_999), 0, False),
]
FAULTS = [fault for fault, *_ in ODD]


@pytest.mark.parametrize("module_lab", ["direct"], indirect=True)
@pytest.mark.parametrize(("fault", "handed_over", "works"), ODD)
def test_what_is_odd_is_handed_over_and_said_once(
    lab: Lab,
    fault: Fault,
    handed_over: int,
    works: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    lab.proxy.fault = fault

    async def scenario(store: Store) -> None:
        for _ in range(2):
            try:
                await read_there(store, 0, len(BODY) - 100_000)
            except ObjectCacheError:
                assert not works
            else:
                assert works
        assert store.counters.handed_over == handed_over

    # A store of its own, which has said nothing yet.
    fresh = {"read_timeout_ms": 5001 + FAULTS.index(fault)}
    with caplog.at_level(logging.INFO):
        lab.run(scenario, **fresh)
    said = [r for r in caplog.records if "slower path" in r.getMessage()]
    assert len(said) == (1 if handed_over else 0)
    assert not fault.chunked or "without Content-Length" in said[0].getMessage()


@pytest.mark.parametrize("module_lab", ["direct"], indirect=True)
def test_bytes_that_landed_are_not_written_again_after_a_hand_over(lab: Lab) -> None:
    """The library path goes on where the body broke."""
    lab.proxy.script.extend([Fault(stop_after=300_000), Fault(status=307), None])

    async def scenario(store: Store) -> None:
        into, seen = bytearray(len(BODY)), [0]

        def landed(n: int) -> None:
            assert into[seen[-1] : n] == BODY[seen[-1] : n]
            into[seen[-1] : n] = bytes(n - seen[-1])  # what is written again would show
            seen.append(n)

        await store.read("there", memoryview(into), marks=[280_000], landed=landed)
        assert into == bytes(len(BODY))
        assert seen[1] == 280_000 and seen[-1] == len(BODY)

    lab.run(scenario)
    assert [r.headers.get("range") for r in lab.proxy.requests] == [
        None,
        f"bytes=300000-{len(BODY) - 1}",
        f"bytes=300000-{len(BODY) - 1}",
    ]


# ---- what others are told, and what is left


class Watched(Gate):
    """Notes what it is told."""

    def __init__(self) -> None:
        super().__init__(8)
        self.said: list[tuple[int, float]] = []
        self.throttles = 0

    def arrived(self, body_bytes: int, seconds: float, first_byte_s: float | None = None) -> None:
        assert first_byte_s is not None and 0 < first_byte_s <= seconds
        self.said.append((body_bytes, seconds))

    def throttled(self) -> None:
        self.throttles += 1


def test_the_gate_hears_of_each_body() -> None:
    def slow_down(number: int, count: int, head: str) -> bytes | None:
        if "missing" in head:
            return b"HTTP/1.1 404 Not Found\r\nContent-Length: 3\r\n\r\nabc"
        time.sleep(0.05)
        return whole()

    async def scenario() -> None:
        origin = Origin(slow_down)
        await origin.listen("127.0.0.1")
        parsed = parse(
            {"url": "s3://some-bucket", "endpoint_url": f"http://127.0.0.1:{origin.port}"}
            | {"anonymous": True}
        )
        library, gate = S3Store(parsed), Watched()
        library.gate = gate
        store = DirectStore(library, library, parsed)
        await read(store)
        await refused(NotFound, read(store, "missing"))
        await read(store)
        await store.close()
        assert [count for count, _ in gate.said] == [len(BODY)] * 2
        assert 0.05 < gate.said[0][1] < 1
        assert origin.connections == 1  # the error's body was read, too
        await origin.close()

    run(scenario)


def test_nothing_is_left_behind() -> None:
    """Threads, sockets and memory, after reads that ended in every way."""

    def by_key(number: int, count: int, head: str) -> bytes | None:
        if "/good" in head:
            return whole()
        if "/short" in head:
            return whole()[:5000]  # and then nothing
        return None

    async def scenario() -> None:
        origin = Origin(by_key)
        await origin.listen("127.0.0.1")
        memories = []
        async with direct(f"http://127.0.0.1:{origin.port}", **QUICK) as store:
            calls = []
            for key in ("good", "short", "broken") * 4:
                memories.append(bytearray(len(BODY)))
                reading = asyncio.ensure_future(store.read(key, memoryview(memories[-1])))
                calls.append(reading)
                calls.append(asyncio.ensure_future(store.head(key)))
            await asyncio.sleep(0.02)
            for call in calls[::2]:
                call.cancel()
            await asyncio.wait(calls[:6])
            began = time.monotonic()
            await store.close()
            assert time.monotonic() - began < 1
            await asyncio.wait(calls, timeout=1)
            for call in calls:
                assert call.done()
            await refused(Unavailable, read(store))
            with pytest.raises(Unavailable):
                await store.open()
        failed = [call for call in calls if not call.cancelled() and call.exception()]
        assert 2 <= len(failed) <= 8
        del call, calls, reading, failed
        gc.collect()  # tracebacks hold frames
        for memory in memories:
            memory.clear()  # raises if anything still holds it
        await origin.close()

    run(scenario)  # whatever Python itself opens at first
    before = set(os.listdir("/proc/self/fd")), set(threading.enumerate())
    run(scenario)
    assert (set(os.listdir("/proc/self/fd")), set(threading.enumerate())) == before
