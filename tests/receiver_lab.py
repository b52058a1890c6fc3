"""Sockets, heads and streams of bytes for the suite of the receiver. No tests here."""

import asyncio
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from objectcache.stores.http1 import Head
from objectcache.stores.receiver import (
    Exchange,
    Peer,
    Receiver,
    Sink,
)
from objectcache.stores.stops import LOW_WATER_BYTES

KIB, MIB = 1 << 10, 1 << 20
STEP = LOW_WATER_BYTES  # the least between two stops
NOWHERE: Peer = (socket.AF_INET, ("127.0.0.1", 1))


def head_of(size: int) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size


def run(scenario: Callable[[Receiver], Awaitable[None]], silence_s: float = 5.0) -> None:
    """With a receiver of one thread, so that who is served first is its choice alone."""

    async def main() -> None:
        receiver = Receiver(1, 2.0, silence_s)
        try:
            await scenario(receiver)
        finally:
            began = time.monotonic()
            await receiver.close()
            assert time.monotonic() - began < 1

    before = descriptors(), threading.active_count()
    asyncio.run(asyncio.wait_for(main(), 20))
    assert (descriptors(), threading.active_count()) == before


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Unlike others, it heeds SO_RCVLOWAT; but less can wait in it."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        ours = socket.create_connection(listening.getsockname())
        theirs, _ = listening.accept()
    theirs.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return ours, theirs


class Stream:
    """An exchange of `size` bytes by a socket whose other end is the test's."""

    def __init__(
        self,
        size: int,
        marks: list[int],
        landed: Callable[[int], None] | None = None,
        pair: Callable[[], tuple[socket.socket, socket.socket]] = socket.socketpair,
    ) -> None:
        self.memory = bytearray(size)
        self.body = os.urandom(size)
        self.seen: list[int] = []
        self.also = landed
        self.heads: list[Head] = []
        self.marks = marks
        ours, self.theirs = pair()
        self.theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 * MIB)
        self.theirs.setblocking(False)
        ours.setblocking(False)
        self.exchange = Exchange(b"GET / HTTP/1.1\r\n\r\n", NOWHERE, self.accept, ours)

    def accept(self, head: Head) -> Sink | None:
        self.heads.append(head)
        return Sink(memoryview(self.memory), self.marks, self.landed)

    def landed(self, n: int) -> None:
        assert self.memory[:n] == self.body[:n]
        self.seen.append(n)
        if self.also is not None:
            self.also(n)

    def send(self, first: int, last: int, head: bool = False) -> None:
        """From the server; it must fit into the socket."""
        data = (head_of(len(self.body)) if head else b"") + self.body[first:last]
        assert self.theirs.send(data) == len(data)

    @contextmanager
    def closing(self) -> Iterator[None]:
        yield
        self.theirs.close()
        if self.exchange.sock is not None:
            self.exchange.sock.close()
