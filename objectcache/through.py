"""Brings a prefix that is longer than the ring through it, chunk after chunk. Not when, nor the copies to vLLM's blocks: see parked.py.

A stream takes places for its next chunks as slots become free and reads as far ahead as it holds
places. Verified chunks are handed over in the order of the prefix; who got one gives it back when it
is copied, and its slot serves the next. What holds a slot waits for the store or for a copy, never for
another slot. Whatever fails ends the stream there. All state belongs to the loop; commands come from
the worker's thread.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from objectcache.errors import ObjectCacheError, Unavailable
from objectcache.loop import LoopThread
from objectcache.order import Turn
from objectcache.reading import Chunk, Reads
from objectcache.shelf import Place, Shelf, State


@dataclass(frozen=True)
class StreamResult:
    """The first `came` chunks were handed over; `error` is why not more, and `failed_key` the object
    at which it ended."""

    job: int
    came: int
    error: ObjectCacheError | None
    failed_key: str = ""


@dataclass
class _Stream:
    job: int
    keys: list[str]
    chunk_hashes: list[bytes]
    arrived: Callable[[int, int, int], None]
    done: Callable[[StreamResult], None]
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    places: list[Place] = field(default_factory=list)  # of its first chunks: all that it ever took
    chunks: dict[Place, Chunk] = field(default_factory=dict)  # those not there when it took them
    turn: Turn | None = None
    came: int = 0
    lent: int = 0  # handed over and not given back
    cancelled: bool = False
    work: "asyncio.Task[None] | None" = None

    @property
    def holds(self) -> int:
        return len(self.places) - self.came + self.lent

    @property
    def wants(self) -> bool:
        return not self.cancelled and len(self.places) < len(self.keys)


class Through:
    """`pump` gives free slots to who waits for them, this room's streams among others (`Through.pump`)."""

    def __init__(
        self,
        loop: LoopThread,
        shelf: Shelf,
        reads: Reads,
        timeout_s: float,
        pump: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._shelf = shelf
        self._reads = reads
        self._timeout_s = timeout_s
        self._pump = pump
        self._streams: dict[int, _Stream] = {}
        self._lent: dict[tuple[int, int], tuple[_Stream, Place]] = {}

    def begin(
        self,
        job: int,
        keys: list[str],
        chunk_hashes: list[bytes],
        arrived: Callable[[int, int, int], None],
        done: Callable[[StreamResult], None],
    ) -> None:
        """Start a stream, from any thread.

        `arrived(job, chunk, slot)` hands a verified chunk over, until `give_back`; `done` is called
        once, after the last of them. Both on the loop.
        """
        self._loop.call(self._begin, _Stream(job, keys, chunk_hashes, arrived, done))

    def cancel(self, job: int) -> None:
        """Bring no more, from any thread. `done` is called soon if it was not yet."""
        self._loop.call(self._cancel, job)

    def give_back(self, job: int, chunk: int) -> None:
        """A chunk that was handed over is copied. From any thread."""
        self._loop.call(self._give_back, job, chunk)

    def abandon(self, job: int) -> None:
        """The loop has ended and nothing copies any more: chunks handed over go back."""
        self._shelf.give_back(job)

    # ---- on the loop

    def pump(self, crowded: bool) -> None:
        """Take places as long as there are free slots, for whoever holds the fewest."""
        took = True
        while took:
            wanting = [stream for stream in self._streams.values() if stream.wants]
            wanting.sort(key=lambda stream: stream.holds)
            took = any(self._take(stream, crowded) for stream in wanting)

    def read_ended(self, place: Place) -> None:
        for job in place.jobs & self._streams.keys():
            self._streams[job].wake.set()

    def _take(self, stream: _Stream, crowded: bool) -> bool:
        at = len(stream.places)
        taken = self._shelf.take_next(stream.job, stream.keys[at], crowded)
        if taken is None:
            return False
        place, unread = taken
        assert stream.turn is not None
        if unread:
            self._reads.start_whole(place, stream.chunk_hashes[at], stream.turn)
        else:
            self._reads.want(stream.turn, place)
        stream.places.append(place)
        stream.chunks |= self._reads.of([place])
        stream.wake.set()
        return True

    def _begin(self, stream: _Stream) -> None:
        self._streams[stream.job] = stream
        now = asyncio.get_running_loop().time()
        stream.turn = self._reads.turn(now, len(stream.keys))
        stream.work = self._loop.spawn(self._run(stream))
        self._pump()

    def _cancel(self, job: int) -> None:
        stream = self._streams.get(job)
        if stream is not None and stream.work is not None:
            stream.cancelled = True
            # Next turn: a task that is cancelled before its first step never runs.
            asyncio.get_running_loop().call_soon(stream.work.cancel)

    def _give_back(self, job: int, chunk: int) -> None:
        stream, place = self._lent.pop((job, chunk))
        stream.lent -= 1
        self._shelf.let_go(job, place)
        stream.wake.set()
        self._pump()

    async def _run(self, stream: _Stream) -> None:
        error: ObjectCacheError | None = None
        try:
            error = await self._hand_over(stream)
        except asyncio.CancelledError:
            stream.cancelled = True  # by _cancel or by the end of the loop: the slots go back
        self._finish(stream, None if stream.cancelled else error)

    async def _hand_over(self, stream: _Stream) -> ObjectCacheError | None:
        """Each chunk as it comes; why there are no more, None if all came.

        There is a limit to the time in which nothing happens, and one to the whole: that of staging
        it one part after the other. While somebody has chunks to copy it is not the store that is late.
        """
        loop = asyncio.get_running_loop()
        parts = -(-len(stream.keys) // max(1, self._shelf.most))
        last = loop.time() + parts * self._timeout_s
        while stream.came < len(stream.keys):
            place = stream.places[stream.came] if stream.came < len(stream.places) else None
            if place is not None and place.state is State.THERE:
                self._lend(stream, place)
                continue
            if place is not None and place.state is State.LOST:
                return stream.chunks[place].failure()
            until = None if stream.lent else min(loop.time() + self._timeout_s, last)
            if await _nothing_happens(stream, until):
                if place is not None:
                    return stream.chunks[place].failure()
                return Unavailable("there was no room in the ring in time.", "raise ring_bytes.")
        return None

    def _lend(self, stream: _Stream, place: Place) -> None:
        at = stream.came
        self._lent[stream.job, at] = (stream, place)
        stream.came, stream.lent = at + 1, stream.lent + 1
        stream.arrived(stream.job, at, place.slot)

    def _finish(self, stream: _Stream, error: ObjectCacheError | None) -> None:
        del self._streams[stream.job]
        if stream.turn is not None:
            stream.turn.end()
        for place in self._shelf.give_back(stream.job, keep=stream.lent):
            # Next turn, as in _cancel.
            asyncio.get_running_loop().call_soon(stream.chunks[place].work.cancel)
        failed_key = stream.keys[stream.came] if error is not None else ""
        stream.done(StreamResult(stream.job, stream.came, error, failed_key))
        self._pump()


async def _nothing_happens(stream: _Stream, until: float | None) -> bool:
    """Whether it is `until` and nothing happened to the stream."""
    try:
        async with asyncio.timeout_at(until):
            await stream.wake.wait()
    except TimeoutError:
        return True
    stream.wake.clear()
    return False
