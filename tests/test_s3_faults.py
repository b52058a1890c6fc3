"""The S3 store while the server, or the way to it, misbehaves. A working store: test_stores_contract.py."""

import asyncio
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from fault_server import Fault, FaultProxy, Request, cut

from benchmarks.servers import seaweedfs
from objectcache.config import parse
from objectcache.errors import (
    Corrupt,
    Denied,
    Misconfigured,
    NotFound,
    ObjectCacheError,
    Unavailable,
)
from objectcache.stores import open_store
from objectcache.stores.base import Store, StoreCounters

BODY = os.urandom(600_000)
QUICK = {"connect_timeout_ms": 400, "read_timeout_ms": 400, "attempts": 3}
SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


class Lab:
    """A bucket with `there` in it, behind a proxy that can break, and stores that live on."""

    def __init__(self, proxy: FaultProxy) -> None:
        self.proxy = proxy
        self._runner = asyncio.Runner()
        self._stores: dict[str, Store] = {}

    def run(
        self,
        scenario: Callable[[Store], Awaitable[None]],
        limit_s: float = 5.0,
        **options: object,
    ) -> float:
        """Run `scenario` with a store that is connected; the seconds it took."""
        return self._runner.run(asyncio.wait_for(self._run(scenario, limit_s, options), 60))

    async def _run(
        self,
        scenario: Callable[[Store], Awaitable[None]],
        limit_s: float,
        options: dict[str, object],
    ) -> float:
        store = self._stores.get(repr(options))
        if store is None:
            settings = {"url": "s3://faults/lab", "endpoint_url": self.proxy.url, **QUICK}
            store = self._stores[repr(options)] = open_store(parse({**settings, **options}))
        fault, self.proxy.fault = self.proxy.fault, None
        script = list(self.proxy.script)
        self.proxy.script.clear()
        await store.check()
        store.counters = StoreCounters()
        self.proxy.requests.clear()
        self.proxy.fault = fault
        self.proxy.script.extend(script)
        began = time.monotonic()
        await scenario(store)
        took_s = time.monotonic() - began
        assert took_s < limit_s
        return took_s

    def close(self) -> None:
        for store in self._stores.values():
            self._runner.run(store.close())
        self._runner.close()


@pytest.fixture(scope="module")
def module_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with seaweedfs(tmp_path_factory.mktemp("seaweedfs"), "faults") as server:
        before = dict(os.environ)
        os.environ.update(server.env)
        server.client().put_object(Bucket="faults", Key="lab/there", Body=BODY)
        with FaultProxy(server.endpoint_url) as proxy:
            lab = Lab(proxy)
            yield lab
            lab.close()
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def lab(module_lab: Lab) -> Lab:
    module_lab.proxy.fault = None
    module_lab.proxy.script.clear()
    return module_lab


@asynccontextmanager
async def _opened(
    endpoint_url: str, url: str = "s3://faults", **options: object
) -> AsyncIterator[Store]:
    store = open_store(parse({"url": url, "endpoint_url": endpoint_url, **QUICK, **options}))
    try:
        yield store
    finally:
        await store.close()


async def _read(store: Store, start: int | None = None, size: int = len(BODY)) -> None:
    """Read and check every byte, and that `landed` announced only what stayed."""
    into, seen, first = bytearray(size), [0], start or 0

    def landed(n: int) -> None:
        assert n >= seen[-1]
        assert into[:n] == BODY[first : first + n]
        seen.append(n)

    await store.read("there", memoryview(into), start=start, landed=landed)
    assert into == BODY[first : first + size]
    assert seen[-1] == size


async def _refused(kind: type[ObjectCacheError], call: Awaitable[object]) -> ObjectCacheError:
    with pytest.raises(kind) as caught:
        await call
    text = f"{caught.value} {caught.value!r} {caught.value.__cause__!r}"
    for name in SECRETS:
        assert os.environ.get(name, "no-such-secret") not in text
    assert type(caught.value) is kind
    return caught.value


ANSWERS = [
    # answer, error, a word of the hint or message, attempts
    (Fault(status=404, code="NoSuchKey"), NotFound, "not in s3://", 1),
    (Fault(status=404), NotFound, "not in s3://", 1),
    (Fault(status=404, code="NoSuchBucket"), Misconfigured, "create the bucket", 1),
    (Fault(status=403, code="AccessDenied"), Denied, "s3:ListBucket", 1),
    (Fault(status=401, code="Unauthorized"), Denied, "s3:GetObject", 1),
    (Fault(status=403, code="InvalidAccessKeyId"), Denied, "AWS_ACCESS_KEY_ID", 1),
    (Fault(status=403, code="SignatureDoesNotMatch"), Denied, "AWS_SECRET_ACCESS_KEY", 1),
    (Fault(status=400, code="ExpiredToken"), Denied, "renew", 1),
    (Fault(status=400, code="InvalidToken"), Denied, "AWS_SESSION_TOKEN", 1),
    (Fault(status=403, code="RequestTimeTooSkewed"), Denied, "NTP", 1),
    (Fault(status=403, code="InvalidObjectState"), NotFound, "archived", 1),
    (Fault(status=400, code="KMS.DisabledException"), Denied, "", 1),
    (Fault(status=416, code="InvalidRange"), Corrupt, "shorter", 1),
    (Fault(status=304), Unavailable, "304", 1),
    (Fault(status=400, code="InvalidRequest"), Unavailable, "InvalidRequest", 1),
    (Fault(status=429, code="TooManyRequests"), Unavailable, "max_connections", 3),
    (Fault(status=503, code="SlowDown"), Unavailable, "max_connections", 3),
    (Fault(status=503), Unavailable, "503", 3),
    (Fault(status=500, code="InternalError"), Unavailable, "InternalError", 3),
    (Fault(status=502), Unavailable, "502", 3),
    (Fault(status=400, code="RequestTimeout"), Unavailable, "RequestTimeout", 3),
    (Fault(reset=True), Unavailable, "connection", 3),
    (Fault(raw=b""), Unavailable, "connection", 3),
    (Fault(raw=b"SSH-2.0-OpenSSH_9.2\r\n"), Unavailable, "", 3),
    (Fault(status=500, code="<junk"), Unavailable, "", 3),
    (Fault(delay_s=3), Unavailable, "in time", 3),
    (Fault(status=307, headers={"Location": "http://127.0.0.1:1/"}), Unavailable, "connect", 3),
]


@pytest.mark.parametrize(("fault", "kind", "word", "attempts"), ANSWERS)
@pytest.mark.parametrize("how", ["read", "write", "head"])
def test_an_answer_becomes_the_right_error(
    lab: Lab, fault: Fault, kind: type[ObjectCacheError], word: str, attempts: int, how: str
) -> None:
    async def scenario(store: Store) -> None:
        calls = {
            "read": lambda: _read(store, 0, 1000),
            "write": lambda: store.write("new", memoryview(BODY)),
            "head": lambda: store.head("there"),
        }
        error = await _refused(kind, calls[how]())
        if how != "head" or fault.raw is not None or not fault.code:  # HEADs have no body
            assert word in str(error)

    if how == "head" and fault.code and kind is not NotFound:
        # What is left of an answer to a HEAD is its status.
        table = {400: Denied, 403: Denied, 404: NotFound}
        kind = table.get(fault.status, kind)
        attempts = 1 if fault.status == 400 else attempts
    elif how == "head" and fault.code == "InvalidObjectState":
        kind = Denied
    lab.proxy.fault = fault
    lab.run(scenario)
    # aiohttp repeats a request by itself, once, if the connection ends without an answer; botocore
    # asks for the bucket's region if a HEAD is answered with 400.
    unanswered = fault.reset or fault.raw == b"" or (how == "head" and fault.status == 400)
    assert attempts <= lab.proxy.count() <= attempts * (2 if unanswered else 1)


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=503, code="SlowDown"),
        Fault(status=500),
        Fault(reset=True),
        Fault(raw=b""),
        Fault(raw=b"garbage\r\n\r\n"),
        Fault(delay_s=1.5),
        cut(0),
        cut(1),
        cut(250_000),
        cut(250_000, "reset"),
        cut(250_000, "stall"),
    ],
)
@pytest.mark.parametrize("start", [None, 1000])
def test_a_read_survives_two_faults(lab: Lab, fault: Fault, start: int | None) -> None:
    lab.proxy.script.extend([fault, fault])
    lab.run(lambda store: _read(store, start, len(BODY) - (start or 0)))
    assert 3 <= lab.proxy.count("GET") <= 4  # see above


@pytest.mark.parametrize("stop", ["close", "reset"])
def test_a_broken_body_goes_on_where_it_stopped(lab: Lab, stop: str) -> None:
    lab.proxy.script.extend([cut(200_000, stop), cut(100_000, stop)])

    async def scenario(store: Store) -> None:
        await _read(store)
        assert store.counters.get_requests == 3
        assert store.counters.read_bytes == len(BODY)

    lab.run(scenario)
    first, second, third = lab.proxy.requests
    assert "range" not in first.headers
    assert second.headers["range"] == f"bytes=200000-{len(BODY) - 1}"
    assert third.headers["range"] == f"bytes=300000-{len(BODY) - 1}"
    assert second.headers["if-match"] == third.headers["if-match"]


def test_a_body_that_always_breaks_is_given_up(lab: Lab) -> None:
    lab.proxy.fault = cut(1000)

    async def scenario(store: Store) -> None:
        await _refused(Unavailable, store.read("there", memoryview(bytearray(len(BODY)))))

    lab.run(scenario)
    assert lab.proxy.count("GET") == 3


def test_an_object_replaced_between_two_parts_is_not_mixed(lab: Lab) -> None:
    def other_etag(request: Request) -> Fault | None:
        if "if-match" in request.headers:
            return Fault(status=412, code="PreconditionFailed")
        return cut(1000)

    lab.proxy.fault = other_etag

    async def scenario(store: Store) -> None:
        await _refused(Corrupt, store.read("there", memoryview(bytearray(len(BODY)))))

    lab.run(scenario)
    assert lab.proxy.count("GET") == 2


@pytest.mark.parametrize(
    ("fault", "start", "size", "kind"),
    [
        (Fault(keep=599_999), None, len(BODY), Corrupt),  # and says so: another object
        (Fault(keep=999), 10, 1000, Corrupt),
        (Fault(extra=b"x"), None, len(BODY), Corrupt),
        (Fault(extra=b"x"), 10, 1000, Corrupt),
        (Fault(extra=b"x", chunked=True), None, len(BODY), Corrupt),
        (Fault(keep=500_000, ignore_range=True, chunked=True), None, len(BODY), Unavailable),
        (Fault(headers={"Content-Range": "bytes 11-1010/600000"}), 10, 1000, Corrupt),
        (Fault(headers={"Content-Range": "bytes 10-1009/600"}), 10, 1000, Corrupt),
        (Fault(headers={"Content-Range": ""}), 10, 1000, Corrupt),
        (Fault(headers={"Content-Range": "junk"}), 10, 1000, Corrupt),
        (Fault(ignore_range=True, keep=1009), 10, 1000, Corrupt),
    ],
)
def test_a_body_of_the_wrong_length_is_no_object(
    lab: Lab, fault: Fault, start: int | None, size: int, kind: type[ObjectCacheError]
) -> None:
    lab.proxy.fault = fault

    async def scenario(store: Store) -> None:
        into = memoryview(bytearray(size))
        await _refused(kind, store.read("there", into, start=start))
        lab.proxy.fault = None
        await _read(store)  # the connection that carried it does no harm

    lab.run(scenario)


@pytest.mark.parametrize(
    ("fault", "start", "size"),
    [
        (Fault(ignore_range=True), 10, 1000),
        (Fault(ignore_range=True), 400_000, 200_000),
        (Fault(ignore_range=True, chunked=True), 300_000, 1000),
        (Fault(chunked=True), None, len(BODY)),
        (Fault(chunked=True), 10, 1000),
        (Fault(keep=599_999, chunked=True), None, len(BODY)),  # the last byte by a range
        (Fault(headers={"ETag": ""}), None, len(BODY)),
    ],
)
def test_odd_answers_that_still_have_the_bytes(
    lab: Lab, fault: Fault, start: int | None, size: int
) -> None:
    lab.proxy.fault = fault

    async def scenario(store: Store) -> None:
        await _read(store, start, size)
        await _read(store, start, size)

    lab.run(scenario)


def test_bytes_behind_a_body_do_no_harm(lab: Lab) -> None:
    lab.proxy.fault = Fault(
        extra=b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno", count_extra=False
    )

    async def scenario(store: Store) -> None:
        for _ in range(4):
            # The HTTP client may take them for the next answer: never for right bytes, though.
            with suppress(Unavailable, Corrupt):
                await _read(store, 10, 1000)
        lab.proxy.fault = None
        await _read(store)

    lab.run(scenario)


def test_a_server_without_ranges_can_break_off_too(lab: Lab) -> None:
    lab.proxy.script.extend([cut(200_000), Fault(ignore_range=True)])
    lab.run(_read)
    assert lab.proxy.count("GET") == 2


def test_wrong_bytes_pass_for_the_checksums_to_find(lab: Lab) -> None:
    lab.proxy.fault = Fault(flip=100)

    async def scenario(store: Store) -> None:
        into = bytearray(len(BODY))
        await store.read("there", memoryview(into))
        assert [i for i in range(len(BODY)) if into[i] != BODY[i]] == [100]

    lab.run(scenario)


def test_a_read_that_drips_ends(lab: Lab) -> None:
    lab.proxy.fault = Fault(bytes_per_s=2000)  # never silent for long, and never done

    async def scenario(store: Store) -> None:
        await _refused(Unavailable, store.read("there", memoryview(bytearray(len(BODY)))))

    assert lab.run(scenario) > 1
    assert lab.proxy.count("GET") == 1


@pytest.mark.parametrize(("wish_s", "attempts"), [("0", 3), ("0.3", 3), ("4", 1), ("soon", 3)])
def test_retry_after_is_heeded_within_reason(lab: Lab, wish_s: str, attempts: int) -> None:
    lab.proxy.fault = Fault(status=503, headers={"Retry-After": wish_s})

    async def scenario(store: Store) -> None:
        await _refused(Unavailable, store.head("there"))

    took_s = lab.run(scenario, limit_s=3, read_timeout_ms=5000)
    assert lab.proxy.count() == attempts
    assert wish_s != "0.3" or took_s > 0.6


@pytest.mark.parametrize("attempts", [1, 2, 5])
def test_attempts_is_the_number_of_requests(lab: Lab, attempts: int) -> None:
    lab.proxy.fault = Fault(status=500)

    async def scenario(store: Store) -> None:
        await _refused(Unavailable, store.head("there"))
        assert store.counters.head_requests == attempts

    lab.run(scenario, attempts=attempts)
    assert lab.proxy.count() == attempts


def test_nobody_listens(lab: Lab) -> None:
    async def scenario(store: Store) -> None:
        await store.head("there")
        lab.proxy.down()
        error = await _refused(Unavailable, store.head("there"))
        assert "endpoint_url" in error.hint
        assert lab.proxy.url in error.message
        lab.proxy.up()
        await _read(store)

    lab.run(scenario)


def test_no_such_host() -> None:
    async def scenario() -> None:
        async with _opened("http://no-such-host.invalid", anonymous=True) as store:
            error = await _refused(Unavailable, store.check())
            assert "DNS" in error.hint

    began = time.monotonic()
    asyncio.run(scenario())
    assert time.monotonic() - began < 5


def test_a_server_that_accepts_and_says_nothing() -> None:
    async def scenario(endpoint_url: str) -> None:
        async with _opened(endpoint_url, anonymous=True) as store:
            await _refused(Unavailable, store.check())

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        began = time.monotonic()
        asyncio.run(scenario(f"http://127.0.0.1:{silent.getsockname()[1]}"))
        assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=301, code="PermanentRedirect", headers={"x-amz-bucket-region": "eu-west-9"}),
        Fault(status=400, code="AuthorizationHeaderMalformed", text="<Region>eu-west-9</Region>"),
        Fault(status=301, headers={"x-amz-bucket-region": "eu-west-9"}),
    ],
)
@pytest.mark.parametrize("how", ["check", "read", "head"])
def test_another_region_is_named(lab: Lab, fault: Fault, how: str) -> None:
    lab.proxy.fault = fault

    async def scenario(store: Store) -> None:
        call = {"check": store.check, "read": lambda: _read(store), "head": lambda: store.head("x")}
        if how == "head" and fault.status == 400:  # has no body to name it
            await _refused(Denied, call[how]())
            return
        error = await _refused(Misconfigured, call[how]())
        assert "'eu-west-9'" in error.message
        assert "'region'" in error.hint

    lab.run(scenario)
    assert lab.proxy.count() <= 4  # botocore looks the region up itself, once


def test_check_names_a_missing_bucket(lab: Lab) -> None:
    async def scenario(store: Store) -> None:
        async with _opened(lab.proxy.url, "s3://absent") as other:
            error = await _refused(Misconfigured, other.check())
            assert "'absent'" in error.message

    lab.run(scenario)


def test_a_put_whose_answer_is_lost_does_not_write_twice(lab: Lab) -> None:
    async def scenario(store: Store) -> None:
        lab.proxy.script.append(Fault(headers={"Content-Length": "1000"}))  # never comes
        created = await store.write("lost", memoryview(BODY))
        assert created is False  # the second attempt found what the first had written
        assert await store.head("lost") == len(BODY)

    lab.run(scenario)
    assert lab.proxy.count("PUT") == 2


@pytest.mark.parametrize(
    ("faults", "created"),
    [
        ([Fault(status=412, code="PreconditionFailed")], False),
        ([Fault(status=409, code="ConditionalRequestConflict")], True),
        ([Fault(status=503, code="SlowDown"), Fault(reset=True)], True),
    ],
)
def test_a_put_is_told_apart_or_repeated(lab: Lab, faults: list[Fault], created: bool) -> None:
    lab.proxy.script.extend(faults)

    async def scenario(store: Store) -> None:
        key = f"put-{time.monotonic_ns()}"
        assert await store.write(key, memoryview(BODY)) is created
        if created:
            into = bytearray(len(BODY))
            await store.read(key, memoryview(into))
            assert into == BODY

    lab.run(scenario)


@pytest.mark.parametrize("fault", [Fault(status=501, code="NotImplemented"), Fault(status=501)])
def test_a_server_without_conditional_put_is_noticed_once(
    lab: Lab, fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    def unconditional_only(request: Request) -> Fault | None:
        return fault if "if-none-match" in request.headers else None

    lab.proxy.fault = unconditional_only

    async def scenario(_: Store) -> None:
        async with _opened(lab.proxy.url) as store:
            await notice(store)

    async def notice(store: Store) -> None:
        key = f"plain-{time.monotonic_ns()}"
        first = [store.write(f"{key}-{i}", memoryview(BODY)) for i in range(4)]
        assert await asyncio.gather(*first) == [True] * 4
        refused = sum("if-none-match" in r.headers for r in lab.proxy.requests)
        assert refused <= 4
        assert await store.write(f"{key}-0", memoryview(b"other")) is False
        assert await store.write(key, memoryview(BODY)) is True
        assert sum("if-none-match" in r.headers for r in lab.proxy.requests) == refused
        assert await store.head(f"{key}-0") == len(BODY)

    with caplog.at_level(logging.INFO):
        lab.run(scenario)
    assert [r.name for r in caplog.records if "objectcache" in r.name] == ["objectcache.stores.s3"]


def test_a_slow_upload_is_no_silence() -> None:
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
        async with server, _opened(url, **quick) as store:
            began = time.monotonic()
            assert await store.write("slow", memoryview(bytes(16 << 20)))
            return time.monotonic() - began

    assert asyncio.run(scenario()) > 1.0


def test_faults_leave_neither_slots_nor_connections_behind(lab: Lab) -> None:
    faults = [fault for fault, *_ in ANSWERS if not fault.delay_s]
    faults += [cut(1000), cut(1000, "reset"), Fault(extra=b"x"), Fault(ignore_range=True)]

    async def scenario(store: Store) -> None:
        for fault in faults:
            lab.proxy.fault = fault
            calls = [store.read("there", memoryview(bytearray(len(BODY)))) for _ in range(3)]
            calls.append(store.read("there", memoryview(bytearray(7)), start=9))
            await asyncio.gather(*calls, return_exceptions=True)
        lab.proxy.fault = None
        before = lab.proxy.connections
        await asyncio.gather(*(_read(store) for _ in range(12)))
        assert lab.proxy.connections - before <= 2

    lab.run(scenario, limit_s=20, max_connections=2, attempts=1)


def test_heads_do_not_wait_behind_bodies(lab: Lab) -> None:
    lab.proxy.fault = lambda request: (
        Fault(bytes_per_s=200_000) if request.method == "GET" else None
    )

    async def scenario(store: Store) -> None:
        reads = [asyncio.ensure_future(_read(store)) for _ in range(12)]
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

    assert lab.run(scenario, max_connections=1, attempts=1) > 1.5


def test_nothing_is_logged_for_each_request(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    lab.proxy.script.extend([Fault(status=503), cut(100)])

    with caplog.at_level(logging.INFO):
        lab.run(_read)
    assert [r for r in caplog.records if r.name != "aiobotocore.credentials"] == []


def test_a_missing_ca_bundle_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match="ca_bundle"):
        open_store(parse({"url": "s3://faults", "ca_bundle": str(tmp_path / "absent.pem")}))
