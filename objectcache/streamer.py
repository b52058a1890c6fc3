"""Brings chunks from the store into ring slots, verified. Not when or which: the scheduler half says so; not in which order: see plan.py.

A job's chunks are read all at once, each checked layer by layer as its bytes land; a chunk that
another job brought or is bringing is not read again (shelf.py). Whatever fails ends the job's prefix
there. Jobs that find no room wait in the order in which they came; none starts before all its places
are free, so that no two hold half and wait for each other. All state belongs to the loop; commands
come from the worker's thread.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from objectcache.errors import Corrupt, ObjectCacheError, Unavailable
from objectcache.format import ObjectLayout, Part, Verifier
from objectcache.loop import LoopThread
from objectcache.plan import Limits, plan
from objectcache.report import log
from objectcache.ring import Ring
from objectcache.shelf import Place, Shelf, State
from objectcache.stores.base import Store


@dataclass(frozen=True)
class _Chunk:
    """An object being read; `work` returns why it failed, None if it did not."""

    verifier: Verifier
    work: "asyncio.Task[BaseException | None]"


@dataclass
class StageJob:
    """Chunks to bring: their keys and hashes, in prefix order."""

    job: int
    keys: list[str]
    chunk_hashes: list[bytes]
    deadline: float = 0.0
    places: list[Place] = field(default_factory=list)
    chunks: dict[Place, _Chunk] = field(default_factory=dict)  # those not there at the start
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
    """`slot_view(slot)` is the memory of a slot, at least object_bytes long; `done` is called on the loop."""

    def __init__(
        self,
        loop: LoopThread,
        store: Store,
        layout: ObjectLayout,
        ring: Ring,
        shelf: Shelf,
        slot_view: Callable[[int], memoryview],
        timeout_s: float,
        done: Callable[[StageResult], None],
    ) -> None:
        self._loop = loop
        self._store = store
        self._layout = layout
        self._ring = ring
        self._shelf = shelf
        self._slot_view = slot_view
        self._timeout_s = timeout_s
        self._done = done
        self._waiting: deque[StageJob] = deque()
        self._jobs: dict[int, StageJob] = {}
        self._chunks: dict[Place, _Chunk] = {}

    def stage(self, job: int, keys: list[str], chunk_hashes: list[bytes]) -> None:
        """Start a job, from any thread. What the ring cannot hold at all is left out."""
        most = self._ring.load_slots
        self._loop.call(self._admit, StageJob(job, keys[:most], chunk_hashes[:most]))

    def cancel(self, job: int) -> None:
        """Stop a job if it has not reported yet, from any thread. It then reports no slots."""
        self._loop.call(self._cancel, job)

    def release(self, job: int) -> None:
        """The slots that a job reported are not used any more. From any thread."""
        self._shelf.give_back(job)
        self._loop.call(self._pump)

    def layers_ready(self, job: int) -> int:
        """How many leading layers lie verified in the slots of all the job's chunks. From any thread.

        It only grows, except that it is 0 while the job waits for room and after it has reported.
        """
        found = self._jobs.get(job)
        if found is None or not found.places:
            return 0
        coming = [found.chunks[p].verifier.verified_layers for p in found.chunks]
        return min(coming, default=len(self._layout.slice_bytes))

    # ---- jobs

    def _admit(self, job: StageJob) -> None:
        job.deadline = asyncio.get_running_loop().time() + self._timeout_s
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
        while self._waiting:
            job = self._waiting[0]
            taken = self._shelf.take(job.job, job.keys)
            if taken is None:
                return
            self._waiting.popleft()
            places, unread = taken
            assert job.work is not None
            job.work.cancel()
            hashes = dict(zip(job.keys, job.chunk_hashes, strict=True))
            self._read(unread, [hashes[place.key] for place in unread])
            job.chunks = {place: self._chunks[place] for place in places if place in self._chunks}
            job.places = places
            job.work = self._loop.spawn(self._run(job))

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
        for place in self._shelf.give_back(job.job, keep=came):
            # Next turn, as in _cancel.
            asyncio.get_running_loop().call_soon(job.chunks[place].work.cancel)
        failed_key = job.keys[came] if error is not None and came < len(job.keys) else ""
        slots = [place.slot for place in job.places[:came]]
        self._done(StageResult(job.job, slots, error, failed_key))
        self._pump()

    # ---- chunks

    def _read(self, places: Sequence[Place], chunk_hashes: Sequence[bytes]) -> None:
        """Start the reads of these chunks, in the order of a plan."""
        verifiers = [
            Verifier(self._layout, chunk_hash, self._view(place))
            for place, chunk_hash in zip(places, chunk_hashes, strict=True)
        ]
        reads: list[list[asyncio.Future[None]]] = [[] for _ in places]
        for chunk, first, last in self._fetches(len(places)):
            part = verifiers[chunk].part(first, last)
            reads[chunk].append(asyncio.ensure_future(self._read_part(places[chunk], part)))
        for place, verifier, parts in zip(places, verifiers, reads, strict=True):
            work = self._loop.spawn(self._bring(place, verifier, parts))
            self._chunks[place] = _Chunk(verifier, work)

    def _fetches(self, chunks: int) -> Iterable[tuple[int, int, int]]:
        """(chunk, first layer, last layer) of each GET, in the order to issue."""
        pace = self._store.pace()
        if pace is None or not chunks:
            return [(chunk, 0, len(self._layout.slice_bytes)) for chunk in range(chunks)]
        limits = Limits(pace.connections, part_bytes=pace.part_bytes)
        return plan(chunks, self._layout, pace.model, limits).fetches()

    async def _read_part(self, place: Place, part: Part) -> None:
        whole = part.span == slice(0, self._layout.object_bytes)
        await self._store.read(
            place.key,
            self._view(place)[part.span],
            start=None if whole else part.span.start,
            marks=part.marks,
            landed=part.landed,
        )

    async def _bring(
        self, place: Place, verifier: Verifier, reads: "list[asyncio.Future[None]]"
    ) -> BaseException | None:
        """Wait for a chunk's reads and return why it failed; its slot is held until the last has ended."""
        error: BaseException | None = None
        try:
            await asyncio.wait(reads, return_when=asyncio.FIRST_EXCEPTION)
        except asyncio.CancelledError as cancelled:
            error = cancelled
        for read in reads:
            read.cancel()
        failures = [failure for failure in await _outcomes(reads) if failure is not None]
        # The first to fail had the others cancelled.
        failures.sort(key=lambda failure: isinstance(failure, asyncio.CancelledError))
        if error is None and failures:
            error = failures[0]
        if error is None and not verifier.complete:
            error = Corrupt(f"{place.key} ended before its last layer.")
        del self._chunks[place]
        self._shelf.read_ended(place, verified=error is None)
        self._pump()
        return error

    def _view(self, place: Place) -> memoryview:
        return self._slot_view(place.slot)[: self._layout.object_bytes]


def _leading(job: StageJob) -> tuple[int, ObjectCacheError | None]:
    """How many leading chunks are there, and why the next one is not."""
    for count, place in enumerate(job.places):
        if place.state is State.THERE:
            continue
        work = job.chunks[place].work
        error = work.result() if work.done() and not work.cancelled() else None
        if isinstance(error, ObjectCacheError):
            return count, error
        if error is None or isinstance(error, asyncio.CancelledError):
            return count, Unavailable(
                "the chunks did not come in time.", "raise stage_timeout_ms, or look at the store."
            )
        log.error("objectcache met a bug while reading a chunk", exc_info=error)
        return count, Unavailable(f"reading a chunk ended in {type(error).__name__}.")
    return len(job.places), None


async def _outcomes(reads: "list[asyncio.Future[None]]") -> "list[BaseException | None]":
    """How each read ended, once all have; also if the caller is cancelled meanwhile."""
    while pending := [read for read in reads if not read.done()]:
        try:
            await asyncio.wait(pending)
        except asyncio.CancelledError:
            continue  # whoever cancels gets its wish: this ends when the reads do
    return [asyncio.CancelledError() if read.cancelled() else read.exception() for read in reads]
