"""What became of each request, and when: kept for the last few, and told as one line when it ends. Not what is decided: see scheduler.py; not where lines go: see tracefile.py.

Pure: events in, plain data out; the clock (seconds, monotonic, one for all of a host) is given. No event holds
a token of a prompt, a hash of one or an address: only counts, times and names of errors.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from objectcache.moment import Moment

LIVE_MAX = 1024  # requests that have not ended; of more the oldest is told as it is
KEPT = 64  # requests that ended
EVENTS_MAX = 256  # of one request; the last place is for its end
PROGRESS_SHARE = 1 / 16  # of a prefix, that is news by itself

Record = dict[str, Any]
Event = tuple[float, str, dict[str, Any]]


@dataclass
class PassTimes:
    """A forward pass with loads, as the host of one rank saw it: all in seconds of the host's monotonic
    clock. `waits` is from when until when it waited for each layer, in their order, and `ready` how many
    leading layers were there when it began to; a GPU may be behind."""

    step: int
    jobs: list[int]
    began_s: float
    ended_s: float = 0.0
    waits: list[tuple[float, float]] = field(default_factory=list)
    ready: list[int] = field(default_factory=list)


@dataclass
class _Live:
    """A request that has not ended."""

    began_s: float
    prompt_tokens: int
    events: list[Event] = field(default_factory=list)
    asks: int = 0  # of vLLM's scheduler, before it was admitted
    steps: int = 0  # of the engine, before it was admitted
    admitted: bool = False
    told: tuple[int, float] = (-1, 0.0)  # layers and share
    news: bool = False  # progress since it was weighed
    first_step: int | None = (
        None  # that computes the end of its prompt; -1 once that is known to be done
    )

    def note(self, now: float, what: str, more: dict[str, Any]) -> None:
        if len(self.events) < EVENTS_MAX - 1:
            self.events.append((now, what, more))

    def progress(self, now: float, ready: int, share: float) -> None:
        if ready > self.told[0] or share >= self.told[1] + PROGRESS_SHARE:
            self.told, self.news = (ready, share), True
            self.note(now, "progress", {"ready": ready, "share": round(share, 4)})

    def passed(self, one: PassTimes) -> None:
        waits = [(round(a - self.began_s, 6), round((b - a) * 1e3, 3)) for a, b in one.waits]
        took_ms = round((one.ended_s - one.began_s) * 1e3, 3)
        more = {"step": one.step, "took_ms": took_ms, "waits": waits, "ready": one.ready}
        self.note(one.began_s, "pass", more)

    def end(self, now: float, how: str) -> None:
        self.events.append((now, "ended", {"how": how}))

    def record(self, request_id: str) -> Record:
        return {
            "request": request_id,
            "prompt_tokens": self.prompt_tokens,
            "arrived_s": round(self.began_s, 6),
            "events": [
                [round(at - self.began_s, 6), what, *([more] if more else [])]
                for at, what, more in sorted(self.events, key=lambda event: event[0])
            ],
        }


class Trace:
    """One for each engine, used from vLLM's scheduler thread. `tell` gets a Record for each request that
    ended; with `keeps` False nothing is kept, and calls cost nothing. `clock` is the host's monotonic one."""

    def __init__(
        self,
        clock: Callable[[], float],
        tell: Callable[[Record], None] = lambda record: None,
        keeps: bool = True,
    ) -> None:
        self._clock, self._tell, self._keeps = clock, tell, keeps
        self._live: OrderedDict[str, _Live] = OrderedDict()
        self._ending: dict[str, _Live] = {}  # of which a report may still come
        self._jobs: OrderedDict[int, str] = OrderedDict()
        self._step = 0
        self.ended: deque[Record] = deque(maxlen=KEPT)

    @property
    def active(self) -> bool:
        """Whether there is anything to follow now."""
        return bool(self._live or self._ending)

    # ---- the life of a request

    def arrived(self, request_id: str, prompt_tokens: int) -> None:
        if not self._keeps:
            return
        self._live[request_id] = _Live(self._clock(), prompt_tokens)
        self.note(request_id, "arrived")
        if len(self._live) > LIVE_MAX:
            self.finished(next(iter(self._live)), "forgotten")

    def note(self, request_id: str, what: str, /, **more: Any) -> None:
        """Anything that happened to a request, now; of one that is not known nothing is kept."""
        live = self._live.get(request_id)
        if live is not None:
            live.note(self._clock(), what, more)

    def asked(self, request_id: str, tokens: int | None) -> None:
        """vLLM asked what there is to load; None was "ask again"."""
        live = self._live.get(request_id)
        if live is None or live.admitted:
            return
        live.asks += 1
        if tokens is not None:
            live.note(self._clock(), "answered", {"tokens": tokens, "asks": live.asks})

    def staging(self, request_id: str, job: int, chunks: int) -> None:
        if self._keeps:
            self._jobs[job] = request_id
            if len(self._jobs) > LIVE_MAX:
                self._jobs.popitem(last=False)
            self.note(request_id, "staging", chunks=chunks)

    def admitted(self, request_id: str, loaded: int) -> None:
        """vLLM gave it blocks; `loaded` of its tokens come from us."""
        live = self._live.get(request_id)
        if live is not None and not live.admitted:
            live.admitted = True
            live.note(self._clock(), "admitted", {"loaded": loaded, "steps": live.steps})

    def weighed(self, request_id: str, moment: Moment, now: float) -> bool:
        """When it may be admitted in time, as it looks now. Returns whether it is time."""
        live, due = self._live.get(request_id), moment.due(now)
        if live is not None and (due or live.news):
            live.news = False
            live.note(now, "due" if due else "expects", moment.numbers(now))
        return due

    def finished(self, request_id: str, how: str) -> None:
        """It ended; what its last step did may still be reported."""
        live = self._live.pop(request_id, None)
        if live is not None:
            live.end(self._clock(), how)
            before = self._ending.pop(request_id, None)
            if before is not None:  # another of that name, in the same step
                self._told(request_id, before)
            self._ending[request_id] = live

    def close(self) -> None:
        """The engine stops."""
        for request_id in list(self._live):
            self.finished(request_id, "engine stopped")
        self._tell_ended()

    # ---- steps

    def stepping(self, step: int, computed: Mapping[str, int]) -> int:
        """The engine takes a step, after which so many tokens of these requests are computed. Returns
        its number: `step`, or one of our own if that is 0."""
        self._tell_ended()
        self._step = step or self._step + 1
        now = self._clock()
        for request_id, live in self._live.items():
            live.steps += not live.admitted
            if live.first_step is None and computed.get(request_id, -1) >= live.prompt_tokens:
                live.first_step = self._step
                live.note(now, "scheduled", {"step": self._step})
        return self._step

    def heard(
        self,
        coming: Iterable[tuple[int, int, float]],
        staged: Iterable[tuple[int, int, str]],
        steps: Iterable[int],
        passes: Iterable[PassTimes],
    ) -> None:
        """What workers reported: of jobs how many leading layers are ready and what share of the bytes
        is there; of jobs that ended their chunks and error; the steps whose results are there."""
        now, furthest = self._clock(), max(steps, default=-1)
        behind: dict[int, tuple[int, float]] = {}  # of all ranks the one that is
        for job, ready, share in coming:
            behind[job] = min(behind.get(job, (ready, share)), (ready, share))
        for job, (ready, share) in behind.items():
            self._of(job).progress(now, ready, share)
        for job, chunks, error in staged:
            self._of(job).note(
                now, "staged", {"chunks": chunks, **({"error": error} if error else {})}
            )
        for one in passes:
            for job in one.jobs:
                self._of(job).passed(one)
        for live in (*self._live.values(), *self._ending.values()):
            if live.first_step is not None and 0 <= live.first_step <= furthest:
                live.first_step = -1
                live.note(now, "first token", {})
        self._tell_ended()

    def _of(self, job: int) -> _Live:
        name = self._jobs.get(job, "")
        return self._live.get(name) or self._ending.get(name) or _Live(0.0, 0)

    def _tell_ended(self) -> None:
        for request_id, live in self._ending.items():
            self._told(request_id, live)
        self._ending.clear()

    def _told(self, request_id: str, live: _Live) -> None:
        record = live.record(request_id)
        self.ended.append(record)
        self._tell(record)


def tell(record: Record) -> str:
    """For a person: one line, milliseconds since arrival."""
    parts = []
    for at_s, what, *more in record["events"]:
        about = more[0] if more else {}
        if what in ("progress", "expects"):
            continue
        if what == "pass":
            waited_ms = sum(wait_ms for _, wait_ms in about["waits"])
            about = {"took_ms": about["took_ms"], "waited_ms": round(waited_ms, 1)}
        said = " ".join(f"{name}={value}" for name, value in about.items())
        parts.append(f"{at_s * 1e3:.1f} {what}{said and f' ({said})'}")
    return f"{record['request']}, {record['prompt_tokens']} tokens: " + ", ".join(parts)
