"""What each fault of the S3 server, or of the way to it, becomes. How long it may take: test_s3_bounds.py."""

import asyncio
import logging
import time
from contextlib import suppress

import pytest
from fault_server import Fault, Request, cut
from s3_lab import (  # noqa: F401 (pytest looks for the fixtures here)
    ASKED_TWICE,
    BODY,
    QUICK,
    READ_TWICE,
    Lab,
    lab_fixture,
    module_lab_fixture,
    opened,
    read_there,
    refused,
)

from objectcache.errors import (
    Corrupt,
    Denied,
    Misconfigured,
    NotFound,
    ObjectCacheError,
    Unavailable,
)
from objectcache.stores.base import Store

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
            "read": lambda: read_there(store, 0, 1000),
            "write": lambda: store.write("new", memoryview(BODY)),
            "head": lambda: store.head("there"),
        }
        error = await refused(kind, calls[how]())
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
    lab.run(scenario, **(QUICK if fault.delay_s else {}))
    # aiohttp repeats a request by itself, once, if the connection ends without an answer; botocore
    # asks for the bucket's region if a HEAD is answered with 400.
    unanswered = fault.reset or fault.raw == b"" or (how == "head" and fault.status == 400)
    twice = (ASKED_TWICE if how == "write" else READ_TWICE)[lab.path]
    most = attempts * (2 if unanswered else 1) + twice
    assert attempts <= lab.proxy.count() <= most


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
    silent = fault.delay_s or fault.stop == "stall"
    lab.run(
        lambda store: read_there(store, start, len(BODY) - (start or 0)),
        **(QUICK if silent else {}),
    )
    assert 3 <= lab.proxy.count("GET") <= 4  # see above


@pytest.mark.parametrize("stop", ["close", "reset"])
def test_a_broken_body_goes_on_where_it_stopped(lab: Lab, stop: str) -> None:
    lab.proxy.script.extend([cut(200_000, stop), cut(100_000, stop)])

    async def scenario(store: Store) -> None:
        await read_there(store)
        assert store.counters.get_requests == 3
        assert store.counters.read_bytes == len(BODY)

    lab.run(scenario)
    # obstore gives a piece as a whole; what it loses of one is asked for again, by the library path.
    went_on = {
        "aiobotocore": [0, 200_000, 300_000],
        "obstore": [0, 0, 100_000],
        "direct": [0, 200_000, 300_000],
    }[lab.path]
    for start, request in zip(went_on, lab.proxy.requests, strict=True):
        range_header = f"bytes={start}-{len(BODY) - 1}" if start else None
        assert request.headers.get("range") == range_header
        assert ("if-match" in request.headers) == bool(start)


def test_a_body_that_always_breaks_is_given_up(lab: Lab) -> None:
    lab.proxy.fault = cut(1000)

    async def scenario(store: Store) -> None:
        await refused(Unavailable, store.read("there", memoryview(bytearray(len(BODY)))))

    lab.run(scenario)
    assert lab.proxy.count("GET") == 3


def test_an_object_replaced_between_two_parts_is_not_mixed(lab: Lab) -> None:
    def other_etag(request: Request) -> Fault | None:
        if "if-match" in request.headers:
            return Fault(status=412, code="PreconditionFailed")
        return cut(1000)

    lab.proxy.fault = other_etag

    async def scenario(store: Store) -> None:
        await refused(Corrupt, store.read("there", memoryview(bytearray(len(BODY)))))

    lab.run(scenario)
    assert 2 <= lab.proxy.count("GET") <= 2 + READ_TWICE[lab.path]


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
        await refused(kind, store.read("there", into, start=start))
        lab.proxy.fault = None
        await read_there(store)  # the connection that carried it does no harm

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
        await read_there(store, start, size)
        await read_there(store, start, size)

    lab.run(scenario)


def test_bytes_behind_a_body_do_no_harm(lab: Lab) -> None:
    lab.proxy.fault = Fault(
        extra=b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno", count_extra=False
    )

    async def scenario(store: Store) -> None:
        for _ in range(4):
            # The HTTP client may take them for the next answer: never for right bytes, though.
            with suppress(Unavailable, Corrupt):
                await read_there(store, 10, 1000)
        lab.proxy.fault = None
        for _ in range(2):  # what the last one left behind may be met once more
            with suppress(Unavailable, Corrupt):
                await read_there(store)
        await read_there(store)

    lab.run(scenario)


def test_a_server_without_ranges_can_break_off_too(lab: Lab) -> None:
    lab.proxy.script.extend([cut(200_000), Fault(ignore_range=True)])
    lab.run(read_there)
    assert 2 <= lab.proxy.count("GET") <= 2 + READ_TWICE[lab.path]


def test_wrong_bytes_pass_for_the_checksums_to_find(lab: Lab) -> None:
    lab.proxy.fault = Fault(flip=100)

    async def scenario(store: Store) -> None:
        into = bytearray(len(BODY))
        await store.read("there", memoryview(into))
        assert [i for i in range(len(BODY)) if into[i] != BODY[i]] == [100]

    lab.run(scenario)


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
        call = {
            "check": store.check,
            "read": lambda: read_there(store),
            "head": lambda: store.head("x"),
        }
        if how == "head" and fault.status == 400:  # has no body to name it
            await refused(Denied, call[how]())
            return
        error = await refused(Misconfigured, call[how]())
        assert "'eu-west-9'" in error.message
        assert "'region'" in error.hint

    lab.run(scenario)
    assert lab.proxy.count() <= 4  # botocore looks the region up itself, once


def test_check_names_a_missing_bucket(lab: Lab) -> None:
    async def scenario(store: Store) -> None:
        async with opened(lab.proxy.url, "s3://absent") as other:
            error = await refused(Misconfigured, other.check())
            assert "'absent'" in error.message

    lab.run(scenario)


def test_a_put_whose_answer_is_lost_does_not_write_twice(lab: Lab) -> None:
    async def scenario(store: Store) -> None:
        lab.proxy.script.append(Fault(headers={"Content-Length": "1000"}))  # never comes
        created = await store.write("lost", memoryview(BODY))
        # The second attempt found what the first had written; obstore needs the head of the answer only.
        assert created is (lab.path == "obstore")
        assert await store.head("lost") == len(BODY)

    # As long as the second answer must not take, lest there be a third PUT.
    lab.run(scenario, read_timeout_ms=1500)
    assert lab.proxy.count("PUT") == (1 if lab.path == "obstore" else 2)


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
        async with opened(lab.proxy.url) as store:
            await notice(store)

    async def notice(store: Store) -> None:
        key = f"plain-{time.monotonic_ns()}"
        first = [store.write(f"{key}-{i}", memoryview(BODY)) for i in range(4)]
        assert await asyncio.gather(*first) == [True] * 4
        refused = sum("if-none-match" in r.headers for r in lab.proxy.requests)
        assert refused <= 4 * (1 + ASKED_TWICE[lab.path])
        assert await store.write(f"{key}-0", memoryview(b"other")) is False
        assert await store.write(key, memoryview(BODY)) is True
        assert sum("if-none-match" in r.headers for r in lab.proxy.requests) == refused
        assert await store.head(f"{key}-0") == len(BODY)

    with caplog.at_level(logging.INFO):
        lab.run(scenario)
    assert [r.name for r in caplog.records if "objectcache" in r.name] == [
        "vllm.objectcache.stores"
    ]
