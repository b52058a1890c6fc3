"""Requests that vLLM has parked while their prefix streams into their blocks: what is copied where, what failed, and who is reported when. Not the reading: see through.py.

Each is reported once, whatever happens, and not before all copies to its blocks have ended: then vLLM
may give the blocks to others. Blocks that did not come are named in the same step, and vLLM computes
from the first of them on. All of it belongs to vLLM's thread.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from objectcache.device import Copies
from objectcache.messages import StreamCommand
from objectcache.mover import Arrived, Mover
from objectcache.runs import Run
from objectcache.through import StreamResult

# To submit a chunk costs the step about 1 ms on a GPU, and the copy itself on a CPU.
CHUNKS_PER_STEP = 16


@dataclass(frozen=True)
class Unparked:
    """A request that goes on: of its stream the first `chunks` chunks are in their blocks.

    `stopped` is whether nobody waited for it any more.
    """

    request_id: str
    chunks: int
    failed_blocks: list[int]
    result: StreamResult
    stopped: bool


@dataclass
class _Stream:
    command: StreamCommand
    blocks: list[tuple[int, list[int]]]  # of each chunk: the first block in it, and page numbers
    settled: int = 0  # chunks copied, or not to be copied
    stopped: bool = False
    result: StreamResult | None = None


class Parked:
    """`chunk_blocks` is how many blocks a chunk has."""

    def __init__(self, copies: Copies, mover: Mover, chunk_blocks: int) -> None:
        self._copies = copies
        self._mover = mover
        self._chunk_blocks = chunk_blocks
        self._streams: dict[int, _Stream] = {}
        self._arrived: deque[Arrived] = deque()

    def begin(self, command: StreamCommand) -> None:
        """Start a stream."""
        blocks = split(command.block_ids, command.first_block, self._chunk_blocks)
        assert len(blocks) == len(command.chunk_hashes)
        self._streams[command.job] = _Stream(command, blocks)
        self._mover.stream(command.job, command.chunk_hashes)

    def stop(self, job: int) -> None:
        """Nobody waits for this stream any more, or it must not count. It may have been reported."""
        stream = self._streams.get(job)
        if stream is not None:
            stream.stopped = True
            self._mover.stop(job)

    def heard(self, event: Arrived | StreamResult) -> None:
        """What the mover said of a stream."""
        if isinstance(event, Arrived):
            self._arrived.append(event)
        else:
            self._streams[event.job].result = event

    def carry(self) -> None:
        """Once a step, after its forward pass: copy what came, give back what is copied."""
        self._collect()
        for _ in range(min(len(self._arrived), CHUNKS_PER_STEP)):
            chunk = self._arrived.popleft()
            stream = self._streams[chunk.job]
            if stream.stopped:
                self._settle(chunk.job, chunk.chunk)
            else:
                run = Run(chunk.slot, *stream.blocks[chunk.chunk])
                self._copies.submit_chunk((chunk.job, chunk.chunk), run)
        self._collect()

    def ended(self) -> list[Unparked]:
        """Requests that vLLM may go on with. Each is named once."""
        ready = [
            (job, stream.result)
            for job, stream in self._streams.items()
            if stream.result is not None and stream.settled == stream.result.came
        ]
        return [self._unpark(self._streams.pop(job), result) for job, result in ready]

    def _collect(self) -> None:
        for job, chunk in self._copies.chunks_loaded():
            self._settle(job, chunk)

    def _settle(self, job: int, chunk: int) -> None:
        stream = self._streams[job]
        stream.settled += 1
        self._mover.give_back(job, chunk)

    @staticmethod
    def _unpark(stream: _Stream, result: StreamResult) -> Unparked:
        chunks = 0 if stream.stopped else result.came
        failed = [block for _, ids in stream.blocks[chunks:] for block in ids]
        return Unparked(stream.command.request_id, chunks, failed, result, stream.stopped)


def split(
    block_ids: Sequence[int], first_block: int, chunk_blocks: int
) -> list[tuple[int, list[int]]]:
    """Page numbers chunk by chunk, as (first block in the chunk, page numbers), the first chunk from
    `first_block` on."""
    chunks, taken = [], 0
    while taken < len(block_ids):
        at = (first_block + taken) % chunk_blocks
        ids = list(block_ids[taken : taken + chunk_blocks - at])
        chunks.append((at, ids))
        taken += len(ids)
    return chunks
