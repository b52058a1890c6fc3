"""Bytes from sockets into memory: in which order, until when, and never after the end."""

import asyncio
import os
import socket
import threading
import time
from functools import partial

import pytest
from receiver_lab import (
    KIB,
    MIB,
    NOWHERE,
    STEP,
    Stream,
    head_of,
    run,
    tcp_pair,
)

from objectcache.stores.http1 import Head
from objectcache.stores.receiver import (
    End,
    Exchange,
    Peer,
    Receiver,
    Sink,
)
from objectcache.stores.stops import LOW_WATER_BYTES

# ---- order


def test_streams_that_all_have_something_go_in_step() -> None:
    order: list[tuple[str, int]] = []
    marks = [STEP * i for i in range(1, 5)]
    streams = {
        name: Stream(4 * STEP, marks, lambda n, name=name: order.append((name, n // STEP)))
        for name in "abc"
    }

    held, release = threading.Event(), threading.Event()

    def hold(n: int) -> None:
        held.set()
        assert release.wait(5)

    async def scenario(receiver: Receiver) -> None:
        busy = Stream(1, [], hold)
        with busy.closing():
            busy.send(0, 1, head=True)
            runs = [asyncio.ensure_future(receiver.run(busy.exchange, 10))]
            await asyncio.to_thread(held.wait, 5)
            for stream in streams.values():  # all is there before the thread looks at any
                stream.send(0, 4 * STEP, head=True)
                runs.append(asyncio.ensure_future(receiver.run(stream.exchange, 10)))
            await asyncio.sleep(0)
            release.set()
            await asyncio.gather(*runs)

    run(scenario)
    for stream in streams.values():
        with stream.closing():
            assert stream.exchange.end is End.DONE
            assert stream.memory == stream.body
            assert stream.seen == marks
    levels = [level for _, level in order]
    assert levels == sorted(levels), order


def test_who_begins_late_comes_in_before_the_others_go_on() -> None:
    order: list[tuple[str, int]] = []
    held, release = threading.Event(), threading.Event()
    marks = [STEP * i for i in range(1, 5)]

    def landed(name: str, n: int) -> None:
        order.append((name, n // STEP))
        if not held.is_set():
            held.set()
            assert release.wait(5)

    many = [Stream(4 * STEP, marks, partial(landed, f"early{n}")) for n in range(12)]
    late = Stream(4 * STEP, marks, partial(landed, "late"))

    async def scenario(receiver: Receiver) -> None:
        for stream in many:
            stream.send(0, 0, head=True)
        runs = [asyncio.ensure_future(receiver.run(stream.exchange, 10)) for stream in many]
        while not all(stream.exchange.body for stream in many):
            await asyncio.sleep(0.001)
        many[0].send(0, 4 * STEP)
        await asyncio.to_thread(held.wait, 5)
        for stream in many[1:]:
            stream.send(0, 4 * STEP)
        late.send(0, 4 * STEP, head=True)
        runs.append(asyncio.ensure_future(receiver.run(late.exchange, 10)))
        await asyncio.sleep(0)
        release.set()
        await asyncio.gather(*runs)

    run(scenario)
    for stream in (*many, late):
        with stream.closing():
            assert stream.exchange.end is End.DONE and stream.memory == stream.body
    others = [step for step in order if step[0] not in ("late", "early0")]
    assert order.index(("late", 1)) < order.index(next(step for step in others if step[1] == 2))


def test_nobody_waits_for_a_slow_stream_and_it_catches_up_first() -> None:
    order: list[tuple[str, int]] = []
    held, release = threading.Event(), threading.Event()
    marks = [STEP * i for i in range(1, 9)]

    def fast_landed(n: int) -> None:
        order.append(("fast", n // STEP))
        if n == 4 * STEP:
            held.set()
            assert release.wait(5)

    fast = Stream(8 * STEP, marks, fast_landed)
    slow = Stream(8 * STEP, marks, lambda n: order.append(("slow", n // STEP)))

    async def scenario(receiver: Receiver) -> None:
        slow.send(0, 0, head=True)
        fast.send(0, 4 * STEP, head=True)
        runs = [asyncio.ensure_future(receiver.run(s.exchange, 10)) for s in (slow, fast)]
        await asyncio.to_thread(held.wait, 5)
        assert order == [("fast", i) for i in (1, 2, 3, 4)]  # the slow one had nothing
        fast.send(4 * STEP, 8 * STEP)
        slow.send(0, 4 * STEP)
        release.set()
        while len(order) < 12:
            await asyncio.sleep(0.001)
        slow.send(4 * STEP, 8 * STEP)
        await asyncio.gather(*runs)

    run(scenario)
    for stream in (fast, slow):
        with stream.closing():
            assert stream.memory == stream.body
    assert order[4:8] == [("slow", i) for i in (1, 2, 3, 4)]


# ---- ends


def test_a_kept_connection_carries_the_next_request() -> None:
    async def scenario(receiver: Receiver) -> None:
        ours, theirs = tcp_pair()
        ours.setblocking(False)
        sizes = (3000, MIB, 0, 10)
        for size in sizes:  # a small answer behind a large one: the kernel must tell of it
            body, memory = os.urandom(size), bytearray(size)

            def accept(head: Head, memory: bytearray = memory) -> Sink:
                return Sink(memoryview(memory))

            exchange = Exchange(b"GET", NOWHERE, accept, ours)
            reading = asyncio.ensure_future(receiver.run(exchange, 5))
            await asyncio.to_thread(theirs.sendall, head_of(size) + body)
            await asyncio.wait_for(reading, 2)
            assert exchange.end is End.DONE and exchange.sock is ours
            assert memory == body
        assert theirs.recv(100) == b"GET" * len(sizes)
        ours.close()
        theirs.close()

    run(scenario)


@pytest.mark.parametrize("extra", [0, 1])
def test_bytes_behind_a_body_cost_the_connection(extra: int) -> None:
    async def scenario(receiver: Receiver) -> None:
        stream = Stream(3000, [])
        with stream.closing():
            stream.theirs.send(head_of(3000) + stream.body + b"x" * extra)
            await receiver.run(stream.exchange, 5)
            assert stream.exchange.end is End.DONE
            assert stream.memory == stream.body
            assert (stream.exchange.sock is None) == bool(extra)

    run(scenario)


@pytest.mark.parametrize(
    ("sent", "end", "have"),
    [
        (b"", End.BROKE, 0),
        (b"HTTP/1.1 200 OK\r\nContent-Le", End.BROKE, 0),
        (head_of(1000) + b"x" * 999, End.BROKE, 999),
        (head_of(MIB) + b"x" * 100_000, End.BROKE, 100_000),
        (b"SSH-2.0-OpenSSH\r\n", End.NOT_HTTP, 0),
    ],
)
def test_an_answer_that_breaks_off(sent: bytes, end: End, have: int) -> None:
    async def scenario(receiver: Receiver) -> None:
        memory = bytearray(MIB)
        ours, theirs = socket.socketpair()
        ours.setblocking(False)

        def accept(head: Head) -> Sink:
            return Sink(memoryview(memory)[: head.length])

        exchange = Exchange(b"GET", NOWHERE, accept, ours)
        theirs.send(sent)
        theirs.shutdown(socket.SHUT_WR)
        await receiver.run(exchange, 5)
        theirs.close()
        assert (exchange.end, exchange.have) == (end, have)
        assert exchange.answered == bool(sent)
        assert exchange.sock is None and ours.fileno() == -1
        assert memory[:have] == b"x" * have

    run(scenario)


def test_silence_ends_it_and_what_came_before_is_kept() -> None:
    async def scenario(receiver: Receiver) -> None:
        stream = Stream(MIB, [], pair=tcp_pair)
        with stream.closing():
            stream.send(0, 1000, head=True)  # far less than the kernel waits for
            await asyncio.sleep(0)
            began = time.monotonic()
            reading = asyncio.ensure_future(receiver.run(stream.exchange, 10))
            await asyncio.sleep(0.2)
            stream.send(1000, 70_000)
            await reading
            assert 0.45 < time.monotonic() - began < 1.5
            assert stream.exchange.end is End.SILENT
            assert stream.exchange.have == 70_000
            assert stream.memory[:70_000] == stream.body[:70_000]

    run(scenario, silence_s=0.3)


def test_a_drip_is_no_silence_but_ends_in_time() -> None:
    async def scenario(receiver: Receiver) -> None:
        stream = Stream(MIB, [], pair=tcp_pair)
        with stream.closing():
            stream.send(0, 0, head=True)
            began = time.monotonic()
            reading = asyncio.ensure_future(receiver.run(stream.exchange, 0.8))
            sent = 0
            while not reading.done():
                stream.theirs.send(stream.body[sent : sent + 10])
                sent += 10
                await asyncio.sleep(0.05)
            assert 0.7 < time.monotonic() - began < 1.5
            assert stream.exchange.end is End.LATE
            assert stream.exchange.have > 50

    run(scenario, silence_s=0.3)


def test_nobody_listens() -> None:
    async def scenario(receiver: Receiver) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))  # and does not listen
            exchange = Exchange(b"GET", (socket.AF_INET, taken.getsockname()), lambda head: None)
            await receiver.run(exchange, 5)
        assert exchange.end is End.UNREACHABLE and exchange.sock is None

    run(scenario)


@pytest.mark.parametrize("where", ["accept", "landed"])
def test_what_the_caller_raises_ends_it(where: str) -> None:
    async def scenario(receiver: Receiver) -> None:
        stream = Stream(1000, [])
        raised = ZeroDivisionError()

        def accept(head: Head) -> Sink:
            if where == "accept":
                raise raised
            return Sink(memoryview(stream.memory), (), landed)

        def landed(n: int) -> None:
            raise raised

        with stream.closing():
            stream.exchange.accept = accept
            stream.send(0, 1000, head=True)
            await receiver.run(stream.exchange, 5)
            assert stream.exchange.end is End.RAISED
            assert stream.exchange.error is raised
            assert stream.exchange.sock is None

    run(scenario)


# ---- letting go


@pytest.mark.parametrize("cancels", [1, 3])
def test_a_cancelled_run_waits_for_the_thread_and_nothing_is_written_after(cancels: int) -> None:
    held, release = threading.Event(), threading.Event()

    def landed(n: int) -> None:
        held.set()
        assert release.wait(5)

    async def scenario(receiver: Receiver) -> None:
        stream = Stream(8 * STEP, [STEP], landed)
        with stream.closing():
            stream.send(0, 2 * STEP, head=True)
            reading = asyncio.ensure_future(receiver.run(stream.exchange, 10))
            await asyncio.to_thread(held.wait, 5)
            for _ in range(cancels):
                reading.cancel()
                await asyncio.sleep(0.02)
            assert not reading.done()  # the thread is still in the caller's code
            release.set()
            with pytest.raises(asyncio.CancelledError):
                await reading
            then = bytes(stream.memory)
            assert stream.exchange.sock is None
            with pytest.raises(OSError):
                stream.theirs.send(stream.body[2 * STEP : 4 * STEP])
            await asyncio.sleep(0.05)
            assert stream.memory == then
            assert then[STEP:] == bytes(7 * STEP)
            stream.memory.clear()  # raises if anything still holds it

    run(scenario)


def test_cancelled_before_the_thread_knew_of_it() -> None:
    async def scenario(receiver: Receiver) -> None:
        for turns in range(6):
            stream = Stream(1000, [])
            with stream.closing():
                stream.send(0, 1000, head=True)
                reading = asyncio.ensure_future(receiver.run(stream.exchange, 5))
                for _ in range(turns):
                    await asyncio.sleep(0)
                reading.cancel()
                await asyncio.wait([reading])
                then = bytes(stream.memory)
                await asyncio.sleep(0.005)
                assert stream.memory == then

    run(scenario)


def test_close_ends_what_is_under_way() -> None:
    async def scenario(receiver: Receiver) -> None:
        stream = Stream(1000, [])
        with stream.closing():
            reading = asyncio.ensure_future(receiver.run(stream.exchange, 5))
            await asyncio.sleep(0.01)
            await receiver.close()
            await asyncio.wait_for(reading, 1)
            assert stream.exchange.end is End.DROPPED and stream.exchange.sock is None
            late = Stream(1000, [])
            await receiver.run(late.exchange, 5)
            assert late.exchange.end is End.DROPPED and late.exchange.sock is None
            late.theirs.close()

    run(scenario)


# ---- what it costs


def test_small_packets_do_not_wake_anybody() -> None:
    """The kernel gathers them, and many ends wake the loop once."""
    body = os.urandom(4 * MIB)

    def serve(listening: socket.socket) -> None:
        sock, _ = listening.accept()
        with sock:
            sock.recv(1000)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.sendall(head_of(len(body)))
            for at in range(0, len(body), 8 * KIB):
                sock.sendall(body[at : at + 8 * KIB])
                time.sleep(50e-6)

    async def scenario(receiver: Receiver) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            server = threading.Thread(target=serve, args=(listening,))
            server.start()
            memory = bytearray(len(body))
            peer: Peer = (socket.AF_INET, listening.getsockname())
            exchange = Exchange(b"GET", peer, lambda head: Sink(memoryview(memory)))
            await receiver.run(exchange, 10)
            server.join()
        assert exchange.end is End.DONE and memory == body
        if exchange.sock is not None:
            exchange.sock.close()
        counts = receiver.counts[0]
        assert counts.receives < 60  # of 512 packets
        assert counts.polls < 60
        assert receiver.wakes == 1

    run(scenario)


def test_ends_at_one_time_wake_the_loop_once() -> None:
    streams = [Stream(1000, []) for _ in range(20)]

    async def scenario(receiver: Receiver) -> None:
        for stream in streams:
            stream.send(0, 1000, head=True)
        runs = [asyncio.ensure_future(receiver.run(s.exchange, 5)) for s in streams]
        await asyncio.wait(runs, timeout=0)  # two turns: in the second the thread is woken
        time.sleep(0.2)  # the loop is busy meanwhile
        await asyncio.gather(*runs)
        assert receiver.wakes <= 2

    run(scenario)
    for stream in streams:
        with stream.closing():
            assert stream.memory == stream.body


def test_requests_of_one_time_wake_a_thread_once() -> None:
    async def scenario(receiver: Receiver) -> None:
        async def request(stream: Stream) -> None:
            time.sleep(0.001)  # lets go of the GIL
            await receiver.run(stream.exchange, 5)

        streams = [Stream(1000, []) for _ in range(20)]
        runs = [asyncio.ensure_future(request(stream)) for stream in streams]
        await asyncio.sleep(0.05)  # nobody answers
        assert receiver.counts[0].polls <= 3
        for stream, its in zip(streams, runs, strict=True):
            with stream.closing():
                stream.send(0, 1000, head=True)
                await its
                assert stream.memory == stream.body

    run(scenario)


def test_the_end_of_a_body_does_not_wait_for_more() -> None:
    """What is left may be less than the kernel was told to gather."""
    size = LOW_WATER_BYTES + 3000

    def serve(listening: socket.socket, sent: list[float]) -> None:
        for _ in range(5):
            sock, _ = listening.accept()
            with sock:
                sock.recv(1000)
                sock.sendall(head_of(size) + bytes(size - 1000))
                time.sleep(0.02)
                sent.append(time.monotonic())
                sock.sendall(bytes(1000))
                sock.recv(1000)

    async def scenario(receiver: Receiver) -> None:
        sent: list[float] = []
        late: list[float] = []
        with socket.create_server(("127.0.0.1", 0)) as listening:
            server = threading.Thread(target=serve, args=(listening, sent))
            server.start()
            for _ in range(5):
                memory = bytearray(size)
                peer: Peer = (socket.AF_INET, listening.getsockname())
                exchange = Exchange(
                    b"GET", peer, lambda head, memory=memory: Sink(memoryview(memory))
                )
                await receiver.run(exchange, 10)
                late.append(time.monotonic() - sent[-1])
                assert exchange.end is End.DONE and exchange.sock is not None
                exchange.sock.close()
            server.join()
        assert sorted(late)[2] < 0.03  # the threads look after all sockets each 0.1 s

    run(scenario)
