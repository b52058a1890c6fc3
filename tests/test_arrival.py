"""When layers will be there: exact where all is steady, honest where it is not, and late when it is silent."""

import math
import random
from collections.abc import Sequence
from itertools import accumulate, pairwise
from statistics import NormalDist, mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_sim import SimulatedStore, Timeline

from objectcache.arrival import FORGET_S, Coming, WireRate, latest_first_byte_s
from objectcache.compute import H100_8B, Estimate, Work, first_pass, prefill
from objectcache.flow import StoreModel
from objectcache.lead import NO_LEAD, Lead
from objectcache.moment import stall_s
from objectcache.timely import Timely
from objectcache.wire import Wire

MIB = 1 << 20
LAYERS = 32
S3 = StoreModel(0.027, 0.114, 85e6, 3e9)


def coming(chunks: int, store: StoreModel = S3) -> Coming:
    return Coming([chunks * MIB] * LAYERS, chunks, chunks, 0.0, store)


@pytest.mark.parametrize("step_s", [0.002, 0.02, 0.1])
@pytest.mark.parametrize("bytes_per_s", [2e8, 2e9, 2e10])
def test_a_steady_stream_is_foretold(step_s: float, bytes_per_s: float) -> None:
    one, total = coming(100), 100 * LAYERS * MIB
    end = total / bytes_per_s
    now = 0.0
    for number in range(1, int(0.6 * end / step_s) + 1):
        now = number * step_s
        landed = int(bytes_per_s * now)
        one.seen(now, landed, landed // (100 * MIB))
    if not now:
        return
    found = one.arrivals(now)
    for layer in range(LAYERS):
        at = (layer + 1) * end / LAYERS
        if at > now:
            assert found.mean_s[layer] == pytest.approx(at, abs=0.3 * (end - now) + 2 * step_s)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 1 << 24), min_size=1, max_size=40),
    st.lists(
        st.tuples(
            st.floats(-0.1, 2.0), st.integers(-10, 1 << 26), st.integers(0, 45), st.integers(0, 5)
        ),
        max_size=30,
    ),
    st.floats(0.0, 10.0),
)
def test_whatever_is_reported_the_answer_is_in_order_and_not_in_the_past(
    layer_bytes: list[int], reports: list[tuple[float, int, int, int]], later_s: float
) -> None:
    one = Coming(layer_bytes, 3, 3, 5.0, S3)
    now, landed, ready = 5.0, 0, 0
    for step_s, size, layers, waiting in reports:
        now, landed = now + step_s, landed + size
        one.seen(now, landed, layers, waiting)
        ready = max(ready, min(layers, len(layer_bytes)))
    found = one.arrivals(now + later_s)
    assert len(found.mean_s) == len(found.sigma_s) == len(layer_bytes)
    assert all(math.isfinite(value) for value in (*found.mean_s, *found.sigma_s))
    assert list(found.mean_s) == sorted(found.mean_s)
    seen = len(one._ready_at)
    assert all(at <= now + 0.1 * len(reports) for at in found.mean_s[:seen])
    assert all(at >= now + later_s for at in found.mean_s[seen:])
    assert all(sigma_s >= 0.0 for sigma_s in found.sigma_s)


def test_before_the_first_byte_it_is_what_the_store_was_seen_to_give() -> None:
    found = coming(10).arrivals(0.0)
    assert found.mean_s[-1] == pytest.approx(0.027 + 10 * LAYERS * MIB / (10 * 85e6))
    one = coming(224)
    one.seen(0.01, 0, 0, waiting=224)
    first = one.arrivals(0.01).mean_s[0]
    assert first == pytest.approx(0.147 + MIB / 85e6, abs=0.01)  # the latest of 224 first bytes


@given(st.integers(1, 300), st.floats(0.0, 0.3))
@settings(max_examples=30, deadline=None)
def test_the_latest_first_byte_is_that_of_the_law(requests: int, waited_s: float) -> None:
    """Against the definition: the chance that all of them come by then, given that none came yet."""
    sigma = math.log(0.114 / 0.027) / NormalDist().inv_cdf(0.99)

    def came(at: float) -> float:
        return NormalDist().cdf(math.log(max(1e-9, at) / 0.027) / sigma)

    for share in (0.1, 0.5, 0.9):
        at = latest_first_byte_s(S3, requests, waited_s, share)
        if came(waited_s) < 0.999:
            by_then = ((came(at) - came(waited_s)) / (1 - came(waited_s))) ** requests
            assert by_then == pytest.approx(share, abs=0.01)


def test_silence_moves_everything_away() -> None:
    one = coming(100)
    for number in range(1, 101):
        one.seen(number * 0.01, number * 10 * MIB, number // 10)
    last = one.arrivals(1.0).mean_s[-1]
    for number in range(101, 201):
        one.seen(number * 0.01, 1000 * MIB, 10)
    silent = one.arrivals(2.0)
    assert silent.mean_s[-1] - 2.0 > 1.5 * (last - 1.0)
    assert silent.mean_s[10] > 2.5  # it is overdue since 0.9 s
    assert silent.sigma_s[10] > 0.5


def test_a_straggler_counts_though_bytes_run_ahead() -> None:
    """All but one stream are far ahead: layers become complete at the pace of that one."""
    one = coming(100)
    for number in range(1, 11):
        now = number * 0.1
        one.seen(now, min(99 * LAYERS, 990 * number) * MIB + number * MIB, number)
    found = one.arrivals(1.0)
    assert found.mean_s[-1] == pytest.approx(1.0 + 22 * 0.1, rel=0.1)


def test_bytes_left_are_taken_at_their_word() -> None:
    """Chunks come one after the other, so that no layer is near although most bytes are there."""
    one = coming(100)
    for number in range(1, 10):
        whole = 10 * number
        left = [(100 - whole) * MIB * (layer + 1) for layer in range(LAYERS)]
        one.seen(number * 0.1, whole * LAYERS * MIB, 0, left_bytes=left)
    found = one.arrivals(0.9)
    assert found.mean_s[0] > 0.9 and found.mean_s[-1] == pytest.approx(1.0, abs=0.02)


def test_it_is_as_sure_as_it_says() -> None:
    """Against a simulated store: chunks read all at once, reports every 8 ms, asked in the middle."""
    surprises = []
    errors = []
    for seed in range(60):
        chance = random.Random(seed)
        chunks = chance.choice((14, 56, 112, 224))
        wire = chance.choice((1.25e9, 3e9, 6e9))
        line = Timeline()
        store = SimulatedStore(
            line,
            connection_bytes_per_s=85e6,
            wire_bytes_per_s=wire,
            first_byte_s=0.027,
            first_byte_p99_s=0.114,
            seed=seed,
        )
        began, landed = [0], [0]
        complete, ready_at = [0] * LAYERS, [math.inf] * LAYERS

        def first(began: list[int] = began) -> None:
            began[0] += 1

        def mark(
            layer: int,
            landed: list[int] = landed,
            complete: list[int] = complete,
            ready_at: list[float] = ready_at,
            line: Timeline = line,
            chunks: int = chunks,
        ) -> None:
            landed[0] += MIB
            complete[layer] += 1
            if complete[layer] == chunks:
                ready_at[layer] = line.now

        for _ in range(chunks):
            store.get([((n + 1) * MIB, lambda n=n: mark(n)) for n in range(LAYERS)], first)
        one = coming(chunks, StoreModel(0.03, 0.2, 80e6, 5e9))
        ask_s = chance.uniform(0.05, 0.35)
        for number in range(1, int(ask_s / 0.008)):
            line.run(until=number * 0.008)
            ready = sum(at < math.inf for at in ready_at)
            one.seen(line.now, landed[0], ready, chunks - began[0])
        now = line.now
        found = one.arrivals(now)
        line.run()
        for layer in (0, 8, 16, 31):
            if ready_at[layer] > now:
                late_s = ready_at[layer] - found.mean_s[layer]
                surprises.append(late_s > 2 * found.sigma_s[layer] + 0.01)
                errors.append(abs(late_s) / (ready_at[layer] - now + 0.03))
    assert len(errors) > 60
    assert sum(surprises) < 0.1 * len(surprises)
    assert sorted(errors)[len(errors) // 2] < 0.2


@pytest.mark.parametrize(("bodies", "full"), [(4, False), (20, False), (60, True), (224, True)])
def test_a_full_wire_is_known_by_streams_that_are_slower_than_a_connection(
    bodies: int, full: bool
) -> None:
    wire = 2e9
    rate = min(85e6, wire / bodies)
    seen = WireRate()
    assert seen.bytes_per_s(0.0, 85e6) == math.inf
    for _ in range(3):
        for _ in range(bodies):
            seen.body(1.0, 32 * MIB, 32 * MIB / rate, bodies)
    found = seen.bytes_per_s(1.0, 85e6)
    assert found == (pytest.approx(wire) if full else math.inf)
    assert seen.bytes_per_s(1.0 + FORGET_S, 85e6) == math.inf


def test_the_last_request_to_begin_is_the_one_that_first_layers_wait_for() -> None:
    """99 streams flow since 10 ms, the last since 200 ms: no layer is there before it has one."""
    one = coming(100, StoreModel(0.027, 0.114, 20e6, 2e9))
    for number in range(1, 21):
        now = number * 0.01
        one.seen(now, int(99 * 20e6 * (now - 0.005)), 0, waiting=1 if now < 0.2 else 0)
    assert one.arrivals(0.2).mean_s[0] == pytest.approx(0.2 + MIB / 20e6, abs=0.01)


# ---- what follows from it: too late is a pity, too early a stall for all

# 224 chunks of 32 MiB on an H100 host with 16 cores: when layers 0, 1, 16 and 31 were there, in seconds.
MEASURED = ((0, 0.104), (1, 0.155), (16, 0.300), (31, 0.455))
PROMPT, HIT, BUDGET, PASS_S = 65536, 57344, 8192, 0.62  # tokens, and what the pass took there


def layers_at(
    seed: int, begin: float = 1.0, noise: float = 0.05, slow_from: int = LAYERS, slow: float = 1.0
) -> list[float]:
    """When each layer is there: as measured, with noise; the begin, and all from a layer on, slower."""
    chance, steps = random.Random(seed), [MEASURED[0][1] * begin]
    for (a, at), (b, until) in pairwise(MEASURED):
        steps += [(until - at) / (b - a) * (begin if a == 0 else 1.0)] * (b - a)
    return list(
        accumulate(
            step * math.exp(chance.gauss(0, noise)) * (slow if layer >= slow_from else 1.0)
            for layer, step in enumerate(steps)
        )
    )


def engine_that_ran(seed: int) -> Timely:
    chance, timely = random.Random(seed), Timely([MIB] * LAYERS, BUDGET)
    kinds = [first_pass(PROMPT - HIT, HIT, BUDGET)]
    kinds += [prefill(1 << power, 3 << power, BUDGET) for power in range(5, 13)]
    scale = PASS_S / seconds(kinds[0])
    for work in kinds * 8:
        timely.compute.timed(work, scale * seconds(work) * math.exp(chance.gauss(0, 0.03)))
    return timely


def seconds(work: Work) -> float:
    return sum(a * b for a, b in zip(work, H100_8B, strict=True))


def admitted_s(ready_at: Sequence[float], ahead: float, seed: int) -> float:
    """Asked each 5 ms; the mean chunk is `ahead` layers further than the last one."""
    timely, chunks, now, before = engine_that_ran(seed), 224, 0.0, [0.0, *ready_at]
    timely.began(1, chunks, 0.0)
    while True:
        now += 0.005
        ready = sum(at <= now for at in ready_at)
        if ready == LAYERS:
            return now
        least = ready + (now - before[ready]) / (ready_at[ready] - before[ready])
        lead = ahead * min(1.0, now / ready_at[0]) * (1 - least / LAYERS)
        timely.seen(1, chunks, ready, int(chunks * (least + lead)) if now > 0.015 else 0, now)
        found = timely.when(1, PROMPT, HIT, now)
        if found is not None and found.due(now):
            return now


@pytest.mark.parametrize("ahead", [1.0, 6.0])
@pytest.mark.parametrize(
    ("late_s", "curve"),
    [
        (0.080, {}),
        (0.086, {"noise": 0.3}),
        (0.111, {"begin": 2.0}),
        (0.145, {"begin": 4.0}),
        (0.200, {"slow_from": 1, "slow": 3.0}),
        (0.165, {"slow_from": 3, "slow": 5.0}),
        (0.140, {"slow_from": 4, "slow": 3.0}),
    ],
    ids=str,
)
def test_a_request_is_admitted_in_time_and_no_sooner(
    late_s: float, curve: dict[str, float], ahead: float
) -> None:
    """Against the best moment in hindsight: on average so late at most, and never so soon that it stalls."""
    late = []
    for seed in range(10):
        ready_at = layers_at(seed, **curve)  # type: ignore[arg-type]
        at = admitted_s(ready_at, ahead, seed)
        best = stall_s(0.0, ready_at, PASS_S / LAYERS)
        assert stall_s(at, ready_at, PASS_S / LAYERS) <= 0.01
        late.append(at - best)
    assert mean(late) < late_s


@pytest.mark.parametrize(("slow_from", "slow"), [(8, 3.0), (12, 6.0)])
def test_what_nobody_can_foresee_costs_no_more_than_that(slow_from: int, slow: float) -> None:
    """It slows down after the best moment: the stall is at most what came later than was to be expected."""
    for seed in range(5):
        usual, ready_at = layers_at(seed), layers_at(seed, slow_from=slow_from, slow=slow)
        stalls_s = stall_s(admitted_s(ready_at, 6.0, seed), ready_at, PASS_S / LAYERS)
        assert (
            stalls_s <= ready_at[-1] - usual[-1] - 0.15
        )  # the rest of it was waited for, or hidden


def test_two_words_of_one_rank_are_not_those_of_two() -> None:
    """One may have no place for a job yet, or lack a chunk of it."""
    timely = Timely([MIB] * LAYERS, BUDGET, ranks=2)
    timely.began(1, 10, 0.0)
    for step in range(1, 5):
        timely.next_reports()
        timely.seen(1, 10, step, 10 * step, 0.01 * step)
        assert timely.when(1, 3000, 2560, 0.01 * step) is None
    timely.next_reports()
    for ready in (4, 2):
        timely.seen(1, 10, ready, 10 * ready, 0.05)
    found = timely.when(1, 3000, 2560, 0.05)
    assert found is not None
    timely.forget(1)
    assert timely.when(1, 3000, 2560, 0.06) is None


# ---- a lead, in which the first layer comes

WIRE = 14e9
FULL = StoreModel(0.01, 0.05, 2e8, wire_bytes_per_s=WIRE)


def test_a_first_layer_is_expected_when_the_last_stream_has_its_share() -> None:
    """100 streams flow since 0.01, one of them since 0.2 only: of the bytes that came nothing tells of it."""
    one = coming(100, FULL)
    layer_s = 100 * MIB / WIRE
    for hundredth in range(1, 21):
        one.seen(hundredth / 100, int(WIRE * (hundredth / 100 - 0.01)), 0)
    assert one.arrivals(0.2).mean_s[0] <= 0.201
    one.begun(0.2)
    assert one.arrivals(0.2).mean_s[0] - 0.2 == pytest.approx(layer_s, rel=0.1)
    overdue = one.arrivals(0.2 + 3 * layer_s)
    assert overdue.mean_s[0] - 0.2 == pytest.approx(5 * layer_s, rel=0.1)
    assert overdue.sigma_s[0] >= 1.9 * layer_s, "nobody knows"
    one.seen(0.21, int(WIRE * 0.2), 1)
    assert one.arrivals(0.21).mean_s[0] == 0.21


class Knows(Lead):
    """Of any request as much."""

    def __init__(self, lead: Estimate) -> None:
        super().__init__()
        self.lead = lead

    def seconds(self, tokens: int) -> Estimate:
        return self.lead


Report = tuple[
    float, int, int
]  # when, what had landed, and how many leading layers; -1 without a header


def streams(
    seed: int, begin_s: float, share: float, wire: float
) -> tuple[list[Report], list[float]]:
    """Chunks that begin at any time and share a wire, about equally: what is seen each 2 ms, and when each
    layer is there."""
    chance, step_s, now, chunks = random.Random(seed), 0.001, 0.0, 56
    begin = [0.008 + chance.lognormvariate(math.log(begin_s), 0.5) for _ in range(chunks)]
    weight = [math.exp(chance.gauss(0, share)) for _ in range(chunks)]
    came, reports, ready_at = [0.0] * chunks, [], []
    while len(ready_at) < LAYERS:
        now += step_s
        flow = [n for n in range(chunks) if begin[n] <= now and came[n] < LAYERS * 4 * MIB]
        all_weight = sum(weight[n] for n in flow)
        for n in flow:
            came[n] += min(wire * step_s * weight[n] / all_weight, LAYERS * 4 * MIB - came[n])
        ready = int(min(came) // (4 * MIB))
        ready_at += [now] * (ready - len(ready_at))
        landed = sum(int(size // (4 * MIB)) for size in came)
        reports.append((now, landed, ready if max(begin) <= now else -1))
    return reports[1::2], ready_at


def begins_s(reports: list[Report], known: Estimate, takes_s: float, alone: bool) -> float:
    """When its pass can use a layer, if that is so long after it was let go."""
    timely = Timely([4 * MIB] * LAYERS, BUDGET)
    for _ in range(8):
        timely.compute.timed(first_pass(PROMPT - HIT, HIT, BUDGET), 0.64)
    timely.lead = Knows(known)
    timely.heard(0, Wire(FULL, 56))
    timely.began(1, 56, 0.0)
    for now, landed, ready in reports:
        timely.seen(1, 56, ready, landed, now)
        found = timely.when(1, PROMPT, HIT, now, alone=alone)
        if found is not None and found.due(now):
            break
    return now + takes_s


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(
    ("begin_s", "share", "wire"),
    [(0.02, 0.05, WIRE), (0.05, 0.05, WIRE), (0.02, 0.1, WIRE), (0.02, 0.05, 0.85 * WIRE)],
)
def test_with_a_lead_a_pass_begins_sooner_and_waits_for_no_layer(
    begin_s: float, share: float, wire: float, alone: bool
) -> None:
    lead, won = Estimate(0.025, 0.0025), []
    for seed in range(5):
        reports, ready_at = streams(seed, begin_s, share, wire)
        before = begins_s(reports, NO_LEAD, lead.mean_s, alone)
        after = begins_s(reports, lead, lead.mean_s, alone)
        stalls_s = stall_s(after, ready_at, 0.64 / LAYERS)
        assert stalls_s <= (0.05 if alone else 0.001)
        before += stall_s(before, ready_at, 0.64 / LAYERS)
        won.append(before - after - stalls_s)
    # Who is alone had begun before its time anyhow, where the wire is slow.
    assert mean(won) >= (0.004 if alone and wire < WIRE else 0.010) and min(won) >= -1e-9
