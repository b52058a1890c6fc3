"""Several movers as one: who brings what, and what is said once all have said theirs. One mover's commands: test_worker.py; processes: test_mover_process.py."""

from collections.abc import Sequence
from dataclasses import fields

import pytest
from fakes import chunk_hash

from objectcache.errors import NotFound
from objectcache.flow import StoreModel
from objectcache.mover import Event, Mover, Placed
from objectcache.movers import Movers
from objectcache.stores.base import StoreCounters
from objectcache.streamer import StageResult
from objectcache.wire import Wire

NAMES = [chunk_hash(number) for number in range(40)]


class Told(Mover):
    """A mover that does nothing but to remember what it was told, and says what it is given."""

    counters = StoreCounters(get_requests=1)
    leased = 2
    wire = Wire(StoreModel(wire_bytes_per_s=1e9), 8)

    def __init__(self) -> None:
        self.stages: dict[int, list[bytes]] = {}
        self.commands: list[tuple[str, int]] = []
        self.says: list[Event] = []

    def enter(self, name: str, digest: bytes) -> None:
        self.commands.append((name, len(digest)))

    def stage(self, job: int, chunk_hashes: Sequence[bytes], first: int = 0) -> None:
        self.stages[job] = list(chunk_hashes)

    def cancel(self, job: int) -> None:
        self.commands.append(("cancel", job))

    def release(self, job: int) -> None:
        self.commands.append(("release", job))

    def stream(self, job: int, chunk_hashes: Sequence[bytes]) -> None:
        self.commands.append(("stream", job))

    def stop(self, job: int) -> None:
        self.commands.append(("stop", job))

    def give_back(self, job: int, chunk: int) -> None:
        self.commands.append(("give_back", job))

    def save(self, slot: int, namespace: str, chunk_hash: bytes) -> None:
        self.commands.append(("save", slot))

    def take(self) -> list[Event]:
        says, self.says = self.says, []
        return says

    def close(self, drain_s: float) -> None:
        self.commands.append(("close", 0))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_chunk_has_one_mover_wherever_a_stage_begins(count: int) -> None:
    told = [Told() for _ in range(count)]
    movers = Movers(told)
    for first in range(7):
        movers.stage(first, NAMES[first:20], first)
    for number, name in enumerate(NAMES[:20]):
        owners = [
            n for n, one in enumerate(told) if any(name in its for its in one.stages.values())
        ]
        assert len(owners) == 1, f"chunk {number} is read {len(owners)} times"
    parts = [len(one.stages.get(0, [])) for one in told]
    assert sum(parts) == 20 and max(parts) - min(parts) <= 1


def test_slots_are_told_in_the_order_of_the_prefix_once_all_movers_have_told_theirs() -> None:
    told = [Told(), Told()]
    movers = Movers(told)
    movers.stage(5, NAMES[1:6], first=1)  # chunks 1, 3 and 5 are of the second
    told[1].says = [Placed(5, [10, 11, 12])]
    assert movers.take() == []
    told[0].says = [Placed(5, [0, 1])]
    assert movers.take() == [Placed(5, [10, 0, 11, 1, 12])]
    error = NotFound("it is not there.")
    told[0].says = [StageResult(5, [0], error, "chunk 4")]
    assert movers.take() == []
    told[1].says = [StageResult(5, [10, 11, 12], None)]
    assert movers.take() == [StageResult(5, [10, 0, 11], error, "chunk 4")]
    movers.release(5)
    assert all(("release", 5) in one.commands for one in told)
    told[0].says = [Placed(5, [0, 1])]  # too late
    assert movers.take() == []


def test_only_who_has_a_part_of_it_hears_of_a_job() -> None:
    told = [Told(), Told(), Told()]
    movers = Movers(told)
    movers.stage(1, NAMES[4:5], first=4)
    movers.cancel(1)
    assert [one.commands for one in told] == [[], [("cancel", 1)], []]
    told[1].says = [StageResult(1, [], None)]
    assert movers.take() == [StageResult(1, [], None)]


def test_sums_and_the_end_are_of_all() -> None:
    told = [Told(), Told(), Told()]
    movers = Movers(told)
    assert movers.counters.get_requests == 3 and movers.leased == 6
    assert movers.wire == Wire(StoreModel(wire_bytes_per_s=3e9), 24)
    movers.close(0.0)
    assert all(one.commands == [("close", 0)] for one in told)


def test_what_the_wire_gives_is_joined_again_only_when_one_has_news_of_it() -> None:
    told = [Told(), Told()]
    movers = Movers(told)
    before = movers.wire
    assert movers.wire is before
    told[1].wire = Wire(StoreModel(wire_bytes_per_s=2e9), 8)
    assert movers.wire == Wire(StoreModel(wire_bytes_per_s=3e9), 16)
    told[0].wire = told[1].wire = None
    assert movers.wire is None


def test_all_that_is_counted_is_summed() -> None:
    names = [field.name for field in fields(StoreCounters)]
    one = StoreCounters(**{name: 1 << at for at, name in enumerate(names)})
    two = StoreCounters(**dict.fromkeys(names, 3))
    assert one + two == StoreCounters(**{name: 3 + (1 << at) for at, name in enumerate(names)})
