"""Requests whose answer is a head alone (HEAD), asked by the loop itself. Bodies: see receiver.py; what is asked, and what an answer means: see s3_direct.py.

An answer of one packet is not worth two hops between threads, which must wait for the GIL where
another thread computes. A connection is made known to the loop once, when it is opened: to do that
for each request costs as much as the rest of it.
"""

import asyncio
import math
import socket
from collections.abc import Callable
from contextlib import suppress

from objectcache.stores.http1 import NotHttp
from objectcache.stores.receiver import End, Exchange

_SCRATCH_BYTES = 8 << 10
_TICK_S = 0.1  # how often what is asked is looked after


class Asker:
    """All is the loop's. `run` and `close` do what those of a Receiver do; of an Exchange the sink
    is not used, for a body is not expected: one that comes costs the connection."""

    def __init__(self, connect_s: float, silence_s: float) -> None:
        self._connect_s = connect_s
        self._silence_s = silence_s
        self._tick_s = min(_TICK_S, silence_s / 4)
        self._tick: asyncio.TimerHandle | None = None  # while something is asked, and once more
        self._live: dict[int, _Asked] = {}  # by descriptor
        self._connecting: set[asyncio.Timeout] = set()
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self._closed = False

    async def run(self, exchange: Exchange, limit_s: float) -> None:
        """Have `exchange` done; how it ended stands there. Ends within `limit_s` or so.

        When this returns or raises (CancelledError only) the socket is let go of.
        """
        loop = asyncio.get_running_loop()
        exchange.until = loop.time() + limit_s
        try:
            if self._closed:
                return
            if exchange.sock is None and not await self._connect(loop, exchange):
                return
            if not self._closed:
                await self._ask(loop, exchange)
        finally:
            if exchange.sock is not None and not exchange.keep:
                exchange.sock.close()
                exchange.sock = None

    def close(self) -> None:
        """End what is asked. Idempotent."""
        self._closed = True
        for asked in list(self._live.values()):
            asked.over(End.DROPPED)
        for limit in self._connecting:
            limit.reschedule(-math.inf)

    async def _connect(self, loop: asyncio.AbstractEventLoop, exchange: Exchange) -> bool:
        family, address = exchange.peer
        exchange.end = End.UNREACHABLE
        exchange.connecting = True
        limit = asyncio.timeout_at(min(loop.time() + self._connect_s, exchange.until))
        try:
            async with limit:
                self._connecting.add(limit)
                line = exchange.sock = _Line(loop, family)
                await loop.sock_connect(line, address)
                line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                line.listen_to(self._came)
        except OSError as exc:  # TimeoutError is one
            exchange.error = exc
            return False
        finally:
            self._connecting.discard(limit)
        exchange.connecting = False
        exchange.end = End.DROPPED
        return True

    async def _ask(self, loop: asyncio.AbstractEventLoop, exchange: Exchange) -> None:
        assert exchange.sock is not None
        sock, descriptor = exchange.sock, exchange.sock.fileno()
        asked = self._live[descriptor] = _Asked(exchange, loop.create_future(), loop.time())
        if self._tick is None:
            self._tick = loop.call_later(self._tick_s, self._look_after)
        try:
            if sock.send(exchange.unsent) < len(exchange.unsent):
                asked.over(End.BROKE)  # nothing is before it: any socket takes so little at once
            await asked.ended
        except OSError as exc:
            asked.over(End.BROKE, exc)
        finally:
            del self._live[descriptor]

    def _look_after(self) -> None:
        """Whether an answer is late."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        for asked in list(self._live.values()):
            if now >= asked.exchange.until:
                asked.over(End.LATE)
            elif now >= asked.exchange.seen + self._silence_s:
                asked.over(End.SILENT)
        again = bool(self._live) and not self._closed
        self._tick = loop.call_later(self._tick_s, self._look_after) if again else None

    def _came(self, line: "_Line") -> None:
        """Something can be read."""
        asked = self._live.get(line.fileno())
        if asked is None:  # its end, or what nobody asked for: who wants to use it will see that
            line.give_up()
            return
        try:
            count = line.recv_into(self._scratch)
        except BlockingIOError:
            return
        except OSError as exc:
            asked.over(End.BROKE, exc)
            return
        asked.came(self._scratch[:count], asyncio.get_running_loop().time())


class _Asked:
    """One exchange that waits for its answer."""

    def __init__(self, exchange: Exchange, ended: "asyncio.Future[None]", now: float) -> None:
        self.exchange = exchange
        self.ended = ended
        exchange.seen = now

    def came(self, data: memoryview, now: float) -> None:
        exchange = self.exchange
        if self.ended.done():  # who asked is about to hear of it
            exchange.keep = False
            return
        if not data:
            self.over(End.BROKE)
            return
        exchange.answered = True
        exchange.seen = now
        try:
            head = exchange.reader.feed(data)
        except NotHttp as exc:
            self.over(End.NOT_HTTP, exc)
            return
        if head is not None:
            exchange.accept(head)
            exchange.keep = head.keep and not head.rest
            self.over(End.DONE)

    def over(self, end: End, error: BaseException | None = None) -> None:
        if not self.ended.done():
            self.exchange.end, self.exchange.error = end, error
            self.ended.set_result(None)


class _Line(socket.socket):
    """A connection that the loop knows from when it is opened until it is closed."""

    def __init__(self, loop: asyncio.AbstractEventLoop, family: int) -> None:
        super().__init__(family, socket.SOCK_STREAM)
        self.setblocking(False)
        self._loop = loop

    def listen_to(self, came: "Callable[[_Line], None]") -> None:
        self._loop.add_reader(self.fileno(), came, self)

    def listen_no_more(self) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._loop.remove_reader(self.fileno())

    def give_up(self) -> None:
        self.listen_no_more()
        with suppress(OSError):
            self.shutdown(socket.SHUT_RDWR)  # so that it stirs for good

    def close(self) -> None:
        if self.fileno() >= 0:
            self.listen_no_more()  # else the loop would mistake the next of this descriptor for it
        super().close()
