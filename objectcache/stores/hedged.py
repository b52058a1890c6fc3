"""Sends a late request a second time and takes the answer that comes first: for all data paths to S3. When that is: see hedge.py.

A request is sent by a coroutine of the data path. When its answer begins it claims the memory; who
comes second is refused, and ended before a byte of its body is written. So one alone ever writes, and
when `run` ends, in whatever way, both have ended.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Generic, Protocol, TypeVar

from objectcache.hedge import Race
from objectcache.stores.attempts import Failed
from objectcache.stores.base import StoreCounters
from objectcache.stores.gate import Gate

T = TypeVar("T")

OVERSLEPT = 1.5  # times a wait


class Lost(Exception):
    """The other request was answered first. Never leaves the data path."""


class _Stalled(Exception):
    """A body fell silent, and its rest may be asked for anew."""


class Body(Protocol):
    """What is being received: how many bytes so far."""

    @property
    def have(self) -> int: ...


class Leg:
    """One of the requests. `body` is what it receives, if that can be told before all is there."""

    def __init__(self, race: Race, number: int, clock: Callable[[], float], began: float) -> None:
        self.body: Body | None = None
        self.answered_s = 0.0  # when its answer began, since the first was sent
        self.claimed: Callable[[], None] = lambda: None
        self._race = race
        self._number = number
        self._clock = clock
        self._began = began

    @property
    def lost(self) -> bool:
        """Whether the other request was answered first."""
        return self._race.winner not in (None, self._number)

    def age_s(self) -> float:
        """Since the first was sent."""
        return self._clock() - self._began

    def claim(self) -> bool:
        """It is answered; whether it may write to the memory. From any thread."""
        if not self._race.claim(self._number):
            return False
        if not self.answered_s:
            self.answered_s = self.age_s()
            self.claimed()
        return True


class Hedged:
    """For one store. `silence_s`: after that long a silent body is given up anyway."""

    def __init__(self, gate: Gate, counters: Callable[[], StoreCounters], silence_s: float) -> None:
        self._gate = gate
        self._counters = counters
        self._silence_s = silence_s

    async def run(self, piece_bytes: int, once: Callable[[Leg], Awaitable[T]]) -> T:
        """Await `once(leg)`, and if it is late a second one beside it; what the one that counts says.

        `once` asks for what is missing when it is called. It calls `leg.claim()` when its answer
        begins, and raises Lost if it may not go on. Of a body there is news for each `piece_bytes`.
        A body that stalls has its rest asked for anew, once.
        """
        try:
            return await self._raced(once, self._gate.hedging.stalled_s(piece_bytes))
        except _Stalled:
            self._counters().hedged_requests += 1
        return await self._raced(once, None)

    async def _raced(self, once: Callable[[Leg], Awaitable[T]], stalled_s: float | None) -> T:
        hedging, clock = self._gate.hedging, asyncio.get_running_loop().time
        late_s, began, race = hedging.began(), clock(), Race()
        first = Leg(race, 0, clock, began)
        if late_s is None:  # as it is without all this
            result = await once(first)
            if first.answered_s:
                hedging.came(first.answered_s)
            return result
        if stalled_s is not None and stalled_s > self._silence_s / 2:
            stalled_s = None
        legs = _Legs(self._gate, self._counters(), once, race, first, clock, began)
        try:
            return await legs.settled(late_s, stalled_s)
        finally:
            await legs.end()


class _Legs(Generic[T]):
    """The requests that are out. All is the loop's but what `Leg.claim` does."""

    def __init__(
        self,
        gate: Gate,
        counters: StoreCounters,
        once: Callable[[Leg], Awaitable[T]],
        race: Race,
        first: Leg,
        clock: Callable[[], float],
        began: float,
    ) -> None:
        self._gate, self._counters, self._once = gate, counters, once
        self._race, self._clock, self._began = race, clock, began
        self._loop = asyncio.get_running_loop()
        self._legs = [first]
        self._out: dict[asyncio.Future[T], int] = {}
        self._failed: Failed | None = None
        self._looked = False
        self._news: asyncio.Future[None] | None = None  # while we wait
        self._start(first)

    def _start(self, leg: Leg) -> None:
        task = asyncio.ensure_future(self._once(leg))
        task.add_done_callback(self._wake)
        self._out[task] = len(self._legs) - 1

    def _wake(self, _: "asyncio.Future[T] | None" = None) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    async def _ended(self, wait_s: float | None) -> "list[asyncio.Future[T]]":
        """Which have ended; none after `wait_s`. As asyncio.wait does it, but for less:
        nearly every request ends before it is late."""
        if not any(task.done() for task in self._out):
            self._news = self._loop.create_future()
            timer = self._loop.call_later(wait_s, self._wake) if wait_s is not None else None
            try:
                await self._news
            finally:
                if timer is not None:
                    timer.cancel()
        return [task for task in self._out if task.done()]

    async def settled(self, late_s: float, stalled_s: float | None) -> T:
        """The answer that counts. Raises what it raises, Failed if there is none, or _Stalled."""
        wait_s: float | None = late_s
        moved = -1
        while True:
            asked = self._clock()
            done = await self._ended(wait_s)
            for task in done:
                if self._counts(task):
                    return task.result()
            if not self._out:
                raise self._failed or asyncio.CancelledError
            if not self._looked:
                self._look()
            elif not done and (winner := self._race.winner) is not None:
                body = self._legs[winner].body
                before, moved = moved, body.have if body is not None else 0
                # If the whole process slept there is no telling who else did.
                awake = wait_s is not None and self._clock() - asked < OVERSLEPT * wait_s
                if moved == before and awake and self._gate.may_go_on():
                    raise _Stalled
            wait_s = stalled_s

    def _look(self) -> None:
        """The first is as old as one that is late."""
        self._looked = True
        late = self._race.winner is None
        self._gate.hedging.looked(late)
        if not late or not self._gate.second():
            return
        second = Leg(self._race, 1, self._clock, self._began)
        for leg in (self._legs[0], second):
            leg.claimed = self._tell
        if self._race.winner is not None:  # just now; who claims from here on, tells
            self._gate.second_ended()
            return
        self._counters.hedged_requests += 1
        self._legs.append(second)
        self._start(second)

    def _tell(self) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._drop_other)

    def _drop_other(self) -> None:
        for task, number in self._out.items():
            if number != self._race.winner:
                task.cancel()

    def _counts(self, task: "asyncio.Future[T]") -> bool:
        """Whether how this one ended is the answer."""
        number = self._out.pop(task)
        if len(self._legs) == 2 and self._out:
            self._gate.second_ended()
        if task.cancelled():
            return False
        error = task.exception()
        if isinstance(error, Lost):
            return False
        if isinstance(error, Failed) and error.verdict.retry and self._race.winner is None:
            if error.verdict.throttled:
                self._gate.throttled()
            if self._failed is None or error.verdict.throttled:
                self._failed = error
            return False
        return self._race.claim(number)

    async def end(self) -> None:
        """End what is out. Raises CancelledError if we are cancelled meanwhile."""
        winner = self._race.winner
        self._race.end()
        self._counters.hedges_won += winner == 1
        self._learn(winner)
        cancelled = False
        for task in self._out:
            task.cancel()
        both = len(self._out) == 2
        while pending := [task for task in self._out if not task.done()]:
            try:
                await asyncio.wait(pending)
            except asyncio.CancelledError:
                cancelled = True  # whoever cancels gets its wish when the memory is let go of
        if both:
            self._gate.second_ended()
        for task in self._out:
            if not task.cancelled():
                task.exception()  # seen
        if cancelled:
            raise asyncio.CancelledError

    def _learn(self, winner: int | None) -> None:
        hedging = self._gate.hedging
        if winner is None:
            return
        if winner == 0 and not self._looked:
            hedging.looked(False)
        answered_s = self._legs[winner].answered_s  # the first's, or later: then it was given up
        if answered_s:
            hedging.came(answered_s)
