"""The prefix search and the memory of known chunks, against brute force and against a dict with a clock."""

import asyncio
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from objectcache import index
from objectcache.index import KnownChunks
from objectcache.lookup import search


def two_rounds(truth: list[bool]) -> tuple[int, list[int]]:
    """What the search finds, and the positions it asked for."""
    chunks = len(truth)
    first = index.first_round(chunks)
    answers = {at: truth[at] for at in first}
    second = index.second_round(chunks, answers)
    answers |= {at: truth[at] for at in second}
    return index.found(chunks, answers), [*first, *second]


def test_every_monotone_truth_up_to_300_chunks_is_found() -> None:
    for chunks in range(301):
        limit = index.ALL_AT_ONCE if chunks <= index.ALL_AT_ONCE else 2 * math.isqrt(chunks) + 3
        for present in range(chunks + 1):
            found, asked = two_rounds([True] * present + [False] * (chunks - present))
            assert found == present
            assert len(asked) == len(set(asked)), "a position was asked for twice"
            assert all(0 <= at < chunks for at in asked)
            assert len(asked) <= limit


@given(st.integers(0, 1_000_000))
def test_questions_grow_with_the_root(chunks: int) -> None:
    asked = index.first_round(chunks)
    gap = max((b - a for a, b in zip([-1, *asked], asked, strict=False)), default=0)
    limit = max(index.ALL_AT_ONCE, math.isqrt(chunks) + 2)
    assert len(asked) <= limit and gap <= limit
    assert asked == sorted(set(asked))
    assert not asked or asked[-1] == chunks - 1


@settings(max_examples=300)
@given(st.lists(st.booleans(), max_size=120))
def test_with_holes_the_answer_never_passes_the_first_hole_that_was_seen(truth: list[bool]) -> None:
    found, asked = two_rounds(truth)
    assert all(truth[at] for at in asked if at < found)
    assert found == min((at for at in asked if not truth[at]), default=len(truth))
    assert found == 0 or found - 1 in asked, "the last chunk claimed was never asked for"


@settings(max_examples=200)
@given(st.lists(st.booleans(), max_size=60))
def test_lookups_search_asks_the_same_in_two_rounds(truth: list[bool]) -> None:
    rounds: list[list[int]] = []

    async def run() -> int:
        pending: list[int] = []

        async def exists(at: int) -> bool:
            if not pending:
                rounds.append(pending)
            pending.append(at)
            await asyncio.sleep(0)  # all of a round are asked before the first is answered
            if pending and rounds[-1] is pending:
                rounds[-1] = list(pending)
                pending.clear()
            return truth[at]

        return await search(len(truth), exists)

    found, asked = two_rounds(truth)
    assert asyncio.run(run()) == found
    assert len(rounds) <= 2 and [at for positions in rounds for at in positions] == asked


class Clocked(RuleBasedStateMachine):
    """KnownChunks against a list of (hash, expiry), least recently used first."""

    TTL_S = 10.0
    MOST = 5
    hashes = st.integers(0, 8).map(lambda n: bytes([n]) * 32)

    def __init__(self) -> None:
        super().__init__()
        self.known = KnownChunks(self.TTL_S, self.MOST)
        self.model: list[tuple[bytes, float]] = []
        self.now = 1000.0

    def _forget(self, chunk: bytes) -> None:
        self.model = [(other, expiry) for other, expiry in self.model if other != chunk]

    def _use(self, chunk: bytes) -> bool:
        expiry = dict(self.model).get(chunk)
        self._forget(chunk)
        if expiry is None or expiry <= self.now:
            return False
        self.model.append((chunk, expiry))
        return True

    @rule(seconds=st.sampled_from([0.0, 1.0, 5.0, 10.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(chunk=hashes)
    def add(self, chunk: bytes) -> None:
        self.known.add(chunk, self.now)
        self._forget(chunk)
        self.model = [*self.model, (chunk, self.now + self.TTL_S)][-self.MOST :]

    @rule(chunk=hashes)
    def discard(self, chunk: bytes) -> None:
        self.known.discard(chunk)
        self._forget(chunk)

    @rule(chunk=hashes)
    def has(self, chunk: bytes) -> None:
        assert self.known.has(chunk, self.now) == self._use(chunk)

    @rule(chunks=st.lists(hashes, max_size=6))
    def prefix(self, chunks: list[bytes]) -> None:
        count = 0
        while count < len(chunks) and self._use(chunks[count]):
            count += 1
        assert self.known.prefix(chunks, self.now) == count

    @rule()
    def clear(self) -> None:
        self.known.clear()
        self.model = []

    @invariant()
    def size_is_bounded(self) -> None:
        assert len(self.known) == len(self.model) <= self.MOST


TestClocked = Clocked.TestCase
TestClocked.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize(("ttl_s", "keys_max"), [(0.0, 10), (10.0, 0)])
def test_remembering_can_be_switched_off(ttl_s: float, keys_max: int) -> None:
    known = KnownChunks(ttl_s, keys_max)
    known.add(bytes(32), 5.0)
    assert not known.has(bytes(32), 5.0) and len(known) == 0


def test_seeing_a_chunk_again_makes_it_known_for_longer() -> None:
    known = KnownChunks(10.0, 10)
    known.add(b"a", 0.0)
    known.add(b"a", 8.0)
    assert known.has(b"a", 17.9) and not known.has(b"a", 18.0)


def test_using_a_chunk_does_not_make_it_known_for_longer() -> None:
    known = KnownChunks(10.0, 10)
    known.add(b"a", 0.0)
    assert known.has(b"a", 9.0) and not known.has(b"a", 10.0)
