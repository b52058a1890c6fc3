"""Two requests for the same bytes: when the second is sent, which counts, and that both have ended when the call has. Through real servers: test_s3_hedges.py."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import pytest

from objectcache.errors import NotFound, Unavailable
from objectcache.stores.attempts import Failed
from objectcache.stores.base import StoreCounters
from objectcache.stores.fill import Fill
from objectcache.stores.gate import Gate
from objectcache.stores.hedged import Hedged, Leg, Lost
from objectcache.stores.s3_errors import Verdict

BUSY = Failed(Verdict(Unavailable("busy."), retry=True, throttled=True))
BROKEN = Failed(Verdict(Unavailable("broken."), retry=True))
ABSENT = Failed(Verdict(NotFound("absent.")))


@dataclass
class Have:
    have: int = 0


@dataclass
class Request:
    """One leg of the scenario: it is answered and ends when it is told to."""

    number: int
    answer: asyncio.Event = field(default_factory=asyncio.Event)
    finish: asyncio.Event = field(default_factory=asyncio.Event)
    error: BaseException | None = None
    begins: bool = True  # claims before it ends
    body: Have = field(default_factory=Have)
    ended: bool = False
    lost: bool = False
    holds_on: asyncio.Event | None = None  # it ends only then, however often it is cancelled

    async def run(self, leg: Leg) -> int:
        try:
            await self.answer.wait()
            if self.begins and not leg.claim():
                self.lost = True
                raise Lost
            leg.body = self.body
            await self.finish.wait()
            if self.error is not None:
                raise self.error
            return self.number
        except asyncio.CancelledError:
            while self.holds_on is not None and not self.holds_on.is_set():
                try:
                    await self.holds_on.wait()
                except asyncio.CancelledError:
                    continue
            raise
        finally:
            self.ended = True


class Scene:
    """A gate that knows its store, and the requests of one read, as they are sent."""

    def __init__(self, percent: int = 20, most: int = 8, flow_s: float = 0.0) -> None:
        self.gate = Gate(most, percent)
        for _ in range(64):
            self.gate.hedging.began()
            if flow_s:
                self.gate.hedging.flowed(1 << 20, flow_s)
            self.gate.hedging.came(0.001)
        self.counters = StoreCounters()
        self.hedged = Hedged(self.gate, lambda: self.counters, 5.0)
        self.sent: list[Request] = []
        self.next: list[Request] = []
        self.news = asyncio.Event()

    async def _once(self, leg: Leg) -> int:
        request = self.next[len(self.sent)]
        self.sent.append(request)
        self.news.set()
        return await request.run(leg)

    def read(self, *requests: Request) -> "asyncio.Task[int]":
        self.next = list(requests)

        async def held() -> int:
            async with self.gate.slot(bulk=True):
                return await self.hedged.run(1 << 20, self._once)

        return asyncio.ensure_future(held())

    async def until_sent(self, count: int) -> None:
        while len(self.sent) < count:
            self.news.clear()
            await self.news.wait()

    @property
    def counted(self) -> tuple[int, int]:
        return self.counters.hedged_requests, self.counters.hedges_won

    async def all_slots_are_free(self) -> None:
        await turns()
        assert (self.gate._small.held, self.gate._bulk.held, self.gate._seconds) == (0, 0, 0)


async def turns(count: int = 10) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_a_request_in_time_is_alone() -> None:
    async def scenario() -> None:
        scene, first = Scene(), Request(0)
        reading = scene.read(first)
        await scene.until_sent(1)
        first.answer.set()
        await asyncio.sleep(0.05)  # its body may take as long as it likes
        first.finish.set()
        assert await reading == 0
        assert scene.counted == (0, 0)
        await scene.all_slots_are_free()

    run(scenario)


def test_the_first_is_late_and_the_second_wins() -> None:
    async def scenario() -> None:
        scene, first, second = Scene(), Request(0), Request(1)
        reading = scene.read(first, second)
        await scene.until_sent(2)
        assert scene.gate._seconds == 1
        second.answer.set()
        await turns()
        assert first.ended and not second.ended  # at once, not when the body is there
        assert scene.gate._seconds == 0
        second.finish.set()
        assert await reading == 1
        assert scene.counted == (1, 1)
        await scene.all_slots_are_free()

    run(scenario)


def test_the_first_comes_just_after_the_second_was_sent() -> None:
    async def scenario() -> None:
        scene, first, second = Scene(), Request(0), Request(1)
        reading = scene.read(first, second)
        await scene.until_sent(2)
        first.answer.set()
        second.answer.set()
        await turns()
        assert second.ended and not first.ended
        first.finish.set()
        assert await reading == 0
        assert scene.counted == (1, 0)
        await scene.all_slots_are_free()

    run(scenario)


@pytest.mark.parametrize("late", [0, 1])
def test_one_fails_and_the_other_counts(late: int) -> None:
    async def scenario() -> None:
        scene = Scene()
        requests = [Request(0, begins=False, error=BROKEN), Request(1, begins=False, error=BROKEN)]
        requests[late].error, requests[late].begins = None, True
        reading = scene.read(*requests)
        await scene.until_sent(2)
        for event in (requests[1 - late].answer, requests[1 - late].finish):
            event.set()
        await turns()
        assert not reading.done()
        for event in (requests[late].answer, requests[late].finish):
            event.set()
        assert await reading == late
        assert scene.counted == (1, late)
        await scene.all_slots_are_free()

    run(scenario)


@pytest.mark.parametrize(
    ("errors", "told"), [((BROKEN, BUSY), BUSY), ((BUSY, BROKEN), BUSY), ((BROKEN, BROKEN), BROKEN)]
)
def test_both_fail(errors: tuple[Failed, Failed], told: Failed) -> None:
    async def scenario() -> None:
        scene = Scene()
        requests = [Request(i, begins=False, error=error) for i, error in enumerate(errors)]
        reading = scene.read(*requests)
        await scene.until_sent(2)
        for request in requests:
            request.answer.set()
            request.finish.set()
        with pytest.raises(Failed) as caught:
            await reading
        assert caught.value is told
        await scene.all_slots_are_free()

    run(scenario)


@pytest.mark.parametrize("who", [0, 1])
def test_an_answer_that_settles_it_ends_the_other(who: int) -> None:
    async def scenario() -> None:
        scene = Scene()
        requests = [Request(0), Request(1)]
        requests[who].error = ABSENT
        requests[who].begins = False
        reading = scene.read(*requests)
        await scene.until_sent(2)
        requests[who].answer.set()
        requests[who].finish.set()
        with pytest.raises(Failed) as caught:
            await reading
        assert caught.value is ABSENT
        assert all(request.ended for request in requests)
        await scene.all_slots_are_free()

    run(scenario)


def test_what_the_loser_says_does_not_matter() -> None:
    async def scenario() -> None:
        scene, first, second = Scene(), Request(0, begins=False, error=ABSENT), Request(1)
        first.holds_on = asyncio.Event()
        reading = scene.read(first, second)
        await scene.until_sent(2)
        second.answer.set()
        await turns()
        second.finish.set()
        await turns()
        assert not reading.done()  # the first is not gone
        first.holds_on.set()
        assert await reading == 1
        await scene.all_slots_are_free()

    run(scenario)


@pytest.mark.parametrize("answered", [None, 0, 1])
@pytest.mark.parametrize("cancels", [1, 3])
def test_cancelled_while_both_are_out(answered: int | None, cancels: int) -> None:
    async def scenario() -> None:
        scene, requests = Scene(), [Request(0), Request(1)]
        for request in requests:
            request.holds_on = asyncio.Event()
        reading = scene.read(*requests)
        await scene.until_sent(2)
        if answered is not None:
            requests[answered].answer.set()
            await turns()
        for _ in range(cancels):
            reading.cancel()
            await turns()
            assert not reading.done()  # as long as one of them may use the memory
        for request in requests:
            request.answer.set()  # too late
            request.finish.set()
            assert request.holds_on is not None
            request.holds_on.set()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert all(request.ended for request in requests)
        await scene.all_slots_are_free()

    run(scenario)


def test_nobody_gets_the_memory_after_the_end() -> None:
    """An answer that comes as the read is cancelled, before its thread has heard of it."""

    async def scenario() -> None:
        scene, legs = Scene(), []

        async def once(leg: Leg) -> int:
            legs.append(leg)
            await asyncio.sleep(60)
            return 0

        reading = asyncio.ensure_future(scene.hedged.run(1, once))
        while len(legs) < 2:
            await asyncio.sleep(0.001)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert [leg.claim() for leg in legs] == [False, False]

    run(scenario)


def test_after_a_503_nobody_is_asked_twice() -> None:
    async def scenario() -> None:
        scene, first = Scene(), Request(0)
        scene.gate.throttled()
        reading = scene.read(first)
        await asyncio.sleep(0.1)
        first.answer.set()
        first.finish.set()
        assert await reading == 0
        assert scene.counted == (0, 0)

    run(scenario)


def test_a_second_request_needs_room() -> None:
    async def scenario() -> None:
        scene, first = Scene(most=1), Request(0)
        reading = scene.read(first)
        await asyncio.sleep(0.1)
        assert len(scene.sent) == 1
        first.answer.set()
        first.finish.set()
        assert await reading == 0

    run(scenario)


def test_the_budget_ends() -> None:
    async def scenario() -> None:
        scene = Scene(percent=1)
        for _ in range(200):  # to know a hundredth, and to have two requests saved up
            scene.gate.hedging.began()
            scene.gate.hedging.came(0.001)
        for _ in range(5):
            scene.sent.clear()
            for _ in range(8):  # as if others were in time
                scene.gate.hedging.looked(False)
            first, second = Request(0), Request(1)
            reading = scene.read(first, second)
            await scene.until_sent(1)
            await asyncio.sleep(0.05)
            for request in (first, second):
                request.answer.set()
                request.finish.set()
            await reading
        assert scene.counters.hedged_requests == 2

    run(scenario)


def test_a_body_that_stalls_goes_on_by_another_request_once() -> None:
    async def scenario() -> None:
        scene, requests = Scene(flow_s=0.001), [Request(0), Request(1)]
        requests[0].body.have = 1000
        reading = scene.read(*requests)
        await scene.until_sent(1)
        requests[0].answer.set()
        await scene.until_sent(2)
        assert requests[0].ended  # before the next was sent
        requests[1].answer.set()
        await asyncio.sleep(0.05)
        requests[1].finish.set()
        assert await reading == 1
        assert scene.counted == (1, 0)
        await scene.all_slots_are_free()

    run(scenario)


def test_a_body_that_moves_has_not_stalled() -> None:
    async def scenario() -> None:
        scene, first = Scene(flow_s=0.001), Request(0)
        reading = scene.read(first)
        await scene.until_sent(1)
        first.answer.set()
        for _ in range(30):
            await asyncio.sleep(0.1)
            first.body.have += 1
        first.finish.set()
        assert await reading == 0
        assert len(scene.sent) == 1

    run(scenario)


def test_a_process_that_slept_takes_no_body_for_stalled() -> None:
    async def scenario() -> None:
        scene, first = Scene(flow_s=0.001), Request(0)
        reading = scene.read(first)
        await scene.until_sent(1)
        first.answer.set()
        await asyncio.sleep(1.1)  # one look at the body
        time.sleep(2.0)  # nobody runs
        await asyncio.sleep(0.05)  # the next look, late
        first.body.have += 1
        first.finish.set()
        assert await reading == 0
        assert len(scene.sent) == 1

    run(scenario)


def test_second_requests_leave_lookups_their_slots() -> None:
    async def scenario() -> None:
        gate = Scene(most=16).gate  # two are kept
        async with AsyncExitStack() as held:
            for _ in range(13):
                await held.enter_async_context(gate.slot(bulk=True))
            assert gate.second() and not gate.second()
            for _ in range(2):
                await asyncio.wait_for(held.enter_async_context(gate.slot()), 1)
            gate.second_ended()

    run(scenario)


def test_what_came_while_a_request_was_ended_is_not_asked_for_again() -> None:
    memory = memoryview(bytearray(100))
    fill = Fill(memory, 0, None)
    assert not fill.complete
    fill.have = 99
    assert not fill.complete and fill.range_header() == "bytes=99-99"
    fill.have = 100
    assert fill.complete
    assert not Fill(memoryview(b""), None, None).complete  # that it is empty is still to be seen
