"""Answers from sockets straight into the caller's memory: a few threads, each with an epoll. Not what is asked, nor what an answer means: see s3_direct.py.

A thread owns an Exchange, its socket and its memory from `run` until the Exchange has ended; the
loop hears of the end. A thread never blocks but in epoll, so whatever it is told it heeds within
one piece and one call of `landed`. It holds the GIL for a few microseconds a piece, and pieces are
large: the kernel wakes it only when much has come (SO_RCVLOWAT).
"""

import asyncio
import enum
import errno
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from objectcache.stores.http1 import Head, HeadReader, NotHttp
from objectcache.stores.stops import LOW_WATER_BYTES, stops_of

FILLS = 2  # bodies served before the sockets are asked again, so that who begins is not behind all
_SCRATCH_BYTES = 8 << 10  # for a head; what comes of the body with it is copied
_TICK_S = 0.1  # how often streams are looked after that nothing woke us for
_END_S = 1.0  # for the threads to end

Peer = tuple[int, tuple[object, ...]]  # address family and socket address


class End(enum.Enum):
    """How an exchange ended."""

    DONE = enum.auto()  # all that `accept` wanted is there
    UNREACHABLE = enum.auto()  # no connection
    BROKE = enum.auto()  # the connection ended before its time
    SILENT = enum.auto()  # nothing came for too long
    LATE = enum.auto()  # it took too long in all
    NOT_HTTP = enum.auto()
    RAISED = enum.auto()  # `accept` or `landed` did: see `error`
    DROPPED = enum.auto()  # on the loop's wish, or the receiver was closed


@dataclass(slots=True)
class Sink:
    """Where a body goes: exactly len(view) bytes. `landed(n)`: view[:n] is final, marks as in Store.read."""

    view: memoryview
    marks: Sequence[int] = ()
    landed: Callable[[int], None] | None = None


class Exchange:
    """One request and its answer. `accept(head)`, in the thread, says where the body goes; None: nowhere.

    With `sock` the request goes by that connection, else by a new one to `peer`. After the end,
    `sock` is the connection if it can carry another request, else None.
    """

    def __init__(
        self,
        request: bytes,
        peer: Peer,
        accept: Callable[[Head], Sink | None],
        sock: socket.socket | None = None,
    ) -> None:
        self.peer = peer
        self.accept = accept
        self.sock = sock
        self.end = End.DROPPED
        self.error: BaseException | None = None
        self.answered = False  # some byte of an answer came
        self.have = 0  # bytes of the body that are in the sink
        # What follows is the thread's.
        self.unsent = request
        self.reader, self.view = HeadReader(), memoryview(b"")
        self.landed: Callable[[int], None] | None = None
        self.body = False  # the head is there and `view` is being filled
        self.stops: tuple[int, ...] = ()
        self.level = 0  # stops passed
        self.stop = 0
        self.low_water = 1
        self.keep = False
        self.connecting = False
        self.seen = 0.0  # when something happened last
        self.until = 0.0
        self.dropped = False  # set by the loop
        self.over = self.heard = False  # `heard`: the loop knows that it is
        self.ended: asyncio.Future[None] | None = None  # the loop's
        self.crew: _Crew | None = None


@dataclass(slots=True)
class Counts:
    """What receiving cost, for tests and benchmarks. Each thread has one."""

    polls: int = 0
    receives: int = 0


class Receiver:
    """The threads. They start with the first exchange; `run` and `close` are for one loop."""

    def __init__(self, threads: int, connect_s: float, silence_s: float) -> None:
        self._threads = threads
        self._limits = (connect_s, silence_s)
        self._crews: list[_Crew] = []
        self._closed = False
        self._ends: deque[Exchange] = deque()
        self._telling = False
        self._called: set[_Crew] = set()  # those to be woken when this turn of the loop is over
        self.wakes = 0  # of the loop

    @property
    def counts(self) -> list[Counts]:
        return [crew.counts for crew in self._crews]

    async def run(self, exchange: Exchange, limit_s: float) -> None:
        """Have `exchange` done by a thread; how it ended stands there. Ends within `limit_s` or so.

        When this returns or raises (CancelledError only) the memory and the socket are let go of.
        """
        loop = asyncio.get_running_loop()
        if self._closed:
            if exchange.sock is not None:
                exchange.sock.close()
                exchange.sock = None
            return
        if not self._crews:
            tell = self._teller(loop)
            self._crews = [_Crew(i, *self._limits, tell) for i in range(self._threads)]
        crew = min(self._crews, key=lambda crew: crew.load)
        crew.load += 1
        exchange.ended = loop.create_future()
        exchange.crew = crew
        exchange.until = time.monotonic() + limit_s
        if not self._called:
            loop.call_soon(self._wake_crews)
        self._called.add(crew)
        crew.submit(exchange)
        try:
            await exchange.ended
        except asyncio.CancelledError:
            exchange.dropped = True
            crew.submit(exchange)
            crew.wake()
            await self._outlast(exchange)
            raise

    def _wake_crews(self) -> None:
        """After a burst: threads that are awake would keep the loop from the GIL at each of its requests."""
        while self._called:
            self._called.pop().wake()

    async def _outlast(self, exchange: Exchange) -> None:
        """Wait for the thread's word, however often we are cancelled: it comes within a piece."""
        while not exchange.heard:
            exchange.ended = asyncio.get_running_loop().create_future()
            try:
                await exchange.ended
            except asyncio.CancelledError:
                continue  # whoever cancels gets its wish when the thread has let go

    async def close(self) -> None:
        """End the threads and what they do, within a second. Idempotent."""
        self._closed = True
        for crew in self._crews:
            crew.close()
        until = time.monotonic() + _END_S
        while any(crew.alive for crew in self._crews) and time.monotonic() < until:
            await asyncio.sleep(0.002)

    def _teller(self, loop: asyncio.AbstractEventLoop) -> "Callable[[Exchange], None]":
        def tell(exchange: Exchange) -> None:
            """From the threads. Many ends may share one wake-up of the loop."""
            self._ends.append(exchange)
            if not self._telling:
                self._telling = True
                with suppress(RuntimeError):  # the loop is closed: nobody waits
                    loop.call_soon_threadsafe(self._hear)

        return tell

    def _hear(self) -> None:
        self.wakes += 1
        self._telling = False  # first: what is appended from here on wakes again
        while self._ends:
            exchange = self._ends.popleft()
            exchange.heard = True
            if exchange.crew is not None:
                exchange.crew.load -= 1
            if exchange.ended is not None and not exchange.ended.done():
                exchange.ended.set_result(None)


def _waits_for(exchange: Exchange) -> int:
    return select.EPOLLOUT if exchange.unsent else select.EPOLLIN


class _Crew:
    """One thread with its sockets. `submit`, `wake`, `close` and `load` are the loop's, all else the thread's."""

    def __init__(
        self, number: int, connect_s: float, silence_s: float, tell: Callable[[Exchange], None]
    ) -> None:
        self.load = 0
        self.counts = Counts()
        self._connect_s = connect_s
        self._silence_s = silence_s
        self._tick_s = min(_TICK_S, connect_s / 4, silence_s / 4)
        self._tell = tell
        self._inbox: deque[Exchange] = deque()  # to begin, or if it is `dropped` to end
        self._live: dict[int, Exchange] = {}  # by descriptor
        self._look_at = 0.0
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self._closing = False
        self._gone = False
        self._woken = False
        self._epoll = select.epoll()
        self._ear, self._mouth = socket.socketpair()
        self._ear.setblocking(False)
        self._mouth.setblocking(False)
        self._epoll.register(self._ear, select.EPOLLIN)
        self._thread = threading.Thread(
            target=self._run, name=f"objectcache-receiver-{number}", daemon=True
        )
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, exchange: Exchange) -> None:
        """Then: `wake`."""
        self._inbox.append(exchange)
        if self._gone:
            self._empty_inbox()

    def close(self) -> None:
        self._closing = True
        self.wake()

    def wake(self) -> None:
        if not self._woken:
            self._woken = True
            with suppress(OSError):  # it has ended, or its ear is full
                self._mouth.send(b"w")

    # -- the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closing:
                self._round()
        finally:
            for exchange in list(self._live.values()):
                self._over(exchange, End.DROPPED)
            self._gone = True  # first: what is submitted from here on, `submit` itself ends
            self._empty_inbox()
            self._epoll.close()
            self._ear.close()
            self._mouth.close()

    def _empty_inbox(self) -> None:
        with suppress(IndexError):
            while True:
                self._over(self._inbox.popleft(), End.DROPPED)

    def _round(self) -> None:
        """Wait for sockets, then serve those that are least far: nobody gets far ahead of others
        that have something to be received, and nobody waits for one that has not."""
        self.counts.polls += 1
        events = self._epoll.poll(self._tick_s if self._live else None)
        now = time.monotonic()
        called = False
        ready: list[Exchange] = []
        for descriptor, _ in events:
            exchange = self._live.get(descriptor)
            if exchange is None:
                called = True
            elif exchange.body:
                ready.append(exchange)
            else:
                self._step(self._advance, exchange, now)
        if ready:
            lowest = min([exchange.level for exchange in ready])
            least = [exchange for exchange in ready if exchange.level == lowest]
            for exchange in least[:FILLS]:
                self._step(self._fill, exchange, now)
        if called:
            with suppress(BlockingIOError):
                self._ear.recv(64)
            self._woken = False  # first: what is submitted from here on wakes again
        # Last: a descriptor that this frees and takes again had no event above. Also if nobody has called
        # yet: who is awake begins what came meanwhile.
        self._listen(now)
        if now >= self._look_at:
            self._look_at = now + self._tick_s
            for exchange in list(self._live.values()):
                self._step(self._look_after, exchange, now)

    def _listen(self, now: float) -> None:
        while self._inbox:
            exchange = self._inbox.popleft()
            if not exchange.over:
                self._step(self._begin, exchange, now)

    def _step(
        self, step: Callable[[Exchange, float], None], exchange: Exchange, now: float
    ) -> None:
        try:
            if exchange.dropped:
                self._over(exchange, End.DROPPED)
            else:
                step(exchange, now)
        except NotHttp as exc:
            self._over(exchange, End.NOT_HTTP, exc)
        except BaseException as exc:  # of `accept` or `landed`: the caller's
            self._over(exchange, End.RAISED, exc)

    def _begin(self, exchange: Exchange, now: float) -> None:
        exchange.seen = now
        if exchange.sock is not None:
            if self._send(exchange):
                self._live[exchange.sock.fileno()] = exchange
                self._epoll.register(exchange.sock, _waits_for(exchange))
            return
        family, address = exchange.peer
        try:
            sock = exchange.sock = socket.socket(family, socket.SOCK_STREAM)
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            error = sock.connect_ex(address)
        except OSError as exc:
            self._over(exchange, End.UNREACHABLE, exc)
            return
        if error not in (0, errno.EINPROGRESS):
            self._over(exchange, End.UNREACHABLE)
            return
        exchange.connecting = True
        self._live[sock.fileno()] = exchange
        self._epoll.register(sock, select.EPOLLOUT)

    def _advance(self, exchange: Exchange, now: float) -> None:
        """A socket is ready, and it is not for the body."""
        assert exchange.sock is not None
        exchange.seen = now
        if exchange.connecting:
            if exchange.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self._over(exchange, End.UNREACHABLE)
                return
            exchange.connecting = False
        if exchange.unsent:
            if self._send(exchange):
                self._epoll.modify(exchange.sock, _waits_for(exchange))
            return
        came = self._receive(exchange, self._scratch)
        if came <= 0:
            return
        exchange.answered = True
        head = exchange.reader.feed(self._scratch[:came])
        if head is not None:
            self._accept(exchange, head)

    def _send(self, exchange: Exchange) -> bool:
        """Send what can be; False if the connection broke."""
        assert exchange.sock is not None
        try:
            sent = exchange.sock.send(exchange.unsent)
        except BlockingIOError:
            sent = 0
        except OSError as exc:
            self._over(exchange, End.BROKE, exc)
            return False
        exchange.unsent = exchange.unsent[sent:]
        return True

    def _accept(self, exchange: Exchange, head: Head) -> None:
        sink = exchange.accept(head)
        if sink is None:
            self._over(exchange, End.DONE)  # without `keep`
            return
        size = len(sink.view)
        first = head.rest[:size]
        exchange.keep = head.keep and head.length == size and len(head.rest) <= size
        exchange.view, exchange.landed = sink.view, sink.landed
        exchange.view[: len(first)] = first
        exchange.have = len(first)
        exchange.stops = stops_of(tuple(sink.marks), size)
        exchange.stop = exchange.stops[0]
        exchange.body = True
        self._heed(exchange)

    def _fill(self, exchange: Exchange, now: float) -> None:
        came = self._receive(exchange, exchange.view[exchange.have : exchange.stop])
        if came <= 0:
            return
        exchange.seen = now
        exchange.have += came
        self._heed(exchange)

    def _receive(self, exchange: Exchange, into: memoryview) -> int:
        """Bytes that came; 0 if the exchange is over, -1 if there are none now."""
        assert exchange.sock is not None
        self.counts.receives += 1
        try:
            came = exchange.sock.recv_into(into)
        except BlockingIOError:
            return -1
        except OSError as exc:
            self._over(exchange, End.BROKE, exc)
            return 0
        if not came:
            self._over(exchange, End.BROKE)
        return came

    def _tell_landed(self, exchange: Exchange) -> None:
        while exchange.level < len(exchange.stops) and (
            exchange.stops[exchange.level] <= exchange.have
        ):
            exchange.level += 1
        if exchange.landed is not None:
            exchange.landed(exchange.have)
        if exchange.level == len(exchange.stops):
            self._over(exchange, End.DONE)
        else:
            exchange.stop = exchange.stops[exchange.level]

    def _heed(self, exchange: Exchange) -> None:
        """Tell what is there; be woken when much has come, or all that is left, or what is told first."""
        if exchange.have >= exchange.stop:
            self._tell_landed(exchange)
        if exchange.over:
            return
        left = (exchange.stop if exchange.level == 0 else len(exchange.view)) - exchange.have
        if exchange.low_water != min(LOW_WATER_BYTES, left):
            self._set_low_water(exchange, min(LOW_WATER_BYTES, left))

    def _set_low_water(self, exchange: Exchange, count: int) -> None:
        assert exchange.sock is not None
        exchange.low_water = count
        exchange.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)

    def _look_after(self, exchange: Exchange, now: float) -> None:
        """Its limits of time, and what came without filling LOW_WATER_BYTES."""
        if now > exchange.until:
            self._over(exchange, End.LATE)
        elif exchange.connecting:
            if now - exchange.seen > self._connect_s:
                self._over(exchange, End.UNREACHABLE)
        else:
            if exchange.body and now - exchange.seen > self._tick_s / 2:
                self._fill(exchange, now)
            if not exchange.over and now - exchange.seen > self._silence_s:
                self._over(exchange, End.SILENT)

    def _over(self, exchange: Exchange, end: End, error: BaseException | None = None) -> None:
        if exchange.over:
            return
        exchange.over = True
        exchange.end, exchange.error = end, error
        sock = exchange.sock
        if sock is not None:
            live = self._live.pop(sock.fileno(), None) is not None
            if end is End.DONE and exchange.keep:
                if live:
                    self._epoll.unregister(sock)
                if exchange.low_water != 1:
                    self._set_low_water(exchange, 1)
            else:
                sock.close()
                exchange.sock = None
        exchange.view, exchange.landed = memoryview(b""), None  # the memory is the caller's again
        self._tell(exchange)
