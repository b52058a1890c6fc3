"""A bucket as a store, by obstore (Rust, without the GIL): GET, HEAD and PUT. All else, and what obstore cannot say clearly, is left to the library path: see s3.py.

A large read is a row of GETs of a few slices each. obstore gives the body of one as memory that is
copied once, on a thread and without the GIL, and verified while it is warm; its stream would copy
under the GIL. A request that failed is asked again by the library path, which reads Retry-After and
goes on at the very byte. So is whatever fails in a way that needs a closer look, at once: the
caller sees what that path would have said.
"""

import asyncio
import logging
import re
from bisect import bisect_left, bisect_right
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import obstore
from botocore import exceptions as boto  # type: ignore[import-untyped]
from obstore.exceptions import BaseError
from obstore.store import S3Store as Bucket

from objectcache.config import Options
from objectcache.errors import Corrupt, Unavailable
from objectcache.order import Turns
from objectcache.stores.attempts import Failed
from objectcache.stores.base import Pace, Store, StoreCounters, check_key
from objectcache.stores.fill import Fill
from objectcache.stores.hedged import Leg, Lost
from objectcache.stores.outlast import outlast
from objectcache.stores.s3 import Address, Credentials, S3Store
from objectcache.stores.s3_errors import Place, judge

if TYPE_CHECKING:  # of which only type stubs exist
    from obstore import GetOptions
    from obstore.store import ClientConfig, S3Config, S3Credential

T = TypeVar("T")

_LOG = logging.getLogger("vllm.objectcache.stores")  # only below "vllm" is there a handler
_PIECE_BYTES = (4 << 20) + (64 << 10)  # four slices of the usual size, and a header
_COPY_THREADS = 2  # each copies and verifies several GB/s
_IDLE_S = 12  # as long as aiohttp keeps a connection; servers close them soon after
_NO_LIMIT = timedelta(days=1)  # for all of a request: obstore's is 30 s, ours depends on the body
_LET_GO_S = 5.0

_STATUS = re.compile(r"Server returned non-2xx status code: (\d{3})")
_CODE = re.compile(r"<Code>([A-Za-z0-9._-]{1,64})</Code>")
_KIND = re.compile(r"HttpError \{\s+kind: (\w+)")
_NO_WAY = re.compile(r"\bOs \{|TimedOut|timed out|dns error")  # in what is told of a connect


class _HandOver(Exception):
    """The library path must look at this. `why` is for the log; "" if that path tells itself."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


class _Stored(Exception):
    """A PUT succeeded, though obstore misses something in the answer."""


class _Keys:
    """What obstore signs with. It asks on threads of its own, so this only passes on what was fetched."""

    refresh_threshold = timedelta(0)

    def __init__(self, live_s: float) -> None:
        self.fetched: Credentials | None = None
        self._live = timedelta(seconds=live_s)

    def __call__(self) -> "S3Credential":
        assert self.fetched is not None
        return {
            "access_key_id": self.fetched.access_key,
            "secret_access_key": self.fetched.secret_key,
            "token": self.fetched.token,
            "expires_at": datetime.now(UTC) + self._live,
        }


@dataclass(frozen=True)
class _Clients:
    """Two, for a limit of silence is right for an answer and wrong for a body that takes long to send."""

    reads: Bucket
    writes: Bucket


class ObstoreStore(Store):
    """The bucket of `library`, with which it shares slots, attempts, counters and credentials.

    The chain is asked again for credentials that are older than `keys_s`; it renews them many
    minutes before they end.
    """

    def __init__(self, library: S3Store, options: Options, keys_s: float = 20.0) -> None:
        self._library = library
        self._options = options
        self.name = library.name
        self._keys = _Keys(keys_s)
        self._keys_s = keys_s
        self._renew_at = 0.0
        self._clients: _Clients | None = None
        self._unfit = ""  # why obstore cannot reach this bucket at all
        self._lock = asyncio.Lock()
        self._pool = ThreadPoolExecutor(_COPY_THREADS, thread_name_prefix="objectcache-obstore")
        self._told: set[str] = set()
        self._closed = False

    @property
    def counters(self) -> StoreCounters:  # one with the library's
        return self._library.counters

    @counters.setter
    def counters(self, counters: StoreCounters) -> None:
        self._library.counters = counters

    async def open(self) -> None:
        await self._library.open()
        try:
            await self._ready()
        except _HandOver as over:
            self._tell(over.why)

    def pace(self) -> Pace:
        return replace(self._library.pace(), part_bytes=_PIECE_BYTES)

    async def head(self, key: str) -> int:
        check_key(key)
        async with self._library.gate.slot():
            return await self._run(
                0,
                lambda until: self._size(key, until),
                lambda until: self._library.size(key, until),
            )

    async def read(
        self,
        key: str,
        into: memoryview,
        *,
        start: int | None = None,
        marks: Sequence[int] = (),
        landed: Callable[[int], None] | None = None,
        turns: Turns | None = None,
    ) -> None:
        check_key(key)
        if start is not None and not len(into):  # HTTP has no empty range
            await self._library.read(key, into, start=start, landed=landed)
            return
        fill = Fill(into, start, landed)
        async with self._library.gate.slot(bulk=True, turns=turns):
            await self._run(
                len(into),
                lambda until: self._receive(key, fill, marks, until),
                lambda until: self._library.receive(key, fill, until),
            )

    async def write(self, key: str, body: memoryview) -> bool:
        check_key(key)
        async with self._library.gate.slot(bulk=True):
            return await self._run(
                body.nbytes,
                lambda until: self._put(key, body, until),
                lambda until: self._library.put(key, body, until),
            )

    async def delete(self, key: str) -> None:
        await self._library.delete(key)

    def list(self, prefix: str) -> AsyncIterator[tuple[str, int]]:
        return self._library.list(prefix)

    async def check(self) -> None:
        await self._library.check()

    async def close(self) -> None:
        self._closed = True
        self._clients = None  # and with it the connections
        self._pool.shutdown()  # a piece that is being copied takes a millisecond
        await self._library.close()

    # -- who does it -----------------------------------------------------------------------------

    async def _run(
        self,
        body_bytes: int,
        fast: Callable[[float], Awaitable[T]],
        slow: Callable[[float], Awaitable[T]],
    ) -> T:
        """The first attempt by obstore, what must be repeated by the library path."""
        first = True

        async def once(until: float) -> T:
            nonlocal first
            if first:
                first = False
                try:
                    return await fast(until)
                except _HandOver as over:
                    self._tell(over.why)
            self.counters.handed_over += 1
            return await slow(until)

        return await self._library.attempts.run(body_bytes, once)

    def _tell(self, why: str) -> None:
        if why and why not in self._told:
            self._told.add(why)
            _LOG.info(  # no warning: if it comes to nothing, the library path's error is one
                "%s: obstore leaves requests to aiobotocore because of %s (said once)",
                self.name,
                why,
            )

    # -- one request -----------------------------------------------------------------------------

    async def _ask(self, what: str, limit_s: float, call: Callable[[], Awaitable[T]]) -> T:
        try:
            async with asyncio.timeout(limit_s):
                return await call()
        except (BaseError, OSError, ValueError, NotImplementedError) as exc:
            raise _sorted(exc, what, self._library.place) from None

    async def _size(self, key: str, until: float) -> int:
        bucket = (await self._ready()).reads
        self.counters.head_requests += 1
        silence_s = self._library.attempts.silence_s
        meta = await self._ask(f"HEAD {key}", silence_s, lambda: obstore.head_async(bucket, key))
        return meta["size"]

    async def _receive(self, key: str, fill: Fill, marks: Sequence[int], until: float) -> None:
        """What `fill` lacks, piece by piece."""
        bucket = (await self._ready()).reads
        for end in pieces(len(fill.into), marks):
            try:
                once = partial(self._body, bucket, key, fill, end, until)
                data = await self._library.hedged.run(end - fill.have, once)
            except Corrupt as exc:
                raise Corrupt(f"GET {key}: {exc.message}") from None
            await self._land(fill, data, marks)

    async def _body(
        self, bucket: Bucket, key: str, fill: Fill, end: int, until: float, leg: Leg
    ) -> memoryview:
        """The bytes of the object that belong to into[have:end]. Raises Corrupt if it has not those."""
        clock, silence_s = asyncio.get_running_loop().time, self._library.attempts.silence_s
        first, last = fill.first + fill.have, fill.first + end - 1
        whole = fill.start is None and last - first + 1 == len(fill.into)
        options: GetOptions = {} if whole else {"range": (first, last + 1)}
        if match := fill.if_match_header():
            options["if_match"] = match
        self.counters.get_requests += 1
        what = f"GET {key}"
        answer = await self._ask(
            what, silence_s, lambda: obstore.get_async(bucket, key, options=options)
        )
        if not leg.claim():
            raise Lost
        size, etag = answer.meta["size"], answer.meta["e_tag"] or ""
        if whole:
            fill.offset(200, "", size)
        else:  # obstore made sure that the server sent this range, but for the end of the object
            fill.offset(206, f"bytes {first}-{last}/{size}", None)
        if not etag.startswith("W/"):  # those never match
            fill.etag = fill.etag or etag
        data = memoryview(await self._ask(what, until - clock(), answer.bytes_async))
        self.counters.read_bytes += len(data)
        if len(data) != last - first + 1:
            raise _HandOver("a body of another length than it should have")
        self._library.gate.arrived(len(data), leg.age_s(), leg.answered_s)
        return data

    async def _land(self, fill: Fill, data: memoryview, marks: Sequence[int]) -> None:
        if self._closed:
            raise Unavailable(f"{self.name} is closed.")
        running = self._pool.submit(_take, fill, data, marks)
        done = asyncio.wrap_future(running)
        try:
            raised = await asyncio.shield(done)
        except asyncio.CancelledError:
            if not running.cancel():
                await outlast(done)
            raise
        if raised is not None:
            raise raised

    async def _put(self, key: str, body: memoryview, until: float) -> bool:
        if not self._library.conditional_put:
            raise _HandOver("")
        bucket = (await self._ready()).writes
        lent = body.cast("B")
        self.counters.put_requests += 1
        try:
            await self._ask(
                f"PUT {key}",
                self._library.attempts.limit_s(body.nbytes),
                lambda: obstore.put_async(bucket, key, lent, mode="create", use_multipart=False),
            )
        except _Stored:
            pass
        except Failed as failed:
            if not failed.verdict.precondition:
                raise
            self.counters.written_bytes += body.nbytes
            return False
        finally:
            await outlast(asyncio.ensure_future(_let_go(lent, key)))
        self.counters.written_bytes += body.nbytes
        return True

    # -- the clients -----------------------------------------------------------------------------

    async def _ready(self) -> _Clients:
        """The clients, made at first use, with credentials that are fresh. Raises Denied without."""
        now = asyncio.get_running_loop().time()
        if not self._options.anonymous and now >= self._renew_at:
            self._keys.fetched = await self._library.credentials()
            self._renew_at = now + self._keys_s
        if self._clients is not None:
            return self._clients
        async with self._lock:
            if self._closed:
                raise Unavailable(f"{self.name} is closed.")
            if self._unfit:
                raise _HandOver(self._unfit)
            if self._clients is None:
                address, proxy = await self._library.address(), await self._library.proxy()
                trusted = await self._library.trusted() if address.scheme == "https" else b""
                try:
                    self._clients = _Clients(
                        self._client(address, proxy, trusted, answers_in_s=self._silence_s()),
                        self._client(address, proxy, trusted, answers_in_s=None),
                    )
                except (BaseError, ValueError):  # its text may quote the password of a proxy
                    self._unfit = "settings that it does not take (certificates, proxy, address)"
                    raise _HandOver(self._unfit) from None
            return self._clients

    def _silence_s(self) -> float:
        return self._options.read_timeout_ms / 1000

    def _client(
        self, address: Address, proxy: str, trusted: bytes, answers_in_s: float | None
    ) -> Bucket:
        host = f"[{address.host}]" if ":" in address.host else address.host
        # The whole of it, so that no style of addressing is left for obstore to choose.
        endpoint = f"{address.scheme}://{host}:{address.port}{address.path}".rstrip("/")
        client: dict[str, Any] = {
            "allow_http": address.scheme == "http",
            "connect_timeout": timedelta(milliseconds=self._options.connect_timeout_ms),
            "timeout": _NO_LIMIT,
            "http1_only": True,  # HTTP/2 would put all bodies on one connection
            "pool_idle_timeout": timedelta(seconds=_IDLE_S),
            "pool_max_idle_per_host": str(self._options.max_connections),
            # Without a proxy here, obstore would look for one in its own way.
            "proxy_url": proxy or "http://127.0.0.1:9",
            "proxy_excludes": "" if proxy else address.host,
        }
        if answers_in_s is not None:
            client["read_timeout"] = timedelta(seconds=answers_in_s)
        if trusted:  # just those, as for the library path
            client["root_certificate"] = trusted
            client["disable_system_certificates"] = True
        bucket: dict[str, Any] = {
            "endpoint": endpoint,
            "aws_endpoint_url_s3": endpoint,
            "region": address.region,
            "virtual_hosted_style_request": True,
            "skip_signature": self._options.anonymous,
            "unsigned_payload": True,
            "s3_express": False,
            "request_payer": False,
            "conditional_put": "etag",
        }
        return Bucket(
            "-",  # the bucket is in the address
            config=cast("S3Config", bucket),
            client_options=cast("ClientConfig", client),
            retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=1)},
            credential_provider=None if self._options.anonymous else self._keys,
        )


def pieces(size: int, marks: Sequence[int]) -> Iterator[int]:
    """The ends of the GETs for `size` bytes: at marks where that is possible, none too large."""
    at = 0
    while True:
        end = min(at + _PIECE_BYTES, size)
        if end < size and (upto := bisect_right(marks, end)) and marks[upto - 1] > at:
            end = marks[upto - 1]
        yield end
        if end == size:
            return
        at = end


def _take(fill: Fill, data: memoryview, marks: Sequence[int]) -> Exception | None:
    """On a thread: copy, and tell of each mark while its bytes are warm. What `landed` raises is returned: a future would change it."""
    first, end = fill.have, fill.have + len(data)
    try:
        for mark in (*marks[bisect_right(marks, first) : bisect_left(marks, end)], end):
            fill.take(data[fill.have - first : mark - first])
    except Exception as exc:
        return exc
    return None


async def _let_go(lent: memoryview, key: str) -> None:
    """Until obstore does not read `lent` any more: it drops a request that was cancelled a moment later."""
    clock = asyncio.get_running_loop().time
    until = clock() + _LET_GO_S
    while True:
        try:
            lent.release()
            return
        except BufferError:
            if clock() > until:
                _LOG.error("PUT %s: obstore holds on to a body that is not its own any more", key)
                return
        await asyncio.sleep(0.0005)


def _sorted(exc: Exception, what: str, place: Place) -> Exception:
    """What to raise for what obstore raised. Its text is read, never repeated: it quotes the server."""
    text, _, source = str(exc).partition("\n\nDebug source:")
    if isinstance(exc, TimeoutError):
        return Failed(judge(exc, what, place))
    status = _STATUS.search(text)
    if status is not None:
        return _sorted_status(int(status[1]), text[status.end() :], what, place)
    kind = _KIND.search(source)
    if kind is None or kind[1] in ("Unknown", "Decode"):
        if what.startswith("PUT") and "MissingEtag" in source:
            return _Stored()
        return _HandOver("an answer that it does not understand")
    if kind[1] == "Timeout":
        return Failed(judge(TimeoutError(), what, place))
    if kind[1] != "Connect":
        return Failed(judge(ConnectionError(), what, place))
    if _NO_WAY.search(source) is None:
        return _HandOver("no TLS connection")
    return Failed(judge(boto.ConnectTimeoutError(endpoint_url=place.endpoint), what, place))


def _sorted_status(status: int, body: str, what: str, place: Place) -> Exception:
    code = found[1] if (found := _CODE.search(body)) else ""
    verb = what.partition(" ")[0]
    absent = status == 404 and code in ("", "NoSuchKey") and verb != "PUT"
    exists = status == 412 and verb == "PUT"
    if absent or exists or status == 429 or (status >= 500 and status != 501):
        operation = {"GET": "GetObject", "HEAD": "HeadObject", "PUT": "PutObject"}[verb]
        answer = {
            "Error": {"Code": code},
            "ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": {}},
        }
        return Failed(judge(boto.ClientError(answer, operation), what, place))
    if status == 501:
        return _HandOver("")  # conditional PUT: the library path says so itself
    return _HandOver(f"answers of status {status}")
