"""A prefix longer than the ring: each chunk once, in order and verified, whoever else wants slots and whatever the store does."""

import queue
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from fakes import LAYOUT, ScriptedStore, chunk_hash, eventually, loop_thread, sealed
from hypothesis import given, settings
from hypothesis import strategies as st

from objectcache.errors import Corrupt, Denied, NotFound, Unavailable
from objectcache.loop import LoopThread
from objectcache.ring import Ring, shares
from objectcache.shelf import Shelf
from objectcache.streamer import StageResult, Streamer
from objectcache.through import StreamResult


def key(number: int) -> str:
    return f"chunk/{number}"


@dataclass
class Seen:
    """What a stream handed over and how it ended. `copies` is whether its chunks are given back at once."""

    numbers: list[int]
    copies: bool = True
    chunks: list[tuple[int, int]] = field(default_factory=list)  # (chunk, slot), not given back
    came: int = 0
    results: "queue.Queue[StreamResult]" = field(default_factory=queue.Queue)

    def result(self, timeout_s: float = 5.0) -> StreamResult:
        return self.results.get(timeout=timeout_s)


class Rig:
    """A streamer over a scripted store; chunk n is at key(n). Its ring has `slots` slots."""

    def __init__(self, loop: LoopThread, timeout_s: float = 5.0, slots: int = 4) -> None:
        self.loop, self.store = loop, ScriptedStore()
        self.ring = Ring(shares(slots)[0])
        self.memory = [bytearray(LAYOUT.object_bytes) for _ in range(slots)]
        self.staged: queue.Queue[StageResult] = queue.Queue()
        self.streams: dict[int, Seen] = {}
        self.most_leased = 0
        self.shelf = Shelf(self.ring, apart=1)
        self.timeout_s = timeout_s
        self.streamer = self.another()

    def another(self) -> Streamer:
        return Streamer(
            self.loop,
            self.store,
            LAYOUT,
            self.shelf,
            lambda slot: memoryview(self.memory[slot]),
            self.timeout_s,
            self.staged.put,
            [0] * len(self.memory),
        )

    def fill(self, *numbers: int) -> None:
        for number in numbers:
            self.store.put(key(number), sealed(number))

    def stage(self, job: int, *numbers: int) -> None:
        self.streamer.stage(job, [key(n) for n in numbers], [chunk_hash(n) for n in numbers])

    def stream(self, job: int, *numbers: int, copies: bool = True) -> Seen:
        seen = self.streams[job] = Seen(list(numbers), copies)
        keys, hashes = [key(n) for n in numbers], [chunk_hash(n) for n in numbers]
        self.streamer.through.begin(job, keys, hashes, self.arrived, seen.results.put)
        return seen

    def arrived(self, job: int, chunk: int, slot: int) -> None:
        seen = self.streams[job]
        assert chunk == seen.came, "out of order, or twice"
        assert bytes(self.memory[slot]) == sealed(seen.numbers[chunk]), "not what was asked for"
        seen.came += 1
        seen.chunks.append((chunk, slot))
        self.most_leased = max(self.most_leased, self.ring.leased)
        if seen.copies:
            self.copy(job)

    def copy(self, job: int) -> None:
        """The first chunk that lies there is copied and given back."""
        seen = self.streams[job]
        chunk, slot = seen.chunks.pop(0)
        assert bytes(self.memory[slot]) == sealed(seen.numbers[chunk]), (
            "overwritten while it was lent"
        )
        self.streamer.through.give_back(job, chunk)

    def go_on(self, *jobs: int) -> None:
        """From now on chunks of these streams are copied at once."""
        for job in jobs:
            self.loop.call(self._go_on, job)

    def _go_on(self, job: int) -> None:
        self.streams[job].copies = True
        while self.streams[job].chunks:
            self.copy(job)

    def quiet(self) -> bool:
        return eventually(lambda: self.ring.leased == 0 and self.store.busy == 0)


@pytest.fixture
def rig() -> Iterator[Rig]:
    with loop_thread() as loop:
        made = Rig(loop)
        yield made
        assert made.quiet(), "the ledger does not return to zero"
    assert made.staged.empty() and all(s.results.empty() for s in made.streams.values())


@pytest.fixture
def hasty() -> Iterator[Rig]:
    """A rig whose jobs have 0.15 s."""
    with loop_thread() as loop:
        made = Rig(loop, timeout_s=0.15)
        yield made
        assert made.quiet(), "the ledger does not return to zero"
    assert made.staged.empty() and all(s.results.empty() for s in made.streams.values())


def test_more_than_the_ring_holds_comes_whole_and_in_order(rig: Rig) -> None:
    rig.fill(*range(20))
    seen = rig.stream(1, *range(20))
    assert seen.result() == StreamResult(1, 20, None)
    assert seen.came == 20 and rig.most_leased <= 3
    assert rig.store.calls == [("read", key(n)) for n in range(20)]


def test_it_reads_as_far_ahead_as_it_holds_places_and_no_further(rig: Rig) -> None:
    rig.fill(*range(9))
    seen = rig.stream(1, *range(9), copies=False)
    assert eventually(lambda: seen.came == 3)
    time.sleep(0.02)
    assert seen.came == 3 and len(rig.store.calls) == 3 and rig.ring.leased == 3
    rig.copy(1)
    assert eventually(lambda: seen.came == 4)
    rig.go_on(1)
    assert seen.result() == StreamResult(1, 9, None)


def test_what_is_lent_outlasts_the_stream(rig: Rig) -> None:
    """The last chunks are copied after all were read; their slots serve nobody else until then."""
    rig.fill(*range(8))
    seen = rig.stream(1, 0, 1, 2, copies=False)
    assert seen.result() == StreamResult(1, 3, None)
    other = rig.stream(2, *range(3, 8))
    time.sleep(0.02)
    assert other.came == 0 and rig.ring.leased == 3
    for _ in range(3):
        rig.copy(1)
    assert other.result() == StreamResult(2, 5, None)


@pytest.mark.parametrize("bad", [0, 1, 4, 8])
@pytest.mark.parametrize(
    "wrong",
    [
        {"flip": LAYOUT.offsets[1] + 5},
        {"error": Denied("no."), "landing": 100},
        {"error": NotFound("gone.")},
        {"stops": True, "landing": LAYOUT.object_bytes - 1},
        {"error": ValueError("a bug in a store")},
    ],
    ids=lambda wrong: "-".join(wrong),
)
def test_what_fails_ends_it_there(rig: Rig, bad: int, wrong: dict) -> None:
    rig.fill(*range(9))
    rig.store.script("read", key(bad), **wrong)
    seen = rig.stream(1, *range(9))
    result = seen.result()
    expected = type(wrong.get("error", Corrupt("")))
    assert type(result.error) is (Unavailable if expected is ValueError else expected)
    assert (result.came, result.failed_key, seen.came) == (bad, key(bad), bad)


def test_a_slow_store_has_its_time_for_each_chunk(hasty: Rig) -> None:
    """0.15 s without progress, and not for the whole."""
    hasty.fill(*range(8))
    gates = [threading.Event() for _ in range(8)]
    for number, gate in enumerate(gates):
        hasty.store.script("read", key(number), gate=gate)
    seen = hasty.stream(1, *range(8))
    for gate in gates:
        time.sleep(0.05)
        gate.set()
    assert seen.result() == StreamResult(1, 8, None)


def test_a_chunk_that_does_not_come_ends_it_in_time(hasty: Rig) -> None:
    hasty.fill(*range(8))
    hasty.store.script("read", key(5), gate=threading.Event(), landing=4000)
    began = time.monotonic()
    seen = hasty.stream(1, *range(8))
    result = seen.result()
    assert 0.14 <= time.monotonic() - began < 1.0
    assert isinstance(result.error, Unavailable) and "stage_timeout_ms" in result.error.hint
    assert (result.came, result.failed_key) == (5, key(5))


def test_a_crawling_store_ends_it_too(hasty: Rig) -> None:
    """It has as long as staging two chunks after two would have: 4 times 0.15 s."""
    numbers = range(8)
    hasty.fill(*numbers)
    for number in numbers:
        gate = threading.Event()
        hasty.store.script("read", key(number), gate=gate)
        threading.Timer(0.12 * (number + 1), gate.set).start()
    began = time.monotonic()
    result = hasty.stream(1, *numbers).result()
    assert 0.55 <= time.monotonic() - began < 0.9
    assert isinstance(result.error, Unavailable) and 3 <= result.came <= 5
    time.sleep(0.5)  # the timers end


def test_an_engine_that_copies_late_is_not_the_stores_fault(hasty: Rig) -> None:
    hasty.fill(*range(9))
    seen = hasty.stream(1, *range(9), copies=False)
    assert eventually(lambda: seen.came == 3)
    time.sleep(0.4)
    assert seen.results.empty()
    hasty.go_on(1)
    assert seen.result() == StreamResult(1, 9, None)


def test_no_room_in_time(hasty: Rig) -> None:
    hasty.fill(1)
    slots = hasty.ring.lease(3)
    result = hasty.stream(1, 1).result()
    assert isinstance(result.error, Unavailable) and "ring_bytes" in result.error.hint
    assert hasty.store.calls == []
    hasty.ring.release(slots)


# ---- with others


def test_what_is_staged_and_waits_for_vllm_does_not_stop_a_stream(rig: Rig) -> None:
    """vLLM may admit it only when the stream has ended and its blocks are free."""
    rig.fill(*range(12))
    rig.stage(1, 10, 11)
    assert len(rig.staged.get(timeout=5).slots) == 2
    rig.stage(2, 10, 9)  # never gets room: the other keeps its places
    assert rig.stream(3, *range(8)).result() == StreamResult(3, 8, None)
    assert eventually(lambda: rig.ring.leased == 2)
    rig.streamer.release(1)
    assert len(rig.staged.get(timeout=5).slots) == 2
    rig.streamer.release(2)


def test_streams_do_not_keep_a_stage_waiting(rig: Rig) -> None:
    """Two streams have the whole ring; who waits gets what they give back, and they go on by the rest."""
    rig.fill(*range(40))
    first = rig.stream(1, *range(15), copies=False)
    second = rig.stream(2, *range(15, 30), copies=False)
    assert eventually(lambda: rig.ring.leased == 3 and first.came + second.came == 3)
    rig.stage(3, 30, 31)
    deadline = time.monotonic() + 5
    copied = 0
    while rig.staged.empty():
        assert time.monotonic() < deadline
        for job in (1, 2):
            if rig.streams[job].chunks:
                rig.copy(job)
                copied += 1
        time.sleep(0.002)
    assert copied <= 6, "they took slots that somebody waited for"
    assert len(rig.staged.get().slots) == 2
    rig.go_on(1, 2)
    assert (first.result().came, second.result().came) == (15, 15)  # by one slot
    rig.streamer.release(3)


def test_two_streams_share(rig: Rig) -> None:
    rig.fill(*range(40))
    first = rig.stream(1, *range(20), copies=False)
    assert eventually(lambda: first.came == 3)
    second = rig.stream(2, *range(20, 40), copies=False)
    for turn in range(12):
        for job in (1, 2):
            if rig.streams[job].chunks:
                rig.copy(job)
        assert eventually(lambda least=4 + turn: first.came + second.came >= least)
    assert second.came >= 4
    rig.go_on(1, 2)
    assert (first.result().came, second.result().came) == (20, 20)


def test_what_another_brings_is_not_read_again(rig: Rig) -> None:
    rig.fill(*range(8))
    rig.stage(1, 0, 1)
    staged = rig.staged.get(timeout=5)
    assert rig.stream(2, *range(8)).result().came == 8
    assert rig.store.calls == [("read", key(n)) for n in range(8)]
    assert bytes(rig.memory[staged.slots[0]]) == sealed(0)
    rig.streamer.release(1)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 30), slots=st.integers(2, 9))
def test_all_make_progress_on_any_ring(seed: int, slots: int) -> None:
    """Streams, stages that are given back late, failures and cancels: each ends, and all slots return."""
    dice = random.Random(seed)
    with loop_thread() as loop:
        rig = Rig(loop, timeout_s=30.0, slots=slots)
        rig.fill(*range(30))
        for number in dice.sample(range(30), 4):
            rig.store.script("read", key(number), error=Unavailable("gone."), landing=50, times=1)
        most = rig.shelf.most
        stages = [job for job in range(1, 4) if most]
        for job in stages:
            first = dice.randrange(30 - most)
            rig.stage(job, *range(first, first + dice.randint(1, most)))
        seen = []
        for job in range(10, 10 + dice.randint(1, 3)):
            first = dice.randrange(10)
            seen.append(rig.stream(job, *range(first, first + dice.randint(1, 20))))
        if dice.random() < 0.3:
            rig.streamer.through.cancel(10)
        late = dice.random() < 0.5
        if late:  # vLLM admits none of those that are staged before the streams have ended
            results = [one.result(10) for one in seen]
        for _ in stages:
            rig.streamer.release(rig.staged.get(timeout=10).job)
        if not late:
            results = [one.result(10) for one in seen]
        for one, result in zip(seen, results, strict=True):
            assert one.came == result.came
            assert result.error is not None or result.came == len(one.numbers) or result.job == 10
        assert rig.quiet()


# ---- the end before the end


def test_cancel_of_a_stream_that_nobody_knows_does_nothing(rig: Rig) -> None:
    rig.streamer.through.cancel(5)


@pytest.mark.parametrize("turns", range(16))
def test_cancel_at_any_turn_of_the_loop(rig: Rig, turns: int) -> None:
    """Whenever it comes, the stream ends once, and all slots go back."""
    rig.fill(*range(5))

    def later(left: int) -> None:
        if left:
            rig.loop.call(later, left - 1)
        else:
            rig.streamer.through.cancel(1)

    held = threading.Event()
    rig.loop.call(held.wait)
    seen = rig.stream(1, *range(5))
    rig.loop.call(later, turns)
    held.set()
    result = seen.result()
    assert (result.error, result.failed_key, result.came) == (None, "", seen.came)


def test_cancel_leaves_what_is_lent_to_who_has_it(rig: Rig) -> None:
    rig.fill(*range(5))
    rig.store.script("read", key(2), gate=threading.Event(), landing=10, lingers_s=0.05)
    seen = rig.stream(1, *range(5), copies=False)
    assert eventually(lambda: seen.came == 2)
    rig.streamer.through.cancel(1)
    assert seen.result() == StreamResult(1, 2, None)
    assert eventually(lambda: rig.ring.leased == 2)
    rig.copy(1), rig.copy(1)


def test_the_end_of_the_loop_gives_every_slot_back() -> None:
    with loop_thread() as loop:
        rig = Rig(loop)
        rig.fill(*range(6))
        for number in (2, 3):
            rig.store.script("read", key(number), gate=threading.Event(), landing=10)
        first = rig.stream(1, *range(6), copies=False)
        rig.stream(2, *range(3, 6))
        assert eventually(lambda: first.came == 2)
    assert first.results.get_nowait() == StreamResult(1, 2, None)
    assert rig.streams[2].results.get_nowait().came == 0
    assert rig.ring.leased == 2 and rig.store.busy == 0
    rig.streamer.through.abandon(1)
    assert rig.ring.leased == 0


def test_what_a_streamer_gives_back_serves_its_successor(rig: Rig) -> None:
    """As after a change of the namespace: the old one's last chunks are still being copied."""
    rig.fill(*range(9))
    old = rig.streamer
    seen = rig.stream(1, 0, 1, 2, copies=False)
    assert seen.result().came == 3
    rig.streamer = rig.another()
    old.succeeded_by(rig.streamer)
    rig.stage(2, 4, 5)
    other = rig.stream(3, 6, 7, 8)
    time.sleep(0.02)
    assert rig.staged.empty() and other.came == 0
    for chunk in range(3):
        old.through.give_back(1, chunk)
    assert len(rig.staged.get(timeout=2).slots) == 2
    assert other.result(2).came == 3
    rig.streamer.release(2)
