"""The gate against a model of two lines, and with requests that run, fail and are cancelled on a loop."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from objectcache.flow import START
from objectcache.stores.gate import Gate


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


class Requests:
    """Requests that hold a slot until they are told to end, and who holds one in which order."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.held: list[int] = []
        self.ever: list[int] = []
        self._ends: dict[int, asyncio.Event] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._numbers = itertools.count()

    def begin(self, bulk: bool) -> int:
        number = next(self._numbers)
        self._ends[number] = asyncio.Event()
        self._tasks[number] = asyncio.ensure_future(self._run(number, bulk))
        return number

    async def _run(self, number: int, bulk: bool) -> None:
        async with self.gate.slot(bulk):
            self.held.append(number)
            self.ever.append(number)
            try:
                await self._ends[number].wait()
            finally:
                self.held.remove(number)

    def end(self, number: int) -> None:
        self._ends[number].set()

    def cancel(self, number: int) -> None:
        self._tasks[number].cancel()

    async def all_gone(self) -> None:
        for number, task in self._tasks.items():
            if task.done():
                continue
            self.cancel(number)
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        assert self.held == []


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(scenario(), 10)

    asyncio.run(bounded())


@pytest.mark.parametrize("most", [1, 2, 7, 8, 32, 256])
def test_bounds_of_both_kinds(most: int) -> None:
    async def scenario() -> None:
        requests = Requests(Gate(most))
        for _ in range(most + 5):
            requests.begin(bulk=True)
        await turns()
        bulk = min(START, max(1, most - max(1, most // 8)))
        assert len(requests.held) == bulk == requests.gate.bulk_limit
        for _ in range(most + 5):
            requests.begin(bulk=False)
        await turns()
        small = len(requests.held) - bulk
        assert small == min(most - bulk, max(most // 8, START))
        assert small >= 1 or most == 1
        await requests.all_gone()

    run(scenario)


def test_small_requests_alone_may_have_all_that_bodies_would_have() -> None:
    async def scenario() -> None:
        requests = Requests(Gate(12))
        for _ in range(30):
            requests.begin(bulk=False)
        await turns()
        assert len(requests.held) == 12
        await requests.all_gone()

    run(scenario)


def test_one_slot_is_given_in_order_of_arrival_to_both_kinds() -> None:
    async def scenario() -> None:
        requests = Requests(Gate(1))
        order = [requests.begin(bulk) for bulk in (True, False, False, True, False, True)]
        for number in order:
            await turns()
            assert requests.held == [number]
            requests.end(number)
        await requests.all_gone()
        assert requests.ever == order

    run(scenario)


def test_many_small_requests_do_not_shut_bodies_out() -> None:
    async def scenario() -> None:
        requests = Requests(Gate(4))
        for _ in range(4):
            requests.begin(bulk=False)
        body = requests.begin(bulk=True)
        for _ in range(50):
            requests.begin(bulk=False)
        await turns()
        requests.end(0)
        await turns()
        assert body in requests.held
        await requests.all_gone()

    run(scenario)


def test_a_cut_takes_effect_as_slots_come_back() -> None:
    async def scenario() -> None:
        gate = Gate(256)
        requests = Requests(gate)
        numbers = [requests.begin(bulk=True) for _ in range(40)]
        await turns()
        assert len(requests.held) == START
        gate.throttled()
        gate.throttled()  # of the same burst
        assert gate.bulk_limit == int(0.7 * START)
        for number in numbers[: START - gate.bulk_limit]:
            requests.end(number)
            await turns()
            assert set(requests.held) <= set(numbers[:START])
        requests.end(numbers[START - 1])
        await turns()
        assert requests.held[-1] == numbers[START] and len(requests.held) == gate.bulk_limit
        # Small ones are not cut below START.
        for _ in range(40):
            requests.begin(bulk=False)
        await turns()
        assert len(requests.held) == gate.bulk_limit + max(START, 256 // 8)
        await requests.all_gone()

    run(scenario)


def test_more_bodies_go_out_once_they_pay() -> None:
    """The gate tells its flow what it needs to know: the limit grows under load only."""

    async def scenario() -> None:
        gate = Gate(256)

        async def body(seconds: float) -> None:
            async with gate.slot(bulk=True):
                began = asyncio.get_running_loop().time()
                await asyncio.sleep(seconds)
                took_s = asyncio.get_running_loop().time() - began
                gate.arrived(1 << 20, took_s, took_s / 2)

        for _ in range(10):
            await asyncio.gather(*(body(0.002) for _ in range(4)))
        assert gate.bulk_limit == START
        await asyncio.gather(*(body(0.02) for _ in range(400)))
        assert gate.bulk_limit > START
        assert 0.005 < gate.model().first_byte_s < 0.1

    run(scenario)


def test_failures_end_a_larger_number_only() -> None:
    async def scenario() -> None:
        gate = Gate(256)
        for _ in range(20):
            gate.failed()
        assert gate.bulk_limit == START

    run(scenario)


class Lines(RuleBasedStateMachine):
    """Random lives of requests. The model: a list for each kind, first come, first served."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.runner.run(self._make())
        self.waiting: list[tuple[int, bool]] = []  # in order of arrival
        self.held: list[tuple[int, bool]] = []

    async def _make(self) -> None:
        self.most = 12
        self.gate = Gate(self.most)
        self.requests = Requests(self.gate)

    def teardown(self) -> None:
        self.runner.run(self.requests.all_gone())
        self.runner.run(self._empty())
        self.runner.close()

    async def _empty(self) -> None:
        """Nothing was lost: as many as ever may go at once."""
        limit = self.gate.bulk_limit
        again = Requests(self.gate)
        for _ in range(20):
            again.begin(bulk=True)
        await turns()
        assert len(again.held) == limit
        await again.all_gone()

    def _do(self, *calls: Callable[[], object]) -> None:
        async def scenario() -> None:
            for call in calls:
                call()
            await turns()
            self.limit = self.gate.bulk_limit

        self.runner.run(scenario())
        self._settle()

    def _settle(self) -> None:
        while len(self.held) < self.most:
            bulk = sum(kind for _, kind in self.held)
            small = len(self.held) - bulk
            may = {True: bulk < self.limit, False: small < max(12, self.limit)}
            following = next((each for each in self.waiting if may[each[1]]), None)
            if following is None:
                return
            self.waiting.remove(following)
            self.held.append(following)

    @rule(kinds=st.lists(st.booleans(), min_size=1, max_size=6))
    def begin(self, kinds: list[bool]) -> None:
        def one(bulk: bool) -> None:
            self.waiting.append((self.requests.begin(bulk), bulk))

        self._do(*(lambda bulk=bulk: one(bulk) for bulk in kinds))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        gone = data.draw(st.sampled_from(self.held))
        self.held.remove(gone)
        self._do(lambda: self.requests.end(gone[0]))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel_a_waiting_one(self, data: st.DataObject) -> None:
        gone = data.draw(st.sampled_from(self.waiting))
        self.waiting.remove(gone)
        self._do(lambda: self.requests.cancel(gone[0]))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def cancel_one_that_holds(self, data: st.DataObject) -> None:
        gone = data.draw(st.sampled_from(self.held))
        self.held.remove(gone)
        self._do(lambda: self.requests.cancel(gone[0]))

    @precondition(lambda self: self.held and self.waiting)
    @rule(data=st.data())
    def cancel_one_just_as_it_is_served(self, data: st.DataObject) -> None:
        """It was given the slot and has not run since: the next in line gets it."""
        gone = data.draw(st.sampled_from(self.held))
        self.held.remove(gone)
        before = list(self.waiting)
        self._settle()
        served = [each for each in before if each not in self.waiting]
        self.waiting = before
        for each in served:
            self.held.remove(each)

        async def scenario() -> None:
            self.requests.end(gone[0])
            await asyncio.sleep(0)  # it leaves; whoever is next has the slot and is not awake
            for number, _ in served:
                self.requests.cancel(number)
            await turns()

        self.runner.run(scenario())
        self.waiting = [each for each in self.waiting if each not in served]
        self._settle()

    @rule()
    def throttled(self) -> None:
        self._do(self.gate.throttled)

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        assert sorted(self.requests.held) == sorted(number for number, _ in self.held)


TestLines = Lines.TestCase
TestLines.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
