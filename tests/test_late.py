"""Layers that a step waits for: it waits no longer than it must, and what does not come fails that request alone."""

import numpy as np
import pytest

from objectcache.late import Coming, Late
from objectcache.ring import NOT_BEGUN

LAYERS = 4


class Clock:
    """Time passes by sleeping; `at[s]` happens after s seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self.at: list[tuple[float, object]] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += max(seconds, 0.01)

    def hear(self) -> None:
        while self.at and self.at[0][0] <= self.now:
            self.at.pop(0)[1]()  # type: ignore[operator]


class Rig:
    def __init__(self) -> None:
        self.clock = Clock()
        self.progress = np.zeros(8, np.int16)
        self.late = Late(self.progress, LAYERS, 1.0, self.clock.hear, self.clock, self.clock.sleep)

    def begin(self, job: int, slots: list[int], first: int = 0) -> Coming:
        blocks = [[10 * slot, 10 * slot + 1] for slot in slots]
        load = Coming(job, np.array(slots), blocks, first)
        self.late.begin(load)
        return load

    def later(self, seconds: float, slot: int, layers: int) -> None:
        self.clock.at.append((seconds, lambda: self.progress.__setitem__(slot, layers)))


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_nothing_to_wait_for(rig: Rig) -> None:
    assert rig.late.layers_ready() == LAYERS
    rig.late.wait(LAYERS - 1)
    rig.begin(1, [2, 3])
    rig.progress[[2, 3]] = (3, 4)
    assert rig.late.layers_ready() == 3
    rig.late.wait(2)
    assert rig.clock.now == 0.0 and rig.late.waits == 0


def test_what_has_not_begun_has_no_layer_and_is_waited_for(rig: Rig) -> None:
    rig.begin(1, [0, 1])
    rig.progress[[0, 1]] = (2, NOT_BEGUN)
    assert rig.late.layers_ready() == 0
    rig.later(0.2, 1, 0)
    rig.later(0.3, 1, 1)
    rig.late.wait(0)
    assert 0.3 <= rig.clock.now < 0.4 and not rig.late.failed_blocks
    rig.progress[1] = NOT_BEGUN
    rig.late.wait(0)
    assert rig.late.lost_jobs == [1], "not for ever"


def test_it_waits_for_the_last_chunk_of_all_loads(rig: Rig) -> None:
    rig.begin(1, [0, 1])
    rig.begin(2, [5])
    rig.progress[[0, 1, 5]] = 1
    rig.later(0.2, 0, 4)
    rig.later(0.3, 5, 2)
    rig.later(0.5, 1, 3)
    rig.late.wait(0)
    assert rig.clock.now == 0.0
    rig.late.wait(1)
    assert 0.5 <= rig.clock.now < 0.6 and rig.late.waits == 1 and not rig.late.failed_blocks


def test_what_comes_too_late_fails_its_request_alone(rig: Rig) -> None:
    rig.begin(1, [0, 1])
    rig.begin(2, [5])
    rig.progress[[0, 1, 5]] = (4, 2, 3)
    rig.later(0.5, 5, 4)
    rig.late.wait(2)
    assert 1.0 <= rig.clock.now < 1.1
    assert rig.late.failed_blocks == {0, 1, 10, 11} and rig.late.lost == 1
    assert rig.late.layers_ready() == 4  # it holds up nothing any more


@pytest.mark.parametrize("first", [0, 3])
def test_a_read_that_ended_is_not_waited_for(rig: Rig, first: int) -> None:
    """Nor does one chunk's failure matter before a layer that it lacks is needed."""
    rig.begin(1, [0, 1], first)
    rig.progress[[0, 1]] = (4, 2)
    assert rig.late.ended(1, first + 1) and not rig.late.ended(9, 1)
    rig.late.wait(1)
    assert not rig.late.failed_blocks
    rig.late.wait(2)
    assert rig.clock.now < 0.1 and rig.late.failed_blocks == {0, 1, 10, 11}


def test_slots_are_free_when_copies_and_reads_have_ended(rig: Rig) -> None:
    for order in ("copied", "ended"), ("ended", "copied"):
        rig.begin(1, [0])
        for what in order:
            assert rig.late.over() == []
            assert rig.late.copied(1) if what == "copied" else rig.late.ended(1, 1)
        assert [load.job for load in rig.late.over()] == [1] and rig.late.over() == []
    assert not rig.late.copied(1) and rig.late.jobs() == []
