"""What to tell vLLM's scheduler about one request, and when: wait, or so many tokens. Not who fetches them: see streamer.py.

Pure: events and `now` (seconds, any monotonic clock) in, answers out. The life of a prefix:

    LOOKUP --found--> FOUND --asked--> STAGING --staged--> READY --admitted--> OVER
       \\________________\\________________\\___ timeout, nothing there, request gone ___/

    FOUND --asked, too long to stage--> OFFERED --admitted--> STREAMING --ended--> OVER
    READY --asked, to be copied ahead--> READY --admitted--> STREAMING --ended--> OVER

Tokens are promised only when their bytes lie verified in host memory, so that a promise cannot
fail: whatever goes wrong before it costs a recompute and nothing else. What host memory cannot hold
is promised as an asynchronous load: vLLM parks the request, and may be told that blocks did not come.
So is what is better copied before the step that computes on it.
"""

import enum
from dataclasses import dataclass, field

# On an H100, 8B, 4K tokens were computed in 105 ms, so these in about 26; half of S3's answers take
# longer than 27 ms, as benchmarks/s3_like.py has it from what was published.
ASKED_TOKENS = 1024
STAGE_GRACE_S = 1.0  # the worker ends staging by itself; this covers a worker that does not answer


class Phase(enum.Enum):
    LOOKUP = "lookup"
    FOUND = "found"
    STAGING = "staging"
    READY = "ready"
    OFFERED = "offered"
    STREAMING = "streaming"
    OVER = "over"


@dataclass(frozen=True)
class Stage:
    """Bring chunks [first, first + count) of the prefix into host memory."""

    first: int
    count: int


@dataclass(frozen=True)
class Answer:
    """`tokens` is None for "ask me again"; `release` says that staged chunks are no longer wanted.

    `asynchronous` says that the tokens are still to come, after the request was admitted.
    """

    tokens: int | None
    stage: Stage | None = None
    release: bool = False
    asynchronous: bool = False


@dataclass(frozen=True)
class Load:
    """Copy staged blocks [first_block, first_block + blocks) of the job to the request's own blocks: in the
    step, or ahead of it if that was promised."""

    first_block: int
    blocks: int


@dataclass(frozen=True)
class Stream:
    """Bring chunks [first, first + count) of the prefix one after the other, and copy their blocks
    [first_block, first_block + blocks), counted from the first chunk, to the request's own."""

    first: int
    count: int
    first_block: int
    blocks: int


WAIT = Answer(None)
NOTHING = Answer(0)


@dataclass
class Admission:
    """One request's way to its prefix. `loadable_tokens` is what may be claimed at all.

    What needs more than `stage_chunks` chunks is streamed; None if nothing may be, and then the
    worker stages as many as it can.
    """

    chunk_tokens: int
    block_tokens: int
    loadable_tokens: int
    lookup_deadline: float
    stage_timeout_s: float
    stage_chunks: int | None = None
    phase: Phase = Phase.LOOKUP
    timed_out: bool = False
    _found: int = 0
    _deadline: float = field(default=0.0)
    _first: int = 0
    _staged: int = 0
    _wanted: int = 0  # chunks of the job
    coming: bool = False  # claimed before all of it was there
    ahead: bool = False  # claimed for a request that vLLM parks until it is in its blocks

    def looked_up(self, chunks: int) -> None:
        """The first `chunks` chunks of the prefix exist."""
        if self.phase is Phase.LOOKUP:
            self._found = chunks
            self.phase = Phase.FOUND

    def staged(self, chunks: int) -> None:
        """The first `chunks` chunks of the job lie verified in host memory, on every rank."""
        if self.phase is Phase.STAGING or (self.phase is Phase.READY and self.coming):
            self._staged = chunks
            self.phase = Phase.READY
            self.coming = False

    def due(self) -> None:
        """The layers of the job that are not there yet will be in time. Nothing else may be claimed then."""
        if self.phase is Phase.STAGING:
            self._staged = self._wanted
            self.phase = Phase.READY
            self.coming = True

    def falls_short(self) -> None:
        """Not all of the job comes: nothing of it is claimed before it is known how much."""
        if self.phase is Phase.READY and self.coming:
            self.phase = Phase.STAGING
            self.coming = False

    def limit(self, chunks: int, local_tokens: int) -> None:
        """No more than so many chunks after these tokens are to be loaded, although more exist."""
        if self.phase is Phase.FOUND:
            first = local_tokens // self.chunk_tokens
            self._found = min(self._found, first + chunks)

    def leave(self) -> None:
        """It was not fetched, and is not worth waiting for any longer."""
        if self.may_fetch:
            self._over(timed_out=True)

    def give_up(self) -> None:
        """What is still to come of the job is not worth waiting for."""
        if self.phase is Phase.STAGING:
            self._staged = 0
            self.phase = Phase.READY

    def wanted(self, local_tokens: int) -> int:
        """Chunks after these tokens that would be fetched now."""
        end = min(self._found * self.chunk_tokens, self.loadable_tokens)
        if not self.may_fetch or end <= local_tokens:
            return 0
        return -(-end // self.chunk_tokens) - local_tokens // self.chunk_tokens

    def overdue(self, now: float) -> bool:
        """Whether it has waited long enough for another that brings the same chunk."""
        return self._deadline != 0.0 and now >= self._deadline

    @property
    def may_fetch(self) -> bool:
        """Whether it is known what there is, and nothing of it is under way. What was offered as a stream
        may be staged after all, if vLLM has more of it itself meanwhile."""
        return self.phase in (Phase.FOUND, Phase.OFFERED)

    @property
    def staging(self) -> bool:
        return self.phase is Phase.STAGING

    def ask(
        self, local_tokens: int, now: float, may_stage: bool = True, ahead: bool = False
    ) -> Answer:
        """vLLM has `local_tokens` (whole blocks) itself: how many more are there to load?

        May be asked any number of times. With `may_stage` False nothing is fetched yet, because
        another request is bringing the same chunk. With `ahead` what is staged is promised as an
        asynchronous load, too, to be copied while others compute.
        """
        if self.phase is Phase.LOOKUP:
            return self._over(timed_out=True) if now >= self.lookup_deadline else WAIT
        if self.may_fetch:
            return self._ask_found(local_tokens, now, may_stage)
        if self.phase is Phase.STAGING:
            late = now >= self._deadline + STAGE_GRACE_S
            return self._over(release=True, timed_out=True) if late else WAIT
        if self.phase is Phase.READY:
            tokens, self.ahead = self.claim(local_tokens), ahead
            if tokens == 0:
                return self._over(release=True)
            return Answer(tokens, asynchronous=ahead)
        return NOTHING

    def allocated(self, tokens: int, local_tokens: int) -> tuple[Load | Stream | None, bool]:
        """The request was admitted with `tokens` of ours after `local_tokens`.

        Returns what to do, and whether staged chunks are to be given back unused. Of a parked request
        vLLM says so once more, with no tokens.
        """
        if self.phase is Phase.STREAMING:
            assert tokens == 0, "vLLM admits more than was promised"
            return None, False
        before, self.phase = self.phase, Phase.OVER
        if tokens == 0:
            return None, before in (Phase.STAGING, Phase.READY)
        if before is Phase.OFFERED:
            end = min(self._found * self.chunk_tokens, self.loadable_tokens)
            assert tokens <= end - local_tokens, "vLLM admits more than was promised"
            self.phase = Phase.STREAMING
            first = local_tokens // self.chunk_tokens
            count = -(-(local_tokens + tokens) // self.chunk_tokens) - first
            first_block = local_tokens % self.chunk_tokens // self.block_tokens
            return Stream(first, count, first_block, tokens // self.block_tokens), False
        assert before is Phase.READY and tokens <= self._end() - local_tokens, (
            "vLLM admits more than was promised"
        )
        if self.ahead:
            self.phase = Phase.STREAMING
        first_token = self._first * self.chunk_tokens
        return (
            Load(
                (local_tokens - first_token) // self.block_tokens,
                tokens // self.block_tokens,
            ),
            False,
        )

    def ended(self) -> None:
        """What the request was parked for is there, or did not come, on every rank."""
        if self.phase is Phase.STREAMING:
            self.phase = Phase.OVER

    def gone(self) -> bool:
        """The request ended. Returns whether a job has to be given back, or a stream stopped."""
        held = self.phase in (Phase.STAGING, Phase.READY, Phase.STREAMING)
        self.phase = Phase.OVER
        return held

    def _ask_found(self, local_tokens: int, now: float, may_stage: bool) -> Answer:
        end = min(self._found * self.chunk_tokens, self.loadable_tokens)
        if end <= local_tokens:
            return self._over()
        if self._deadline == 0.0:
            self._deadline = now + self.stage_timeout_s
        if not may_stage and now < self._deadline:
            return WAIT
        self._first = local_tokens // self.chunk_tokens
        count = -(-end // self.chunk_tokens) - self._first
        if self.stage_chunks is not None and count > self.stage_chunks:
            self.phase = Phase.OFFERED
            return Answer(end - local_tokens, asynchronous=True)
        self._deadline = now + self.stage_timeout_s
        self.phase = Phase.STAGING
        self._wanted = count
        return Answer(None, Stage(self._first, count))

    def _end(self) -> int:
        """The token after the last one that is staged."""
        return self.end_of(self._staged)

    def end_of(self, chunks: int) -> int:
        """The token after the last one of the job's first `chunks` chunks."""
        return min((self._first + chunks) * self.chunk_tokens, self.loadable_tokens)

    def claim(self, local_tokens: int) -> int:
        """Tokens that continue what vLLM has; none if it lost blocks before our first chunk."""
        if local_tokens < self._first * self.chunk_tokens:
            return 0
        return max(0, self._end() - local_tokens)

    def _over(self, release: bool = False, timed_out: bool = False) -> Answer:
        self.phase = Phase.OVER
        self.timed_out = timed_out
        return Answer(0, release=release)


def asks(known_chunks: int, chunk_tokens: int, most_tokens: int) -> bool:
    """Whether to wait until the store has said what more of a prefix exists, whose first chunks are known
    to, and of which `most_tokens` could be claimed at all. It is not worth it for what is computed
    meanwhile and is a quarter at most; if it is there, that much is computed in vain, once."""
    known = known_chunks * chunk_tokens
    left = most_tokens - known
    return left > min(ASKED_TOKENS, known // 3)


def loadable(prompt_tokens: int, block_tokens: int) -> int:
    """Most tokens that may be claimed: whole blocks, and one token at least left to compute."""
    return max(0, prompt_tokens - 1) // block_tokens * block_tokens
