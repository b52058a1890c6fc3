"""How fast connections are among few and among many, and what is concluded of the wire and of how chunks are asked for, against simulated stores."""

import math
import statistics
from collections.abc import Callable

import pytest
from store_sim import client
from test_plan import CHUNK

from objectcache.curve import FASTER, FORGOTTEN, LEAST_BODIES, SHARES, Curve
from objectcache.flow import Flow
from objectcache.plan import Limits, goes_whole, plan

MIB = 1 << 20
BODY = 32 * MIB


def burst(curve: Curve, now: float, count: int, rate: float) -> float:
    """So many bodies at once, each at this rate. When all have come."""
    for _ in range(count):
        curve.began(now)
    end = now + BODY / rate
    for _ in range(count):
        curve.arrived(end, BODY, BODY / rate)
        curve.ended(end)
    return end + 1.0


def shared(curve: Curve, counts: list[int], connection: float, wire: float) -> None:
    now = 0.0
    for count in counts:
        now = burst(curve, now, count, min(connection, wire / count))


def test_nothing_is_known_at_first() -> None:
    curve = Curve()
    assert curve.connection_bytes_per_s == 0.0
    assert curve.wire_bytes_per_s is None


def test_connections_that_are_as_fast_among_many_show_no_wire() -> None:
    curve = Curve()
    shared(curve, [4, 16, 64, 16, 4], 80e6, math.inf)
    assert curve.connection_bytes_per_s == pytest.approx(80e6, rel=0.01)
    assert curve.wire_bytes_per_s is None


def test_a_wire_is_seen_though_few_leave_it_idle() -> None:
    curve = Curve()
    shared(curve, [4, 8, 64], 100e6, 2e9)
    assert curve.connection_bytes_per_s == pytest.approx(100e6, rel=0.01)
    assert curve.wire_bytes_per_s == pytest.approx(2e9, rel=0.25)


def test_where_few_fill_the_wire_a_connection_may_be_faster_than_was_seen() -> None:
    curve = Curve()
    shared(curve, [4, 16], 2e9, 2e9)
    assert curve.wire_bytes_per_s == pytest.approx(2e9, rel=0.1)
    assert curve.connection_bytes_per_s == pytest.approx(FASTER * 0.5e9, rel=0.1)


def test_a_little_slower_among_many_is_chance() -> None:
    curve = Curve()
    now = burst(curve, 0.0, 4, 100e6)
    burst(curve, now, 64, 100e6 * (1 - 0.9 * SHARES))
    assert curve.wire_bytes_per_s is None


def test_a_wire_that_got_wider_is_forgotten() -> None:
    curve = Curve()
    shared(curve, [4, 64], 100e6, 2e9)
    assert curve.wire_bytes_per_s is not None
    shared(curve, [64] * 8, 100e6, math.inf)
    assert curve.wire_bytes_per_s is None


def test_too_few_bodies_and_small_ones_tell_nothing() -> None:
    curve = Curve()
    burst(curve, 0.0, LEAST_BODIES - 1, 100e6)
    assert curve.connection_bytes_per_s == 0.0
    for _ in range(10):
        curve.began(10.0)
        curve.arrived(10.001, 1000, 0.001)
        curve.ended(10.001)
    assert curve.connection_bytes_per_s == 0.0


def test_without_a_pause_it_learns_as_well() -> None:
    """Requests follow each other, always 32 of them in flight."""
    curve, in_flight, now = Curve(), 0, 0.0
    while in_flight < 32:
        curve.began(now)
        in_flight += 1
    for _ in range(40):
        now += 0.5
        for _ in range(32):
            curve.arrived(now, BODY, 0.5)
            curve.began(now)
            curve.ended(now)
    assert curve.connection_bytes_per_s == pytest.approx(BODY / 0.5, rel=0.05)


# ---- with plans


Gives = tuple[float, float]  # of the wire and of a connection, bytes a second


def requests_of(reads: int, gives: Callable[[int], Gives], first_byte_s: float) -> list[int]:
    """GETs of one read of 14 chunks after the other, as reading.py asks for them, of a store that gives this
    to each."""
    flow = Flow(224)
    reader = client(flow, first_byte_s=first_byte_s, first_byte_p99_s=5 * first_byte_s)
    asked, split = [], 0
    for number in range(reads):
        wire, connection = gives(number)
        reader.store.wire.change(connection, wire)
        best = plan(14, CHUNK, flow.model(), Limits(flow.limit(reader.line.now)))
        requests = best.requests
        split += requests > 14
        if requests > 14 and goes_whole(split):
            requests = 14
        reader.body_bytes = 14 * CHUNK.object_bytes // requests
        reader.read(requests)
        reader.line.run()
        reader.line.run(reader.line.now + 2.0)
        asked.append(requests)
    return asked


@pytest.mark.parametrize(("wire", "connection"), [(1e9, 1.5e9), (4e9, 1.5e9), (10e9, 1.5e9)])
def test_what_a_full_wire_brings_in_order_is_not_asked_for_in_parts(
    wire: float, connection: float
) -> None:
    """Parts of later layers would take their share of it from the first ones."""
    asked = requests_of(60, lambda _: (wire, connection), 0.002)
    assert asked[4:] == [14] * 56, asked


def test_a_full_wire_is_looked_at_again_now_and_then() -> None:
    """If it is not full any more parts are better: what was seen of many connections is forgotten."""
    asked = requests_of(4 * FORGOTTEN, lambda _: (4e9, 1.5e9), 0.002)
    again = [number for number, requests in enumerate(asked) if number > 4 and requests > 14]
    assert 2 <= len(again) <= 8, again


def test_where_connections_are_slow_parts_stay() -> None:
    asked = requests_of(40, lambda _: (10e9, 80e6), 0.03)
    assert statistics.median(asked) >= 42
    assert asked.count(14) <= 3  # by which it would see if that changed


BUSY, SLOW, FAST = (640e6, 80e6), (10e9, 20e6), (10e9, 800e6)


@pytest.mark.parametrize("then", [BUSY, SLOW, FAST])
@pytest.mark.parametrize("when", [range(1, 4), range(20, 40), range(6)])
def test_a_store_that_was_another_one_for_a_while_is_known_again(then: Gives, when: range) -> None:
    """A wire that others filled, connections that were slowed down, or as fast as in a cache."""
    reads = 60 + 6 * FORGOTTEN
    asked = requests_of(reads, lambda n: then if n in when else (10e9, 80e6), 0.03)
    late = asked[-FORGOTTEN:]
    assert statistics.median(late) >= 28, late


def test_two_numbers_that_are_nearly_the_same_show_no_wire() -> None:
    curve = Curve()
    now = burst(curve, 0.0, 11, 83e6)
    burst(curve, now, 12, 78e6)
    assert curve.wire_bytes_per_s is None


def test_a_request_that_hangs_is_not_part_of_what_others_had() -> None:
    curve = Curve()
    curve.began(0.0)
    burst(curve, 0.0, 14, 100e6)
    curve.ended(60.0)
    assert curve.connection_bytes_per_s == pytest.approx(100e6, rel=0.05)
    burst(curve, 100.0, 56, 40e6)
    assert curve.wire_bytes_per_s == pytest.approx(56 * 40e6, rel=0.05)


def test_what_comes_in_no_time_tells_nothing() -> None:
    curve = Curve()
    for _ in range(5):
        curve.began(1.0)
    for _ in range(5):
        curve.arrived(1.0, BODY, 0.5)  # before the window, all of it
        curve.ended(1.0)
    assert curve.connection_bytes_per_s == 0.0


def test_one_read_in_many_goes_whole() -> None:
    whole = [number for number in range(1, 1025) if goes_whole(number)]
    assert whole == [1, 4, 16, 64, 256, 1024]
