"""The number of requests in flight against simulated stores, and against the best fixed number, which is the reference."""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from store_sim import client

from objectcache.flow import (
    CUT,
    IDLE_S,
    MEND_S,
    MEND_TO,
    ONE_BURST_S,
    START,
    USED,
    Flow,
)

MIB = 1 << 20
MOST = 224
RATE = 80e6  # of one connection


class Fixed(Flow):
    """Always as many."""

    def limit(self, now: float) -> int:
        return self._most

    def throttled(self, now: float) -> None:
        pass


@functools.cache
def best_fixed(body_bytes: int, seconds: float, **store: Any) -> float:
    """Goodput of the best number that is hardly ever refused."""
    found = 0.0
    for number in (1, 4, 8, 12, 24, 48, 64, 96, 160, 200, 224):
        one = client(Fixed(number), body_bytes, **store)
        one.read(math.inf)
        one.line.run(seconds)
        # Bodies that began together come together: with few rounds it is chance how many were seen.
        if one.rounds > 10 and one.store.refused <= 0.01 * one.asked:
            found = max(found, one.goodput(seconds / 4))
    return found


# ---- it finds what the store rewards


@pytest.mark.parametrize("body_bytes", [32 * MIB, 4 * MIB])
@pytest.mark.parametrize(
    "store",
    [
        {"wire_bytes_per_s": 8 * RATE},
        {"servers": 8},
        {"wire_bytes_per_s": 60 * RATE},
        {"wire_bytes_per_s": 172 * RATE},
        {"wire_bytes_per_s": 200 * RATE, "servers": 200},
        {"wire_bytes_per_s": RATE, "servers": 1},
        {},
    ],
    ids=str,
)
def test_within_twenty_rounds_it_is_near_the_best(store: dict[str, Any], body_bytes: int) -> None:
    slow = store.get("servers") == 1 or store.get("wire_bytes_per_s") == 8 * RATE
    seconds = body_bytes / MIB * (12.0 if slow else 1.0)
    flow = Flow(MOST)
    reader = client(flow, body_bytes, **store)
    reader.read(math.inf)
    reader.line.run(seconds)
    best = best_fixed(body_bytes, seconds, **store)
    # A store that serves one at a time does not get to twenty rounds.
    since = reader.after_rounds(20) if reader.rounds >= 30 else seconds / 4
    assert reader.goodput(since) > 0.9 * best


@pytest.mark.parametrize("body_bytes", [32 * MIB, 4 * MIB])
@pytest.mark.parametrize("requests_per_s", [20, 100, 400])
def test_a_store_that_refuses_is_refused_little_more(requests_per_s: int, body_bytes: int) -> None:
    store = {"requests_per_s": requests_per_s}
    reader = client(Flow(MOST), body_bytes, **store)
    reader.read(math.inf)
    reader.line.run(20.0)
    refused, asked = reader.store.refused, reader.asked
    reader.line.run(80.0)
    best = best_fixed(body_bytes, 40.0, **store)
    assert reader.goodput(20.0) > 0.75 * best
    assert refused < max(4 * START, 2.5 * requests_per_s)  # until it knew the store
    assert reader.store.refused - refused < 0.05 * (reader.asked - asked)


def test_it_follows_a_store_that_changes() -> None:
    flow = Flow(MOST)
    reader = client(flow, wire_bytes_per_s=12 * RATE)
    reader.read(math.inf)
    reader.line.run(30.0)
    reader.store.wire.change(RATE, 150 * RATE)
    rounds = reader.rounds
    reader.line.run(150.0)
    since = reader.after_rounds(rounds + 45)
    assert reader.goodput(since) > 0.9 * 150 * RATE * 0.95
    reader.store.wire.change(RATE, 12 * RATE)
    reader.line.run(300.0)
    assert reader.goodput(200.0) > 0.9 * 12 * RATE


def test_it_steps_back_from_a_line_at_the_server() -> None:
    flow = Flow(MOST)
    reader = client(flow, 4 * MIB, wire_bytes_per_s=200 * RATE)
    reader.read(math.inf)
    reader.line.run(5.0)
    high = flow.limit(5.0)
    assert high > 100
    reader.store.wire.change(RATE, 8 * RATE)
    reader.store.serve_with(8)
    reader.line.run(400.0)
    assert flow.limit(400.0) < high / 3
    assert reader.goodput(200.0) > 0.85 * best_fixed(4 * MIB, 40.0, servers=8)


# ---- it starts and rests without harm


def test_it_starts_small_and_doubles() -> None:
    reader = client(Flow(MOST))
    seen = {reader.flow.limit(0.0)}
    reader.read(math.inf)
    for tick in range(60):
        reader.line.run(tick / 10)
        seen.add(reader.flow.limit(reader.line.now))
    assert sorted(seen)[:4] == [START, 2 * START, 4 * START, MOST]


@pytest.mark.parametrize(
    ("most", "begins"), [(8, 8), (56, 56), (2 * START, 2 * START), (2 * START + 1, START)]
)
def test_where_one_doubling_is_all_it_begins_with_that(most: int, begins: int) -> None:
    flow = Flow(most)
    assert flow.limit(0.0) == begins
    flow.began(0.0)
    flow.throttled(0.5)
    assert flow.limit(0.5) < max(2, begins)
    flow.ended(1.0)
    assert flow.limit(2000.0) == begins  # after a long pause, as at first


@pytest.mark.parametrize("wire", [4 * RATE, 10 * RATE])
def test_what_begins_with_all_meets_the_wire_all_the_same(wire: float) -> None:
    """Lone bodies have shown what a connection gives; no trial with more will show the wire."""
    flow = Flow(56)
    reader = client(flow, 4 * MIB, wire_bytes_per_s=wire)
    for _ in range(4):
        reader.read(1)
        reader.line.run(reader.line.now + 1.0)
    assert flow.model().connection_bytes_per_s > 0.9 * RATE
    reader.read(224)
    reader.line.run(reader.line.now + 60.0)
    assert 0.7 * wire < flow.model().wire_bytes_per_s < 1.4 * wire


def test_what_begins_with_all_sees_no_wire_where_none_is() -> None:
    flow = Flow(56)
    reader = client(flow, 4 * MIB)
    reader.read(500)
    reader.line.run(60.0)
    assert flow.model().wire_bytes_per_s == math.inf


def test_bursts_teach_and_pauses_do_not() -> None:
    flow = Flow(MOST)
    reader = client(flow)
    for _ in range(4):
        reader.read(400)
        reader.line.run(reader.line.now + 30.0)
    assert flow.limit(reader.line.now) >= 150
    known = flow.limit(reader.line.now)
    for _ in range(200):  # a few bodies now and then say nothing about many
        reader.read(5)
        reader.line.run(reader.line.now + 3.0)
    assert flow.limit(reader.line.now) == known
    assert flow.limit(reader.line.now + 0.9 * IDLE_S) == known
    halved = flow.limit(reader.line.now + 2 * IDLE_S)
    assert halved == known // 2 or halved == math.floor(known / 1.25 / 2)
    assert Flow(MOST).limit(1e9) == START


@pytest.mark.parametrize("sizes", [(32 * MIB, MIB), (MIB, 32 * MIB, 4 * MIB)])
def test_bodies_of_several_sizes_do_not_mislead_it(sizes: tuple[int, ...]) -> None:
    flow = Flow(MOST)
    reader = client(flow, wire_bytes_per_s=100 * RATE)
    reader.read(3000)
    reader.line.run(60.0)
    for turn in range(60):
        reader.body_bytes = sizes[turn % len(sizes)]
        reader.read(500)
        reader.line.run(reader.line.now + 5.0)
        assert flow.limit(reader.line.now) >= 80


# ---- single events


def fill(flow: Flow, now: float = 0.0) -> int:
    """Use all that may be; returns how many that is."""
    count = flow.limit(now)
    for _ in range(count):
        flow.began(now)
    return count


def test_a_burst_of_503_counts_once() -> None:
    flow = Flow(MOST)
    fill(flow)
    for i in range(16):
        flow.throttled(i * ONE_BURST_S / 100)
    assert flow.limit(1.0) == int(CUT * START)
    flow.throttled(6.0)
    assert flow.limit(6.0) == int(CUT * int(CUT * START))
    for i in range(100):
        flow.throttled(10.0 * i)
        assert flow.limit(10.0 * i) >= 1
    assert flow.limit(1000.0) == 1


def steady(
    flow: Flow,
    now: float,
    until: float,
    rate: float = RATE,
    body_bytes: int = 10_000_000,
    first_byte_s: float = 0.01,
) -> float:
    """Bodies from a store without end, all slots in use; sizes and times never vary."""
    seconds = body_bytes / rate
    in_flight = 0
    while now < until:
        while in_flight < flow.limit(now):
            flow.began(now)
            in_flight += 1
        now += seconds
        for _ in range(in_flight):
            flow.arrived(now, body_bytes, first_byte_s, seconds)
            flow.ended(now)
        in_flight = 0
    return now


def wired(flow: Flow, now: float, wire_bytes_per_s: float) -> float:
    """As many bodies as may be, of which the wire is the limit: one batch."""
    return steady(flow, now, now + 1e-9, rate=min(RATE, wire_bytes_per_s / flow.limit(now)))


def test_on_a_full_wire_more_is_kept_if_it_does_no_harm_and_then_left_in_peace() -> None:
    flow, now = Flow(MOST), 0.0
    limits = []
    for _ in range(300):
        now = wired(flow, now, START * RATE)
        limits.append(flow.limit(now))
    assert MOST in limits[:20]
    # No first byte comes sooner with fewer: trials of that are rare, and not kept.
    settled = limits[20:]
    assert min(settled) >= 0.75 * MOST and settled.count(MOST) > 0.9 * len(settled)
    assert flow.model().wire_bytes_per_s < 1.3 * START * RATE


@pytest.mark.parametrize(("most", "tries_fewer"), [(2 * START, False), (4 * START, True)])
def test_who_begins_with_all_is_not_tried_with_fewer_though_first_bytes_come_sooner_then(
    most: int, tries_fewer: bool
) -> None:
    """They stand in line at a server, and the wire is full either way."""
    flow, now, limits = Flow(most), 0.0, []
    for _ in range(300):
        limits.append(flow.limit(now))
        line_s = 0.001 * limits[-1]
        now = steady(flow, now, now + 1e-9, rate=START * RATE / limits[-1], first_byte_s=line_s)
    settled = limits[50:]
    assert (min(settled) < most) == tries_fewer
    flow.throttled(now)
    assert flow.limit(now) < most, "a server that asks for fewer is heard"


def test_after_a_cut_it_has_its_quiet_then_mends_by_small_steps() -> None:
    flow = Flow(MOST)
    now = steady(flow, 0.0, 5.0)
    assert flow.limit(now) == MOST
    flow.throttled(now)
    cut = now
    assert flow.limit(now) == int(CUT * MOST)
    now = steady(flow, now, cut + MEND_S - 0.2)
    assert flow.limit(now) == int(CUT * MOST)
    last = flow.limit(now)
    while last < int(MEND_TO * MOST):
        assert now < cut + 2 * MEND_S
        now = steady(flow, now, now + 0.1)
        assert last <= flow.limit(now) <= last + max(1, last / 16) + 1
        last = flow.limit(now)


def test_cuts_after_growth_make_the_quiet_longer() -> None:
    flow, now = Flow(MOST), 0.0
    waits = []
    for _ in range(5):
        began = now
        while flow.limit(now) < 40:
            now = steady(flow, now, now + 0.1)
        waits.append(now - began)
        while flow.limit(now) >= 20:
            now += 6.0
            flow.throttled(now)
    assert waits[0] < waits[1] < waits[2] < waits[3]
    assert waits[4] < 200


def test_larger_bodies_are_no_proof_that_more_connections_pay() -> None:
    flow = Flow(MOST)
    now = steady(flow, 0.0, 0.05, rate=20e6, body_bytes=1_000_000)
    assert flow.limit(now) == 2 * START
    now = steady(flow, now, now + 0.5, rate=40e6, body_bytes=32_000_000)
    assert flow.limit(now) == START
    # Smaller ones that gain all the same are.
    flow = Flow(MOST)
    now = steady(flow, 0.0, 0.5, rate=40e6, body_bytes=32_000_000)
    now = steady(flow, now, now + 0.1, rate=38e6, body_bytes=4_000_000)
    assert flow.limit(now) >= 2 * START


def test_a_failure_ends_a_trial_and_nothing_else() -> None:
    flow = Flow(MOST)
    now = steady(flow, 0.0, 0.1)
    assert flow.limit(now) == 2 * START
    flow.failed(now)
    assert START <= flow.limit(now) <= 1.25 * START
    now = steady(flow, now, now + 9.0, rate=RATE)
    settled = flow.limit(now)
    assert settled > 4 * START
    for _ in range(50):
        flow.failed(now)
    assert flow.limit(now) >= settled / 1.25


def test_what_it_measured() -> None:
    flow = Flow(MOST)
    assert flow.model().wire_bytes_per_s == math.inf
    reader = client(
        flow, wire_bytes_per_s=60 * RATE, first_byte_s=0.05, first_byte_p99_s=0.4, seed=3
    )
    reader.read(8000)
    reader.line.run(100.0)
    assert reader.in_flight == 0
    model = flow.model()
    assert 0.8 < model.first_byte_s / 0.05 < 1.25
    assert 0.5 < model.first_byte_p99_s / 0.4 < 1.5
    assert 0.7 < model.connection_bytes_per_s / RATE < 1.05
    assert 0.85 < model.wire_bytes_per_s / (60 * RATE) < 1.25
    # Idle time and small reads do not make a store look slow.
    for _ in range(50):
        reader.read(3)
        reader.line.run(reader.line.now + 60.0)
    assert flow.model().wire_bytes_per_s == model.wire_bytes_per_s


# ---- any events


class Any_(RuleBasedStateMachine):
    """Whatever happens, in whatever order."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = Flow(MOST)
        self.now = 0.0
        self.in_flight = 0
        self.most_used = 0.0
        self.last = START

    @rule(seconds=st.floats(0.0, 2.0))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self._never_rises()

    @rule()
    def a_long_time_passes(self) -> None:
        self.now += 2 * IDLE_S
        if self.in_flight:
            self._never_rises()
        else:
            assert self.flow.limit(self.now) >= min(self.last, START)

    @rule(count=st.integers(1, 300))
    def begin(self, count: int) -> None:
        for _ in range(min(count, self.flow.limit(self.now) - self.in_flight)):
            self.flow.began(self.now)
            self.in_flight += 1
        self.most_used = max(self.most_used, self.in_flight)

    @precondition(lambda self: self.in_flight)
    @rule(
        count=st.integers(1, 300),
        size=st.integers(0, 64 * MIB),
        seconds=st.floats(0.0, 3.0),
        first=st.none() | st.floats(0.0, 1.0),
        came=st.booleans(),
    )
    def end(self, count: int, size: int, seconds: float, first: float | None, came: bool) -> None:
        for _ in range(min(count, self.in_flight)):
            if came:
                self.flow.arrived(self.now, size, first, seconds)
            self.flow.ended(self.now)
            self.in_flight -= 1
        if not came:
            self._never_rises()

    @rule(call=st.sampled_from([Flow.failed, Flow.throttled]))
    def bad_news(self, call: Callable[[Flow, float], None]) -> None:
        before = self.flow.limit(self.now)
        call(self.flow, self.now)
        # The first trial after a doubling that failed is a quarter more than what was good.
        assert self.flow.limit(self.now) <= before

    def _never_rises(self) -> None:
        assert self.flow.limit(self.now) <= self.last

    @invariant()
    def it_is_bounded(self) -> None:
        self.last = self.flow.limit(self.now)
        assert 1 <= self.last <= MOST
        assert self.last <= max(START, 2 * self.most_used / USED + 1), "it grew without use"
        model = self.flow.model()
        assert 0 <= model.first_byte_s <= model.first_byte_p99_s
        assert 0 < model.connection_bytes_per_s <= model.wire_bytes_per_s


TestAny = Any_.TestCase
TestAny.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
