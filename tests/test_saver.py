"""The way out: what becomes of a slot that holds a chunk's pages, whatever the store does."""

import queue
import threading
import time
from collections.abc import Iterator

import pytest
from fakes import LAYOUT, ScriptedStore, chunk_hash, eventually, loop_thread, sealed

from objectcache.breaker import FAILURES_TO_OPEN, FIRST_PAUSE_S
from objectcache.errors import Denied, ObjectCacheError, Unavailable
from objectcache.ring import Ring
from objectcache.saver import SPOILT_MAX, Saver, SaveResult

Outcome = tuple[bytes, str, ObjectCacheError | None]


def key(number: int) -> str:
    return f"chunk/{number}"


class Rig:
    """A saver over a scripted store."""

    def __init__(self, loop) -> None:
        self.loop = loop
        self.store = ScriptedStore()
        self.ring = Ring(range(16))
        self.memory = [bytearray(LAYOUT.object_bytes) for _ in range(16)]
        self.outcomes: queue.Queue[Outcome] = queue.Queue()
        self.saver = Saver(
            loop,
            self.store,
            LAYOUT,
            lambda slot: memoryview(self.memory[slot]),
            self.saved,
        )

    def saved(self, result: SaveResult) -> None:
        self.ring.release([result.slot])
        self.outcomes.put((result.chunk_hash, result.outcome, result.error))

    def save(self, number: int) -> int:
        """Put the pages of chunk `number` into a slot, and the slot on its way."""
        leased = self.ring.lease(1)
        assert leased is not None
        (slot,) = leased
        body = sealed(number)
        self.memory[slot][:] = b"\x55" * LAYOUT.header_bytes + body[LAYOUT.header_bytes :]
        self.saver.save(key(number), chunk_hash(number), slot)
        return slot

    def outcome(self) -> Outcome:
        return self.outcomes.get(timeout=5.0)

    def spoilt(self, number: int) -> None:
        self.loop.call(self.saver.spoilt, key(number))


@pytest.fixture
def rig() -> Iterator[Rig]:
    with loop_thread() as loop:
        made = Rig(loop)
        yield made
        assert eventually(lambda: made.ring.leased == 0), "the ledger does not return to zero"
    assert made.outcomes.empty(), "an upload reported twice, or unasked"
    assert made.store.busy == 0


def test_a_chunk_is_written_as_the_format_says(rig: Rig) -> None:
    rig.save(1)
    assert rig.outcome() == (chunk_hash(1), "written", None)
    assert rig.store.body(key(1)) == sealed(1)


def test_a_chunk_that_exists_is_left_as_it_is(rig: Rig) -> None:
    rig.store.put(key(1), b"whatever")
    rig.save(1)
    assert rig.outcome() == (chunk_hash(1), "existed", None)
    assert rig.store.body(key(1)) == b"whatever"
    assert rig.store.calls == [("head", key(1))]  # its bytes were not sent


def test_a_chunk_that_came_to_exist_meanwhile_is_left_as_it_is(rig: Rig) -> None:
    gate = threading.Event()
    rig.store.script("write", key(1), gate=gate)
    rig.save(1)
    assert eventually(lambda: ("write", key(1)) in rig.store.calls)
    rig.store.put(key(1), b"whatever")
    gate.set()
    assert rig.outcome() == (chunk_hash(1), "existed", None)
    assert rig.store.body(key(1)) == b"whatever"


def test_the_slot_is_kept_until_the_upload_ends(rig: Rig) -> None:
    gate = threading.Event()
    rig.store.script("write", key(1), gate=gate)
    slot = rig.save(1)
    assert eventually(lambda: rig.store.busy == 1)
    free = rig.ring.lease(rig.ring.slots - 1)
    assert free is not None and slot not in free and rig.ring.lease(1) is None
    gate.set()
    assert rig.outcome()[1] == "written"
    assert eventually(lambda: rig.ring.leased == len(free))
    rig.ring.release(free)


@pytest.mark.parametrize("error", [Unavailable("503."), Denied("403.")])
def test_a_store_that_refuses_costs_only_the_chunk(rig: Rig, error: ObjectCacheError) -> None:
    rig.store.script("write", key(1), error=error)
    rig.save(1)
    assert rig.outcome() == (chunk_hash(1), "failed", error)
    rig.save(2)
    assert rig.outcome() == (chunk_hash(2), "written", None)


def test_a_bug_in_a_store_gives_the_slot_back_and_reports(rig: Rig) -> None:
    rig.store.script("write", key(1), error=ValueError("a bug"))
    rig.save(1)
    assert rig.outcome()[:2] == (chunk_hash(1), "failed")


# ---- spoilt objects


def test_a_spoilt_object_is_replaced_once(rig: Rig) -> None:
    rig.store.put(key(1), b"corrupt")
    rig.spoilt(1)
    rig.save(1)
    assert rig.outcome()[1] == "written"
    assert rig.store.body(key(1)) == sealed(1)
    rig.save(1)
    assert rig.outcome()[1] == "existed"
    assert [call for call in rig.store.calls if call[0] == "delete"] == [("delete", key(1))]


def test_a_spoilt_object_that_cannot_be_deleted_stays_marked(rig: Rig) -> None:
    rig.store.put(key(1), b"corrupt")
    rig.store.script("delete", key(1), error=Unavailable("503."), times=1)
    rig.spoilt(1)
    rig.save(1)
    assert rig.outcome()[1] == "failed"
    rig.save(1)
    assert rig.outcome()[1] == "written"
    assert rig.store.body(key(1)) == sealed(1)


def test_two_saves_of_one_spoilt_object_at_once(rig: Rig) -> None:
    """Two requests computed it; neither upload may break, nor undo the other."""
    rig.store.put(key(1), b"corrupt")
    gate = threading.Event()
    rig.store.script("delete", key(1), gate=gate)
    rig.spoilt(1)
    rig.save(1)
    rig.save(1)
    assert eventually(lambda: rig.store.busy >= 1)
    time.sleep(0.02)
    gate.set()
    assert {rig.outcome()[1], rig.outcome()[1]} <= {"written", "existed"}
    assert rig.store.body(key(1)) == sealed(1)


def test_spoilt_marks_are_bounded(rig: Rig) -> None:
    """The mark of an object is lost after many others; it may also go while its delete runs."""
    rig.store.put(key(1), b"corrupt")
    gate = threading.Event()
    rig.store.script("delete", key(1), gate=gate)
    rig.spoilt(1)
    rig.save(1)
    assert eventually(lambda: rig.store.busy == 1)
    for number in range(2, SPOILT_MAX + 9):
        rig.spoilt(number)
    gate.set()
    assert rig.outcome()[1] == "written"
    assert rig.loop.submit(_size(rig.saver)).result(5.0) <= SPOILT_MAX


async def _size(saver: Saver) -> int:
    return len(saver._spoilt)


# ---- the breaker


def test_a_sick_store_is_left_alone_and_tried_again(rig: Rig) -> None:
    for number in range(FAILURES_TO_OPEN):
        rig.store.script("write", key(number), error=Unavailable("503."))
        rig.save(number)
        assert rig.outcome()[1] == "failed"
    sent = len(rig.store.calls)
    for number in range(10, 13):
        rig.save(number)
        assert rig.outcome() == (chunk_hash(number), "failed", None)
    assert len(rig.store.calls) == sent, "the store was asked although it is sick"
    time.sleep(FIRST_PAUSE_S)
    rig.save(20)
    assert rig.outcome()[1] == "written"
    rig.save(21)
    assert rig.outcome()[1] == "written"


def test_failures_that_others_follow_with_success_do_not_open_it(rig: Rig) -> None:
    for number in range(3 * FAILURES_TO_OPEN):
        if number % FAILURES_TO_OPEN:
            rig.store.script("write", key(number), error=Unavailable("503."))
        rig.save(number)
        assert rig.outcome()[1] == ("failed" if number % FAILURES_TO_OPEN else "written")


# ---- the end


def test_drain_waits_for_all_uploads(rig: Rig) -> None:
    gate = threading.Event()
    for number in range(3):
        rig.store.script("write", key(number), gate=gate)
        rig.save(number)
    drained = rig.loop.submit(rig.saver.drain())
    time.sleep(0.03)
    assert not drained.done()
    gate.set()
    drained.result(5.0)
    assert rig.ring.leased == 0
    assert [rig.outcome()[1] for _ in range(3)] == ["written"] * 3


def test_drain_of_nothing_ends_at_once(rig: Rig) -> None:
    rig.loop.submit(rig.saver.drain()).result(1.0)


def test_the_end_of_the_loop_ends_uploads_and_gives_slots_back() -> None:
    """Those that wait for the store, and one that had no turn yet."""
    with loop_thread() as loop:
        rig = Rig(loop)
        rig.store.script("write", key(1), gate=threading.Event())
        rig.save(1)
        assert eventually(lambda: rig.store.busy == 1)
        held = threading.Event()
        loop.call(held.wait)
        rig.store.script("write", key(2), gate=threading.Event())
        rig.save(2)
        threading.Timer(0.05, held.set).start()
    assert rig.ring.leased == 0
    ended = {rig.outcome(), rig.outcome()}
    assert {(name, outcome) for name, outcome, _ in ended} == {
        (chunk_hash(1), "failed"),
        (chunk_hash(2), "failed"),
    }
    assert all(isinstance(error, Unavailable) for _, _, error in ended)
