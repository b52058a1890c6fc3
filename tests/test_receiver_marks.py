"""Where a receiver stops to tell what is there. What else it does: test_receiver.py."""

import asyncio
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from receiver_lab import MIB, STEP, Stream, run, tcp_pair

from objectcache.stores.receiver import End, Receiver
from objectcache.stores.stops import PIECE_BYTES, stops_of


@given(st.lists(st.integers(1, 5 * MIB), max_size=20), st.integers(0, 6 * MIB))
def test_stops_are_near_the_marks_and_pieces_of_a_sensible_size(gaps: list[int], size: int) -> None:
    marks = [sum(gaps[: i + 1]) for i in range(len(gaps))]
    stops = stops_of(tuple(marks), size)
    assert stops[-1] == size
    assert list(stops) == sorted(set(stops))
    ends = list(zip([0, *stops], stops, strict=False))
    assert all(b - a <= 1.5 * PIECE_BYTES for a, b in ends)
    first = bool(marks) and stops[0] == marks[0]  # that one counts however small it is
    assert all(b - a >= STEP for a, b in ends[first:-1])
    assert not marks or marks[0] >= size or first or marks[0] > PIECE_BYTES
    for mark in marks:
        if mark <= size:
            assert any(mark <= stop < mark + 1.5 * PIECE_BYTES for stop in stops)


def test_slices_of_a_layer_are_one_piece_each() -> None:
    marks = tuple(4096 + i * MIB for i in range(5))
    assert stops_of(marks, marks[-1]) == marks


@pytest.mark.parametrize("with_head", [5000, 100, 0])
def test_a_first_mark_is_told_however_little_came(with_head: int) -> None:
    """Of an object it is the header; the rest comes when the test has seen that."""
    told = threading.Event()
    size = STEP + 3000
    marks = [4096, size]
    stream = Stream(size, marks, lambda n: told.set(), pair=tcp_pair)

    async def scenario(receiver: Receiver) -> None:
        running = asyncio.ensure_future(receiver.run(stream.exchange, 10))
        stream.send(0, with_head, head=True)
        await asyncio.sleep(0.05)
        stream.send(with_head, 5000)
        assert await asyncio.to_thread(told.wait, 5)
        assert stream.seen[0] in (4096, with_head, 5000) and not running.done()
        stream.send(5000, size)
        await running

    run(scenario)
    with stream.closing():
        assert stream.exchange.end is End.DONE and stream.memory == stream.body
        assert stream.seen[-1] == size and len(stream.seen) <= 5
