"""Brings chunks from the store into ring slots, verified. Not when or which: the scheduler half says so; not in which order: see plan.py.

A job's chunks are read all at once, each checked layer by layer as its bytes land; a chunk that
another job brought or is bringing is not read again (shelf.py). Whatever fails ends the job's prefix
there. Jobs that find no room wait in the order in which they came; none starts before all its places
are free, so that no two hold half and wait for each other. All state belongs to the loop; commands
come from the worker's thread.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from objectcache.errors import ObjectCacheError, Unavailable
from objectcache.format import ObjectLayout
from objectcache.loop import LoopThread
from objectcache.order import Turn
from objectcache.reading import Chunk, Progress, Reads
from objectcache.shelf import Place, Shelf, State
from objectcache.stores.base import Store
from objectcache.through import Through


@dataclass
class StageJob:
    """Chunks to bring: their keys and hashes, in prefix order."""

    job: int
    keys: list[str]
    chunk_hashes: list[bytes]
    deadline: float = 0.0
    turn: Turn | None = None
    places: list[Place] = field(default_factory=list)
    chunks: dict[Place, Chunk] = field(default_factory=dict)  # those not there at the start
    cancelled: bool = False
    work: "asyncio.Task[None] | None" = None


@dataclass(frozen=True)
class StageResult:
    """`slots` hold the leading chunks that came; the caller gives them back (`Streamer.release`).

    `error` is why not more, and `failed_key` the object at which it ended.
    """

    job: int
    slots: list[int]
    error: ObjectCacheError | None
    failed_key: str = ""


class Streamer:
    """`slot_view(slot)` is the memory of a slot, at least object_bytes long, and `progress[slot]` how many
    leading layers there may be used. `placed(job, slots)` is told once, when a job has its places, then
    `done`; both on the loop."""

    def __init__(
        self,
        loop: LoopThread,
        store: Store,
        layout: ObjectLayout,
        shelf: Shelf,
        slot_view: Callable[[int], memoryview],
        timeout_s: float,
        done: Callable[[StageResult], None],
        progress: Progress,
        placed: Callable[[int, list[int]], None] = lambda job, slots: None,
    ) -> None:
        self._loop = loop
        self._layers = len(layout.slice_bytes)
        self._shelf = shelf
        self._timeout_s = timeout_s
        self._done = done
        self._placed = placed
        self._waiting: deque[StageJob] = deque()
        self._jobs: dict[int, StageJob] = {}
        self._successor: Streamer | None = None
        self._reads = Reads(loop, store, layout, shelf, slot_view, self._read_ended, progress)
        self.through = Through(loop, shelf, self._reads, timeout_s, self._pump)

    def stage(self, job: int, keys: list[str], chunk_hashes: list[bytes]) -> None:
        """Start a job, from any thread. What the ring cannot hold at all is left out."""
        most = self._shelf.most
        self._loop.call(self._admit, StageJob(job, keys[:most], chunk_hashes[:most]))

    def cancel(self, job: int) -> None:
        """Stop a job if it has not reported yet, from any thread. It then reports no slots."""
        self._loop.call(self._cancel, job)

    def release(self, job: int) -> None:
        """The slots that a job reported are not used any more. From any thread."""
        self._shelf.give_back(job)
        self._loop.call(self._pump)

    def succeeded_by(self, successor: "Streamer") -> None:
        """What this one still holds of the ring is soon the other's, which waits for it."""
        self._successor = successor

    # ---- jobs

    def _admit(self, job: StageJob) -> None:
        now = asyncio.get_running_loop().time()
        job.deadline = now + self._timeout_s
        job.turn = self._reads.turn(now, len(set(job.keys)))
        self._jobs[job.job] = job
        self._waiting.append(job)
        job.work = self._loop.spawn(self._expire(job))
        self._pump()

    async def _expire(self, job: StageJob) -> None:
        await asyncio.sleep(self._timeout_s)  # cancelled when the job gets its slots
        self._waiting.remove(job)
        self._finish(
            job, 0, Unavailable("there was no room in the ring in time.", "raise ring_bytes.")
        )
        self._pump()

    def _pump(self) -> None:
        """Give free slots to who waits for them: jobs in their order, then streams."""
        while self._waiting:
            job = self._waiting[0]
            taken = self._shelf.take(job.job, job.keys)
            if taken is None:
                break
            self._waiting.popleft()
            places, unread = taken
            assert job.work is not None and job.turn is not None
            job.work.cancel()
            new = set(unread)
            for place in dict.fromkeys(places):
                if place not in new:
                    self._reads.want(job.turn, place)
            hashes = dict(zip(job.keys, job.chunk_hashes, strict=True))
            self._reads.start(unread, [hashes[place.key] for place in unread], job.turn)
            job.chunks = self._reads.of(places)
            job.places = places
            self._placed(job.job, [place.slot for place in places])
            job.work = self._loop.spawn(self._run(job))
        self.through.pump(crowded=bool(self._waiting))
        if self._successor is not None:
            self._successor._pump()

    def _read_ended(self, place: Place) -> None:
        self.through.read_ended(place)
        self._pump()

    def _cancel(self, number: int) -> None:
        job = self._jobs.get(number)
        if job is None:
            return
        job.cancelled = True
        if job in self._waiting:
            self._waiting.remove(job)
            assert job.work is not None
            job.work.cancel()
            self._finish(job, 0, None)
            self._pump()
        elif job.work is not None:
            # Next turn: a task that is cancelled before its first step never runs, and here it
            # would neither report nor give its slots back.
            asyncio.get_running_loop().call_soon(job.work.cancel)

    async def _run(self, job: StageJob) -> None:
        try:
            await self._until_first_failure(job)
        except asyncio.CancelledError:
            job.cancelled = True  # by _cancel or by the end of the loop: the slots go back
        self._finish(job, *((0, None) if job.cancelled else _leading(job)))

    async def _until_first_failure(self, job: StageJob) -> None:
        """Wait for the chunks in prefix order; a failure makes all later ones useless."""
        try:
            async with asyncio.timeout_at(job.deadline):
                for place in job.places:
                    if place in job.chunks:
                        await asyncio.wait([job.chunks[place].work])
                    if place.state is not State.THERE:
                        return
        except TimeoutError:
            return

    def _finish(self, job: StageJob, came: int, error: ObjectCacheError | None) -> None:
        del self._jobs[job.job]
        if job.turn is not None:
            job.turn.end()
        # A job that was not cancelled may be in a step by now, which waits for layers in all of its places.
        end = self._shelf.give_back if job.cancelled else self._shelf.stop
        for place in end(job.job, keep=came):
            # Next turn, as in _cancel.
            asyncio.get_running_loop().call_soon(job.chunks[place].work.cancel)
        failed_key = job.keys[came] if error is not None and came < len(job.keys) else ""
        slots = [place.slot for place in job.places[:came]]
        self._done(StageResult(job.job, slots, error, failed_key))
        self._pump()


def _leading(job: StageJob) -> tuple[int, ObjectCacheError | None]:
    """How many leading chunks are there, and why the next one is not."""
    for count, place in enumerate(job.places):
        if place.state is not State.THERE:
            return count, job.chunks[place].failure()
    return len(job.places), None
