"""Whose request goes next, against a model that looks at all that wait; and what that gives a short job beside a long one."""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest
from fakes import LAYOUT, ScriptedStore, eventually, loop_thread
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from streamer_lab import Rig, key

from objectcache.order import PATIENCE_S, Line, Turn, Turns
from objectcache.stores.gate import Gate

# ---- the line


@dataclass
class Job:
    turn: Turn
    came_s: float
    left_bytes: int
    order: list[int] = field(default_factory=list)  # its requests, in which it wants them


@dataclass
class Wish:
    """An object that jobs want, and the requests for it."""

    turns: Turns
    jobs: list[Job]


class Waiting(RuleBasedStateMachine):
    """Random jobs, requests and times. The model asks of each request how it stands."""

    def __init__(self) -> None:
        super().__init__()
        self.line = Line()
        self.now = 0.0
        self.number = 0
        self.jobs: list[Job] = []
        self.wishes: list[Wish] = []
        self.waiting: dict[int, Wish | None] = {}  # in order of arrival
        self.came_s: dict[int, float] = {}

    @rule(seconds=st.sampled_from([0.0, 0.1, 1.0, PATIENCE_S]))
    def later(self, seconds: float) -> None:
        self.now += seconds

    @rule(left_bytes=st.integers(0, 5))
    def job(self, left_bytes: int) -> None:
        turn = Turn(self.now, left_bytes)
        self.jobs.append(Job(turn, self.now, left_bytes))

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), parts=st.integers(1, 4), waits=st.booleans())
    def wish(self, data: st.DataObject, parts: int, waits: bool) -> None:
        job = data.draw(st.sampled_from(self.jobs))
        wish = Wish(Turns(job.turn, 3), [job])
        self.wishes.append(wish)
        for _ in range(parts if waits else 0):
            self._add(wish)

    @precondition(lambda self: self.wishes)
    @rule(data=st.data())
    def ask(self, data: st.DataObject) -> None:
        self._add(data.draw(st.sampled_from(self.wishes)))

    @rule()
    def ask_alone(self) -> None:
        self._add(None)

    def _add(self, wish: Wish | None) -> None:
        self.line.add(self.number, self.now, wish.turns if wish is not None else None)
        self.waiting[self.number] = wish
        self.came_s[self.number] = self.now
        for job in wish.jobs if wish is not None else []:
            job.order.append(self.number)
        self.number += 1

    @precondition(lambda self: self.wishes and self.jobs)
    @rule(data=st.data())
    def join(self, data: st.DataObject) -> None:
        wish = data.draw(st.sampled_from(self.wishes))
        job = data.draw(st.sampled_from(self.jobs))
        if job in wish.jobs:
            return
        wish.turns.join(job.turn)
        wish.jobs.append(job)
        job.order += [number for number, of in self.waiting.items() if of is wish]

    @precondition(lambda self: self.wishes)
    @rule(data=st.data())
    def landed(self, data: st.DataObject) -> None:
        wish = data.draw(st.sampled_from(self.wishes))
        wish.turns.landed(1)
        for job in wish.jobs:
            job.left_bytes -= 1

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.jobs))
        job.turn.end()
        job.left_bytes, job.came_s = 1 << 62, math.inf

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(list(self.waiting)))
        self.line.remove(number)
        self.line.remove(number)
        self._gone(number)

    def _gone(self, number: int) -> None:
        del self.waiting[number]
        for job in self.jobs:
            if number in job.order:
                job.order.remove(number)

    def _rank(self, came_s: float, left_bytes: int) -> tuple[int, float]:
        if self.now - came_s >= PATIENCE_S:
            return (0, came_s)
        return (1, left_bytes)

    @precondition(lambda self: self.waiting)
    @rule()
    def take(self) -> None:
        ranks: dict[int, list[tuple[int, float]]] = {}
        for job in self.jobs:
            if job.order:
                first = job.order[0]
                came_s = max(job.came_s, self.came_s[first])
                ranks.setdefault(first, []).append(self._rank(came_s, job.left_bytes))
        alone = [number for number, wish in self.waiting.items() if wish is None]
        if alone:
            ranks.setdefault(alone[0], []).append(self._rank(self.came_s[alone[0]], 1 << 62))
        best = min(min(of) for of in ranks.values())
        number = self.line.take(self.now)
        assert best[0] == 0 or min(ranks[number])[1] <= best[1]
        assert min(ranks[number]) == best
        self._gone(number)

    @invariant()
    def knows_who_waits(self) -> None:
        assert len(self.line) == len(self.waiting)
        if self.waiting:
            assert self.line.oldest == next(iter(self.waiting))


TestWaiting = Waiting.TestCase
TestWaiting.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_nobody_starves() -> None:
    """Behind short jobs that never end, a long one waits its time and then goes first."""
    line, long, now, number = Line(), Turn(0.0, 1000), 0.0, 1
    line.add(0, now, Turns(long, 1000))
    while now < 2 * PATIENCE_S:
        for _ in range(2):  # more come than go
            line.add(number, now, Turns(Turn(now, 1), 1))
            number += 1
        if line.take(now) == 0:
            break
        now += 0.01
    assert now == pytest.approx(PATIENCE_S, abs=0.02)


# ---- jobs


class GatedStore(ScriptedStore):
    """As a store of S3 does it: whoever waits goes by the gate. One at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate(2)  # of which one is kept for requests without bodies
        self.asked: list[str] = []
        self.served: list[str] = []

    async def read(
        self,
        key: str,
        into: memoryview,
        *,
        start: int | None = None,
        marks: Sequence[int] = (),
        landed: Callable[[int], None] | None = None,
        turns: Turns | None = None,
    ) -> None:
        self.asked.append(key)
        async with self.gate.slot(bulk=True, turns=turns):
            self.served.append(key)
            await super().read(key, into, start=start, marks=marks, landed=landed)


class Busy:
    """A rig whose store is busy with the first chunk of a long job until it is let go."""

    def __init__(self, rig: Rig, store: GatedStore, chunks: int) -> None:
        self.rig, self.store, self.chunks = rig, store, chunks
        rig.fill(*range(chunks))
        self.held = threading.Event()
        store.script("read", key(0), gate=self.held)
        rig.stage(1, *range(chunks))
        assert eventually(lambda: len(store.asked) == chunks)
        assert store.served == [key(0)]

    def stage(self, job: int, *numbers: int) -> None:
        before = len(self.store.asked)
        new = {key(n) for n in numbers} - set(self.store.asked)
        self.rig.fill(*numbers)
        self.rig.stage(job, *numbers)
        assert eventually(lambda: job in self.rig.placed)
        assert eventually(lambda: len(self.store.asked) == before + len(new))

    def let_go(self, jobs: int) -> list[int]:
        """The numbers of the chunks after the first, in the order in which they were served."""
        self.held.set()
        results = [self.rig.result() for _ in range(jobs)]
        assert all(result.error is None for result in results)
        for result in results:
            self.rig.give_back(result)
        return [int(name.rpartition("/")[2]) for name in self.store.served[1:]]


@pytest.fixture(name="busy")
def busy_fixture() -> Iterator[Busy]:
    with loop_thread() as loop:
        store = GatedStore()
        rig = Rig(loop, slots=40, store=store)
        yield Busy(rig, store, 20)
        assert rig.quiet()


def test_a_long_job_alone_goes_in_the_order_of_its_plan(busy: Busy) -> None:
    assert busy.let_go(1) == list(range(1, 20))


def test_a_short_job_beside_a_long_one_is_done_as_soon_as_alone(busy: Busy) -> None:
    busy.stage(2, 100, 101, 102)
    # Only what was on its way already goes before it; then the long one goes on, and ends.
    assert busy.let_go(2) == [100, 101, 102, *range(1, 20)]


def test_the_shorter_of_two_goes_first_whoever_came_first(busy: Busy) -> None:
    busy.stage(2, 100, 101, 102)
    busy.stage(3, 200, 201)
    assert busy.let_go(3) == [200, 201, 100, 101, 102, *range(1, 20)]


def test_what_two_jobs_want_goes_with_the_better_one(busy: Busy) -> None:
    busy.stage(2, 17, 18, 100)
    assert busy.let_go(2) == [17, 18, 100, *range(1, 17), 19]


def test_a_job_that_ended_does_not_hold_up_who_shares_with_it(busy: Busy) -> None:
    busy.stage(2, 17, 18)
    busy.store.script("read", key(17), gate=(at := threading.Event()))
    busy.rig.streamer.cancel(1)
    assert busy.rig.result().slots == []
    assert eventually(lambda: busy.store.served[-1] == key(17))  # the next, whoever asked for it
    busy.stage(3, 100)
    at.set()
    assert busy.let_go(2) == [17, 100, 18]


def test_a_job_nears_its_end_as_its_bytes_land(busy: Busy) -> None:
    """Of 20 chunks 18 are there: it is the shorter one now."""
    at = threading.Event()
    busy.store.script("read", key(17), gate=at)
    busy.held.set()
    assert eventually(lambda: busy.store.served[-1] == key(17))
    busy.stage(2, *range(100, 105))
    at.set()
    assert busy.let_go(2)[16:] == [17, 18, 19, *range(100, 105)]


def test_the_bytes_left_are_those_that_have_not_landed(busy: Busy) -> None:
    busy.stage(2, 17, 100)
    turn = busy.rig.streamer._jobs[2].turn
    long = busy.rig.streamer._jobs[1].turn
    assert turn is not None and long is not None
    assert turn.left_bytes == 2 * LAYOUT.object_bytes
    assert long.left_bytes == 20 * LAYOUT.object_bytes
    busy.store.script("read", key(19), gate=(last := threading.Event()))
    busy.held.set()
    assert eventually(lambda: busy.store.served[-1] == key(19))
    assert eventually(lambda: long.left_bytes == LAYOUT.object_bytes)
    last.set()
    busy.let_go(2)


def test_a_stream_that_asks_for_more_as_long_as_it_lives_does_not_keep_others_waiting() -> None:
    """It came long ago, but what it asks for now has just come."""
    line, stream = Line(), Turn(0.0, 1 << 40)
    now, number, served = 10.0, 0, []
    for _ in range(8):
        line.add(number, now, Turns(stream, 1 << 20))
        number += 1
    short = Turn(now, 4 << 20)
    mine = {number + n for n in range(4)}
    for _ in mine:
        line.add(number, now, Turns(short, 1 << 20))
        number += 1
    upload = number
    line.add(upload, now)
    while upload not in served:
        taken = line.take(now)
        served.append(taken)
        if taken not in mine and taken != upload:
            number += 1
            line.add(number, now, Turns(stream, 1 << 20))
        now += 0.01
    assert set(served[:4]) == mine
    assert now - 10.0 <= PATIENCE_S + 0.2, "the upload came when it had waited long enough"
