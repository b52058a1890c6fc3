"""All that moves bytes between the store and the ring, behind one face: commands in, events out. Not where it runs: see mover_process.py; not what is moved when: the scheduler half says so.

The worker half gives commands from vLLM's thread and takes events when it likes; no call waits for the
store. What is said crosses a process border as well as a call.
"""

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from objectcache import keys
from objectcache.config import Options
from objectcache.errors import Corrupt, ObjectCacheError
from objectcache.format import ObjectLayout
from objectcache.loop import LoopThread
from objectcache.reading import Progress
from objectcache.report import log
from objectcache.ring import Ring
from objectcache.saver import Saver, SaveResult
from objectcache.shelf import Shelf
from objectcache.stores import open_store
from objectcache.stores.base import StoreCounters
from objectcache.streamer import StageResult, Streamer
from objectcache.through import StreamResult, Through
from objectcache.wire import Wire

CLOSE_TIMEOUT_S = 1.0
NAMESPACES_MAX = 4  # in which saves may still be under way


@dataclass(frozen=True)
class Arrived:
    """A verified chunk of a stream lies in `slot` until it is given back."""

    job: int
    chunk: int
    slot: int


@dataclass(frozen=True)
class Placed:
    """The chunks of a stage come to these slots, or are there: see `progress`."""

    job: int
    slots: list[int]


Event = Placed | StageResult | StreamResult | Arrived | SaveResult


@dataclass(frozen=True)
class Berth:
    """What a mover may use of the ring: slots for loads, `apart` of them for streams alone.

    `layout` is that of the objects, but for their namespace. `populate` is whether all of the memory
    is there already, so that to map it costs no memory. `threads` receive bodies; 0: see open_store.
    """

    options: Options
    layout: ObjectLayout
    slots: int  # all of the ring's, others' too
    load_slots: range
    apart: int
    populate: bool = False
    threads: int = 0


class Mover(ABC):
    """Commands from one thread. Slots named in events stay as they are until they are given back."""

    @abstractmethod
    def enter(self, name: str, digest: bytes) -> None:
        """Objects from now on bear this namespace. No job of the one before is wanted any more."""

    @abstractmethod
    def stage(self, job: int, chunk_hashes: Sequence[bytes], first: int = 0) -> None:
        """Bring these chunks, the first of which is chunk `first` of its prefix. A StageResult follows,
        and before it perhaps a Placed; of what the ring cannot hold neither says anything."""

    @abstractmethod
    def cancel(self, job: int) -> None:
        """Stop a stage that has not reported. It reports soon, in any case."""

    @abstractmethod
    def release(self, job: int) -> None:
        """The slots that a stage reported are not used any more."""

    @abstractmethod
    def stream(self, job: int, chunk_hashes: Sequence[bytes]) -> None:
        """Bring these chunks one after the other: an Arrived for each, then one StreamResult."""

    @abstractmethod
    def stop(self, job: int) -> None:
        """Bring no more of a stream that has not ended. It ends soon."""

    @abstractmethod
    def give_back(self, job: int, chunk: int) -> None:
        """A chunk that arrived is not used any more."""

    @abstractmethod
    def save(self, slot: int, namespace: str, chunk_hash: bytes) -> None:
        """Upload the slot, whose pages are final. A SaveResult follows."""

    @abstractmethod
    def take(self) -> list[Event]:
        """What happened since the last call."""

    @property
    @abstractmethod
    def counters(self) -> StoreCounters:
        """What was asked of the store so far."""

    @property
    @abstractmethod
    def wire(self) -> Wire | None:
        """What the store gave until the latest job ended; None if nothing is known, or nothing is to."""

    @property
    @abstractmethod
    def leased(self) -> int:
        """Slots for loads that are in use; zero when all is quiet."""

    @abstractmethod
    def close(self, drain_s: float) -> None:
        """Let uploads end for so long, then stop everything; slots are in use no more. Idempotent."""


@dataclass
class _Stream:
    through: Through
    back: int = 0  # chunks given back
    came: int | None = None  # in all, once it has ended


class LocalMover(Mover):
    """In this process, on a thread with a loop. `slot_view(slot)` is the memory of a slot, and
    `progress[slot]` how many leading layers of what comes there may be used.

    `heard` is called, from any thread, when there is an event to take, and `opened`, on the thread with
    the loop, once the store is open or could not be opened.
    """

    def __init__(
        self,
        berth: Berth,
        slot_view: Callable[[int], memoryview],
        progress: Progress,
        heard: Callable[[], None] = lambda: None,
        opened: Callable[[], None] = lambda: None,
    ) -> None:
        self._options = berth.options
        self._layout = berth.layout
        self._slot_view = slot_view
        self._progress = progress
        self._ring = Ring(berth.load_slots)
        self._shelf = Shelf(self._ring, berth.apart)
        self._lock = threading.Lock()
        self._events: list[Event] = []
        self._heard = heard
        self._held: set[int] = set()  # stage jobs that may hold slots
        self._streams: dict[int, _Stream] = {}  # streams that may
        self._savers: OrderedDict[str, Saver] = OrderedDict()
        self._store = open_store(berth.options, berth.threads)
        self._loop: LoopThread | None = LoopThread("objectcache-mover")
        self._streamer: Streamer | None = None
        self._wire: Wire | None = None
        self._loop.call(lambda loop: loop.spawn(self._open_store(opened)), self._loop)

    async def _open_store(self, opened: Callable[[], None]) -> None:
        try:
            await self._store.open()
        except ObjectCacheError:
            log.debug("objectcache: the store is not ready yet")  # the scheduler half says why
        opened()

    def enter(self, name: str, digest: bytes) -> None:
        loop, before = self._running, self._streamer
        layout = replace(self._layout, namespace_digest=digest)
        saver = Saver(loop, self._store, layout, self._slot_view, self._tell)
        self._name, self._saver = name, saver
        self._savers[name] = saver
        if len(self._savers) > NAMESPACES_MAX:
            self._savers.popitem(last=False)

        def staged(result: StageResult) -> None:
            self._look_at(saver, result)

        self._streamer = Streamer(
            loop,
            self._store,
            layout,
            self._shelf,
            self._slot_view,
            self._options.stage_timeout_ms / 1000,
            staged,
            self._progress,
            lambda job, slots: self._tell(Placed(job, slots)),
        )
        if before is not None:
            before.succeeded_by(self._streamer)

    def stage(self, job: int, chunk_hashes: Sequence[bytes], first: int = 0) -> None:
        self._held.add(job)
        self._entered.stage(job, self._keys(chunk_hashes), list(chunk_hashes))

    def cancel(self, job: int) -> None:
        self._entered.cancel(job)

    def release(self, job: int) -> None:
        self._held.discard(job)
        self._entered.release(job)

    def stream(self, job: int, chunk_hashes: Sequence[bytes]) -> None:
        saver = self._saver

        def arrived(job: int, chunk: int, slot: int) -> None:
            self._tell(Arrived(job, chunk, slot))

        def done(result: StreamResult) -> None:
            self._look_at(saver, result)

        through = self._entered.through
        self._streams[job] = _Stream(through)
        through.begin(job, self._keys(chunk_hashes), list(chunk_hashes), arrived, done)

    def stop(self, job: int) -> None:
        if job in self._streams:
            self._streams[job].through.cancel(job)

    def give_back(self, job: int, chunk: int) -> None:
        stream = self._streams[job]
        stream.through.give_back(job, chunk)
        stream.back += 1
        self._forget_if_over(job)

    def save(self, slot: int, namespace: str, chunk_hash: bytes) -> None:
        saver = self._savers.get(namespace)
        if saver is None:
            self._tell(SaveResult(slot, chunk_hash, "failed"))
            return
        saver.save(self._key(namespace, chunk_hash), chunk_hash, slot)

    def take(self) -> list[Event]:
        if not self._events:
            return []
        with self._lock:
            events, self._events = self._events, []
        for event in events:
            if isinstance(event, StreamResult):
                self._streams[event.job].came = event.came
                self._forget_if_over(event.job)
        return events

    @property
    def counters(self) -> StoreCounters:
        return self._store.counters

    @property
    def wire(self) -> Wire | None:
        return self._wire

    @property
    def leased(self) -> int:
        return self._ring.leased

    def close(self, drain_s: float) -> None:
        if self._loop is None:
            return
        loop, self._loop = self._loop, None
        _drain(loop, list(self._savers.values()), drain_s)
        loop.stop(self._store.close(), CLOSE_TIMEOUT_S)
        # Nothing runs any more: slots that somebody would have asked for go back unused.
        for job in [*self._held, *self._streams]:
            self._shelf.give_back(job)

    def _forget_if_over(self, job: int) -> None:
        if self._streams[job].came == self._streams[job].back:
            del self._streams[job]

    # ---- on the loop

    def _look_at(self, saver: Saver, result: StageResult | StreamResult) -> None:
        if isinstance(result.error, Corrupt):
            saver.spoilt(result.failed_key)
        pace = self._store.pace() if self._store.counters.read_bytes else None
        if pace is not None:
            self._wire = Wire(pace.model, pace.connections)
        self._tell(result)

    def _tell(self, event: Event) -> None:
        with self._lock:
            self._events.append(event)
        self._heard()

    # ---- what is where

    @property
    def _running(self) -> LoopThread:
        assert self._loop is not None, "vLLM steps a worker that was shut down"
        return self._loop

    @property
    def _entered(self) -> Streamer:
        assert self._streamer is not None, "there is no namespace yet"
        return self._streamer

    def _key(self, namespace: str, chunk_hash: bytes) -> str:
        return keys.object_key(namespace, chunk_hash, self._layout.shard, self._layout.shards)

    def _keys(self, chunk_hashes: Sequence[bytes]) -> list[str]:
        return [self._key(self._name, chunk_hash) for chunk_hash in chunk_hashes]


def _drain(loop: LoopThread, savers: list[Saver], timeout_s: float) -> None:
    async def drain() -> None:
        for saver in savers:
            await saver.drain()

    try:
        loop.submit(drain()).result(timeout_s)
    except TimeoutError:
        log.warning("objectcache: some chunks were not uploaded before the engine stopped.")
