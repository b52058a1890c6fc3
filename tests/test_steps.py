"""What is learned of steps that were timed, and a request that is alone on the GPU: Timely without an engine. With one: test_timely.py."""

import math

import numpy as np
import pytest

from objectcache.compute import ComputeModel, Costs, Estimate, Work
from objectcache.flow import StoreModel
from objectcache.lead import Lead
from objectcache.moment import AT_ONCE, STAGED
from objectcache.timely import Timely
from objectcache.wire import Wire

LAYERS, SLICE = 8, 1 << 20
PASS_S = 0.4  # whatever it computes
PREFILL = {"a": (1000, 3000)}


class Heard(ComputeModel):
    """Keeps what it is told."""

    def __init__(self, pass_s: float = PASS_S) -> None:
        super().__init__(Costs(pass_s, 0.0, 0.0, 0.0))
        for tokens in range(1, 200):
            super().timed(Work(1, tokens, 200.0 * tokens), pass_s)
        self.heard: list[tuple[int, float]] = []

    def timed(self, work: Work, seconds: float) -> None:
        self.heard.append((work.tokens, pytest.approx(seconds)))


def timely() -> Timely:
    one = Timely([SLICE] * LAYERS, 4096)
    one.compute = Heard()
    return one


def test_a_pass_begins_when_it_is_scheduled_however_late_the_idle_steps_before_it_are_heard_of() -> (
    None
):
    one = timely()
    one.scheduled(1, {}, 10.0)
    one.scheduled(2, PREFILL, 10.002)
    one.stepped(1, False, 10.06)  # once step 2 was given to the GPU
    one.scheduled(3, {"a": (1, 4000)}, 10.061)
    one.stepped(2, False, 10.602)
    one.stepped(3, False, 10.609)
    assert one.compute.heard == [(1000, 0.6), (1, 0.007)]


def test_all_that_a_step_computes_is_one_pass() -> None:
    class Kept(Heard):
        def timed(self, work: Work, seconds: float) -> None:
            kept.append(work)

    kept: list[Work] = []
    one = timely()
    one.compute = Kept()
    work = {"a": (1, 500), "b": (100, 1000), "c": (1, 70), "d": (50, 0), "e": (1, 6)}
    one.scheduled(1, work, 0.0)
    one.scheduled(2, {"a": (1, 501), "c": (1, 71)}, 0.5)
    for step in (1, 2):
        one.stepped(step, False, float(step))
    assert kept == [Work(1, 153, 100 * 1050 + 50 * 25, 576), Work(1, 2, 0.0, 572)]


def test_a_pass_begins_behind_one_of_which_nothing_is_known() -> None:
    one = timely()
    one.scheduled(1, None, 10.0)
    one.scheduled(2, PREFILL, 10.002)
    assert one.busy_s(10.002) == pytest.approx(PASS_S, abs=0.01)
    one.stepped(1, False, 10.3)
    one.stepped(2, False, 10.7)
    assert one.compute.heard == [(1000, 0.4)]
    assert one.busy_s(10.7) == 0.0


def bringing(one: Timely, layers: int, until: float) -> None:
    """A job of eight chunks, a layer of all of them each 0.1 s since 0, as the wire gives."""
    one.heard(0, Wire(StoreModel(0.001, 0.002, SLICE / 0.1), 8))
    one.began(1, 8, 0.0)
    steps = round(until / 0.01)
    for step in range(1, steps + 1):
        now = step * 0.01
        ready = min(layers, int(now / 0.1 + 1e-9))
        one.seen(1, 8, ready, min(8 * layers, int(8 * now / 0.1 + 1e-9)), now)


def test_who_is_alone_does_not_wait_for_a_margin() -> None:
    """A layer comes each 0.1 s and computes in 0.05: the last at 0.8, so that 0.45 is in time."""
    soon = {}
    for alone in (False, True):
        for hundredths in range(10, 80):
            one = timely()
            now = hundredths / 100
            bringing(one, LAYERS, now)
            moment = one.when(1, 4000, 3000, now, alone=alone)
            if moment is not None and moment.due(now):
                soon[alone] = now
                break
    assert 0.4 <= soon[True] <= 0.5, "within a short stall of what is in time"
    assert soon[False] >= soon[True] + 0.05
    one = timely()
    bringing(one, LAYERS, soon[True])
    moment = one.when(1, 4000, 3000, soon[True], alone=True)
    assert moment is not None and moment.margin_s < 0.0, "it says that it is before its time"


def test_who_is_alone_waits_for_the_first_layer_of_all_its_chunks() -> None:
    one = timely()
    bringing(one, LAYERS, 0.05)
    assert one.when(1, 4000, 3000, 0.05, alone=True) is None


class Knows(Lead):
    """Of any request as much."""

    def seconds(self, tokens: int) -> Estimate:
        return Estimate(0.05, 0.0)


def test_with_a_lead_the_headers_of_all_chunks_are_waited_for_and_no_first_layer() -> None:
    """A header tells that its object exists, is the right one and comes."""
    for ranks in ((-1,), (0,), (1,), (0, -1), (0, 0)):
        for lead in (Lead(), Knows()):
            one = Timely([SLICE] * LAYERS, 4096, len(ranks))
            one.lead = lead
            one.heard(0, Wire(StoreModel(0.001, 0.002, SLICE / 0.1), 8))
            one.began(1, 8, 0.0)
            for ready in ranks:
                one.seen(1, 8, ready, 3, 0.05)
            least = 0 if isinstance(lead, Knows) else 1
            assert (one.when(1, 4000, 3000, 0.05) is not None) == (min(ranks) >= least)
            assert (one.when(1, 4000, 3000, 0.05, alone=True) is not None) == (min(ranks) >= least)
            for mode in (AT_ONCE, STAGED):  # as before
                assert (one.when(1, 4000, 3000, 0.05, mode) is not None) == (min(ranks) >= 1)


def test_a_first_layer_is_expected_a_share_after_the_last_header() -> None:
    """Whatever came of the others until then."""
    one = Timely([SLICE], 4096)
    one.lead = Knows()
    one.heard(0, Wire(StoreModel(0.001, 0.002, 80 * SLICE, wire_bytes_per_s=80 * SLICE), 8))
    one.began(1, 8, 0.0)
    for hundredth in range(1, 21):
        one.seen(1, 8, -1, 7 * hundredth // 20, hundredth / 100)
    one.seen(1, 8, 0, 7, 0.21)
    when = one.when(1, 4000, 3000, 0.21)
    assert when is not None and when.arrives_s >= 0.3


def test_a_prefix_is_expected_as_the_wire_was_measured() -> None:
    ahead = {}
    for wire in (None, Wire(StoreModel(0.001, 0.002, 1e9), 8), Wire(StoreModel(0.3, 0.4, 1e6), 8)):
        one = timely()
        if wire is not None:
            one.heard(0, wire)
        one.began(1, 8, 0.0)
        moment = one.expected(1, 4000, 3000, 0.0)
        assert moment is not None
        ahead[wire and wire.store.first_byte_s] = moment.staged_s
    assert ahead[0.001] < 0.05 < ahead[None] < 1.5 < ahead[0.3]


@pytest.mark.parametrize(("seen_full", "expected_s"), [(False, 0.7), (True, 0.175)])
def test_of_a_wire_that_was_never_full_no_more_is_expected_than_a_fast_card_gives(
    seen_full: bool, expected_s: float
) -> None:
    """Few and small bodies tell what a connection gives, not what hundreds do."""
    wire_bytes_per_s = 100e9 if seen_full else math.inf
    one = Timely([17_500_000_000 // LAYERS // 224] * LAYERS, 4096)
    one.heard(0, Wire(StoreModel(1e-6, 2e-6, 1e9, wire_bytes_per_s=wire_bytes_per_s), 224))
    one.began(1, 224, 0.0)
    when = one.expected(1, 60_000, 57_344, 0.0)
    assert when is not None and when.staged_s == pytest.approx(expected_s, rel=0.1)


def test_how_long_a_step_takes_follows_from_what_is_left_of_those_it_computes() -> None:
    one = Timely([SLICE] * LAYERS, 4096)
    one.compute = ComputeModel(Costs(0.005, 1e-4, 0.0, 0.0))
    assert one.step_s([]) == 0.0
    assert one.step_s([(1, 500)] * 10) == pytest.approx(0.005 + 10e-4)
    assert one.step_s([(1, 500), (1000, 0)]) == pytest.approx(0.005 + 0.1001)
    # No more than a step may compute, however much is left, and of a prompt that is all computed its next token.
    assert one.step_s([(9000, 0), (9000, 0)]) == pytest.approx(0.005 + 0.4096)
    assert one.step_s([(0, 500)]) == one.step_s([(1, 500)])


def test_a_step_that_the_bus_holds_up_is_no_measure_of_computing() -> None:
    """Prompts that are nearly all in the store, between others: what is known of a pass stays what it takes."""
    one, now = Timely([SLICE] * LAYERS, 4096), 10.0
    truth = Costs(0.008, 2e-5, 8e-10, 0.0)
    for step in range(1, 200):
        tokens, context = ((256, 16000), (2000, 8000))[step % 2]
        took_s = float(np.array(Work(1, tokens, tokens * (context + tokens / 2))) @ np.array(truth))
        if tokens == 256:  # 0.5 GB of slices cross the bus at 40 GB/s
            one.loads(context + tokens, context, 64 * 4, now)
            took_s = max(took_s, 64 * 4 * LAYERS * SLICE / 40e9 + 0.002)
        one.scheduled(step, {"a": (tokens, context)}, now)
        one.stepped(step, False, now + took_s)
        now += took_s + 0.001
    known = one.compute.seconds(Work(1, 2000, 2000 * 9000.0))
    assert known.mean_s == pytest.approx(0.008 + 0.04 + 0.0144, rel=0.05)
    assert known.sigma_s < 0.2 * known.mean_s


def test_a_step_whose_loads_are_expected_to_hide_behind_computing_is_timed() -> None:
    """Where all prompts load something, else nothing would be learned of long ones. In a short one the host
    may be what takes the time: whatever it took, it says nothing, or what is held up would be chosen."""
    for chunks, pass_s, took_s, timed in (
        *((0, 0.4, 0.4, True), (100, 0.4, 0.4, True), (2400, 0.4, 0.4, False)),
        *((0, 0.05, 0.05, True), (1, 0.05, 0.05, False), (1, 0.05, 0.5, False)),
    ):
        one = timely()
        one.compute = Heard(pass_s)
        if chunks:
            one.loads(4000, 3000, chunks, 10.0)
        one.scheduled(1, PREFILL, 10.0)
        one.stepped(1, False, 10.0 + took_s)
        one.scheduled(2, PREFILL, 11.0)  # which loads nothing
        one.stepped(2, False, 11.05)
        assert len(one.compute.heard) == 1 + timed, (chunks, pass_s, took_s)
