"""The S3 store keeps its bounds of time, requests and connections. What a fault becomes: test_s3_faults.py."""

import asyncio
import logging
import socket
import time
from pathlib import Path

import pytest
from fault_server import Fault, cut
from s3_lab import (  # noqa: F401 (pytest looks for the fixtures here)
    ASKED_TWICE,
    BODY,
    PATHS,
    QUICK,
    Lab,
    lab_fixture,
    module_lab_fixture,
    opened,
    read_there,
    refused,
)

from objectcache.config import parse
from objectcache.errors import Misconfigured, Unavailable
from objectcache.stores import open_store
from objectcache.stores.base import Store


def test_a_read_that_drips_ends(lab: Lab) -> None:
    lab.proxy.fault = Fault(bytes_per_s=2000)  # never silent for long, and never done

    async def scenario(store: Store) -> None:
        await refused(Unavailable, store.read("there", memoryview(bytearray(len(BODY)))))

    assert lab.run(scenario, **QUICK) > 1
    assert lab.proxy.count("GET") == 1


@pytest.mark.parametrize(("wish_s", "attempts"), [("0", 3), ("0.3", 3), ("4", 1), ("soon", 3)])
def test_retry_after_is_heeded_within_reason(lab: Lab, wish_s: str, attempts: int) -> None:
    lab.proxy.fault = Fault(status=503, headers={"Retry-After": wish_s})

    async def scenario(store: Store) -> None:
        await refused(Unavailable, store.head("there"))

    took_s = lab.run(scenario, limit_s=3)
    unread = ASKED_TWICE[
        lab.path
    ]  # obstore does not tell it: the second attempt is the first to know
    assert lab.proxy.count() == min(attempts + unread, 3)
    assert wish_s != "0.3" or took_s > 0.3 * (2 - unread)


@pytest.mark.parametrize("attempts", [1, 2, 5])
def test_attempts_is_the_number_of_requests(lab: Lab, attempts: int) -> None:
    lab.proxy.fault = Fault(status=500)

    async def scenario(store: Store) -> None:
        await refused(Unavailable, store.head("there"))
        assert store.counters.head_requests == attempts

    lab.run(scenario, attempts=attempts)
    assert lab.proxy.count() == attempts


def test_nobody_listens(lab: Lab) -> None:
    async def scenario(store: Store) -> None:
        await store.head("there")
        lab.proxy.down()
        error = await refused(Unavailable, store.head("there"))
        assert "endpoint_url" in error.hint
        assert lab.proxy.url in error.message
        lab.proxy.up()
        await read_there(store)

    lab.run(scenario)


@pytest.mark.parametrize("path", PATHS)
def test_no_such_host(path: str) -> None:
    async def scenario() -> None:
        async with opened(
            "http://no-such-host.invalid", path=path, anonymous=True, **QUICK
        ) as store:
            error = await refused(Unavailable, store.head("there"))
            assert "DNS" in error.hint

    began = time.monotonic()
    asyncio.run(scenario())
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("path", PATHS)
def test_a_server_that_accepts_and_says_nothing(path: str) -> None:
    async def scenario(endpoint_url: str) -> None:
        async with opened(endpoint_url, path=path, anonymous=True, **QUICK) as store:
            await refused(Unavailable, store.head("there"))

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        began = time.monotonic()
        asyncio.run(scenario(f"http://127.0.0.1:{silent.getsockname()[1]}"))
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("path", PATHS)
def test_a_slow_upload_is_no_silence(path: str) -> None:
    """The read timeout is for a silent server, not for a body that takes long to send."""

    async def slow_sink(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        left = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        while left:
            left -= len(await reader.read(min(left, 64 << 10)))
            await asyncio.sleep(0.005)
        writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 0\r\nETag: "x"\r\n\r\n')
        await writer.drain()
        writer.close()

    async def scenario() -> float:
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)  # else it is all there
        listening.bind(("127.0.0.1", 0))
        server = await asyncio.start_server(slow_sink, sock=listening, limit=64 << 10)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        quick = {"attempts": 1, "read_timeout_ms": 600, "anonymous": True}
        async with server, opened(url, path=path, **quick) as store:
            began = time.monotonic()
            assert await store.write("slow", memoryview(bytes(16 << 20)))
            return time.monotonic() - began

    assert asyncio.run(scenario()) > 1.0


def test_faults_leave_neither_slots_nor_connections_behind(lab: Lab) -> None:
    faults = [
        *(Fault(status=status) for status in (304, 307, 403, 404, 416, 429, 500, 503)),
        *(Fault(reset=True), Fault(raw=b""), Fault(raw=b"SSH-2.0-OpenSSH_9.2\r\n")),
        *(cut(1000), cut(1000, "reset"), Fault(extra=b"x"), Fault(ignore_range=True)),
    ]

    async def scenario(store: Store) -> None:
        for fault in faults:
            lab.proxy.fault = fault
            calls = [store.read("there", memoryview(bytearray(len(BODY)))) for _ in range(3)]
            calls.append(store.read("there", memoryview(bytearray(7)), start=9))
            await asyncio.gather(*calls, return_exceptions=True)
        lab.proxy.fault = None
        before = lab.proxy.connections
        await asyncio.gather(*(read_there(store) for _ in range(12)))
        assert lab.proxy.connections - before <= 2

    lab.run(scenario, limit_s=20, max_connections=2, attempts=1)


def test_heads_do_not_wait_behind_bodies(lab: Lab) -> None:
    lab.proxy.fault = lambda request: (
        Fault(bytes_per_s=200_000) if request.method == "GET" else None
    )

    async def scenario(store: Store) -> None:
        reads = [asyncio.ensure_future(read_there(store)) for _ in range(12)]
        await asyncio.sleep(0.1)
        began = time.monotonic()
        await asyncio.gather(*(store.head("there") for _ in range(5)))
        assert time.monotonic() - began < 1
        for read in reads:
            read.cancel()
        await asyncio.wait(reads)

    lab.run(scenario, max_connections=4)


def test_waiting_for_a_connection_is_no_timeout(lab: Lab) -> None:
    lab.proxy.fault = Fault(delay_s=0.2)

    async def scenario(store: Store) -> None:
        assert await asyncio.gather(*(store.head("there") for _ in range(8))) == [len(BODY)] * 8

    limits = {
        "connect_timeout_ms": 600,
        "read_timeout_ms": 600,
    }  # longer than one waits for an answer, shorter than for a turn
    assert lab.run(scenario, max_connections=1, attempts=1, **limits) > 1.5


def test_nothing_is_logged_for_each_request(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    lab.proxy.script.extend([Fault(status=503), cut(100)])

    with caplog.at_level(logging.INFO):
        lab.run(read_there)
    assert [r for r in caplog.records if r.name != "aiobotocore.credentials"] == []


def test_a_missing_ca_bundle_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match="ca_bundle"):
        open_store(parse({"url": "s3://faults", "ca_bundle": str(tmp_path / "absent.pem")}))
