"""What a request is to others that want the wire or the GPU, in each phase of its life."""

from types import SimpleNamespace

from objectcache.admission import Admission
from objectcache.choosing import Choosing, Other
from objectcache.keys import ChunkChain
from objectcache.loading import Loading
from objectcache.metrics import Counters
from objectcache.trace import Trace
from objectcache.tracked import Tracked
from objectcache.turns import Turns
from objectcache.worth import Choice

CHUNK, BLOCK = 64, 16


def tracked(tokens: int = 400, computed: int = 0) -> Tracked:
    request = SimpleNamespace(num_tokens=tokens, num_computed_tokens=computed)
    return Tracked(request, ChunkChain(bytes(32), CHUNK, ()))


def test_who_waits_for_bytes_takes_no_gpu_until_it_is_admitted() -> None:
    one = tracked()
    assert one.other == Other(400, 0, runs=False, waits_for_bytes=False)  # it will be computed
    one.admission = Admission(CHUNK, BLOCK, 384, lookup_deadline=1.0, stage_timeout_s=1.0)
    one.local_tokens = 64
    waiting = Other(400, 64, runs=False, waits_for_bytes=True)
    assert one.other == waiting  # for a lookup
    one.admission.looked_up(6)
    assert one.other == waiting
    assert one.admission.ask(64, now=0.0).stage is not None
    assert one.other == waiting
    one.admission.staged(5)
    assert one.admission.ask(64, now=0.0).tokens == 320
    one.admission.allocated(320, 64)
    one.admitted, one.request.num_computed_tokens = True, 384
    assert one.other == Other(400, 384, runs=True, waits_for_bytes=False)


def test_who_is_to_be_computed_waits_for_no_bytes() -> None:
    one = tracked()
    one.admission = Admission(CHUNK, BLOCK, 384, lookup_deadline=1.0, stage_timeout_s=1.0)
    one.admission.looked_up(0)
    assert one.admission.ask(0, now=0.0).tokens == 0
    assert one.other == Other(400, 0, runs=False, waits_for_bytes=False)


def test_blocks_of_its_own_are_those_behind_what_vllm_had() -> None:
    one = tracked(computed=100)
    one.local_tokens = 32
    assert one.own_blocks(BLOCK) == 7 - 2
    one.request.num_computed_tokens = 0
    assert one.own_blocks(BLOCK) == 0


class Judges(Choosing):
    """Counts how often it is told that a load ended."""

    def __init__(self) -> None:
        self.told: list[float] = []

    def ended(self, choice: Choice, took_s: float, now: float) -> None:
        self.told.append(took_s)


def test_a_load_is_judged_once() -> None:
    """It may be admitted early, and then all of it is there before vLLM has blocks for it."""
    judges, turns = Judges(), Turns(10, 100, by_priority=False)
    loading = Loading(
        *(CHUNK, BLOCK, {}, Counters(), turns, None, judges, True, None),
        *(Trace(lambda: 0.0), lambda now: False, 10.0),
    )
    one = tracked()
    one.job, one.job_hashes, one.began_s = 7, [b"a", b"b"], 1.0
    one.choice = SimpleNamespace()  # type: ignore[assignment]
    loading.staged(one, 2, now=3.0)
    loading.staged(one, 2, now=4.0)
    assert judges.told == [2.0]
