"""Which request to one S3 endpoint goes next, whichever data path sends it. How many that should be: see flow.py.

All calls are made on the loop of the store.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
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

    @asynccontextmanager
    async def slot(self, bulk: bool = False, turns: Turns | None = None) -> AsyncIterator[None]:
        """Wait for room, hold it. Within a kind as order.py says, without `turns` in order of arrival.
        Between the kinds who came first goes first, but nobody waits for the other kind's limit."""
        kind = self._bulk if bulk else self._small
        number, given = next(self._numbers), asyncio.get_running_loop().create_future()
        self._given[number] = given
        kind.waiting.add(number, _now(), turns)
        self._admit()
        try:
            await given
            yield
        finally:
            if self._given.pop(number, None) is not None:
                kind.waiting.remove(number)
            else:
                self._leave(kind)
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

    def _leave(self, kind: _Kind) -> None:
        kind.held -= 1
        if kind is self._bulk:
            self._flow.ended(_now())

    def _admit(self) -> None:
        """Give free slots to whose turn it is."""
        now = _now()
        while self._small.held + self._bulk.held + self._seconds < self._most:
            limit = self._flow.limit(now)
            limits = ((self._small, max(self._small_least, limit)), (self._bulk, limit))
            kinds = [kind for kind, most in limits if kind.waiting and kind.held < most]
            if not kinds:
                return
            kind = min(kinds, key=lambda kind: kind.waiting.oldest)
            given = self._given.pop(kind.waiting.take(now))
            kind.held += 1
            if not given.cancelled():  # else who waited is about to give it back
                given.set_result(None)
            if kind is self._bulk:
                self._flow.began(now)


def _now() -> float:
    return asyncio.get_running_loop().time()
