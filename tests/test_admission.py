"""What is claimed and when: brute force over sizes, and random lives of a request against a small model."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from objectcache.admission import (
    NOTHING,
    STAGE_GRACE_S,
    WAIT,
    Admission,
    Answer,
    Load,
    Phase,
    Stage,
    Stream,
    loadable,
)

LOOKUP_S, STAGE_S = 1.0, 10.0


def admission(
    loadable_tokens: int = 64, stage_chunks: int | None = None, chunk: int = 16, block: int = 4
) -> Admission:
    return Admission(chunk, block, loadable_tokens, LOOKUP_S, STAGE_S, stage_chunks)


# ---- how much may be claimed


@given(st.integers(0, 5000), st.integers(1, 128))
def test_loadable_is_whole_blocks_and_leaves_a_token(prompt: int, block: int) -> None:
    tokens = loadable(prompt, block)
    assert tokens % block == 0 and tokens >= 0
    assert tokens < prompt or prompt == 0
    assert tokens + block >= prompt, "a block more would have left a token"


# ---- one life, step by step


def test_a_prefix_that_comes_whole() -> None:
    a = admission(loadable_tokens=60)
    assert a.ask(0, 0.0) == WAIT
    a.looked_up(4)
    assert a.ask(0, 0.1) == Answer(None, Stage(0, 4))
    assert a.ask(0, 0.2) == WAIT
    a.staged(4)
    assert a.ask(0, 0.3) == Answer(60)
    assert a.allocated(60, 0) == (Load(0, 15), False)
    assert a.phase is Phase.OVER and not a.gone()


def test_what_vllm_has_itself_is_not_fetched() -> None:
    a = admission()
    a.looked_up(4)
    assert a.ask(24, 0.0).stage == Stage(1, 3)
    a.staged(3)
    assert a.ask(24, 0.0) == Answer(40)
    assert a.allocated(40, 24) == (Load(2, 10), False)


def test_vllm_may_have_more_when_it_admits() -> None:
    a = admission()
    a.looked_up(4)
    assert a.ask(0, 0.0).stage == Stage(0, 4)
    a.staged(4)
    assert a.ask(20, 0.0) == Answer(44)
    assert a.allocated(44, 20) == (Load(5, 11), False)


def test_if_vllm_lost_blocks_before_the_first_staged_chunk_nothing_is_claimed() -> None:
    a = admission()
    a.looked_up(4)
    assert a.ask(32, 0.0).stage == Stage(2, 2)
    a.staged(2)
    assert a.ask(28, 0.0) == Answer(0, release=True)
    assert a.ask(32, 0.0) == NOTHING


def test_if_vllm_has_all_of_it_meanwhile_the_chunks_are_given_back() -> None:
    a = admission()
    a.looked_up(4)
    a.ask(0, 0.0)
    a.staged(4)
    assert a.ask(64, 0.0) == Answer(0, release=True)


@pytest.mark.parametrize("chunks", [0, 1, 2])
def test_only_what_came_is_claimed(chunks: int) -> None:
    a = admission()
    a.looked_up(4)
    a.ask(16, 0.0)
    a.staged(chunks)
    answer = a.ask(16, 0.0)
    assert answer == (Answer(16 * chunks) if chunks else Answer(0, release=True))


def test_nothing_found_is_over_at_once() -> None:
    a = admission()
    a.looked_up(1)
    assert a.ask(16, 0.0) == NOTHING
    assert a.phase is Phase.OVER and not a.timed_out


def test_a_lookup_that_is_late() -> None:
    a = admission()
    assert a.ask(0, LOOKUP_S - 0.01) == WAIT
    assert a.ask(0, LOOKUP_S) == NOTHING and a.timed_out
    a.looked_up(4)
    assert a.ask(0, LOOKUP_S) == NOTHING, "an answer that comes too late is not used"


def test_a_stage_that_never_reports() -> None:
    a = admission()
    a.looked_up(4)
    a.ask(0, 5.0)
    assert a.ask(0, 5.0 + STAGE_S + STAGE_GRACE_S - 0.01) == WAIT
    assert a.ask(0, 5.0 + STAGE_S + STAGE_GRACE_S) == Answer(0, release=True)
    assert a.timed_out
    a.staged(4)
    assert a.ask(0, 99.0) == NOTHING


def test_while_another_brings_the_chunk_nothing_is_fetched_but_not_for_ever() -> None:
    a = admission()
    a.looked_up(4)
    assert a.ask(0, 2.0, may_stage=False) == WAIT
    assert a.ask(0, 2.0 + STAGE_S - 0.01, may_stage=False) == WAIT
    assert a.ask(0, 2.0 + STAGE_S, may_stage=False).stage == Stage(0, 4)


def test_the_other_brought_it_all() -> None:
    a = admission()
    a.looked_up(4)
    assert a.ask(0, 0.0, may_stage=False) == WAIT
    assert a.ask(64, 0.1) == NOTHING


@pytest.mark.parametrize("phase", ["lookup", "found", "staging", "ready"])
def test_admitted_with_nothing_of_ours(phase: str) -> None:
    a = admission()
    if phase != "lookup":
        a.looked_up(4)
    if phase in ("staging", "ready"):
        a.ask(0, 0.0)
    if phase == "ready":
        a.staged(4)
    assert a.allocated(0, 0) == (None, phase in ("staging", "ready"))
    assert a.allocated(0, 0) == (None, False)


def test_more_than_was_promised_is_refused() -> None:
    a = admission()
    a.looked_up(4)
    a.ask(0, 0.0)
    a.staged(1)
    with pytest.raises(AssertionError):
        a.allocated(20, 0)


# ---- more than can be staged


def test_what_is_too_long_to_stage_is_answered_at_once_and_streams() -> None:
    a = admission(loadable_tokens=60, stage_chunks=3)
    a.looked_up(4)
    assert a.ask(0, 0.0) == Answer(60, asynchronous=True)
    assert a.ask(0, 0.1) == Answer(60, asynchronous=True), "asked again: there were no blocks"
    assert a.allocated(60, 0) == (Stream(0, 4, 0, 15), False)
    assert a.phase is Phase.STREAMING
    a.ended()
    assert a.allocated(0, 0) == (None, False), "vLLM says so again when it resumes the request"
    assert a.phase is Phase.OVER and not a.gone()


def test_when_it_resumes_before_the_end_is_known_nothing_changes() -> None:
    a = admission(stage_chunks=3)
    a.looked_up(4)
    a.ask(0, 0.0)
    a.allocated(64, 0)
    assert a.allocated(0, 0) == (None, False) and a.phase is Phase.STREAMING


@pytest.mark.parametrize(
    ("local", "answer"),
    [
        (0, Answer(64, asynchronous=True)),
        (12, Answer(52, asynchronous=True)),
        (16, Answer(None, Stage(1, 3))),
    ],
)
def test_only_what_vllm_lacks_counts(local: int, answer: Answer) -> None:
    a = admission(stage_chunks=3)
    a.looked_up(4)
    assert a.ask(local, 0.0) == answer


def test_an_offer_is_made_anew_each_time() -> None:
    """vLLM had no blocks for it; meanwhile it computed a part itself, or another request brings it."""
    a = admission(stage_chunks=3)
    a.looked_up(4)
    assert a.ask(0, 0.0).asynchronous
    assert a.ask(0, 0.0, may_stage=False) == WAIT
    assert a.ask(4, 0.0) == Answer(60, asynchronous=True)
    assert a.ask(20, 0.0) == Answer(None, Stage(1, 3))
    b = admission(stage_chunks=3)
    b.looked_up(4)
    assert b.ask(0, 0.0).asynchronous
    assert b.ask(64, 0.0) == NOTHING


def test_an_offer_that_vllm_does_not_take() -> None:
    a = admission(stage_chunks=3)
    a.looked_up(4)
    a.ask(0, 0.0)
    assert a.allocated(0, 0) == (None, False) and a.phase is Phase.OVER


def test_a_request_that_goes_while_it_streams_has_a_stream_to_stop() -> None:
    a = admission(stage_chunks=0)
    a.looked_up(4)
    a.ask(0, 0.0)
    assert not admission(stage_chunks=0).gone()
    a.allocated(64, 0)
    assert a.gone() and not a.gone()


@settings(max_examples=300)
@given(st.data())
def test_a_stream_names_the_block_of_every_token(data: st.DataObject) -> None:
    block = data.draw(st.integers(1, 5), "block_tokens")
    chunk = block * data.draw(st.integers(1, 5), "blocks in a chunk")
    prompt = data.draw(st.integers(1, 40 * block), "prompt_tokens")
    most = loadable(prompt, block)
    found = data.draw(st.integers(0, -(-most // chunk)), "found")
    local = block * data.draw(st.integers(0, most // block), "blocks local")
    a = Admission(chunk, block, most, 1.0, STAGE_S, 0)
    a.looked_up(found)
    answer = a.ask(local, 0.0)
    wanted = list(range(local, min(found * chunk, most), block))
    assert answer.tokens == len(wanted) * block and answer.asynchronous == bool(wanted)
    if wanted:
        stream, _ = a.allocated(answer.tokens, local)
        assert isinstance(stream, Stream)
        blocks = [  # the token at which each block of its chunks begins
            first
            for at in range(stream.first, stream.first + stream.count)
            for first in range(at * chunk, (at + 1) * chunk, block)
        ]
        assert blocks[stream.first_block : stream.first_block + stream.blocks] == wanted
        assert stream.first_block < chunk // block, "a chunk that nobody needs"
        assert wanted[-1] // chunk == stream.first + stream.count - 1


# ---- where the blocks of a load lie, against brute force


@settings(max_examples=400)
@given(st.data())
def test_a_load_names_the_staged_block_of_every_token(data: st.DataObject) -> None:
    block = data.draw(st.integers(1, 5), "block_tokens")
    chunk = block * data.draw(st.integers(1, 5), "blocks in a chunk")
    prompt = data.draw(st.integers(1, 40 * block), "prompt_tokens")
    most = loadable(prompt, block)
    found = data.draw(st.integers(0, -(-most // chunk)), "found")
    at_stage = block * data.draw(st.integers(0, most // block), "blocks local at stage")
    a = Admission(chunk, block, most, 1.0, STAGE_S)
    a.looked_up(found)
    stage = a.ask(at_stage, 0.0).stage
    wanted = range(at_stage, min(found * chunk, most))
    if not wanted:
        assert stage is None and a.phase is Phase.OVER
        return
    assert stage is not None
    assert {token // chunk for token in wanted} == set(
        range(stage.first, stage.first + stage.count)
    )
    came = data.draw(st.integers(0, stage.count), "came")
    a.staged(came)
    local = block * data.draw(st.integers(0, most // block), "blocks local when admitted")
    staged_blocks = [  # the token at which each staged block begins
        first
        for at in range(stage.first, stage.first + came)
        for first in range(at * chunk, (at + 1) * chunk, block)
    ]
    tokens = a.ask(local, 0.0).tokens
    claimable = [first for first in staged_blocks if first >= local and first < most]
    continues = bool(claimable) and claimable[0] == local
    assert tokens == (len(claimable) * block if continues else 0)
    if tokens:
        load, _ = a.allocated(tokens, local)
        assert isinstance(load, Load)
        copied = staged_blocks[load.first_block : load.first_block + load.blocks]
        assert copied == list(range(local, local + tokens, block))


# ---- less than all of it


@pytest.mark.parametrize("chunks", range(6))
def test_no_more_is_fetched_than_was_chosen(chunks: int) -> None:
    a = admission(loadable_tokens=76)
    a.looked_up(5)
    a.limit(chunks, 20)
    a.limit(9, 0)
    assert a.wanted(20) == min(chunks, 4)
    assert a.ask(20, 0.0).stage == (Stage(1, min(chunks, 4)) if chunks else None)
    a.limit(1, 0)  # too late
    a.staged(chunks)
    assert a.ask(20, 0.1).tokens == (min(76, 16 * (chunks + 1)) - 20 if chunks else 0)


def test_a_load_that_is_given_up_is_released_once_and_nothing_of_it_counts() -> None:
    a = admission()
    a.looked_up(4)
    assert a.ask(0, 0.0).stage is not None
    a.give_up()
    a.staged(4)  # it came all the same
    assert a.ask(0, 0.1) == Answer(0, release=True)
    assert a.ask(0, 0.2) == NOTHING and not a.gone()


# ---- random lives


class Life(RuleBasedStateMachine):
    """A request with a scheduler, a store and a worker that may do anything at any time."""

    CHUNK, BLOCK = 12, 4

    @initialize(prompt=st.integers(1, 90), most=st.sampled_from([None, 0, 1, 2, 3, 5]))
    def arrive(self, prompt: int, most: int | None) -> None:
        self.now = 100.0
        self.prompt = prompt
        self.most = loadable(prompt, self.BLOCK)
        self.stage_chunks = most
        self.a = Admission(self.CHUNK, self.BLOCK, self.most, self.now + LOOKUP_S, STAGE_S, most)
        self.streaming = False
        self.stage: Stage | None = None
        self.found: int | None = None
        self.came: int | None = None
        self.stages = self.ends = 0
        self.admitted = False
        self.over_seen = False
        self.began = self.now

    def staged_range(self) -> range:
        if self.stage is None or not self.came:
            return range(0)
        first = self.stage.first * self.CHUNK
        return range(first, first + self.came * self.CHUNK)

    @rule(seconds=st.sampled_from([0.01, 0.5, 1.0, 5.0, 11.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(data=st.data())
    def lookup_answers(self, data: st.DataObject) -> None:
        chunks = data.draw(st.integers(0, -(-self.most // self.CHUNK)))
        if self.a.phase is Phase.LOOKUP:
            self.found = chunks
        self.a.looked_up(chunks)

    @precondition(lambda self: self.stage is not None)
    @rule(data=st.data())
    def stage_reports(self, data: st.DataObject) -> None:
        assert self.stage is not None
        chunks = data.draw(st.integers(0, self.stage.count))
        if self.a.phase is Phase.STAGING:
            self.came = chunks
        self.a.staged(chunks)

    @rule(data=st.data(), chunks=st.integers(0, 6))
    def less_is_chosen(self, data: st.DataObject, chunks: int) -> None:
        local = self.BLOCK * data.draw(st.integers(0, self.prompt // self.BLOCK))
        if self.a.phase is Phase.FOUND:
            assert self.found is not None
            self.found = min(self.found, local // self.CHUNK + chunks)
        self.a.limit(chunks, local)
        if self.a.phase is Phase.FOUND:
            assert self.a.wanted(local) <= chunks

    @rule()
    def the_load_is_given_up(self) -> None:
        if self.a.phase is Phase.STAGING:
            self.came = 0
        self.a.give_up()

    @precondition(lambda self: not self.admitted)
    @rule(data=st.data(), may_stage=st.booleans(), admit=st.booleans(), ahead=st.booleans())
    def asks(self, data: st.DataObject, may_stage: bool, admit: bool, ahead: bool) -> None:
        local = self.BLOCK * data.draw(st.integers(0, max(0, self.prompt - 1) // self.BLOCK))
        wanted = self.a.wanted(local)
        answer = self.a.ask(local, self.now, may_stage, ahead)
        assert answer.stage is None or answer.stage.count == wanted > 0
        assert not (answer.tokens and self.stages) or answer.asynchronous == ahead
        self.check(answer, local)
        again = self.a.ask(local, self.now, may_stage, ahead)
        if answer.stage is None and not answer.release:
            assert again.tokens == answer.tokens
        assert again.stage is None and not again.release, "asked again, it changes nothing"
        assert again.asynchronous == answer.asynchronous or answer.stage or answer.release
        if again.tokens is not None and admit:
            self.admit(again.tokens, local)

    def check(self, answer: Answer, local: int) -> None:
        if answer.stage is not None:
            self.stages += 1
            assert answer.tokens is None and self.found is not None
            self.stage = answer.stage
            assert self.stage.first == local // self.CHUNK and self.stage.count >= 1
            assert self.stage.first + self.stage.count <= self.found
            assert self.stage_chunks is None or self.stage.count <= self.stage_chunks
        if answer.release:
            self.ends += 1
            assert answer.tokens == 0
        if answer.asynchronous and self.stages == 0:
            assert self.found is not None and self.stage_chunks is not None and answer.tokens
            end = local + answer.tokens
            assert end == min(self.found * self.CHUNK, self.most)
            assert -(-end // self.CHUNK) - local // self.CHUNK > self.stage_chunks
        elif answer.tokens:
            tokens = range(local, local + answer.tokens)
            staged = self.staged_range()
            assert tokens.start in staged and tokens[-1] in staged, "not staged"
            assert tokens.stop <= self.most < self.prompt
            assert answer.tokens % self.BLOCK == 0
        if self.over_seen:
            assert answer == NOTHING

    def admit(self, tokens: int, local: int) -> None:
        load, unused = self.a.allocated(tokens, local)
        self.admitted = True
        assert (load is not None) == (tokens > 0)
        if isinstance(load, Stream):
            self.streaming = True
            assert not unused and self.stages == 0
            first = load.first * self.CHUNK + load.first_block * self.BLOCK
            assert (first, load.blocks * self.BLOCK) == (local, tokens)
            return
        self.ends += unused + (load is not None)
        self.streaming = load is not None and self.a.ahead
        if load is not None:
            assert self.stage is not None and self.came is not None
            first = self.stage.first * self.CHUNK + load.first_block * self.BLOCK
            assert (first, load.blocks * self.BLOCK) == (local, tokens)
            assert load.first_block + load.blocks <= self.came * self.CHUNK // self.BLOCK

    @precondition(lambda self: self.streaming)
    @rule(resumes=st.booleans())
    def stream_ends(self, resumes: bool) -> None:
        self.a.ended()
        self.streaming = False
        assert self.a.phase is Phase.OVER
        if resumes:
            assert self.a.allocated(0, 0) == (None, False)

    @rule()
    def finishes(self) -> None:
        held = self.a.gone()
        assert held or not self.streaming, "a stream that nobody stops"
        self.ends += held and not self.streaming
        self.streaming = False

    @invariant()
    def a_stage_ends_once(self) -> None:
        if not hasattr(self, "a"):
            return
        assert self.stages <= 1 and self.ends <= self.stages
        self.over_seen = self.over_seen or self.a.phase is Phase.OVER
        if self.over_seen:
            assert self.a.phase is Phase.OVER and self.ends == self.stages

    def teardown(self) -> None:
        """Left alone by everybody, it says how many tokens, in bounded time."""
        if not hasattr(self, "a") or self.admitted:
            return
        limit = self.now + LOOKUP_S + 2 * STAGE_S + STAGE_GRACE_S + 1.0
        while (answer := self.a.ask(0, self.now, may_stage=False)).tokens is None:
            self.check(answer, 0)
            assert self.now < limit, f"it waits for ever in {self.a.phase}"
            self.now += 0.25
        self.check(answer, 0)
        self.admit(answer.tokens, 0)
        self.ends += self.a.gone() and not self.streaming
        assert self.ends == self.stages


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=200, stateful_step_count=25, deadline=None)
