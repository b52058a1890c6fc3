"""What each request is priced with: what it meets, deadlines, a load that became slow, a store that goes off. The prices: test_worth.py; with an engine: test_loads.py."""

import math
from dataclasses import replace

import pytest

from objectcache.choosing import DEADLINE, DEADLINE_MOST_MS, Choosing, Other, Prompt, deadline_s_of
from objectcache.compute import ComputeModel, Costs, Work
from objectcache.errors import Misconfigured
from objectcache.flow import StoreModel
from objectcache.timely import Timely
from objectcache.wire import Wire
from objectcache.worth import FIRST_PAUSE_S, LOSSES, Choice

LAYERS, SLICE = 4, 1 << 20  # a chunk of 64 tokens is 4 MiB
COSTS = Costs(pass_s=0.01, token_s=1e-3, pair_s=0.0, read_s=0.0)
FAST = Wire(StoreModel(0.001, 0.002, 1e9), 32)  # a chunk in 4 ms, that computes in 64
SLOW = Wire(StoreModel(0.001, 0.002, 1e6, 40e6), 32)  # a chunk in 131 ms
PROMPT = Prompt(1000, 0, 15)


class Known(ComputeModel):
    """Costs that were learned."""

    def __init__(self, costs: Costs = COSTS) -> None:
        super().__init__(costs)
        for tokens in range(16, 400, 16):
            self.timed(Work(1, tokens, 8.0 * tokens), costs.pass_s + tokens * costs.token_s)


def choosing(wire: Wire | None = FAST, admits: bool = False, room: int | None = None) -> Choosing:
    timely = Timely([SLICE] * LAYERS, 4096, admits=admits)
    timely.compute = Known()
    one = Choosing(timely, 64, LAYERS * SLICE, LAYERS, room)
    if wire is not None:
        one._timely.heard(0, wire)
    return one


def chosen(one: Choosing, prompt: Prompt = PROMPT, now: float = 0.0, **more: list) -> Choice:
    found = one.choose(prompt, more.get("others", []), more.get("waiting", []), now)
    assert not isinstance(found, str)
    return found


def test_what_is_sooner_is_loaded_and_what_is_not_is_computed() -> None:
    assert chosen(choosing(FAST)).best.chunks == 15
    assert chosen(choosing(SLOW)).best.chunks == 0
    assert chosen(choosing(FAST, room=7)).best.chunks == 7


def test_all_is_loaded_while_the_wire_or_computing_is_not_known() -> None:
    assert "wire" in str(choosing(None).choose(PROMPT, [], [], 0.0))
    one = choosing(FAST)
    one._timely.compute = ComputeModel(COSTS)
    assert "too few prompts" in str(one.choose(PROMPT, [], [], 0.0))
    for _ in range(3):
        one._timely.compute.timed(Work(1, 400, 4e4), 0.41)
    assert isinstance(one.choose(PROMPT, [], [], 0.0), Choice)


def test_ranks_wait_for_the_slowest_of_them() -> None:
    one = choosing(FAST)
    one._timely.heard(1, SLOW)
    assert chosen(one).best.chunks == 0
    one._timely.heard(1, FAST)
    assert chosen(one).best.chunks == 15


def test_what_is_met() -> None:
    one = choosing(FAST)
    one._timely.began(1, 5, 0.0)
    others = [
        Other(700, 100, runs=True),  # prefill
        Other(300, 299, runs=True),  # decode
        Other(400, 0, runs=False),  # to be computed
        Other(900, 0, runs=False, waits_for_bytes=True),
    ]
    met = chosen(one, others=others, waiting=[2, 3]).met
    assert met.wire_busy_s == pytest.approx(10 * LAYERS * SLICE / FAST.bytes_per_s)
    assert met.gpu_busy_s == pytest.approx(2 * 0.01 + 1.0, rel=0.05)
    assert (met.wire_line, met.gpu_line) == (3, 3)
    assert (met.beside.tokens, met.beside.read_tokens) == (1, 299)
    assert not met.overlaps and met.pass_tokens == 4096
    one._timely.seen(1, 5, LAYERS, 5 * LAYERS, 1.0)
    assert one._timely.left_bytes() == []


def test_a_step_that_runs_keeps_the_gpu_until_it_ends() -> None:
    one = choosing(FAST)
    one._timely.scheduled(1, {"a": (200, 0)}, 5.0)
    assert chosen(one, now=5.1).met.gpu_busy_s == pytest.approx(0.11, rel=0.1)
    assert chosen(one, now=9.0).met.gpu_busy_s == 0.0
    one._timely.stepped(1, False, 9.0)
    assert chosen(one, now=9.0).met.gpu_busy_s == 0.0


def test_who_asks_to_be_staged_is_priced_as_staged() -> None:
    one = choosing(FAST, admits=True)
    early, staged = chosen(one), chosen(one, replace(PROMPT, early=False))
    assert early.met.overlaps and not staged.met.overlaps
    assert staged.best.first_token_s > early.best.first_token_s
    one._timely.heard(0, Wire(StoreModel(0.001, 0.002, 3e6), 15))  # 1.4 s, and 3.05 for the rest
    one._timely.began(7, 15, 0.0)
    long = Prompt(4000, 0, 15, deadline_s=4.2)  # all computes in 4.0
    why = [one.gives_up(early, 7, replace(long, early=e), [], 0.0, 0.0)[0] for e in (True, False)]
    assert why[0] == "" and "to keep its deadline" in why[1]


def test_a_deadline_counts_before_what_others_wait() -> None:
    middling = Wire(StoreModel(0.001, 0.002, 1e9, 100e6), 32)  # a chunk in 42 ms, beside 64
    one = choosing(middling)
    for job in (1, 2, 3):
        one._timely.began(job, 1, 0.0)
    kind = chosen(one)
    soon = chosen(one, Prompt(1000, 0, 15, deadline_s=0.95))
    assert kind.best.first_token_s > 0.95
    assert soon.keeps_deadline and soon.best.chunks > kind.best.chunks


def test_a_load_that_became_slow_is_given_up_and_a_good_one_is_not() -> None:
    one = choosing(FAST)
    choice = chosen(one)
    one._timely.began(7, 15, 0.0)
    why, again_s = one.gives_up(choice, 7, PROMPT, [], 0.0, 0.001)
    assert why == "" and 0.0 < again_s <= 0.25
    for n in range(1, 200):  # a hundredth of it comes in a second
        one._timely.seen(7, 15, 0, n // 40, n * 0.02)
        why, _ = one.gives_up(choice, 7, PROMPT, [], 0.0, n * 0.02)
        if why:
            break
    assert why.startswith("Give up its load: first token in ") and n * 0.02 < 2.2
    assert one.gives_up(choice, 99, PROMPT, [], 0.0, 1.0) == ("", 0.25)  # nothing is known of it


def test_a_load_that_misses_a_deadline_which_computing_keeps_is_given_up_sooner() -> None:
    one = choosing(FAST)
    choice = chosen(one)
    # 1.4 s: less than twice that without.
    one._timely.heard(0, Wire(StoreModel(0.001, 0.002, 3e6), 15))
    one._timely.began(7, 15, 0.0)
    assert one.gives_up(choice, 7, PROMPT, [], 0.0, 0.0)[0] == ""
    late = Prompt(1000, 0, 15, deadline_s=1.1)
    assert "to keep its deadline" in one.gives_up(choice, 7, late, [], 0.0, 0.0)[0]
    gone = Prompt(1000, 0, 15, deadline_s=0.5)  # too late for both
    assert one.gives_up(choice, 7, gone, [], 0.0, 0.0)[0] == ""


def test_a_store_that_got_slow_goes_off_is_tried_and_comes_back() -> None:
    one, now = choosing(FAST), 100.0
    for _ in range(LOSSES):
        assert not one.off
        one.ended(chosen(one, now=now), 20.0, now)
    assert one.off and chosen(one, now=now).best.chunks == 0
    later = now + FIRST_PAUSE_S + 100.0  # what it was slow by has faded
    tried = chosen(one, now=later)
    assert tried.best.chunks > 0 and chosen(one, now=later).best.chunks == 0
    one.ended(tried, 0.02, later)
    assert not one.off and chosen(one, now=later).best.chunks == 15


def test_waiting_for_those_before_it_is_not_the_stores_doing() -> None:
    one = choosing(FAST)
    one._timely.began(1, 2000, 0.0)
    for _ in range(LOSSES + 1):
        choice = chosen(one)
        before_s = choice.met.wire_busy_s
        one.ended(choice, before_s + 1.1 * (choice.best.load_s - before_s), 0.0)
    assert not one.off and one._use.slowness(0.0) < 1.5


def test_deadlines_are_numbers_of_milliseconds() -> None:
    assert deadline_s_of(None) == deadline_s_of({}) == math.inf
    assert deadline_s_of({DEADLINE: None, "other": 1}) == math.inf
    assert deadline_s_of({DEADLINE: 250}) == 0.25 and deadline_s_of({DEADLINE: 0.5}) == 5e-4
    bad = (0, -1, "100", True, [], {}, math.nan, math.inf, -math.inf, 2 * DEADLINE_MOST_MS)
    for value in bad:
        with pytest.raises(Misconfigured, match="no number of milliseconds"):
            deadline_s_of({DEADLINE: value})


@pytest.mark.parametrize("landed", [0, 20])
@pytest.mark.parametrize("admits", [False, True])
def test_a_load_of_which_nothing_comes_is_given_up_when_computing_would_be_done(
    admits: bool, landed: int
) -> None:
    one, prompt = choosing(FAST, admits), Prompt(4000, 0, 15)
    choice = chosen(one, prompt)
    one._timely.began(7, 15, 0.0)
    now, again_s, why = 0.0, 0.0, ""
    while not why:
        now += again_s
        one._timely.seen(7, 15, 0, landed, now)
        why, again_s = one.gives_up(choice, 7, prompt, [], 0.0, now)
        assert now < 9.0
    assert 2.2 < now < 5.2  # all computes in 4.0 s, the rest in 3.05
