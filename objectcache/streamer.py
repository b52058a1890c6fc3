"""Brings chunks from the store into ring slots, verified. Not when or which: the scheduler half says so.

A job's chunks are read all at once, each by one GET that is checked layer by layer as its bytes
land. Whatever fails ends the job's prefix there. Jobs that find no room wait in the order in which
they came; none starts before all its slots are free, so that no two hold half and wait for each
other. All state belongs to the loop; commands come from the worker's thread.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from objectcache.errors import Corrupt, ObjectCacheError, Unavailable
from objectcache.format import ObjectLayout, Verifier
from objectcache.loop import LoopThread
from objectcache.report import log
from objectcache.ring import Ring
from objectcache.stores.base import Store


@dataclass
class StageJob:
    """Chunks to bring: their keys and hashes, in prefix order."""

    job: int
    keys: list[str]
    chunk_hashes: list[bytes]
    deadline: float = 0.0
    slots: list[int] = field(default_factory=list)
    cancelled: bool = False
    work: "asyncio.Task[None] | None" = None


@dataclass(frozen=True)
class StageResult:
    """`slots` hold the leading chunks that came; the caller gives them back.

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
        slot_view: Callable[[int], memoryview],
        timeout_s: float,
        done: Callable[[StageResult], None],
    ) -> None:
        self._loop = loop
        self._store = store
        self._layout = layout
        self._ring = ring
        self._slot_view = slot_view
        self._timeout_s = timeout_s
        self._done = done
        self._waiting: deque[StageJob] = deque()
        self._jobs: dict[int, StageJob] = {}

    def stage(self, job: int, keys: list[str], chunk_hashes: list[bytes]) -> None:
        """Start a job, from any thread. What the ring cannot hold at all is left out."""
        most = self._ring.load_slots
        self._loop.call(self._admit, StageJob(job, keys[:most], chunk_hashes[:most]))

    def cancel(self, job: int) -> None:
        """Stop a job if it has not reported yet, from any thread. It then reports no slots."""
        self._loop.call(self._cancel, job)

    def room(self) -> None:
        """Slots became free, from any thread."""
        self._loop.call(self._pump)

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
            slots = self._ring.lease_loads(len(self._waiting[0].keys))
            if slots is None:
                return
            job = self._waiting.popleft()
            job.slots = slots
            assert job.work is not None
            job.work.cancel()
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
        reads: list[asyncio.Future[None]] = [
            asyncio.ensure_future(self._read(key, chunk_hash, slot))
            for key, chunk_hash, slot in zip(job.keys, job.chunk_hashes, job.slots, strict=True)
        ]
        try:
            await _until_first_failure(reads, job.deadline)
        except asyncio.CancelledError:
            job.cancelled = True  # by _cancel or by the end of the loop: the slots go back below
        for read in reads:
            read.cancel()
        # A slot may be reused only when nothing writes to it any more.
        outcomes = await _outcomes(reads)
        self._finish(job, *((0, None) if job.cancelled else _leading(outcomes)))

    async def _read(self, key: str, chunk_hash: bytes, slot: int) -> None:
        view = self._slot_view(slot)[: self._layout.object_bytes]
        verifier = Verifier(self._layout, chunk_hash, view)
        await self._store.read(key, view, landed=verifier.landed)
        if not verifier.complete:
            raise Corrupt(f"{key} ended before its last layer.")

    def _finish(self, job: StageJob, came: int, error: ObjectCacheError | None) -> None:
        del self._jobs[job.job]
        self._ring.release(job.slots[came:])
        failed_key = job.keys[came] if error is not None and came < len(job.keys) else ""
        self._done(StageResult(job.job, job.slots[:came], error, failed_key))
        if came < len(job.slots):
            self._pump()


async def _until_first_failure(reads: "list[asyncio.Future[None]]", deadline: float) -> None:
    """Wait for the reads in prefix order; a failure makes all later ones useless."""
    try:
        async with asyncio.timeout_at(deadline):
            for read in reads:
                await asyncio.wait([read])
                if read.cancelled() or read.exception() is not None:
                    return
    except TimeoutError:
        return


async def _outcomes(reads: "list[asyncio.Future[None]]") -> "list[BaseException | None]":
    """How each read ended, once all have; also if the caller is cancelled meanwhile."""
    while pending := [read for read in reads if not read.done()]:
        try:
            await asyncio.wait(pending)
        except asyncio.CancelledError:
            continue  # whoever cancels gets its wish: this ends when the reads do
    return [asyncio.CancelledError() if read.cancelled() else read.exception() for read in reads]


def _leading(outcomes: "list[BaseException | None]") -> tuple[int, ObjectCacheError | None]:
    """How many leading reads succeeded, and why the next one did not."""
    for count, outcome in enumerate(outcomes):
        if outcome is None:
            continue
        if isinstance(outcome, ObjectCacheError):
            return count, outcome
        if isinstance(outcome, asyncio.CancelledError):
            return count, Unavailable(
                "the chunks did not come in time.", "raise stage_timeout_ms, or look at the store."
            )
        log.error("objectcache met a bug while reading a chunk", exc_info=outcome)
        return count, Unavailable(f"reading a chunk ended in {type(outcome).__name__}.")
    return len(outcomes), None
