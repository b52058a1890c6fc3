"""Reads chunks into their places, each checked layer by layer as its bytes land. Not whose places: see shelf.py; not which chunks when: see streamer.py and through.py.

All state belongs to the loop.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from objectcache.errors import Corrupt, ObjectCacheError, Unavailable
from objectcache.format import ObjectLayout, Part, Verifier
from objectcache.loop import LoopThread
from objectcache.order import Turn, Turns
from objectcache.plan import Limits, goes_whole, plan
from objectcache.report import log
from objectcache.ring import FAILED, NOT_BEGUN
from objectcache.shelf import Place, Shelf
from objectcache.stores.base import Store


class Progress(Protocol):
    """For each slot how many leading layers of what is read there may be used; before its header is
    verified NOT_BEGUN, and FAILED once it is known not to come."""

    def __setitem__(self, slot: int, layers: int, /) -> None: ...


@dataclass(frozen=True)
class Chunk:
    """An object being read; `work` returns why it failed, None if it did not."""

    verifier: Verifier
    work: "asyncio.Task[BaseException | None]"
    turns: Turns

    def failure(self) -> ObjectCacheError:
        """Why it is not there, for a user; it did not come in time if it may still come."""
        error = self.work.result() if self.work.done() and not self.work.cancelled() else None
        if isinstance(error, ObjectCacheError):
            return error
        if error is None or isinstance(error, asyncio.CancelledError):
            return Unavailable(
                "the chunks did not come in time.", "raise stage_timeout_ms, or look at the store."
            )
        log.error("objectcache met a bug while reading a chunk", exc_info=error)
        return Unavailable(f"reading a chunk ended in {type(error).__name__}.")


class Reads:
    """`slot_view(slot)` is the memory of a slot, at least object_bytes long; `ended(place)` is called
    when nothing writes to a place any more. `progress[slot]` is how many leading layers of what is
    read there may be used."""

    def __init__(
        self,
        loop: LoopThread,
        store: Store,
        layout: ObjectLayout,
        shelf: Shelf,
        slot_view: Callable[[int], memoryview],
        ended: Callable[[Place], None],
        progress: Progress,
    ) -> None:
        self._loop = loop
        self._store = store
        self._layout = layout
        self._shelf = shelf
        self._slot_view = slot_view
        self._ended = ended
        self._progress = progress
        self._chunks: dict[Place, Chunk] = {}
        self._split = 0  # reads that were better split

    def of(self, places: Iterable[Place]) -> dict[Place, Chunk]:
        """Those of the places that are being read, in their order."""
        return {place: self._chunks[place] for place in places if place in self._chunks}

    def turn(self, came_s: float, chunks: int) -> Turn:
        """Of a job that came then and wants so many chunks. They go by `want`, or are read by it."""
        return Turn(came_s, chunks * self._layout.object_bytes)

    def want(self, turn: Turn, place: Place) -> None:
        """A job wants a chunk that others read, or that is there."""
        chunk = self._chunks.get(place)
        left_bytes = 0
        if chunk is not None:
            chunk.turns.join(turn)
            left_bytes = chunk.turns.left_bytes
        turn.left_bytes -= self._layout.object_bytes - left_bytes

    def start(self, places: Sequence[Place], chunk_hashes: Sequence[bytes], turn: Turn) -> None:
        """Read these chunks together, in the order of a plan."""
        verifiers = [
            self._verifier(place, chunk_hash)
            for place, chunk_hash in zip(places, chunk_hashes, strict=True)
        ]
        turns = [Turns(turn, self._layout.object_bytes) for _ in places]
        fetches = [*self._fetches(len(places))]
        alone = len(fetches) == len(places)  # a chunk's only GET needs no task beside the chunk's
        reads: list[list[Awaitable[None]]] = [[] for _ in places]
        for chunk, first, last in fetches:
            part = verifiers[chunk].part(first, last)
            read = self._read_part(places[chunk], part, turns[chunk])
            reads[chunk].append(read if alone else asyncio.ensure_future(read))
        for place, verifier, parts, wanted in zip(places, verifiers, reads, turns, strict=True):
            self._bring_soon(place, verifier, parts[0] if alone else _all_of(parts), wanted)

    def start_whole(self, place: Place, chunk_hash: bytes, turn: Turn) -> None:
        """Read one chunk by one GET: of chunks that are wanted one after the other the first counts."""
        verifier = self._verifier(place, chunk_hash)
        part = verifier.part(0, len(self._layout.slice_bytes))
        turns = Turns(turn, self._layout.object_bytes)
        self._bring_soon(place, verifier, self._read_part(place, part, turns), turns)

    def _bring_soon(
        self,
        place: Place,
        verifier: Verifier,
        read: Awaitable[None],
        turns: Turns,
    ) -> None:
        work = self._loop.spawn(self._bring(place, verifier, read))
        self._chunks[place] = Chunk(verifier, work, turns)

    def _fetches(self, chunks: int) -> Iterable[tuple[int, int, int]]:
        """(chunk, first layer, last layer) of each GET, in the order to issue."""
        pace = self._store.pace()
        whole = [(chunk, 0, len(self._layout.slice_bytes)) for chunk in range(chunks)]
        if pace is None or not chunks:
            return whole
        limits = Limits(pace.connections, part_bytes=pace.part_bytes)
        best = plan(chunks, self._layout, pace.model, limits)
        if len(best.groups) > 1 and pace.part_bytes is None:
            self._split += 1
            if goes_whole(self._split):
                return whole
        return best.fetches()

    async def _read_part(self, place: Place, part: Part, turns: Turns) -> None:
        whole = part.span == slice(0, self._layout.object_bytes)
        await self._store.read(
            place.key,
            self._view(place)[part.span],
            start=None if whole else part.span.start,
            marks=part.marks,
            landed=part.landed,
            turns=turns,
        )
        turns.landed(part.span.stop - part.span.start)

    async def _bring(
        self, place: Place, verifier: Verifier, read: Awaitable[None]
    ) -> BaseException | None:
        """Wait for what is read of a chunk and return why it failed; its slot is held until that has ended."""
        error = await _failure_of(read)
        if error is None and not verifier.complete:
            error = Corrupt(f"{place.key} ended before its last layer.")
        whole = len(self._layout.slice_bytes)
        self._progress[place.slot] = whole if error is None else FAILED
        del self._chunks[place]
        self._shelf.read_ended(place, verified=error is None)
        self._ended(place)
        return error

    def _verifier(self, place: Place, chunk_hash: bytes) -> Verifier:
        progress, slot = self._progress, place.slot
        progress[slot] = NOT_BEGUN

        def told(layers: int) -> None:
            progress[slot] = layers

        return Verifier(self._layout, chunk_hash, self._view(place), told)

    def _view(self, place: Place) -> memoryview:
        return self._slot_view(place.slot)[: self._layout.object_bytes]


async def _failure_of(read: Awaitable[None]) -> BaseException | None:
    """Why it failed. (In a frame of its own, which does not keep it: none is left for the collector.)"""
    try:
        await read
    except (Exception, asyncio.CancelledError) as failure:
        return failure
    return None


async def _all_of(parts: Sequence[Awaitable[None]]) -> None:
    """Wait for several reads, which are under way. When one has failed, or who waits is cancelled, the others
    are cancelled; then, or that, is raised once the last has ended."""
    reads: list[asyncio.Future[None]] = [asyncio.ensure_future(part) for part in parts]
    failures: list[BaseException] = []
    try:
        await asyncio.wait(reads, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for read in reads:
            read.cancel()
        failures += [failure for failure in await _outcomes(reads) if failure is not None]
    # The first to fail had the others cancelled.
    failures.sort(key=lambda failure: isinstance(failure, asyncio.CancelledError))
    try:
        if failures:
            raise failures[0]
    finally:
        failures.clear()  # or this frame and what failed would keep each other


async def _outcomes(reads: "list[asyncio.Future[None]]") -> "list[BaseException | None]":
    """How each read ended, once all have; also if the caller is cancelled meanwhile."""
    while pending := [read for read in reads if not read.done()]:
        try:
            await asyncio.wait(pending)
        except asyncio.CancelledError:
            continue  # whoever cancels gets its wish: this ends when the reads do
    return [asyncio.CancelledError() if read.cancelled() else read.exception() for read in reads]
