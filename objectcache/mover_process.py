"""A mover in a process of its own, so that a stream does not take the interpreter from vLLM's thread: both ends, and what is said between them. Not what a mover does: see mover.py.

Commands and events are pickled over a socket pair; the bytes stay in memory that both map. The
process ends with its parent, in whatever way that ends. If it ends before, all that it owed is
reported as failed, which costs recomputes; when nothing of it is in use any more, another is started.
"""

import gc
import logging
import mmap
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, Pipe, wait
from queue import SimpleQueue

from objectcache.errors import Unavailable
from objectcache.mover import Arrived, Berth, Event, LocalMover, Mover, Placed
from objectcache.report import log
from objectcache.ring import progress_offset
from objectcache.saver import SaveResult
from objectcache.stores.base import StoreCounters
from objectcache.streamer import StageResult
from objectcache.through import StreamResult
from objectcache.wire import Wire

_START = (
    "import sys; sys.path[:] = sys.argv[3].split('\\n'); "
    "from objectcache.mover_process import serve; serve(int(sys.argv[1]), int(sys.argv[2]))"
)
_LINES_MAX = 1000
_LOOK_S = 0.02
# Between two words of nothing but what was asked of the store. Each wakes a thread beside vLLM's, and takes the
# interpreter from it: 0.2 ms of a step that computes 4.5, where 200 came in a second.
_COUNTERS_S = 1.0
_DYING_S = 0.2  # from the end of its socket to its own
_END_S = 1.5  # for the process to end after its drain
_FIRST_PAUSE_S, _PAUSE_MAX_S = 1.0, 60.0  # before another is started


@dataclass
class _Owed:
    """What a process has to answer for, and what it was told to keep."""

    stages: set[int] = field(default_factory=set)
    streams: dict[int, int] = field(default_factory=dict)  # with the chunks that arrived
    saves: dict[int, bytes] = field(default_factory=dict)
    held: set[int] = field(default_factory=set)  # stages that reported slots
    lent: set[tuple[int, int]] = field(default_factory=set)  # chunks of streams

    def hear(self, event: Event) -> None:
        if isinstance(event, Placed):
            return
        if isinstance(event, Arrived):
            self.streams[event.job] += 1
            self.lent.add((event.job, event.chunk))
        elif isinstance(event, StageResult):
            self.stages.remove(event.job)
            self.held.add(event.job)
        elif isinstance(event, StreamResult):
            del self.streams[event.job]
        else:
            del self.saves[event.slot]

    def failed(self) -> list[Event]:
        """How all ends that did not, if the process has."""
        error = Unavailable(
            "the process that moves the bytes has ended.", "look at the log for why."
        )
        events: list[Event] = [StageResult(job, [], error) for job in self.stages]
        events += [StreamResult(job, came, error) for job, came in self.streams.items()]
        events += [SaveResult(slot, name, "failed", error) for slot, name in self.saves.items()]
        return events

    @property
    def nothing_in_use(self) -> bool:
        return not self.held and not self.lent


class MoverProcess(Mover):
    """The parent's end. `memory` is the descriptor of HostSlots.

    Raises OSError if no process can be started.
    """

    def __init__(self, berth: Berth, memory: int) -> None:
        self._berth = berth
        self._memory = memory
        self._owed = _Owed()
        self._events: list[Event] = []  # of orders that no process took
        self._namespace: tuple[str, bytes] | None = None
        self._counted = StoreCounters()  # by processes that have ended
        self._summed = (StoreCounters(), StoreCounters())  # of a child, and with those before it
        self._pause_s = _FIRST_PAUSE_S
        self._again_at = 0.0
        self._began_at = time.monotonic()
        self._child: _Child | None = _Child(berth, memory)

    def enter(self, name: str, digest: bytes) -> None:
        self._namespace = (name, digest)  # also for the one that is started next
        self._order("enter", name, digest)

    def stage(self, job: int, chunk_hashes: Sequence[bytes], first: int = 0) -> None:
        self._owed.stages.add(job)
        self._ask("stage", job, list(chunk_hashes))

    def cancel(self, job: int) -> None:
        self._order("cancel", job)

    def release(self, job: int) -> None:
        self._owed.held.discard(job)
        self._order("release", job)

    def stream(self, job: int, chunk_hashes: Sequence[bytes]) -> None:
        self._owed.streams[job] = 0
        self._ask("stream", job, list(chunk_hashes))

    def stop(self, job: int) -> None:
        self._order("stop", job)

    def give_back(self, job: int, chunk: int) -> None:
        self._owed.lent.discard((job, chunk))
        self._order("give_back", job, chunk)

    def save(self, slot: int, namespace: str, chunk_hash: bytes) -> None:
        self._owed.saves[slot] = chunk_hash
        self._ask("save", slot, namespace, chunk_hash)

    def take(self) -> list[Event]:
        if self._child is not None:
            ended = self._child.ended  # first: what it said before that is in its news
            self._listen(self._child)
            if ended:
                self._bury(self._child)
        if self._child is None:
            for event in self._owed.failed():
                self._owed.hear(event)
                self._events.append(event)
        events, self._events = self._events, []
        return events

    def _listen(self, child: "_Child") -> None:
        for event in child.news():
            self._owed.hear(event)
            self._events.append(event)

    @property
    def counters(self) -> StoreCounters:
        if self._child is None:
            return self._counted
        child = self._child.counters
        if self._summed[0] is not child:  # it said something
            self._summed = (child, self._counted + child)
        return self._summed[1]

    @property
    def wire(self) -> Wire | None:
        return self._child.wire if self._child is not None else None

    @property
    def leased(self) -> int:
        return self._child.leased if self._child is not None else 0

    def close(self, drain_s: float) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.close(drain_s)
        self._listen(child)
        self._counted += child.counters
        self._again_at = float("inf")

    # ---- the process

    def _ask(self, name: str, *arguments: object) -> None:
        """What a new process can do as well as the one before."""
        if self._child is None:
            self._start_again()
        self._order(name, *arguments)

    def _order(self, name: str, *arguments: object) -> None:
        if self._child is not None:
            self._child.order(name, arguments)

    def _bury(self, child: "_Child") -> None:
        if time.monotonic() - self._began_at > _PAUSE_MAX_S:
            self._pause_s = _FIRST_PAUSE_S  # it ran well for a while
        log.error(
            "objectcache: the process that moves the bytes has ended with code %s. Prompts are "
            "computed until there is another, in %.0f s at the soonest.",
            child.bury(),
            self._pause_s,
        )
        self._counted += child.counters
        self._child = None
        self._again_at = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, _PAUSE_MAX_S)

    def _start_again(self) -> None:
        """Not while there are slots in use that it would take for free."""
        if time.monotonic() < self._again_at or not self._owed.nothing_in_use:
            return
        try:
            self._child = _Child(self._berth, self._memory)
        except OSError as error:
            log.error("objectcache: no process could be started to move the bytes: %s", error)
            self._again_at = time.monotonic() + self._pause_s
            return
        self._began_at = time.monotonic()
        if self._namespace is not None:
            self._child.order("enter", self._namespace)


class _Child:
    """One process, and two threads that keep its end of the socket from holding up anybody."""

    def __init__(self, berth: Berth, memory: int) -> None:
        ours, theirs = Pipe()
        handed = (theirs.fileno(), memory)
        command = [sys.executable, "-c", _START, *map(str, handed), "\n".join(sys.path)]
        try:
            self._process = subprocess.Popen(
                command, pass_fds=handed, stdin=subprocess.DEVNULL, close_fds=True
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        self._pipe = ours
        self._orders: SimpleQueue[bytes | None] = SimpleQueue()
        self._sent = 0
        self._lock = threading.Lock()
        self._state = _State()
        self._news: list[Event] = []
        self.ended = False
        self._threads = [
            threading.Thread(target=self._send, name="objectcache-orders", daemon=True),
            threading.Thread(target=self._receive, name="objectcache-events", daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        self._orders.put(pickle.dumps((berth, log.getEffectiveLevel())))

    def order(self, name: str, arguments: Sequence[object]) -> None:
        self._sent += 1
        self._orders.put(pickle.dumps((name, arguments)))

    def news(self) -> list[Event]:
        if not self._news:
            return []
        with self._lock:
            news, self._news = self._news, []
        return news

    @property
    def counters(self) -> StoreCounters:
        return self._state.counters

    @property
    def wire(self) -> Wire | None:
        return self._state.wire

    @property
    def leased(self) -> int:
        """Slots in use; not zero while it has orders that it may not have read."""
        state = self._state
        return state.leased or int(state.heeded < self._sent)

    def bury(self) -> int | None:
        """It has ended, or as good as. Its exit code; a process that was killed here has -9."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_DYING_S)
        self._process.kill()
        return self.close(0.0)

    def close(self, drain_s: float) -> int | None:
        """Have it end, and see to it that it has. Its exit code."""
        self.order("close", (drain_s,))
        self._orders.put(None)
        try:
            self._process.wait(drain_s + _END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for thread in self._threads:
            thread.join(1.0)
        self._pipe.close()
        return self._process.returncode

    def _send(self) -> None:
        try:
            while (order := self._orders.get()) is not None:
                self._pipe.send_bytes(order)
        except OSError:
            pass  # it has ended, as the other thread hears

    def _receive(self) -> None:
        try:
            while True:
                state: _State = pickle.loads(self._pipe.recv_bytes())
                with self._lock:
                    self._news += state.events
                    self._state = state
                for level, line in state.lines:
                    log.log(level, "%s", line)
        except (EOFError, OSError):
            self.ended = True


# ---- what is said, and the process's end


@dataclass
class _State:
    """From the process: what happened since it last said so, and how things are."""

    events: list[Event] = field(default_factory=list)
    lines: list[tuple[int, str]] = field(default_factory=list)  # for the log, with their levels
    counters: StoreCounters = field(default_factory=StoreCounters)
    leased: int = 0
    heeded: int = 0  # orders
    wire: Wire | None = None


def serve(pipe: int, memory: int) -> None:
    """The whole life of the process; `pipe` and `memory` are descriptors."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when it is over
    orders = Connection(pipe)
    try:
        berth, level = pickle.loads(orders.recv_bytes())
        _Served(orders, berth, memory, level).run()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent is gone, and nobody wants anything
    os._exit(0)  # no thread of a library keeps what nobody waits for


def set_heap_apart() -> None:
    """What is there now, libraries above all, stays to the end: no collection looks at it again.

    Else one of all objects comes during the first prefixes, and for about 0.1 s no thread moves a byte.
    """
    gc.collect()
    gc.freeze()


class _Served:
    """Heeds orders, tells events; a thread of its own for neither."""

    def __init__(self, orders: Connection, berth: Berth, memory: int, level: int) -> None:
        self._orders = orders
        self._ear, self._mouth = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._lines: list[tuple[int, str]] = []
        self._heeded = 0
        self._told = _State()
        self._counted_at = -_COUNTERS_S
        self._untold = False  # of the counters
        log.setLevel(level)
        log.addHandler(_Lines(self._say))
        log.propagate = False
        flags = mmap.MAP_SHARED | (mmap.MAP_POPULATE if berth.populate else 0)
        size = berth.layout.object_bytes
        ring = memoryview(mmap.mmap(memory, 0, flags))
        progress = ring[progress_offset(berth.slots, size) :].cast("h")
        self._mover = LocalMover(
            berth,
            lambda slot: ring[slot * size : (slot + 1) * size],
            progress,
            self._wake,
            set_heap_apart,
        )

    def run(self) -> None:
        while True:
            # Slots become free without a word: as long as some are in use it looks by itself.
            again_s = _LOOK_S if self._told.leased else _COUNTERS_S if self._untold else None
            ready = wait([self._orders, self._ear], again_s)
            if self._ear in ready:
                os.read(self._ear, 4096)
            # A burst of orders is heeded at once, but events do not wait for its end.
            for _ in range(64):
                if not self._orders.poll():
                    break
                name, arguments = pickle.loads(self._orders.recv_bytes())
                self._heeded += 1
                getattr(self._mover, name)(*arguments)
                if name == "close":
                    self._tell()
                    return
            self._tell()

    def _tell(self) -> None:
        lines, self._lines = self._lines, []
        mover = self._mover
        state = _State(
            mover.take(), lines, replace(mover.counters), mover.leased, self._heeded, mover.wire
        )
        now, told = time.monotonic(), self._told
        self._untold = state.counters != told.counters
        if now < self._counted_at + _COUNTERS_S:
            told = replace(told, counters=state.counters)  # they can wait, if nothing else is said
        if state != told:
            self._orders.send_bytes(pickle.dumps(state))
            self._told = replace(state, events=[], lines=[])
            self._counted_at, self._untold = now, False

    def _wake(self) -> None:
        with suppress(BlockingIOError):  # it is full of calls
            os.write(self._mouth, b"w")

    def _say(self, level: int, line: str) -> None:
        if len(self._lines) < _LINES_MAX:
            self._lines.append((level, line))
        self._wake()


class _Lines(logging.Handler):
    """What is logged goes to the parent's log."""

    def __init__(self, say: Callable[[int, str], None]) -> None:
        super().__init__()
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        self._say(record.levelno, self.format(record))
