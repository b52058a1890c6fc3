"""Which of several bodies is received first. For all else of the receiver see test_receiver.py."""

import asyncio
import threading
from functools import partial

from receiver_lab import (
    STEP,
    Stream,
    run,
)

from objectcache.stores.receiver import (
    End,
    Receiver,
)

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


def test_what_lies_further_to_the_front_of_its_object_goes_first() -> None:
    """Parts of one object, or of several: the layers that are needed first."""
    order: list[tuple[str, int]] = []
    held, release = threading.Event(), threading.Event()
    marks = [STEP * i for i in range(1, 5)]

    def hold(n: int) -> None:
        held.set()
        assert release.wait(5)

    parts = {
        name: Stream(
            4 * STEP, marks, partial(lambda name, n: order.append((name, n)), name), before=at
        )
        for name, at in (("last", 8 * STEP), ("middle", 4 * STEP), ("first", 0))
    }

    async def scenario(receiver: Receiver) -> None:
        busy = Stream(1, [], hold)
        with busy.closing():
            busy.send(0, 1, head=True)
            runs = [asyncio.ensure_future(receiver.run(busy.exchange, 10))]
            await asyncio.to_thread(held.wait, 5)
            for stream in parts.values():  # all is there before the thread looks at any
                stream.send(0, 4 * STEP, head=True)
                runs.append(asyncio.ensure_future(receiver.run(stream.exchange, 10)))
            await asyncio.sleep(0)
            release.set()
            await asyncio.gather(*runs)

    run(scenario)
    for stream in parts.values():
        with stream.closing():
            assert stream.exchange.end is End.DONE and stream.memory == stream.body
    # With the head of an answer comes what was sent with it: of that there is no choice.
    chosen = [name for name, n in order if n > STEP]
    assert chosen == ["first"] * 3 + ["middle"] * 3 + ["last"] * 3, order


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
