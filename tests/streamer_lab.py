"""A streamer over a scripted store, for its suite. No tests here."""

import queue
from collections.abc import Iterator

import pytest
from fakes import LAYOUT, ScriptedStore, chunk_hash, eventually, loop_thread, sealed

from objectcache.flow import StoreModel
from objectcache.ring import Ring, shares
from objectcache.shelf import Shelf
from objectcache.stores.base import Pace
from objectcache.streamer import StageResult, Streamer

LOAD_SLOTS = 6
POISON = b"\xaa"


def key(number: int) -> str:
    return f"chunk/{number}"


class Rig:
    """A streamer over a scripted store; chunk n is at key(n)."""

    def __init__(
        self,
        loop,
        timeout_s: float = 5.0,
        slots: int = 8,
        store: ScriptedStore | None = None,
    ) -> None:
        self.loop = loop
        self.store = store or ScriptedStore()
        self.ring = Ring(shares(slots)[0])
        assert slots != 8 or self.ring.slots == LOAD_SLOTS
        self.memory = [bytearray(POISON * LAYOUT.object_bytes) for _ in range(slots)]
        self.progress = [0] * slots
        self.placed: dict[int, list[int]] = {}
        self.results: queue.Queue[StageResult] = queue.Queue()
        self.streamer = Streamer(
            loop,
            self.store,
            LAYOUT,
            Shelf(self.ring),
            lambda slot: memoryview(self.memory[slot]),
            timeout_s,
            self.results.put,
            self.progress,
            lambda job, slots: self.placed.update({job: slots}),
        )

    def fill(self, *numbers: int) -> None:
        for number in numbers:
            self.store.put(key(number), sealed(number))

    def stage(self, job: int, *numbers: int) -> None:
        self.streamer.stage(job, [key(n) for n in numbers], [chunk_hash(n) for n in numbers])

    def result(self, timeout_s: float = 5.0) -> StageResult:
        return self.results.get(timeout=timeout_s)

    def ready(self, job: int) -> int:
        """Layers that may be used of all the job's chunks."""
        return min(self.progress[slot] for slot in self.placed[job])

    def give_back(self, result: StageResult) -> None:
        self.streamer.release(result.job)

    def holds(self, slot: int, number: int) -> bool:
        return bytes(self.memory[slot]) == sealed(number)

    def quiet(self) -> bool:
        return eventually(lambda: self.ring.leased == 0 and self.store.busy == 0)


@pytest.fixture(name="rig")
def rig_fixture() -> Iterator[Rig]:
    with loop_thread() as loop:
        made = Rig(loop)
        yield made
        assert made.quiet(), "the ledger does not return to zero"
    assert made.results.empty(), "a job reported twice, or unasked"


@pytest.fixture(name="hasty")
def hasty_fixture() -> Iterator[Rig]:
    """A rig whose jobs have 0.15 s."""
    with loop_thread() as loop:
        made = Rig(loop, timeout_s=0.15)
        yield made
        assert made.quiet(), "the ledger does not return to zero"
    assert made.results.empty(), "a job reported twice, or unasked"


def check_brought(rig: Rig, result: StageResult, *numbers: int) -> None:
    """The job brought exactly these chunks; give them back."""
    assert len(result.slots) == len(numbers)
    assert all(rig.holds(slot, number) for slot, number in zip(result.slots, numbers, strict=True))
    assert rig.ring.leased >= len(numbers)
    rig.give_back(result)


def split(rig: Rig) -> None:
    """From here on chunks are read in parts: the first that might be goes whole."""
    rig.store.paced = Pace(StoreModel(0.0001, 0.0002, 1e4, 1e9), 64)
    rig.fill(11)
    rig.stage(11, 11)
    check_brought(rig, rig.result(), 11)
    assert rig.store.ranges == [(key(11), 0)]  # one GET
    rig.store.ranges.clear()
