"""What crosses between the scheduler half and the worker half. Plain data, pickled by vLLM every step. No decisions."""

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from objectcache.ring import FAILED
from objectcache.trace import PassTimes
from objectcache.wire import Wire


@dataclass(frozen=True)
class StageCommand:
    """Bring these chunks into host memory, in this order, and report how many came. The first of them is
    chunk `first` of its prefix."""

    job: int
    chunk_hashes: list[bytes]
    first: int = 0


@dataclass(frozen=True)
class LoadCommand:
    """Copy blocks [first_block, first_block + len(block_ids)) of a staged job to these pages, then release it.

    In this step; or, with `request_id`, beside the steps to come, while vLLM keeps that request parked, and
    then report the request and the job, once."""

    job: int
    first_block: int
    block_ids: list[int]
    coming: bool = False  # its last layers may not be there yet
    request_id: str = ""


@dataclass(frozen=True)
class StreamCommand:
    """Bring these chunks one after the other past the ring to these pages, from `first_block` of the
    first chunk on, while vLLM keeps the request parked; then report the request and the job, once."""

    job: int
    request_id: str
    chunk_hashes: list[bytes]
    first_block: int
    block_ids: list[int]


@dataclass(frozen=True)
class SaveCommand:
    """Write the chunk that these pages hold after this step."""

    chunk_hash: bytes
    block_ids: list[int]


@dataclass
class StepCommands(KVConnectorMetadata):
    """Scheduler to worker, once a step."""

    namespace: tuple[str, bytes] = ("", b"")  # name and digest
    stages: list[StageCommand] = field(default_factory=list)
    releases: list[int] = field(default_factory=list)
    loads: list[LoadCommand] = field(default_factory=list)
    streams: list[StreamCommand] = field(default_factory=list)
    stops: list[int] = field(
        default_factory=list
    )  # jobs of parked requests that nobody waits for; none of it counts
    saves: list[SaveCommand] = field(default_factory=list)
    step: int = 0


@dataclass(frozen=True)
class Staged:
    """`chunks` leading chunks of the job are verified in host memory; `error` is why not more, or ""."""

    job: int
    chunks: int
    error: str = ""


@dataclass(frozen=True)
class Coming:
    """So far the job's chunks, `chunks` of them, have `layers` layers verified, all of them together; and
    each the first `ready`, which is below 0 until each has its header, or if one does not come."""

    job: int
    chunks: int
    ready: int
    layers: int

    @property
    def failed(self) -> bool:
        """Whether it is known that some chunk does not come."""
        return self.ready == FAILED


@dataclass(frozen=True)
class Landed:
    """A load that began before all of its bytes were there has ended; `lost` if they did not come."""

    job: int
    lost: bool


@dataclass(frozen=True)
class Streamed:
    """`chunks` leading chunks of what a parked request waited for are in their pages; `error` is why not
    more, or ""."""

    job: int
    chunks: int
    error: str = ""


@dataclass(frozen=True)
class Saved:
    """`outcome` is "written", "existed", "dropped" (no room) or "failed"."""

    chunk_hash: bytes
    outcome: str


@dataclass
class StepReport(KVConnectorWorkerMetadata):
    """Worker to scheduler, after a step. Reports of several ranks are joined; the scheduler counts."""

    staged: list[Staged] = field(default_factory=list)
    saved: list[Saved] = field(default_factory=list)
    streamed: list[Streamed] = field(default_factory=list)
    coming: list[Coming] = field(default_factory=list)
    landed: list[Landed] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)  # jobs of which some rank lacks bytes, at once
    steps: list[tuple[int, bool]] = field(default_factory=list)  # of each rank: which, did it wait
    # Of each rank, and each step that loads: when it could first use a layer, by its host's monotonic clock.
    needed: list[tuple[int, float]] = field(default_factory=list)
    wires: list[tuple[int, Wire]] = field(default_factory=list)  # by shard; only what is new
    passes: list[PassTimes] = field(default_factory=list)  # of those with loads, if they are traced

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "StepReport":
        assert isinstance(other, StepReport)
        return StepReport(
            self.staged + other.staged,
            self.saved + other.saved,
            self.streamed + other.streamed,
            self.coming + other.coming,
            self.landed + other.landed,
            self.lost + other.lost,
            self.steps + other.steps,
            self.needed + other.needed,
            self.wires + other.wires,
            passes=self.passes + other.passes,
        )


@dataclass
class WorkerPlace(KVConnectorHandshakeMetadata):
    """What only a worker knows, told once after its KV cache exists.

    `facts` go into the namespace; `shard` of `shards` is the part of each chunk that it holds;
    `stage_chunks` is the most that one job can stage; `slice_bytes` is the size of each layer of a
    chunk; `error` is why it cannot take part, or "".
    """

    facts: dict[str, Any]
    shard: int
    shards: int
    stage_chunks: int = 0
    slice_bytes: tuple[int, ...] = ()
    error: str = ""
