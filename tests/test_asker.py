"""Answers that are a head alone: until when they are waited for, and which connections go on."""

import asyncio
import os
import socket
import time
from collections.abc import Awaitable, Callable

import pytest

from objectcache.stores.asker import Asker
from objectcache.stores.connections import Connections
from objectcache.stores.http1 import Head
from objectcache.stores.receiver import End, Exchange, Peer

GOOD = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"
REQUEST = b"HEAD /x HTTP/1.1\r\n\r\n"


class Server:
    """Takes one connection after the other; what is sent is the test's."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.peer: Peer = (socket.AF_INET, self._listening.getsockname())
        self.port = self._listening.getsockname()[1]

    async def accept(self) -> socket.socket:
        theirs, _ = await asyncio.to_thread(self._listening.accept)
        theirs.settimeout(5)
        return theirs

    def close(self) -> None:
        self._listening.close()


def run(scenario: Callable[[Asker, Server], Awaitable[None]], silence_s: float = 5.0) -> None:
    async def main() -> None:
        asker, server = Asker(2.0, silence_s), Server()
        try:
            await scenario(asker, server)
        finally:
            asker.close()
            server.close()

    before = len(os.listdir("/proc/self/fd"))
    asyncio.run(asyncio.wait_for(main(), 20))
    assert len(os.listdir("/proc/self/fd")) == before


def asked(peer: Peer, sock: socket.socket | None = None, request: bytes = REQUEST) -> Exchange:
    heads: list[Head] = []

    def accept(head: Head) -> None:
        heads.append(head)

    return Exchange(request, peer, accept, sock)


async def opened(asker: Asker, server: Server) -> tuple[socket.socket, socket.socket]:
    """A connection that has carried an answer: our end and theirs."""
    exchange = asked(server.peer)
    asking = asyncio.ensure_future(asker.run(exchange, 5))
    theirs = await server.accept()
    theirs.send(GOOD)
    await asking
    assert exchange.end is End.DONE and exchange.sock is not None
    assert theirs.recv(1000) == REQUEST
    return exchange.sock, theirs


def test_a_connection_carries_the_next_request() -> None:
    async def scenario(asker: Asker, server: Server) -> None:
        ours, theirs = await opened(asker, server)
        for answer in (GOOD, b"HTTP/1.1 100 Continue\r\n\r\n" + GOOD):
            exchange = asked(server.peer, ours)
            asking = asyncio.ensure_future(asker.run(exchange, 5))
            for at in range(0, len(answer), 7):
                await asyncio.sleep(0.001)
                theirs.send(answer[at : at + 7])
            await asking
            assert exchange.end is End.DONE and exchange.sock is ours and exchange.answered
        ours.close()
        theirs.close()

    run(scenario)


@pytest.mark.parametrize(
    ("sent", "end"),
    [
        (b"", End.BROKE),
        (GOOD[:20], End.BROKE),
        (b"SSH-2.0-OpenSSH\r\n", End.NOT_HTTP),
        (GOOD + b"x", End.DONE),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\n", End.DONE),
        (GOOD[:-2] + b"Connection: close\r\n\r\n", End.DONE),
    ],
)
def test_answers_that_cost_the_connection(sent: bytes, end: End) -> None:
    async def scenario(asker: Asker, server: Server) -> None:
        ours, theirs = await opened(asker, server)
        exchange = asked(server.peer, ours)
        asking = asyncio.ensure_future(asker.run(exchange, 5))
        await asyncio.sleep(0)
        theirs.send(sent)
        theirs.shutdown(socket.SHUT_WR)
        await asking
        assert exchange.end is end and exchange.answered == bool(sent)
        assert exchange.sock is None and ours.fileno() == -1
        theirs.close()

    run(scenario)


@pytest.mark.parametrize("left", [b"", b"x"])
def test_what_happens_to_an_idle_connection_is_seen_by_who_would_use_it(left: bytes) -> None:
    """The server closed it, or said what nobody asked for."""

    async def scenario(asker: Asker, server: Server) -> None:
        connections = Connections("127.0.0.1", server.port, 4, 1.0)
        peer = await connections.choose()
        ours, theirs = await opened(asker, server)
        connections.give_back(peer, ours)
        theirs.send(left)
        if not left:
            theirs.close()
        began = time.process_time()
        await asyncio.sleep(0.2)
        assert time.process_time() - began < 0.15  # the loop does not look at it again and again
        assert connections.take() is None and ours.fileno() == -1
        theirs.close()

    run(scenario)


def test_the_next_connection_of_a_descriptor_is_heard() -> None:
    async def scenario(asker: Asker, server: Server) -> None:
        pairs = [await opened(asker, server) for _ in range(4)]
        before = {ours.fileno() for ours, _ in pairs}
        for ours, _ in pairs:
            ours.close()
        pairs += [await opened(asker, server) for _ in range(4)]
        assert before & {ours.fileno() for ours, _ in pairs[4:]}
        for ours, theirs in pairs:
            ours.close()
            theirs.close()

    run(scenario, silence_s=0.5)


def test_silence_and_a_drip_end_in_time() -> None:
    async def scenario(asker: Asker, server: Server) -> None:
        ours, theirs = await opened(asker, server)
        began = time.monotonic()
        exchange = asked(server.peer, ours)
        await asker.run(exchange, 10)
        assert exchange.end is End.SILENT and exchange.sock is None
        assert 0.25 < time.monotonic() - began < 2
        theirs.close()

        ours, theirs = await opened(asker, server)
        began = time.monotonic()
        exchange = asked(server.peer, ours)
        asking = asyncio.ensure_future(asker.run(exchange, 0.8))
        drip = iter(b"HTTP/1.1 200 OK\r\nA: " + b"a" * 1000)
        while not asking.done():
            theirs.send(bytes([next(drip)]))
            await asyncio.sleep(0.05)
        assert exchange.end is End.LATE and exchange.sock is None
        assert 0.7 < time.monotonic() - began < 2.5
        theirs.close()

    run(scenario, silence_s=0.3)


def test_nobody_listens() -> None:
    async def scenario(asker: Asker, server: Server) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))  # and does not listen
            exchange = asked((socket.AF_INET, taken.getsockname()))
            await asker.run(exchange, 5)
        assert exchange.end is End.UNREACHABLE and exchange.sock is None

    run(scenario)


@pytest.mark.parametrize("turns", [0, 1, 2, 5, 50])
def test_cancelled_at_any_time_it_lets_go_of_the_connection(turns: int) -> None:
    async def scenario(asker: Asker, server: Server) -> None:
        ours, theirs = await opened(asker, server)
        calls = [asked(server.peer), asked(server.peer, ours)]
        tasks = [asyncio.ensure_future(asker.run(call, 5)) for call in calls]
        for _ in range(turns):
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        if turns:
            assert [call.sock for call in calls] == [None, None]
        ours.close()
        theirs.close()

    run(scenario)


def test_a_request_that_the_socket_does_not_take_at_once() -> None:
    async def scenario(asker: Asker, server: Server) -> None:
        ours, theirs = await opened(asker, server)
        exchange = asked(server.peer, ours, bytes(16 << 20))
        await asker.run(exchange, 10)
        assert exchange.end is End.BROKE and exchange.sock is None
        theirs.close()

    run(scenario)


def test_close_ends_what_is_connecting() -> None:
    async def scenario(asker: Asker, server: Server) -> None:
        with socket.create_server(("127.0.0.1", 0), backlog=0) as silent:
            full = [socket.socket() for _ in range(4)]  # its queue: it hears nobody else
            for one in full:
                one.setblocking(False)
                one.connect_ex(silent.getsockname())
            exchange = asked((socket.AF_INET, silent.getsockname()))
            asking = asyncio.ensure_future(asker.run(exchange, 10))
            await asyncio.sleep(0.05)
            assert exchange.connecting and not asking.done()
            asker.close()
            await asyncio.wait_for(asking, 1)
            assert exchange.end is End.UNREACHABLE and exchange.sock is None
            for one in full:
                one.close()

    run(scenario)


def test_close_ends_what_is_asked() -> None:
    async def scenario(asker: Asker, server: Server) -> None:
        ours, theirs = await opened(asker, server)
        exchange = asked(server.peer, ours)
        asking = asyncio.ensure_future(asker.run(exchange, 5))
        await asyncio.sleep(0.01)
        asker.close()
        await asyncio.wait_for(asking, 1)
        assert exchange.end is End.DROPPED and exchange.sock is None
        late = asked(server.peer)
        await asker.run(late, 5)
        assert late.end is End.DROPPED and late.sock is None
        theirs.close()

    run(scenario)
