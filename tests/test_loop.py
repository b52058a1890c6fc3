"""The loop's thread: work reaches it, its end is bounded, and nothing is left behind."""

import asyncio
import inspect
import threading
import time

import pytest
from fakes import eventually, loop_thread

from objectcache.loop import LoopThread


def test_calls_run_on_the_loop_in_their_order() -> None:
    with loop_thread("test-calls") as loop:
        ran: list[object] = []
        for number in range(100):
            loop.call(ran.append, number)
        loop.call(lambda: ran.append(threading.current_thread().name))
        assert eventually(lambda: len(ran) == 101)
    assert ran == [*range(100), "test-calls"]


def test_submit_gives_the_answer_or_the_error() -> None:
    async def divide(by: int) -> int:
        return 4 // by

    with loop_thread() as loop:
        assert loop.submit(divide(2)).result(2.0) == 2
        with pytest.raises(ZeroDivisionError):
            loop.submit(divide(0)).result(2.0)


def test_a_bug_in_the_background_is_logged_and_the_loop_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def bug() -> None:
        raise ZeroDivisionError

    with loop_thread() as loop:
        loop.call(lambda: loop.spawn(bug()))
        assert eventually(lambda: "a bug in the background" in caplog.text)
        assert loop.submit(asyncio.sleep(0, "alive")).result(2.0) == "alive"


def test_stop_cancels_runs_the_last_and_ends_the_thread() -> None:
    events: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            events.append("cancelled")

    async def last() -> None:
        events.append("last")

    with loop_thread() as loop:
        loop.call(lambda: loop.spawn(work()))
        loop.stop(last(), 2.0)
        assert events == ["cancelled", "last"]
        loop.stop(None, 2.0)
        again = last()
        loop.stop(again, 2.0)
        assert inspect.getcoroutinestate(again) == inspect.CORO_CLOSED
        loop.call(events.append, "too late")
        time.sleep(0.01)
    assert events == ["cancelled", "last"]


def test_work_that_was_spawned_but_had_no_turn_cleans_up_too() -> None:
    cleaned: list[int] = []

    async def work(number: int) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            cleaned.append(number)

    def next_turn() -> None:
        asyncio.get_running_loop().call_soon(lambda: loop.spawn(work(2)))

    with loop_thread() as loop:
        held = threading.Event()
        loop.call(held.wait)
        loop.call(lambda: loop.spawn(work(1)))
        loop.call(next_turn)  # spawned after the end began, and before its first step
        stopping = threading.Thread(target=loop.stop, args=(None, 2.0))
        stopping.start()
        time.sleep(0.02)
        held.set()
        stopping.join(5.0)
    assert sorted(cleaned) == [1, 2]


def test_work_that_is_spawned_while_the_loop_ends_is_ended_too() -> None:
    cleaned: list[int] = []

    with loop_thread() as loop:

        async def work(left: int) -> None:
            try:
                await asyncio.sleep(60)
            finally:
                cleaned.append(left)
                if left:
                    loop.spawn(work(left - 1))

        loop.call(lambda: loop.spawn(work(3)))
    assert cleaned == [3, 2, 1, 0]


def test_work_that_will_not_end_is_left_after_the_time_is_up() -> None:
    let_go = threading.Event()

    async def stubborn() -> None:
        while not let_go.is_set():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                continue

    ran: list[str] = []

    async def last() -> None:
        ran.append("last")

    loop = LoopThread("test-stubborn")
    loop.call(lambda: loop.spawn(stubborn()))
    began, closing = time.monotonic(), last()
    loop.stop(closing, 0.2)
    assert 0.15 < time.monotonic() - began < 1.0
    assert ran == [] and inspect.getcoroutinestate(closing) == inspect.CORO_CLOSED
    assert eventually(lambda: "test-stubborn" not in {t.name for t in threading.enumerate()})
    let_go.set()


def test_a_last_that_hangs_is_left_too() -> None:
    loop = LoopThread("test-last")
    began = time.monotonic()
    loop.stop(asyncio.sleep(60), 0.2)
    assert 0.15 < time.monotonic() - began < 1.0
    assert eventually(lambda: "test-last" not in {t.name for t in threading.enumerate()})


def test_a_last_that_fails_still_ends_the_thread() -> None:
    async def last() -> None:
        raise ValueError("a bug in a store's close")

    with loop_thread() as loop:
        loop.stop(last(), 1.0)
