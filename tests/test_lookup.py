"""Asking which chunks exist: two rounds, in bounded time, and nobody waits."""

import threading
import time
from collections.abc import Iterator

import pytest
from fakes import ScriptedStore, eventually, loop_thread

from objectcache.admission import ASKED_TOKENS, asks
from objectcache.errors import Denied, ObjectCacheError, Unavailable
from objectcache.lookup import Lookup, LookupResult


def key(number: int) -> str:
    return f"chunk/{number:03d}"


class Rig:
    def __init__(self, loop, timeout_s: float = 5.0) -> None:
        self.loop = loop
        self.store = ScriptedStore()
        self.lookup = Lookup(loop, self.store, timeout_s)

    def fill(self, count: int) -> None:
        for number in range(count):
            self.store.put(key(number), b"x")

    def ask(self, ticket: int, count: int) -> None:
        self.lookup.submit(ticket, [key(number) for number in range(count)])

    def results(self, count: int) -> list[LookupResult]:
        found: list[LookupResult] = []
        assert eventually(lambda: len(found) >= count or bool(found.extend(self.lookup.poll())))
        return found


@pytest.fixture
def rig() -> Iterator[Rig]:
    with loop_thread() as loop:
        made = Rig(loop)
        yield made
        assert eventually(lambda: made.store.busy == 0), "questions are left under way"
    assert made.lookup.poll() == []


@pytest.mark.parametrize(("chunks", "present"), [(0, 0), (1, 0), (1, 1), (16, 9), (200, 137)])
def test_finds_how_many_leading_chunks_exist(rig: Rig, chunks: int, present: int) -> None:
    rig.fill(present)
    rig.ask(7, chunks)
    assert rig.results(1) == [LookupResult(7, present, None)]
    assert len(rig.store.calls) <= 30
    assert {operation for operation, _ in rig.store.calls} <= {"head"}


def test_two_round_trips_however_long_the_prompt_is(rig: Rig) -> None:
    """Every question waits until nobody asks another one; then all are answered at once."""
    rig.fill(137)
    gates = {key(number): threading.Event() for number in range(200)}
    for name, gate in gates.items():
        rig.store.script("head", name, gate=gate)

    def waiting() -> list[str]:
        return [name for _, name in rig.store.calls if not gates[name].is_set()]

    rig.ask(1, 200)
    rounds = 0
    while not (results := rig.lookup.poll()):
        if eventually(lambda: bool(waiting()), 0.05):
            time.sleep(0.03)  # whoever wants to ask has asked
            rounds += 1
            for name in waiting():
                gates[name].set()
    assert results == [LookupResult(1, 137, None)]
    assert rounds == 2


def test_no_key_is_asked_for_twice(rig: Rig) -> None:
    rig.fill(50)
    rig.ask(1, 120)
    assert rig.results(1)[0].chunks == 50
    assert len(rig.store.calls) == len(set(rig.store.calls))


@pytest.mark.parametrize("error", [Unavailable("503."), Denied("403.")])
def test_a_store_that_cannot_say_is_an_error_and_no_chunks(
    rig: Rig, error: ObjectCacheError
) -> None:
    rig.fill(10)
    rig.store.script("head", key(3), error=error)
    for number in range(4, 10):
        rig.store.script("head", key(number), gate=threading.Event())
    rig.ask(1, 10)
    assert rig.results(1) == [LookupResult(1, 0, error)]


def test_a_store_that_hangs_is_an_error_in_time() -> None:
    with loop_thread() as loop:
        rig = Rig(loop, timeout_s=0.1)
        rig.fill(3)
        rig.store.script("head", key(1), gate=threading.Event())
        began = time.monotonic()
        rig.ask(1, 3)
        (result,) = rig.results(1)
        assert 0.09 < time.monotonic() - began < 1.0
        assert (result.ticket, result.chunks) == (1, 0)
        assert isinstance(result.error, Unavailable) and "lookup_timeout_ms" in result.error.hint
        assert eventually(lambda: rig.store.busy == 0)


def test_nobody_waits_for_the_store(rig: Rig) -> None:
    """Not even while the loop itself is busy."""
    rig.fill(3)
    gate = threading.Event()
    rig.loop.call(gate.wait)
    began = time.monotonic()
    for ticket in range(100):
        rig.ask(ticket, 3)
        assert rig.lookup.poll() == []
    assert time.monotonic() - began < 0.5
    gate.set()
    assert {result.ticket for result in rig.results(100)} == set(range(100))


def test_lookups_do_not_wait_for_each_other(rig: Rig) -> None:
    rig.fill(2)
    gate = threading.Event()
    rig.store.script("head", key(0), gate=gate, times=1)
    rig.ask(1, 1)
    assert eventually(lambda: rig.store.busy == 1)
    rig.ask(2, 2)
    assert rig.results(1) == [LookupResult(2, 2, None)]
    gate.set()
    assert rig.results(1) == [LookupResult(1, 1, None)]


def test_a_callers_list_may_change_afterwards(rig: Rig) -> None:
    rig.fill(2)
    names = [key(0), key(1)]
    gate = threading.Event()
    rig.loop.call(gate.wait)
    rig.lookup.submit(1, names)
    time.sleep(0.01)
    names.clear()
    gate.set()
    assert rig.results(1) == [LookupResult(1, 2, None)]


def test_after_the_end_nothing_is_asked() -> None:
    with loop_thread() as loop:
        rig = Rig(loop)
    rig.ask(1, 3)
    assert rig.lookup.poll() == [] and rig.store.calls == []


# ---- what is asked for


def test_a_short_end_behind_known_chunks_is_not_asked_for() -> None:
    chunk = 256
    assert not asks(4, chunk, 4 * chunk)  # all is known
    assert not asks(16, chunk, 16 * chunk + ASKED_TOKENS)
    assert asks(16, chunk, 16 * chunk + ASKED_TOKENS + 16)
    assert asks(0, chunk, 16)  # nothing is known: it may all be there
    assert not asks(3, chunk, 4 * chunk) and asks(3, chunk, 4 * chunk + 16)  # three quarters are


def test_who_waits_is_woken_by_the_result_and_else_waits_no_longer_than_it_says(rig: Rig) -> None:
    began = time.monotonic()
    rig.lookup.wait(0.05)
    assert 0.05 <= time.monotonic() - began < 1.0
    rig.fill(3)
    rig.ask(1, 3)
    began = time.monotonic()
    rig.lookup.wait(5.0)
    assert rig.lookup.poll() == [LookupResult(1, 3, None)] and time.monotonic() < began + 2.0
    began = time.monotonic()
    rig.lookup.wait(0.05)
    assert time.monotonic() - began >= 0.05, "an old result wakes nobody"
