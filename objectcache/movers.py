"""Several movers as one: each brings its part of every prefix. Not what one does: see mover.py.

Chunk n of a prefix is the business of mover n modulo their number, whichever stage asks, so that a chunk
which several want is still read once. (A stream is the business of one of them, whatever others bring.)
All get the commands in the same order and give places in the order
of their jobs, so that two jobs never wait for each other in two movers.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from objectcache.errors import ObjectCacheError
from objectcache.mover import Arrived, Berth, Event, Mover, Placed
from objectcache.saver import SaveResult
from objectcache.stores.base import StoreCounters
from objectcache.streamer import StageResult
from objectcache.through import StreamResult
from objectcache.wire import Wire, together


@dataclass
class _Stage:
    """`owner[k]` is the mover of chunk k of the job."""

    owner: list[int]
    placed: dict[int, list[int]] = field(default_factory=dict)  # slots, by mover
    results: dict[int, StageResult] = field(default_factory=dict)

    @property
    def movers(self) -> set[int]:
        return set(self.owner)

    def joined(self, slots: dict[int, list[int]]) -> list[int]:
        """In the order of the prefix, as far as all that come before are there."""
        left = {mover: iter(its) for mover, its in slots.items()}
        found: list[int] = []
        for mover in self.owner:
            slot = next(left[mover], None)
            if slot is None:
                break
            found.append(slot)
        return found

    def result(self, job: int) -> StageResult:
        slots = self.joined({mover: result.slots for mover, result in self.results.items()})
        error: ObjectCacheError | None = None
        failed_key = ""
        if len(slots) < len(self.owner):
            first = self.results[self.owner[len(slots)]]
            error, failed_key = first.error, first.failed_key
        return StageResult(job, slots, error, failed_key)


def split(berth: Berth, count: int) -> list[Berth]:
    """Equal parts of the slots and of the connections, for so many movers; fewer if there are too few."""
    loads, connections = berth.load_slots, berth.options.max_connections
    count = max(1, min(count, len(loads) // 2, connections))
    share = len(loads) // count
    options = replace(berth.options, max_connections=connections // count)
    apart = max(1, berth.apart // count) if berth.apart else 0
    return [
        replace(
            berth,
            options=options,
            load_slots=range(loads.start + n * share, loads.start + (n + 1) * share),
            apart=apart,
        )
        for n in range(count)
    ]


def most_chunks(berths: Sequence[Berth]) -> int:
    """That one job can stage."""
    return len(berths) * min(len(berth.load_slots) - berth.apart for berth in berths)


class Movers(Mover):
    """`movers` in the order of their parts."""

    def __init__(self, movers: Sequence[Mover]) -> None:
        self._movers = list(movers)
        self._stages: dict[int, _Stage] = {}
        self._wires: list[Wire | None] = []  # of each, when they were joined
        self._wire: Wire | None = None

    def enter(self, name: str, digest: bytes) -> None:
        for mover in self._movers:
            mover.enter(name, digest)

    def stage(self, job: int, chunk_hashes: Sequence[bytes], first: int = 0) -> None:
        count = len(self._movers)
        owner = [(first + k) % count for k in range(len(chunk_hashes))]
        self._stages[job] = _Stage(owner)
        for n in self._stages[job].movers:
            part = [name for name, mine in zip(chunk_hashes, owner, strict=True) if mine == n]
            self._movers[n].stage(job, part, first)

    def cancel(self, job: int) -> None:
        self._each(job, lambda mover: mover.cancel(job))

    def release(self, job: int) -> None:
        self._each(job, lambda mover: mover.release(job))
        self._stages.pop(job, None)

    def stream(self, job: int, chunk_hashes: Sequence[bytes]) -> None:
        self._of_stream(job).stream(job, chunk_hashes)

    def stop(self, job: int) -> None:
        self._of_stream(job).stop(job)

    def give_back(self, job: int, chunk: int) -> None:
        self._of_stream(job).give_back(job, chunk)

    def save(self, slot: int, namespace: str, chunk_hash: bytes) -> None:
        self._movers[slot % len(self._movers)].save(slot, namespace, chunk_hash)

    def take(self) -> list[Event]:
        events: list[Event] = []
        for n, mover in enumerate(self._movers):
            for event in mover.take():
                events += self._heard(n, event)
        return events

    @property
    def counters(self) -> StoreCounters:
        return sum((mover.counters for mover in self._movers), StoreCounters())

    @property
    def wire(self) -> Wire | None:
        """The same one as before while none of them has another: it is asked for in each step."""
        wires = [mover.wire for mover in self._movers]
        if wires != self._wires:
            self._wires, self._wire = wires, together(wires)
        return self._wire

    @property
    def leased(self) -> int:
        return sum(mover.leased for mover in self._movers)

    def close(self, drain_s: float) -> None:
        """All at once: vLLM allows 5 s for everything."""
        threads = [threading.Thread(target=mover.close, args=(drain_s,)) for mover in self._movers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    # ---- parts

    def _heard(self, n: int, event: Event) -> list[Event]:
        if isinstance(event, (Arrived, StreamResult, SaveResult)):
            return [event]
        stage = self._stages.get(event.job)
        if stage is None:
            return []  # it was released
        if isinstance(event, Placed):
            stage.placed[n] = event.slots
            whole = stage.placed.keys() == stage.movers
            return [Placed(event.job, stage.joined(stage.placed))] if whole else []
        stage.results[n] = event
        return [stage.result(event.job)] if stage.results.keys() == stage.movers else []

    def _each(self, job: int, tell: Callable[[Mover], None]) -> None:
        stage = self._stages.get(job)
        for n in sorted(stage.movers) if stage is not None else ():
            tell(self._movers[n])

    def _of_stream(self, job: int) -> Mover:
        return self._movers[job % len(self._movers)]
