"""What Loading tells Timely and Choosing of who is alone, of steps on several ranks, and of loads that are admitted early. The decisions themselves: test_steps.py, test_moment.py. With an engine: test_timely.py."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from objectcache.admission import Admission, Phase
from objectcache.choosing import Choosing
from objectcache.compute import ComputeModel, Costs, Work
from objectcache.flow import StoreModel
from objectcache.keys import ChunkChain
from objectcache.loading import DOUBT, DOUBT_S, Loading
from objectcache.messages import Landed, StepReport
from objectcache.metrics import Counters
from objectcache.moment import AT_ONCE, JUST_IN_TIME
from objectcache.timely import Timely
from objectcache.trace import Trace
from objectcache.tracked import Tracked
from objectcache.turns import Turns
from objectcache.wire import Wire
from objectcache.worth import Choice

LAYERS, SLICE, CHUNKS, CHUNK, BLOCK = 8, 1 << 20, 8, 384, 16
PASS_S = 0.4  # whatever it computes
LAYER_S = 0.1  # between two layers of all chunks


class Known(ComputeModel):
    """Every pass takes as long, and it keeps what it is told of others."""

    def __init__(self) -> None:
        super().__init__(Costs(PASS_S, 0.0, 0.0, 0.0))
        for tokens in range(1, 200):
            super().timed(Work(1, tokens, 200.0 * tokens), PASS_S)
        self.heard: list[int] = []

    def timed(self, work: Work, seconds: float) -> None:
        self.heard.append(work.tokens)


class Quick(Timely):
    """The steps of others take 5 ms: one can soon ask again."""

    def step_s(self, left: Sequence[tuple[int, int]]) -> float:
        return 0.005


class Judges(Choosing):
    """Keeps how long loads are said to have taken."""

    def __init__(self) -> None:
        self.told: list[float] = []

    def ended(self, choice: Choice, took_s: float, now: float) -> None:
        self.told.append(took_s)

    def gives_up(self, *what: Any) -> tuple[str, float]:
        return "", 1.0


class Scene:
    """A request whose load began at 0, and others beside it."""

    def __init__(
        self, mode: str = JUST_IN_TIME, ranks: int = 1, kind: type[Timely] = Timely
    ) -> None:
        self.timely = kind([SLICE] * LAYERS, 4096, ranks)
        self.timely.compute = Known()
        self.timely.heard(0, Wire(StoreModel(0.001, 0.002, SLICE / LAYER_S), CHUNKS))
        self.judges = Judges()
        self.requests: dict[str, Tracked] = {}
        self.loading = Loading(
            *(CHUNK, BLOCK, self.requests, Counters(), Turns(10, 10_000, by_priority=False)),
            *(self.timely, self.judges, True, None),
            *(Trace(lambda: 0.0, keeps=False), lambda now: False, 10.0),
        )
        self.one = self.has("a", 4000, 0)
        self.one.mode = mode
        self.one.choice = SimpleNamespace()  # type: ignore[assignment]
        self.one.job, self.one.job_hashes = 1, [bytes([n]) for n in range(CHUNKS)]
        self.admission = Admission(CHUNK, BLOCK, CHUNKS * CHUNK, 9.0, 99.0)
        self.one.admission = self.admission
        self.admission.looked_up(CHUNKS)
        assert self.admission.ask(0, now=0.0).stage is not None
        self.loading.began(self.one, 0.0)

    def has(self, name: str, tokens: int, computed: int) -> Tracked:
        request = SimpleNamespace(
            request_id=name, num_tokens=tokens, num_computed_tokens=computed, priority=0
        )
        self.requests[name] = Tracked(request, ChunkChain(bytes(32), CHUNK, ()))
        return self.requests[name]

    def crowd(self, count: int, tokens: int = 500) -> None:
        """So many others on the GPU, of whom each computes its last token, or this is all of one's prompt."""
        for number in range(count):
            self.has(f"other {number}", tokens, 499).admitted = True

    def bring(self, now: float, layer_s: float = LAYER_S) -> None:
        ready = min(LAYERS, int(now / layer_s + 1e-9))
        landed = min(LAYERS * CHUNKS, int(CHUNKS * now / layer_s + 1e-9))
        self.timely.seen(1, CHUNKS, ready, landed, now)

    def is_let_go(self, now: float) -> bool:
        self.loading.watch(self.one, self.admission, now)
        return self.admission.phase is Phase.READY

    def admitted_at(self, scheduled: dict[str, int], heard: bool = True) -> float:
        """When it is let go, if each step computes this and has ended when the next is put together."""
        for hundredth in range(1, 100):
            now = hundredth / 100
            step = self.loading.scheduled(scheduled, now)
            if heard:
                self.loading.reported(StepReport(steps=[(step, False)] * self.timely.ranks), now)
            self.bring(now)
            if self.is_let_go(now):
                return now
        raise AssertionError("never")


def test_who_is_alone_is_let_go_sooner_than_who_has_somebody_beside_it() -> None:
    alone = Scene().admitted_at({})
    beside = Scene(kind=Quick)
    beside.crowd(1)
    assert beside.admitted_at({"other 0": 1}) >= alone + 0.05
    assert 0.4 <= alone <= 0.5, "within a short stall of what is in time"


def test_who_would_wait_for_a_long_step_is_let_go_before_its_time_if_that_costs_few_others() -> (
    None
):
    """A step takes 0.4 s here: a stall of some hundredths is less than that, if not too many share it."""
    at = {}
    for count in (1, 100):
        scene = Scene()
        scene.crowd(count)
        at[count] = scene.admitted_at({"other 0": 1})
    quick = Scene(kind=Quick)
    quick.crowd(1)
    assert at[1] + 0.03 <= at[100] < quick.admitted_at({"other 0": 1}), at


class Long(Timely):
    """Steps take long if a prompt is computed in them."""

    def step_s(self, left: Sequence[tuple[int, int]]) -> float:
        return 0.4 if any(tokens > 1 for tokens, _ in left) else 0.005


def test_who_is_parked_makes_no_step_long() -> None:
    """Until its prefix is there it computes nothing, however much it will."""
    at = {}
    for parked, tokens in ((False, 500), (True, 4000), (False, 4000)):
        scene = Scene(kind=Long)
        scene.crowd(1)
        other = scene.has("b", tokens, 499)
        other.admitted, other.job = True, 7 if parked else None
        at[parked, tokens] = scene.admitted_at({"other 0": 1})
    assert at[True, 4000] == at[False, 500] > at[False, 4000], at


def test_what_the_gpu_still_computes_is_a_lead() -> None:
    """Steps of 0.4 s, put together one ahead: the next one begins so much later than it is asked for."""
    at = {}
    for heard in (True, False):
        scene = Scene()
        scene.crowd(100)
        at[heard] = scene.admitted_at({"other 0": 1}, heard)
    assert 0.1 <= at[False] <= 0.3 and at[True] >= 0.4, at


def test_a_step_of_which_nothing_is_known_is_no_lead_nor_one_that_has_run_its_time() -> None:
    known = {"a": (1, 499)}
    for step, ran_s, due in ((None, 0.0, False), (known, 0.0, True), (known, 0.6, False)):
        scene = Scene()
        for hundredth in range(1, 31):
            scene.bring(hundredth / 100)
        scene.timely.scheduled(1, step, 0.3 - ran_s)
        found = scene.timely.when(1, 4000, CHUNKS * CHUNK, 0.3)
        assert found is not None and found.due(0.3) == due, (step, ran_s)


def test_nobody_is_alone_beside_work_of_which_nothing_is_known() -> None:
    assert Scene().admitted_at({"unheard of": 1}) >= Scene().admitted_at({}) + 0.05


def test_of_two_in_one_step_only_the_first_is_alone() -> None:
    scene = Scene()
    soon = Scene().admitted_at({})
    scene.loading.scheduled({}, soon)
    for hundredth in range(1, round(soon * 100) + 1):
        scene.bring(hundredth / 100)
    scene.loading.admitted()
    assert not scene.is_let_go(soon)
    scene.loading.scheduled({}, soon)  # it ended at once
    scene.one.next_moment_s = soon
    assert scene.is_let_go(soon)


@pytest.mark.parametrize("ranks", [1, 2])
def test_of_what_does_not_all_come_nothing_is_claimed_before_it_is_known_how_much(
    ranks: int,
) -> None:
    """Also if it was due, and vLLM only has no blocks for it yet."""
    scene = Scene(ranks=ranks)
    scene.admission.due()
    assert scene.admission.ask(0, now=0.1).tokens == CHUNKS * CHUNK
    scene.loading.falls_short(7, scene.one)  # of a load before this one
    assert scene.admission.ask(0, now=0.1).tokens == CHUNKS * CHUNK
    scene.loading.falls_short(1, scene.one)
    assert scene.admission.ask(0, now=0.1).tokens is None
    assert not scene.is_let_go(0.9), "it is not followed any more"
    scene.admission.staged(3)
    assert scene.admission.ask(0, now=0.2).tokens == 3 * CHUNK
    scene.loading.falls_short(1, scene.one)  # too late to change anything
    assert scene.admission.ask(0, now=0.2).tokens == 3 * CHUNK


class Requests(dict[str, Tracked]):
    """Counts how often somebody goes through all."""

    walks = 0

    def values(self) -> Any:
        self.walks += 1
        return super().values()


def test_who_runs_is_looked_up_once_a_step_however_many_are_watched() -> None:
    scene = Scene()
    scene.one.choice = None  # who might be given up looks at all as well
    scene.loading._requests = requests = Requests(scene.requests)
    for now in (0.05, 0.06, 0.07):
        scene.loading.scheduled({}, now)
        scene.bring(now)
        for _ in range(20):
            scene.one.next_moment_s = now
            assert not scene.is_let_go(now)
    assert requests.walks == 3


def test_at_once_is_let_go_however_much_the_rest_of_its_load_is_doubted() -> None:
    for mode in (AT_ONCE, JUST_IN_TIME):
        scene = Scene(mode)
        scene.bring(20.0, layer_s=20.0)  # two hundred times slower than the wire was
        moment = scene.timely.when(1, 4000, CHUNKS * CHUNK, 20.0, mode)
        assert moment is not None
        left_s = scene.timely.left_s(1, 20.0)
        assert left_s > DOUBT * (moment.staged_s - 20.0) + DOUBT_S, "nothing is doubted"
        assert scene.is_let_go(20.0) == (mode == AT_ONCE)


@pytest.mark.parametrize("ranks", [1, 2])
def test_at_once_is_judged_by_when_all_of_it_is_there_not_by_what_was_expected(ranks: int) -> None:
    scene = Scene(AT_ONCE, ranks)
    for _ in range(ranks):
        scene.bring(0.2)
    assert scene.is_let_go(0.2) and scene.judges.told == []
    scene.loading.lands(scene.one)
    scene.loading.over(scene.one, 0.2)
    for rank in range(ranks):
        assert scene.judges.told == []
        scene.loading.reported(StepReport(landed=[Landed(1, False)]), 5.0 + rank)
    assert scene.judges.told == [4.0 + ranks]


def test_a_load_that_is_lost_is_not_judged() -> None:
    scene = Scene(AT_ONCE, ranks=2)
    scene.bring(0.2)
    scene.bring(0.2)
    assert scene.is_let_go(0.2)
    scene.loading.lands(scene.one)
    scene.loading.reported(StepReport(landed=[Landed(1, True), Landed(1, False)]), 5.0)
    assert scene.judges.told == [] and not scene.loading._landing


def test_just_in_time_is_judged_by_what_is_expected_as_it_is_let_go_and_never_again() -> None:
    scene = Scene()
    now = scene.admitted_at({})
    assert len(scene.judges.told) == 1 and scene.judges.told[0] > now
    scene.loading.lands(scene.one)
    scene.loading.reported(StepReport(landed=[Landed(1, False)]), 5.0)
    assert len(scene.judges.told) == 1


@pytest.mark.parametrize("waits", [(False, True), (True, False), (True, True), (False, False)])
def test_a_step_that_waited_on_any_rank_is_not_timed(waits: tuple[bool, bool]) -> None:
    scene = Scene(ranks=2)
    scene.has("b", 1000, 0)
    step = scene.loading.scheduled({"b": 1000}, 1.0)
    scene.loading.reported(StepReport(steps=[(step, waited) for waited in waits]), 1.4)
    assert scene.timely.compute.heard == ([] if any(waits) else [1000])  # type: ignore[attr-defined]


LEAD_S = 0.05


def learns(scene: Scene, ends: bool = True, beside: str = "", computes: int = 900) -> None:
    """Three requests, each loaded in a step of its own, whose first layer is needed the lead after it was
    asked for. `ends` is whether the step has ended before the next one; `beside` runs all the time."""
    for now in (1.0, 2.0, 3.0):
        ranks = scene.timely.ranks
        if beside:
            scene.loading.scheduled({beside: 1}, now)
        one = scene.has(f"at {now}", 4000, CHUNKS * CHUNK)
        one.asked_s = now
        scene.loading.loads(one, CHUNKS * CHUNK)
        step = scene.loading.scheduled({f"at {now}": computes}, now + LEAD_S / 2)
        scene.loading.reported(StepReport(needed=[(step, now + LEAD_S)] * ranks), now + 0.5)
        if ends:
            scene.loading.reported(StepReport(steps=[(step, False)] * ranks), now + 0.5)


@pytest.mark.parametrize("ranks", [1, 2])
def test_who_is_not_alone_is_let_go_sooner_by_the_lead(ranks: int) -> None:
    at = {}
    for knows in (False, True):
        scene = Scene(kind=Quick)
        if knows:
            other = Scene(ranks=ranks)
            learns(other)
            scene.timely.lead = other.timely.lead
        scene.crowd(1)
        at[knows] = scene.admitted_at({"other 0": 1})
    assert 0.03 <= at[False] - at[True] <= LEAD_S + 0.011, "by steps of 10 ms, and its spread"


def test_of_a_step_behind_one_that_loads_no_lead_is_learned() -> None:
    """Its worker may have been held up there, by late layers: a lead that grows with them makes others late."""
    scene = Scene()
    learns(scene, ends=False, computes=1)  # as few as a decode does
    assert scene.timely.lead.seconds(4000).mean_s == 0.0
    learns(scene)
    assert scene.timely.lead.seconds(4000).mean_s == pytest.approx(LEAD_S)


@pytest.mark.parametrize(("name", "learned"), [("b", True), ("c", False), ("unheard of", False)])
def test_a_lead_is_learned_behind_decodes_and_behind_nothing_else(name: str, learned: bool) -> None:
    scene = Scene()
    for other in "bc":
        scene.has(other, 500, 499)
    scene.loading.scheduled({"c": 300} if name == "c" else {}, 0.9)
    learns(scene, beside=name)
    assert (scene.timely.lead.seconds(4000).mean_s > 0.0) == learned


def test_a_prefix_is_expected_without_a_lead() -> None:
    """What is expected is when its pass begins."""
    scene, other = Scene(), Scene()
    learns(other)
    scene.bring(0.1)
    before = scene.timely.expected(1, 4000, CHUNKS * CHUNK, 0.1)
    scene.timely.lead = other.timely.lead
    assert scene.timely.expected(1, 4000, CHUNKS * CHUNK, 0.1) == before
