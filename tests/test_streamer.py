"""The way in: what a stage job brings, leaves out and gives back, whatever the store does."""

import asyncio
import threading
import time

import pytest
from fakes import LAYOUT, ScriptedStore, eventually, loop_thread, sealed
from streamer_lab import (  # noqa: F401 (pytest looks for the fixtures here)
    LOAD_SLOTS,
    POISON,
    Rig,
    check_brought,
    hasty_fixture,
    key,
    rig_fixture,
    split,
)

from objectcache.errors import Corrupt, Denied, NotFound, Unavailable
from objectcache.ring import FAILED, NOT_BEGUN
from objectcache.streamer import StageResult


def test_all_chunks_come_verified_in_prefix_order(rig: Rig) -> None:
    rig.fill(1, 2, 3)
    rig.stage(7, 1, 2, 3)
    result = rig.result()
    assert (result.job, result.error, result.failed_key) == (7, None, "")
    check_brought(rig, result, 1, 2, 3)


def test_chunks_are_read_at_the_same_time_by_one_get_each(rig: Rig) -> None:
    rig.fill(1, 2, 3)
    gate = threading.Event()
    for number in (1, 2, 3):
        rig.store.script("read", key(number), gate=gate)
    rig.stage(1, 1, 2, 3)
    assert eventually(lambda: rig.store.busy == 3)
    gate.set()
    check_brought(rig, rig.result(), 1, 2, 3)
    assert rig.store.calls == [("read", key(n)) for n in (1, 2, 3)]


def test_an_empty_job_reports_at_once(rig: Rig) -> None:
    rig.stage(1)
    assert rig.result() == StageResult(1, [], None, "")


def test_a_hole_ends_the_prefix_there(rig: Rig) -> None:
    rig.fill(1, 2, 4, 5)
    rig.stage(1, 1, 2, 3, 4, 5)
    result = rig.result()
    assert isinstance(result.error, NotFound) and result.failed_key == key(3)
    check_brought(rig, result, 1, 2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"flip": LAYOUT.offsets[1] + 5},
        {"flip": 3},
        {"error": Denied("no."), "landing": 100},
        {"error": Unavailable("reset."), "landing": LAYOUT.offsets[2]},
        {"stops": True, "landing": LAYOUT.object_bytes - 1},
        {"error": ValueError("a bug in a store")},
    ],
    ids=lambda wrong: "-".join(wrong),
)
def test_a_chunk_that_fails_ends_the_prefix_there(rig: Rig, wrong: dict) -> None:
    rig.fill(1, 2, 3)
    rig.store.script("read", key(2), **wrong)
    rig.stage(1, 1, 2, 3)
    result = rig.result()
    expected = type(wrong.get("error", Corrupt("")))
    assert type(result.error) is (Unavailable if expected is ValueError else expected)
    assert result.failed_key == key(2)
    check_brought(rig, result, 1)


@pytest.mark.parametrize("body", [b"", b"x" * 10, sealed(2)[:-1], sealed(2) + b"x", sealed(9)])
def test_an_object_of_another_length_or_chunk_is_corrupt(rig: Rig, body: bytes) -> None:
    rig.fill(1, 3)
    rig.store.put(key(2), body)
    rig.stage(1, 1, 2, 3)
    result = rig.result()
    assert isinstance(result.error, Corrupt) and result.failed_key == key(2)
    check_brought(rig, result, 1)


def test_a_failure_at_the_front_does_not_wait_for_what_is_behind(rig: Rig) -> None:
    rig.fill(2, 3)
    rig.store.script("read", key(3), gate=threading.Event())
    rig.stage(1, 1, 2, 3)
    result = rig.result(timeout_s=1.0)
    assert isinstance(result.error, NotFound) and result.slots == []
    rig.give_back(result)


def test_a_chunk_behind_that_fails_early_does_not_hurt_a_slow_one_before_it(rig: Rig) -> None:
    rig.fill(1)
    gate = threading.Event()
    rig.store.script("read", key(1), gate=gate)
    rig.stage(1, 1, 2)
    assert eventually(lambda: len(rig.store.calls) == 2)
    time.sleep(0.02)
    gate.set()
    check_brought(rig, rig.result(), 1)


def test_at_the_deadline_the_chunks_before_the_slow_one_are_kept(hasty: Rig) -> None:
    hasty.fill(1, 2, 3, 4)
    hasty.store.script("read", key(3), gate=threading.Event(), landing=4000)
    began = time.monotonic()
    hasty.stage(1, 1, 2, 3, 4)
    result = hasty.result()
    assert 0.14 <= time.monotonic() - began < 1.0
    assert isinstance(result.error, Unavailable) and "stage_timeout_ms" in result.error.hint
    check_brought(hasty, result, 1, 2)


def test_a_released_slot_is_never_written_again(rig: Rig) -> None:
    """A cancelled read that lingers keeps its slot until it ends."""
    rig.fill(*range(1, 11))
    for number in (2, 3, 4):
        rig.store.script("read", key(number), gate=threading.Event(), landing=500, lingers_s=0.1)
    rig.store.script("read", key(1), error=Unavailable("gone."))
    rig.stage(1, 1, 2, 3, 4)
    rig.stage(2, *range(5, 11))  # needs every slot that job 1 has
    first = rig.result()
    assert first.slots == []
    rig.give_back(first)
    second = rig.result()
    time.sleep(0.15)  # as long as a stray writer would last
    check_brought(rig, second, *range(5, 11))


# ---- chunks that several want


def test_a_chunk_that_two_jobs_want_is_read_once(rig: Rig) -> None:
    rig.fill(1, 2, 3)
    gate = threading.Event()
    rig.store.script("read", key(1), gate=gate)
    rig.stage(1, 1, 2)
    rig.stage(2, 1, 3)
    assert eventually(lambda: len(rig.store.calls) == 3)
    gate.set()
    first, second = rig.result(), rig.result()
    assert {first.job, second.job} == {1, 2} and first.slots[0] == second.slots[0]
    assert rig.ring.leased == 3
    check_brought(rig, first, *((1, 2) if first.job == 1 else (1, 3)))
    assert rig.ring.leased == 2
    check_brought(rig, second, *((1, 2) if second.job == 1 else (1, 3)))
    assert sorted(rig.store.calls) == [("read", key(n)) for n in (1, 2, 3)]


def test_cancelling_one_of_two_leaves_the_read_to_the_other(rig: Rig) -> None:
    rig.fill(1)
    gate = threading.Event()
    rig.store.script("read", key(1), gate=gate)
    rig.stage(1, 1)
    rig.stage(2, 1)
    rig.streamer.cancel(1)
    assert rig.result() == StageResult(1, [], None, "")
    gate.set()
    check_brought(rig, rig.result(), 1)
    assert rig.store.calls == [("read", key(1))]


def test_who_comes_after_a_read_was_given_up_reads_anew(rig: Rig) -> None:
    """The old read lingers and writes: the new one has another slot."""
    rig.fill(1)
    rig.store.script("read", key(1), gate=threading.Event(), landing=100, lingers_s=0.1, times=1)
    rig.stage(1, 1)
    assert eventually(lambda: rig.store.busy == 1)
    rig.streamer.cancel(1)
    assert rig.result() == StageResult(1, [], None, "")
    rig.stage(2, 1)
    result = rig.result()
    time.sleep(0.12)
    check_brought(rig, result, 1)


def test_both_hear_of_a_failure(rig: Rig) -> None:
    rig.fill(1)
    gate = threading.Event()
    rig.store.script("read", key(2), gate=gate, error=Denied("no."))
    rig.stage(1, 1, 2)
    rig.stage(2, 1, 2)
    gate.set()
    for result in (rig.result(), rig.result()):
        assert isinstance(result.error, Denied) and result.failed_key == key(2)
        check_brought(rig, result, 1)


def test_what_lies_in_a_free_slot_is_not_read_again(rig: Rig) -> None:
    rig.fill(*range(1, 9))
    rig.stage(1, 1, 2)
    check_brought(rig, rig.result(), 1, 2)
    assert rig.ring.leased == 0
    rig.stage(2, 1, 2, 3)
    check_brought(rig, rig.result(), 1, 2, 3)
    assert rig.store.calls == [("read", key(n)) for n in (1, 2, 3)]
    rig.stage(3, *range(4, 9))  # takes the free slots, and those free longest
    check_brought(rig, rig.result(), *range(4, 9))
    rig.stage(4, 1, 3)
    check_brought(rig, rig.result(), 1, 3)
    assert rig.store.calls[8:] == [("read", key(1))]


def test_what_a_failed_read_left_is_read_again(rig: Rig) -> None:
    rig.fill(1)
    rig.store.script("read", key(1), flip=LAYOUT.offsets[2], times=1)
    rig.stage(1, 1)
    spoilt = rig.result()
    assert isinstance(spoilt.error, Corrupt)
    rig.stage(2, 1)
    check_brought(rig, rig.result(), 1)
    rig.give_back(spoilt)


# ---- layers


def test_a_layer_is_ready_when_all_chunks_have_it(rig: Rig) -> None:
    rig.fill(1, 2)
    gates = [threading.Event(), threading.Event()]
    layers = len(LAYOUT.slice_bytes)
    rig.store.script("read", key(1), gate=gates[0], landing=LAYOUT.slice_of(1).stop)
    rig.store.script("read", key(2), gate=gates[1], landing=LAYOUT.slice_of(0).stop)
    rig.stage(1, 1, 2)
    assert eventually(lambda: 1 in rig.placed)

    assert eventually(lambda: rig.ready(1) == 1)
    gates[1].set()
    assert eventually(lambda: rig.ready(1) == 2)
    assert rig.results.empty() and layers > 2
    gates[0].set()
    check_brought(rig, rig.result(), 1, 2)
    assert rig.ready(1) == layers
    rig.stage(3, 1, 2)  # they lie there still
    check_brought(rig, rig.result(), 1, 2)
    assert rig.ready(3) == layers
    rig.stage(4, 5, 6, 7, 8, 9, 10)
    missing = rig.result()
    assert not missing.slots and rig.ready(4) == FAILED
    rig.give_back(missing)


def test_a_header_tells_that_an_object_comes_before_any_layer_may_be_used(rig: Rig) -> None:
    rig.fill(1, 2)
    gates = [threading.Event(), threading.Event()]
    rig.store.script("read", key(1), gate=gates[0], landing=LAYOUT.header_bytes)
    rig.store.script("read", key(2), gate=gates[1], landing=LAYOUT.header_bytes - 1)
    rig.stage(1, 1, 2)
    assert eventually(lambda: 1 in rig.placed)
    assert eventually(lambda: [rig.progress[slot] for slot in rig.placed[1]] == [0, NOT_BEGUN])
    assert rig.ready(1) == NOT_BEGUN
    for gate in gates:
        gate.set()
    check_brought(rig, rig.result(), 1, 2)


def test_what_lay_in_a_slot_before_counts_for_nothing(rig: Rig) -> None:
    """A step that begins before its last layers are there looks at nothing but the progress."""
    first, then = range(1, LOAD_SLOTS + 1), range(11, LOAD_SLOTS + 11)
    rig.fill(*first, *then)
    rig.stage(1, *first)
    check_brought(rig, rig.result(), *first)
    gate = threading.Event()
    for number in then:
        rig.store.script("read", key(number), gate=gate)
    rig.stage(2, *then)
    assert eventually(lambda: 2 in rig.placed)
    assert [rig.progress[slot] for slot in rig.placed[2]] == [NOT_BEGUN] * LOAD_SLOTS
    gate.set()
    check_brought(rig, rig.result(), *then)
    assert rig.ready(2) == len(LAYOUT.slice_bytes)


def test_objects_are_read_in_parts_where_the_store_rewards_it(rig: Rig) -> None:
    """Few chunks and many slow connections: parts in layer order across the chunks."""
    split(rig)
    rig.fill(1, 2)
    rig.stage(1, 1, 2)
    check_brought(rig, rig.result(), 1, 2)
    starts = [start for _, start in rig.store.ranges]
    assert len(starts) > 2 and sorted(starts) == starts
    assert {k for k, _ in rig.store.ranges} == {key(1), key(2)}


def test_a_part_that_fails_ends_the_other_parts_of_its_chunk(rig: Rig) -> None:
    split(rig)
    rig.fill(1, 2)
    rig.store.script("read", key(2), flip=LAYOUT.offsets[2], lingers_s=0.02)
    rig.stage(1, 1, 2)
    result = rig.result()
    assert isinstance(result.error, Corrupt) and result.failed_key == key(2)
    check_brought(rig, result, 1)


# ---- the ring is full


def test_jobs_that_find_no_room_wait_in_their_order(rig: Rig) -> None:
    rig.fill(*range(1, 10))
    rig.stage(1, 1, 2, 3, 4)
    first = rig.result()
    rig.stage(2, 5, 6, 7)  # needs 3 of the 2 that are free
    rig.stage(3, 8)  # would fit, but came later
    time.sleep(0.03)
    assert rig.results.empty()
    check_brought(rig, first, 1, 2, 3, 4)
    results = {result.job: result for result in (rig.result(), rig.result())}
    assert rig.store.calls[4:] == [("read", key(n)) for n in (5, 6, 7, 8)]
    check_brought(rig, results[2], 5, 6, 7)
    check_brought(rig, results[3], 8)


def test_slots_that_a_failed_job_gives_back_start_the_next(rig: Rig) -> None:
    rig.fill(1, 3, 4, 5, 6, 7)
    gate = threading.Event()
    rig.store.script("read", key(1), gate=gate)
    rig.stage(1, 1, 2, 3, 4, 5, 6)
    rig.stage(2, 5, 6, 7)
    assert rig.results.empty()
    gate.set()
    first = rig.result()
    assert (first.job, len(first.slots)) == (1, 1)
    time.sleep(0.02)
    assert rig.results.empty() and rig.ring.leased == LOAD_SLOTS, "somebody may look at all of them"
    check_brought(rig, first, 1)
    second = rig.result()
    assert second.job == 2
    check_brought(rig, second, 5, 6, 7)


def test_a_job_larger_than_the_ring_brings_what_fits(rig: Rig) -> None:
    rig.fill(*range(10))
    rig.stage(1, *range(10))
    result = rig.result()
    assert result.error is None
    check_brought(rig, result, *range(LOAD_SLOTS))
    assert len(rig.store.calls) == LOAD_SLOTS


def test_a_job_that_finds_no_room_in_time_says_so(hasty: Rig) -> None:
    hasty.fill(1, 2)
    slots = hasty.ring.lease(LOAD_SLOTS)
    hasty.stage(1, 1)
    hasty.stage(2, 2)
    for job in (1, 2):
        result = hasty.result()
        assert (result.job, result.slots) == (job, [])
        assert isinstance(result.error, Unavailable) and "ring_bytes" in result.error.hint
    hasty.ring.release(slots)
    hasty.stage(3, 1)
    check_brought(hasty, hasty.result(), 1)


def test_a_job_that_gives_up_waiting_lets_the_next_go(hasty: Rig) -> None:
    hasty.fill(1, 2)
    slots = hasty.ring.lease(LOAD_SLOTS - 1)
    hasty.stage(1, 1, 2)
    time.sleep(0.1)
    hasty.stage(2, 2)
    assert hasty.result().slots == []
    check_brought(hasty, hasty.result(), 2)
    hasty.ring.release(slots)


# ---- cancel


def test_cancel_of_a_job_that_nobody_knows_does_nothing(rig: Rig) -> None:
    rig.streamer.cancel(5)
    rig.fill(1)
    rig.stage(5, 1)
    check_brought(rig, rig.result(), 1)


def test_cancel_right_after_stage(rig: Rig) -> None:
    """Both commands reach the loop in one turn: the job has not begun."""
    rig.fill(1, 2)
    held = threading.Event()
    rig.loop.call(held.wait)
    rig.stage(1, 1, 2)
    rig.streamer.cancel(1)
    held.set()
    assert rig.result() == StageResult(1, [], None, "")


@pytest.mark.parametrize("turns", range(12))
def test_cancel_at_any_turn_of_the_loop(rig: Rig, turns: int) -> None:
    """Whenever it comes, the job reports once, and all slots go back."""
    rig.fill(1, 2)

    def later(left: int) -> None:
        if left:
            rig.loop.call(later, left - 1)
        else:
            rig.streamer.cancel(1)

    held = threading.Event()
    rig.loop.call(held.wait)
    rig.stage(1, 1, 2)
    rig.loop.call(later, turns)
    held.set()
    result = rig.result()
    if result.slots:
        check_brought(rig, result, 1, 2)


def test_a_chunk_that_one_get_brings_costs_one_task() -> None:
    tasks: set[object] = set()

    class Counting(ScriptedStore):
        async def read(self, *args, **kwargs) -> None:
            tasks.update(asyncio.all_tasks())
            await super().read(*args, **kwargs)

    with loop_thread() as loop:
        rig = Rig(loop, store=Counting())
        rig.fill(1, 2, 3, 4, 5)
        rig.stage(1, 1, 2, 3, 4, 5)
        check_brought(rig, rig.result(), 1, 2, 3, 4, 5)
        assert len(tasks) == 5 + 1  # the job waits for its chunks
        assert eventually(rig.quiet)


def test_cancel_while_chunks_arrive(rig: Rig) -> None:
    rig.fill(1, 2)
    rig.store.script("read", key(2), gate=threading.Event(), landing=4200, lingers_s=0.02)
    rig.stage(1, 1, 2)
    assert eventually(lambda: len(rig.store.calls) == 2)
    rig.streamer.cancel(1)
    assert rig.result() == StageResult(1, [], None, "")


def test_a_failed_job_does_not_wait_for_reads_that_linger(rig: Rig) -> None:
    """But their slots do: the next job gets them only when nothing writes to them any more."""
    rig.fill(2, *range(3, 9))
    rig.store.script("read", key(2), gate=threading.Event(), landing=10, lingers_s=0.1)
    rig.stage(1, 1, 2)
    began = time.monotonic()
    failed = rig.result()
    assert isinstance(failed.error, NotFound) and failed.slots == []
    assert time.monotonic() - began < 0.09
    rig.streamer.cancel(1)  # too late: it has reported
    rig.give_back(failed)
    rig.stage(2, *range(3, 9))  # needs all slots, also the one that still is written to
    check_brought(rig, rig.result(), *range(3, 9))
    assert time.monotonic() - began >= 0.1


def test_cancel_after_the_report_leaves_the_slots_to_the_caller(rig: Rig) -> None:
    rig.fill(1)
    rig.stage(1, 1)
    result = rig.result()
    rig.streamer.cancel(1)
    time.sleep(0.01)
    check_brought(rig, result, 1)


def test_cancel_of_a_waiting_job_lets_the_next_go(rig: Rig) -> None:
    rig.fill(1, 2)
    slots = rig.ring.lease(LOAD_SLOTS - 1)
    rig.stage(1, 1, 2)
    rig.stage(2, 2)
    rig.streamer.cancel(1)
    assert rig.result() == StageResult(1, [], None, "")
    check_brought(rig, rig.result(), 2)
    rig.ring.release(slots)
    assert rig.store.calls == [("read", key(2))]


def test_the_end_of_the_loop_gives_every_slot_back() -> None:
    """Also those of a job that gets its room only because another was ended."""
    with loop_thread() as loop:
        rig = Rig(loop)
        rig.fill(*range(1, 7))
        for number in range(1, 7):
            rig.store.script("read", key(number), gate=threading.Event(), landing=10)
        rig.stage(1, *range(1, 7))
        rig.stage(2, *range(1, 7))
        rig.stage(3, 1)
        assert eventually(lambda: rig.store.busy == 6)
    assert rig.ring.leased == 0 and rig.store.busy == 0
