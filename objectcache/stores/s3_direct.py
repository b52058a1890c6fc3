"""GET and HEAD from plain http:// S3 endpoints; the kernel receives a body straight into the caller's memory. All else, and whatever is odd, the library path does.

What an answer means stands here; the bytes move in receiver.py. A call shares gate, attempts,
counters and credentials with the library path, and its errors are the same. What this path cannot
do it hands over, with one line in the log for each reason: to the library path the rest of one call,
to the others, uncounted, all calls for a reason of the endpoint (https, a proxy). (A kept connection that ends without an answer is
replaced once, uncounted, as aiohttp does below the library path.)
"""

import asyncio
import logging
import math
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial

from botocore.utils import get_environ_proxies  # type: ignore[import-untyped]

from objectcache import __version__
from objectcache.config import Options
from objectcache.errors import Corrupt, Unavailable
from objectcache.order import Turns
from objectcache.stores.asker import Asker
from objectcache.stores.attempts import Failed
from objectcache.stores.base import Pace, Store, StoreCounters, check_key
from objectcache.stores.connections import Connections, LookUp, Unresolved
from objectcache.stores.fill import Fill
from objectcache.stores.hedged import Leg, Lost
from objectcache.stores.http1 import Head
from objectcache.stores.receiver import End, Exchange, Peer, Receiver, Sink
from objectcache.stores.s3 import Address, Credentials, S3Store
from objectcache.stores.s3_errors import Verdict, judge, judge_answer, unreachable
from objectcache.stores.sigv4 import Signer, host_header, quoted
from objectcache.stores.stops import PIECE_BYTES

_LOG = logging.getLogger("vllm.objectcache.stores")  # only below "vllm" is there a handler
# Of one process. Measured on 16 cores in the process of an engine that decodes: 4 threads brought 4.4 GB/s and made its median
# step 3 % longer, 8 brought 6.3 GB/s and made it 59 % longer.
THREADS = min(4, max(1, (os.cpu_count() or 1) // 2))
_ERROR_BYTES_MAX = 16 << 10  # of an error's body that is read for its code
_CODE = re.compile(rb"<Code>([A-Za-z0-9._-]{1,64})</Code>")
_KEYS_S = 1.0  # credentials are used so long before the chain is asked again: it renews them minutes before they end
_OTHER_PEERS = 3  # most addresses tried in one attempt after the first
_JUDGED = {404, 412, 429}  # and 5xx: what these mean the status and the code say


class _HandOver(Exception):
    """This answer is for the library path; why, in words for the log."""


class _Call:
    """One call: who does it, and where it has asked."""

    def __init__(self, method: str, key: str) -> None:
        self.key = key
        self.what = f"{method} {key}"
        self.handed_over = False
        self.used: list[Peer] = []  # where this attempt has asked: a second request goes elsewhere


class _Read(_Call):
    """One read: how far it is, and what it is."""

    def __init__(self, key: str, fill: Fill, marks: Sequence[int]) -> None:
        super().__init__("GET", key)
        self.fill = fill
        self.marks = marks


class _Told:
    """What the answer to one HEAD tells. No body comes, whatever length is told."""

    def __init__(self, call: _Call) -> None:
        self.call = call
        self.head: Head | None = None
        self.said = bytearray()  # the body of an error
        self.odd = ""  # why the library path must repeat this

    def accept(self, head: Head) -> Sink | None:
        self.head = head
        if 200 < head.status < 401:  # of some of these botocore makes more
            self.odd = f"answers {head.status}"
        elif head.status == 200 and head.length is None:
            self.odd = "answers HEAD without Content-Length"
        return None

    def sent(self, exchange: Exchange) -> None:
        """This is on its way."""

    def given_up(self) -> bool:
        """Whether another request was answered meanwhile."""
        return False

    def received(self, exchange: Exchange) -> int:
        """Take note of how far the body came; the bytes of it."""
        return 0


class _Answer(_Told):
    """What the answer to one request of a read is taken for. `accept` runs in a receiver's thread.

    Only who has claimed the memory touches the fill; the answer to another request may come meanwhile.
    """

    def __init__(self, read: _Read, leg: Leg) -> None:
        super().__init__(read)
        self.read = read
        self.fill = read.fill
        self.leg = leg
        self._base = read.fill.have
        self._mine = False  # the body goes into the fill
        self.lost = False  # the other request was answered first
        self.corrupt: Corrupt | None = None

    def accept(self, head: Head) -> Sink | None:
        self.head = head
        try:
            return self._sink(head)
        except Corrupt as exc:
            self.corrupt = exc
        except _HandOver as exc:
            self.odd = str(exc)
        return None

    def _sink(self, head: Head) -> Sink | None:
        busy = head.status == 429 or head.status >= 500  # the other request may still do better
        if not busy and not self.leg.claim():
            self.lost = True
            return None
        if head.status not in (200, 206):
            return self._error_sink(head)
        if head.coded or head.length is None:
            raise _HandOver("sends bodies without Content-Length")
        fill = self.fill
        skip = fill.offset(head.status, head.content_range, head.length)
        if skip or head.length != len(fill.into) - fill.have:
            raise _HandOver("answers to a Range with the whole object")
        fill.etag = fill.etag or head.etag
        marks = [mark - self._base for mark in self.read.marks if mark > self._base]
        self._mine = True
        return Sink(fill.into[self._base :], marks, self._landed)

    def _error_sink(self, head: Head) -> Sink | None:
        if head.status not in _JUDGED and head.status < 500:
            raise _HandOver(f"answers {head.status}")
        if head.length is not None and head.length <= _ERROR_BYTES_MAX:
            self.said = bytearray(head.length)
            return Sink(memoryview(self.said))
        if head.status == 404:  # of the key or of the bucket?
            raise _HandOver("answers 404 without Content-Length")
        return None

    def _landed(self, count: int) -> None:
        self.fill.have = self._base + count
        if self.fill.landed is not None:
            self.fill.landed(self.fill.have)

    def sent(self, exchange: Exchange) -> None:
        self.leg.body = exchange

    def given_up(self) -> bool:
        return self.leg.lost

    def received(self, exchange: Exchange) -> int:
        if not self._mine:
            return 0
        self.fill.have = self._base + exchange.have
        return exchange.have

    def check(self, end: End) -> None:
        """Raises Failed if the body broke off, Corrupt if it cannot be what is wanted."""
        if end is End.BROKE:
            have, wanted = self.fill.have, len(self.fill.into)
            error = f"{self.call.what}: the body ended after {have} of {wanted} bytes."
            raise Failed(Verdict(Unavailable(error), retry=True))
        if self.corrupt is not None:
            raise Corrupt(f"{self.call.what}: {self.corrupt.message}")


class DirectStore(Store):
    """`library` answers what is odd, `others` (which may be the same) does all but GET and HEAD."""

    def __init__(
        self,
        library: S3Store,
        others: Store,
        options: Options,
        threads: int = THREADS,
        look_up: LookUp | None = None,
    ) -> None:
        self.name = library.name
        self._library = library
        self._others = others
        self._most = options.max_connections
        self._look_up = look_up
        self._connect_s = options.connect_timeout_ms / 1000
        self._receiver = Receiver(threads, self._connect_s, options.read_timeout_ms / 1000)
        self._asker = Asker(self._connect_s, options.read_timeout_ms / 1000)
        self._endpoint: _Endpoint | None = None
        self._keys: Credentials | None = None
        self._renew_at = -math.inf
        self._said: set[str] = set()  # reasons for handing over that are in the log
        self._closed = False

    @property
    def counters(self) -> StoreCounters:
        return self._library.counters

    @counters.setter
    def counters(self, counters: StoreCounters) -> None:
        self._library.counters = counters

    async def open(self) -> None:
        await self._others.open()
        await self._ready()

    def pace(self) -> Pace | None:
        by_others = self._endpoint is not None and self._endpoint.why_not
        return (self._others if by_others else self._library).pace()

    async def head(self, key: str) -> int:
        check_key(key)
        endpoint = await self._ready()
        if endpoint.why_not:
            self._say(endpoint.why_not)
            return await self._others.head(key)
        call = _Call("HEAD", key)
        async with self._library.gate.slot():
            return await self._library.attempts.run(
                0, lambda until: self._size(endpoint, call, until)
            )

    async def write(self, key: str, body: memoryview) -> bool:
        return await self._others.write(key, body)

    async def delete(self, key: str) -> None:
        await self._others.delete(key)

    def list(self, prefix: str) -> AsyncIterator[tuple[str, int]]:
        return self._others.list(prefix)

    async def check(self) -> None:
        await self._others.check()

    async def close(self) -> None:
        self._closed = True
        if self._endpoint is not None:
            self._endpoint.close()
        self._asker.close()
        await self._receiver.close()
        await self._others.close()
        await self._library.close()

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
        endpoint = await self._ready()
        if endpoint.why_not:
            self._say(endpoint.why_not)
        if endpoint.why_not or (start is not None and not len(into)):  # HTTP has no empty range
            await self._others.read(key, into, start=start, marks=marks, landed=landed, turns=turns)
            return
        read = _Read(key, Fill(into, start, landed), marks)
        async with self._library.gate.slot(bulk=True, turns=turns):
            await self._library.attempts.run(
                len(into), lambda until: self._attempt(endpoint, read, until)
            )

    async def _ready(self) -> "_Endpoint":
        if self._closed:
            raise self._is_closed()
        if self._endpoint is None:
            address = await self._library.address()
            if self._endpoint is None:
                self._endpoint = _Endpoint(
                    address, self._connections(address), self._connections(address)
                )
        return self._endpoint

    def _connections(self, address: Address) -> Connections:
        return Connections(address.host, address.port, self._most, self._connect_s, self._look_up)

    async def _credentials(self) -> Credentials | None:
        """As the library path's; asked for a burst of requests once."""
        now = asyncio.get_running_loop().time()
        if now >= self._renew_at:
            self._keys, self._renew_at = await self._library.credentials(), now + _KEYS_S
        return self._keys

    def _is_closed(self) -> Unavailable:
        return Unavailable(f"{self.name} is closed.")

    def _say(self, why: str) -> None:
        # No warning: if it comes to nothing, the slower path's error is one.
        if why not in self._said:
            self._said.add(why)
            _LOG.info(
                "%s %s: such requests go by a slower path",
                self._library.place.endpoint,
                why,
            )

    # -- one attempt -----------------------------------------------------------------------------

    async def _attempt(self, endpoint: "_Endpoint", read: _Read, until: float) -> None:
        if not read.handed_over:
            odd = await self._get(endpoint, read, until)
            if not odd:
                return
            self._hand_over(read, odd)
        await self._library.receive(read.key, read.fill, until)

    async def _size(self, endpoint: "_Endpoint", call: _Call, until: float) -> int:
        """A HEAD. The size that is told."""
        if not call.handed_over:
            credentials = await self._credentials()
            if self._closed:
                raise self._is_closed()
            call.used.clear()
            request, told = endpoint.head(call.key, credentials), _Told(call)
            self.counters.head_requests += 1
            silence_s = self._library.attempts.silence_s
            until = min(until, asyncio.get_running_loop().time() + silence_s)
            exchange = await self._exchange(self._asker, endpoint.heads, request, told, until)
            if exchange.end is End.LATE:  # of so little that is silence
                exchange.end = End.SILENT
            odd = self._judge(told, exchange)
            if not odd and told.head is not None:
                return told.head.length or 0
            self._hand_over(call, odd)
        return await self._library.size(call.key, until)

    def _hand_over(self, call: _Call, odd: str) -> None:
        call.handed_over = True
        self.counters.handed_over += 1
        self._say(odd)

    async def _get(self, endpoint: "_Endpoint", read: _Read, until: float) -> str:
        """A GET of what is missing, a second one if it is late. What is odd about the answer, "" if
        it was received well."""
        credentials = await self._credentials()
        if self._closed:
            raise self._is_closed()
        read.used.clear()
        once = partial(self._get_once, endpoint, read, credentials, until)
        return await self._library.hedged.run(PIECE_BYTES, once)

    async def _get_once(
        self,
        endpoint: "_Endpoint",
        read: _Read,
        credentials: Credentials | None,
        until: float,
        leg: Leg,
    ) -> str:
        if read.fill.complete:  # while a request that seemed to have stalled was ended
            return ""
        request, answer = endpoint.get(read.key, read.fill, credentials), _Answer(read, leg)
        self.counters.get_requests += 1
        exchange = await self._exchange(
            self._receiver, endpoint.connections, request, answer, until
        )
        if answer.lost:
            raise Lost
        odd = self._judge(answer, exchange)
        answer.check(exchange.end)
        if not odd:
            self._library.gate.arrived(exchange.have, leg.age_s(), leg.answered_s)
        return odd

    async def _exchange(
        self,
        by: Receiver | Asker,
        connections: Connections,
        request: bytes,
        answer: _Told,
        until: float,
    ) -> Exchange:
        """Send it by a kept connection or by a new one, to wherever one can be had. Raises Failed if
        the name has no address."""
        loop = asyncio.get_running_loop()
        failed: list[Peer] = []
        try:
            peer, sock = await connections.get(answer.call.used)
        except Unresolved:
            raise Failed(unreachable(answer.call.what, self._library.place.endpoint)) from None
        kept = sock
        while True:
            answer.call.used.append(peer)
            exchange = Exchange(request, peer, answer.accept, sock)
            answer.sent(exchange)
            try:
                await by.run(exchange, until - loop.time())
            except asyncio.CancelledError:
                if exchange.connecting and answer.given_up():  # all that time
                    connections.reached(peer, False)
                raise
            finally:
                connections.give_back(peer, exchange.sock)
                self.counters.read_bytes += answer.received(exchange)
            if kept is None:
                connections.reached(peer, exchange.end is not End.UNREACHABLE)
            if kept is not None and exchange.end is End.BROKE and not exchange.answered:
                kept = None  # it was closed before the request came
            elif exchange.end is End.UNREACHABLE and len(failed) < _OTHER_PEERS:
                failed.append(peer)
            else:
                return exchange
            try:
                peer, sock = await connections.choose(failed), None
            except Unresolved:
                return exchange

    def _judge(self, answer: _Told, exchange: Exchange) -> str:
        """ "" if an answer of success came, or what is odd. Raises what the library path would raise."""
        end, head, what, place = exchange.end, answer.head, answer.call.what, self._library.place
        if end is End.RAISED and exchange.error is not None:
            raise exchange.error
        if end is End.DROPPED:
            raise self._is_closed()
        if end is End.NOT_HTTP:
            return "does not answer as HTTP/1.1 does"
        if end is End.UNREACHABLE:
            raise Failed(unreachable(what, place.endpoint))
        if end is End.LATE:
            raise Failed(Verdict(Unavailable(f"{what}: {place.endpoint} is too slow.")))
        if head is not None and head.status not in (200, 206) and not answer.odd:
            code = _CODE.search(answer.said)
            told = code[1].decode() if code is not None else ""
            raise Failed(judge_answer(head.status, told, head.retry_after, what, place))
        if end is End.SILENT:
            raise Failed(judge(TimeoutError(), what, place))
        if end is End.BROKE and head is None:
            raise Failed(judge(ConnectionResetError(), what, place))
        return answer.odd


class _Endpoint:
    """Where requests go and how they are written; `why_not` says why they cannot go from here. The
    connections for HEAD are others: the loop knows them."""

    def __init__(self, address: Address, connections: Connections, heads: Connections) -> None:
        host = host_header(address.host, address.port)
        self.connections = connections
        self.heads = heads
        self.why_not = _why_not(address)
        self._path = address.path
        self._signer = Signer(host, address.region)
        self._fixed = f"Host: {host}\r\nUser-Agent: objectcache/{__version__}\r\n"

    def close(self) -> None:
        self.connections.close()
        self.heads.close()

    def get(self, key: str, fill: Fill, credentials: Credentials | None) -> bytes:
        """The GET of what `fill` lacks. It holds a signature and a token: not to be logged."""
        also = ""
        if (bytes_range := fill.range_header()) is not None:
            also += f"Range: {bytes_range}\r\n"
        if (etag := fill.if_match_header()) is not None:
            also += f"If-Match: {etag}\r\n"
        return self._request("GET", key, also, credentials)

    def head(self, key: str, credentials: Credentials | None) -> bytes:
        """Not to be logged, either."""
        return self._request("HEAD", key, "", credentials)

    def _request(self, method: str, key: str, also: str, credentials: Credentials | None) -> bytes:
        path = self._path + quoted(key)
        lines = f"{method} {path} HTTP/1.1\r\n{self._fixed}{also}"
        if credentials is not None:
            key_pair = credentials.access_key, credentials.secret_key
            lines += self._signer.headers(method, path, *key_pair, credentials.token, time.gmtime())
        return f"{lines}\r\n".encode("latin-1")


def _why_not(address: Address) -> str:
    if address.scheme != "http":
        return f"is {address.scheme}"
    host = host_header(address.host, address.port)
    if get_environ_proxies(f"http://{host}/").get("http"):  # as botocore decides it
        return "is behind a proxy"
    return ""
