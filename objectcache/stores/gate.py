"""Which request to one S3 endpoint goes next, whichever data path sends it. How many that should be: see flow.py.

All calls are made on the loop of the store.
"""

import asyncio
import itertools
from dataclasses import dataclass, field

from objectcache.flow import START, Flow, StoreModel
from objectcache.hedge import Hedging
from objectcache.order import Line, Turns


@dataclass
class _Kind:
    """Requests of one kind: those that hold a slot, and those that wait, with their numbers."""

    held: int = 0
    waiting: Line = field(default_factory=Line)


class Gate:
    """At most `most` requests at once, and of those with bodies ("bulk") only as many as the store
    rewards. Small ones do not stand in line behind bulk: an eighth is kept for them, and a store
    that asks for fewer requests gets fewer small ones only down to that or START."""

    def __init__(self, most: int, hedge_percent: int = 0) -> None:
        kept = max(1, most // 8)
        self._most, self._bulk_most = most, max(1, most - kept)
        self._small_least = max(kept, min(most, START))
        self._flow = Flow(self._bulk_most)
        self.hedging = Hedging(hedge_percent)
        self._seconds = 0  # second requests for what a slot is held for
        self._small, self._bulk = _Kind(), _Kind()
        self._numbers = itertools.count()
        self._given: dict[int, asyncio.Future[None]] = {}  # of those that wait

    @property
    def bulk_limit(self) -> int:
        """Requests with bodies that may be in flight now."""
        return self._flow.limit(_now())

    def model(self) -> StoreModel:
        """What the store was seen to give."""
        return self._flow.model()

    def slot(self, bulk: bool = False, turns: Turns | None = None) -> "Slot":
        """`async with` waits for room and holds it. Within a kind as order.py says, without `turns` in order of arrival.
        Between the kinds who came first goes first, but nobody waits for the other kind's limit."""
        return Slot(self, self._bulk if bulk else self._small, turns)

    def enter(self, kind: _Kind, turns: Turns | None) -> "tuple[int, asyncio.Future[None]] | None":
        """For a Slot: None if it has one now, else its number and what is set when it is given one."""
        if not self._small.waiting and not self._bulk.waiting:
            now = _now()
            if self._has_room() and kind.held < self._limit_of(kind, now):
                self._give(kind, now)
                return None
        number, given = next(self._numbers), asyncio.get_running_loop().create_future()
        self._given[number] = given
        kind.waiting.add(number, _now(), turns)
        self._admit()
        return number, given

    def leave(self, kind: _Kind, number: int | None) -> None:
        """For a Slot: it holds, or waits, no more."""
        if number is not None and self._given.pop(number, None) is not None:
            kind.waiting.remove(number)
            return
        kind.held -= 1
        if kind is self._bulk:
            self._flow.ended(_now())
        self._admit()

    def arrived(self, body_bytes: int, seconds: float, first_byte_s: float | None = None) -> None:
        """A body came in so many seconds since its request was sent. While its slot is held."""
        self._flow.arrived(_now(), body_bytes, first_byte_s, seconds)
        self.hedging.flowed(body_bytes, seconds - (first_byte_s or 0.0))

    def failed(self) -> None:
        """A request got no answer that settles it, other than `throttled`."""
        self._flow.failed(_now())

    def throttled(self) -> None:
        """The server asked for fewer requests."""
        self._flow.throttled(_now())

    def second(self) -> bool:
        """Whether a late request may be sent a second time now. If so: `second_ended` when one of
        the two has ended."""
        room = self._small.held + self._bulk.held + self._seconds < self._most
        beside = (
            self._bulk.held + self._seconds < self._bulk_most
        )  # not what is kept for small ones
        if not room or not beside or not self.may_go_on():
            return False
        self._seconds += 1
        return True

    def second_ended(self) -> None:
        self._seconds -= 1
        self._admit()

    def may_go_on(self) -> bool:
        """Whether a request more may take the place of one that stalled."""
        return self._flow.calm(_now()) and self.hedging.may_ask()

    def _has_room(self) -> bool:
        return self._small.held + self._bulk.held + self._seconds < self._most

    def _limit_of(self, kind: _Kind, now: float) -> int:
        limit = self._flow.limit(now)
        return limit if kind is self._bulk else max(self._small_least, limit)

    def _give(self, kind: _Kind, now: float) -> None:
        kind.held += 1
        if kind is self._bulk:
            self._flow.began(now)

    def _admit(self) -> None:
        """Give free slots to whose turn it is."""
        while (self._small.waiting or self._bulk.waiting) and self._has_room():
            now = _now()
            kinds = [
                kind
                for kind in (self._small, self._bulk)
                if kind.waiting and kind.held < self._limit_of(kind, now)
            ]
            if not kinds:
                return
            kind = min(kinds, key=lambda kind: kind.waiting.oldest)
            given = self._given.pop(kind.waiting.take(now))
            self._give(kind, now)
            if not given.cancelled():  # else who waited is about to give it back
                given.set_result(None)


class Slot:
    """Room for one request, while it is entered. No generator: each small request would pay for it."""

    __slots__ = ("_gate", "_kind", "_number", "_turns")

    def __init__(self, gate: Gate, kind: _Kind, turns: Turns | None) -> None:
        self._gate, self._kind, self._turns = gate, kind, turns
        self._number: int | None = None

    async def __aenter__(self) -> None:
        waits = self._gate.enter(self._kind, self._turns)
        if waits is None:
            return
        self._number, given = waits
        try:
            await given
        except BaseException:
            self._gate.leave(self._kind, self._number)
            raise

    async def __aexit__(self, *exc_info: object) -> None:
        self._gate.leave(self._kind, self._number)


def _now() -> float:
    return asyncio.get_running_loop().time()
