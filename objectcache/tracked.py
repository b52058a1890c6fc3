"""What the scheduler half knows of one live request, of a stream and of a save. Plain records. What is decided from them: see admission.py, choosing.py, turns.py."""

import math
from dataclasses import dataclass, field
from typing import Any

from objectcache.admission import Admission, Phase
from objectcache.choosing import Other
from objectcache.keys import ChunkChain
from objectcache.moment import STAGED
from objectcache.worth import Choice


@dataclass
class Tracked:
    """One live request that may use the store."""

    request: Any
    chain: ChunkChain
    arrived_s: float = 0.0
    deadline_s: float = math.inf  # for its first token
    mode: str = STAGED  # when it is admitted
    saves: bool = True  # what it computes
    may_load: bool = True
    admission: Admission | None = None
    admitted: bool = False
    admission_number: int = 0
    misled: bool = False  # it computed on bytes that did not come: nothing of it is saved
    local_tokens: int = 0  # what vLLM had itself when it asked last
    asked_s: float = 0.0  # and when that was
    found: int = 0  # chunks that the store was found to have
    looked_at: float = 0.0
    chosen: bool = False  # how many of them to load
    wanted: tuple[int, int] | None = (
        None  # at which news, and behind which tokens, it stood in line
    )
    choice: Choice | None = None
    ahead: bool = False  # it was let go to be copied while others compute
    job: int | None = None
    job_hashes: list[bytes] = field(default_factory=list)
    job_first: int = 0  # chunk of the prefix
    began_s: float = 0.0
    next_look_s: float = 0.0  # at what still comes of the job
    next_moment_s: float = 0.0  # at when it may be admitted
    save_from: int = 0  # chunks before this one are in the store, or on their way

    @property
    def other(self) -> Other:
        """What it is to others that want the wire or the GPU."""
        phase = self.admission.phase if self.admission is not None else Phase.OVER
        computed = self.request.num_computed_tokens if self.admitted else self.local_tokens
        waits = not self.admitted and phase is not Phase.OVER
        return Other(self.request.num_tokens, computed, self.admitted, waits)

    def own_blocks(self, block_tokens: int) -> int:
        """Blocks on the GPU that only it has, about: those after what vLLM had itself."""
        computed: int = self.request.num_computed_tokens
        return max(0, -(-computed // block_tokens) - self.local_tokens // block_tokens)

    def extended(self, chunk_tokens: int) -> int:
        """Bring the chain up to the request's tokens; how many whole chunks it has."""
        whole = self.request.num_tokens // chunk_tokens
        if whole > len(self.chain.hashes):
            tokens = self.request.all_token_ids[self.chain.tokens : whole * chunk_tokens]
            self.chain.extend(tokens)
        return len(self.chain.hashes)


@dataclass
class Streaming:
    """A prefix on its way into the blocks of a parked request, from the store or from host memory; each rank
    reports it once."""

    tracked: Tracked
    chunk_hashes: list[bytes]
    tokens: range  # of the prompt
    stopped: bool = False
    reports: list[tuple[int, str]] = field(default_factory=list)


@dataclass
class Saving:
    """A chunk on its way out: whose it is, where in its prefix, and what the shards said so far."""

    tracked: Tracked
    chunk: int
    outcomes: list[str] = field(default_factory=list)
