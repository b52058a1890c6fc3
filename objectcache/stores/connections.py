"""Connections to one endpoint: its addresses, and those that wait for another request. Not what is sent on them: see receiver.py.

All is the loop's. A name is looked up in asyncio's threads, once for all who ask, and believed for
a few seconds. New connections go where the fewest are, and for a while not where none was possible.
"""

import asyncio
import select
import socket
from collections import Counter, deque
from collections.abc import Callable, Collection
from contextlib import suppress
from itertools import islice

from objectcache.stores.receiver import Peer

LOOKUP_TTL_S = 5.0
DEAD_S = 10.0  # how long an address without a connection is left alone
IDLE_S = 12.0  # servers and balancers close theirs after 15 s or more
ASKED_TOGETHER = 64  # most connections about which the system is asked for one that is wanted


LookUp = Callable[[str, int, int], list[Peer]]  # host, port, flags of getaddrinfo; raises OSError


class Unresolved(Exception):
    """The name has no address now, or no other."""


class Connections:
    """At most `most` of them, idle ones included, if the caller has no more than that in use."""

    def __init__(
        self,
        host: str,
        port: int,
        most: int,
        lookup_s: float,
        look_up: LookUp | None = None,
        idle_s: float = IDLE_S,
    ) -> None:
        self._host = host
        self._port = port
        self._most = most
        self._lookup_s = lookup_s  # longest wait for the addresses
        self._look_up = look_up or _looked_up  # by the system
        self._idle_s = idle_s
        self._peers: list[Peer] = []
        self._peers_until = 0.0
        self._lookup: asyncio.Future[list[Peer]] | None = None
        self._dead_until: dict[Peer, float] = {}
        self._open: Counter[Peer] = Counter()  # in use and idle
        self._idle: deque[tuple[float, Peer, socket.socket]] = deque()  # the latest last
        # Idle ones that did not stir in this turn of the loop.
        self._quiet: set[socket.socket] = set()
        self._sweep: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def open(self) -> int:
        return self._open.total()

    @property
    def idle(self) -> int:
        return len(self._idle)

    async def get(self, elsewhere: Collection[Peer] = ()) -> tuple[Peer, socket.socket | None]:
        """A kept connection, or where to open one; if it can be not at those addresses. Then: `give_back`.

        Raises Unresolved.
        """
        if elsewhere:
            now = asyncio.get_running_loop().time()
            but = {*elsewhere, *(peer for peer, until in self._dead_until.items() if until > now)}
            with suppress(Unresolved):
                return self.take(but) or (await self.choose(but), None)
        return self.take() or (await self.choose(), None)

    def take(self, but: Collection[Peer] = ()) -> tuple[Peer, socket.socket] | None:
        """The connection that was used last, if it still seems good. Then: `give_back`."""
        for at in range(len(self._idle) - 1, -1, -1):
            _, peer, sock = self._idle[at]
            if peer in but:
                continue
            quiet = self._is_quiet(at)
            del self._idle[at]
            if quiet:
                return peer, sock
            self._drop(peer, sock)
        return None

    def _is_quiet(self, at: int) -> bool:
        """Of an idle one. A burst of requests asks the system once for many: each call lets go of the
        GIL, and to get it again takes longer than all else that a request costs here."""
        sock = self._idle[at][2]
        if sock not in self._quiet:
            first = max(0, at + 1 - ASKED_TOGETHER)
            idle = [sock for _, _, sock in islice(self._idle, first, at + 1)]
            stirring = _stirring(idle)
            if not self._quiet:
                asyncio.get_running_loop().call_soon(self._quiet.clear)
            self._quiet.clear()
            self._quiet.update(sock for sock in idle if sock.fileno() not in stirring)
        if sock not in self._quiet:
            return False
        self._quiet.remove(sock)  # when it comes back it is asked about anew
        return True

    async def choose(self, but: Collection[Peer] = ()) -> Peer:
        """Where to open a connection. Then: `give_back`. Raises Unresolved if nothing is left beside `but`."""
        peers = [peer for peer in await self._addresses() if peer not in but]
        if not peers:
            raise Unresolved(self._host)
        now = asyncio.get_running_loop().time()
        alive = [peer for peer in peers if self._dead_until.get(peer, 0.0) <= now]
        if alive:
            peer = min(alive, key=lambda peer: self._open[peer])
        else:
            peer = min(peers, key=lambda peer: self._dead_until[peer])
        if self.open >= self._most and self._idle:
            self._drop(*self._idle.popleft()[1:])
        self._open[peer] += 1
        return peer

    def give_back(self, peer: Peer, sock: socket.socket | None) -> None:
        """After use; None if the connection is gone."""
        if sock is None or self._closed:
            self._drop(peer, sock)
            return
        loop = asyncio.get_running_loop()
        self._idle.append((loop.time() + self._idle_s, peer, sock))
        if self._sweep is None:
            self._sweep = loop.call_later(self._idle_s, self._drop_old)

    def reached(self, peer: Peer, well: bool) -> None:
        """Whether a connection to `peer` was possible."""
        if well:
            self._dead_until.pop(peer, None)
        else:
            self._dead_until[peer] = asyncio.get_running_loop().time() + DEAD_S

    def close(self) -> None:
        """Close the idle ones, and those in use when they are given back. Idempotent."""
        self._closed = True
        if self._sweep is not None:
            self._sweep.cancel()
        while self._idle:
            self._drop(*self._idle.pop()[1:])

    def _drop(self, peer: Peer, sock: socket.socket | None) -> None:
        self._open[peer] -= 1
        if not self._open[peer]:
            del self._open[peer]
        if sock is not None:
            sock.close()

    def _drop_old(self) -> None:
        loop = asyncio.get_running_loop()
        while self._idle and self._idle[0][0] <= loop.time():
            self._drop(*self._idle.popleft()[1:])
        self._sweep = (
            loop.call_at(self._idle[0][0], self._drop_old)
            if self._idle and not self._closed
            else None
        )

    # -- the addresses of the name ---------------------------------------------------------------

    async def _addresses(self) -> list[Peer]:
        loop = asyncio.get_running_loop()
        if self._peers and loop.time() < self._peers_until:
            return self._peers
        try:
            self._peers = self._look_up(self._host, self._port, socket.AI_NUMERICHOST)
            self._peers_until = float("inf")
            return self._peers
        except OSError:
            pass  # a name
        if self._lookup is None:
            self._lookup = loop.run_in_executor(None, self._look_up, self._host, self._port, 0)
            self._lookup.add_done_callback(self._found)
        if not self._peers:  # else the old ones do until there is news
            await asyncio.wait([self._lookup], timeout=self._lookup_s)
        if not self._peers:
            raise Unresolved(self._host)
        return self._peers

    def _found(self, lookup: "asyncio.Future[list[Peer]]") -> None:
        self._lookup = None
        if not lookup.cancelled() and lookup.exception() is None:
            loop = asyncio.get_running_loop()
            self._peers, self._peers_until = lookup.result(), loop.time() + LOOKUP_TTL_S
            self._dead_until = {p: t for p, t in self._dead_until.items() if p in self._peers}


def _looked_up(host: str, port: int, flags: int) -> list[Peer]:
    """Blocks, unless `flags` has AI_NUMERICHOST. Raises OSError."""
    every = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    # Without IPv6 in Python, an IPv6 address is of bytes: nothing to connect to.
    peers = ((int(found[0]), found[4]) for found in every)
    return [*dict.fromkeys(peers)]


def _stirring(socks: list[socket.socket]) -> set[int]:
    """Descriptors of idle connections that were closed, or have bytes that nobody asked for."""
    poll = select.poll()
    for sock in socks:
        poll.register(sock, select.POLLIN)
    return {descriptor for descriptor, _ in poll.poll(0)}
