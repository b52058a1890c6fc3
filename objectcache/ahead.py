"""Prefixes that are copied from the ring to the blocks of parked requests while others compute, layer by layer as they come. Not whether a request is parked for that: see moment.py; what is longer than the ring: see parked.py.

A request is reported once, whatever happens, and not before all copies to its blocks have ended. One that
nobody waits for, or whose bytes do not come, or not in time, does not wait for the mover: that writes to slots
alone. All of it belongs to vLLM's thread.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from objectcache.device import Copies
from objectcache.moment import BESIDE_BYTES_PER_S
from objectcache.runs import Batch, Run

# Of copying that a step may begin, however short or long the last ones were.
LEAST_S, MOST_S = 0.004, 0.05


@dataclass(frozen=True)
class Landing:
    """A request that goes on: its load is in its blocks, or none of it counts and all blocks are named.
    `chunks` of it came, and `error` is why not more."""

    job: int
    request_id: str
    chunks: int
    failed_blocks: list[int]
    error: str
    lost: bool  # its bytes did not come, and somebody waited for them
    heard: bool  # the mover has ended the job


@dataclass
class _Load:
    job: int
    request_id: str
    slots: npt.NDArray[np.int64]
    runs: list[Run]
    first: int  # of the job's chunks
    until: float  # by when all of it must be there
    batches: list[Batch] | None = None  # once they may be written
    next: int = 0  # of its parts: layer by layer, batch by batch
    under_way: int = 0  # parts that are being copied
    came: int | None = None  # of its chunks, once the mover has said so
    error: str = ""
    stopped: bool = False
    late: bool = False

    @property
    def lost(self) -> bool:
        return self.late or (self.came is not None and self.came < len(self.slots))

    @property
    def ends(self) -> bool:
        """Whether nothing more of it is to be copied."""
        return self.stopped or self.lost

    @property
    def blocks(self) -> list[int]:
        return [block for run in self.runs for block in run.block_ids]


class Ahead:
    """`progress[slot]` is how many leading layers there may be used, of `slice_bytes` of a whole chunk. A
    mover that has not ended a job `timeout_s` after it was begun here does not answer any more."""

    def __init__(
        self,
        copies: Copies,
        progress: npt.NDArray[np.int16],
        slice_bytes: Sequence[int],
        chunk_blocks: int,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._copies = copies
        self._progress = progress
        self._block_bytes = [size // chunk_blocks for size in slice_bytes]
        self._timeout_s = timeout_s
        self._clock = clock
        self._carried_at, self._step_s = clock(), 0.0
        self._credit_bytes = (
            0  # less than none after a part that was more than there was credit for
        )
        self._loads: dict[int, _Load] = {}

    def begin(self, job: int, request_id: str, runs: list[Run], first: int) -> None:
        """Copy these runs, each of a chunk of the job from chunk `first` on, there or on its way."""
        slots = np.array([run.slot for run in runs], np.int64)
        until = self._clock() + self._timeout_s
        self._loads[job] = _Load(job, request_id, slots, runs, first, until)

    def ended(self, job: int, came: int, error: str) -> bool:
        """The mover brings no more of a job: so many of its chunks came. Whether that is a load of ours."""
        load = self._loads.get(job)
        if load is None:
            return False
        load.came, load.error = max(0, min(came - load.first, len(load.slots))), error
        return True

    def stop(self, job: int) -> bool:
        """Nobody waits for it any more, or it must not count. Whether the mover still brings it."""
        load = self._loads.get(job)
        if load is None:
            return False
        load.stopped = True
        return load.came is None

    def carry(self) -> None:
        """Once a step, after its forward pass: begin copies for about as long as a step takes. That is the
        shorter one of the last two: of a long one alone the next should not be longer still."""
        now = self._clock()
        last_s, self._step_s = self._step_s, now - self._carried_at
        usual_s = min(MOST_S, max(LEAST_S, min(last_s, self._step_s)))
        self._credit_bytes = min(0, self._credit_bytes) + int(usual_s * BESIDE_BYTES_PER_S)
        self._carried_at = now
        self._collect()
        for load in self._loads.values():
            if self._credit_bytes > 0 and not load.ends:
                self._credit_bytes -= self._copy(load, self._credit_bytes)

    def over(self) -> list[Landing]:
        """Requests that vLLM may go on with. Each is named once."""
        self._collect()
        now = self._clock()
        for load in self._loads.values():
            load.late = load.late or (load.came is None and now >= load.until)
        done = [load for load in self._loads.values() if self._is_over(load)]
        for load in done:
            del self._loads[load.job]
        return [self._landing(load) for load in done]

    def _copy(self, load: _Load, most_bytes: int) -> int:
        """Begin what is there of a load, about so many bytes of it; how many it was."""
        if load.batches is None:
            load.batches = self._copies.begin_apart(load.runs)
        parts = len(load.batches) * len(self._block_bytes)
        if load.next == parts:
            return 0  # and only its last bytes are waited for
        began, ready = 0, int(self._progress[load.slots].min())
        while began < most_bytes and load.next < parts:
            layer, at = divmod(load.next, len(load.batches))
            if layer >= ready:
                break
            batch = load.batches[at]
            self._copies.submit_part(load.job, layer, batch)
            began += self._block_bytes[layer] * len(batch.block_ids)
            load.next += 1
            load.under_way += 1
        return began

    def _collect(self) -> None:
        for job in self._copies.parts_loaded():
            self._loads[job].under_way -= 1

    def _is_over(self, load: _Load) -> bool:
        if load.under_way or load.ends:
            return not load.under_way
        parts = len(load.batches or ()) * len(self._block_bytes)
        return load.came is not None and load.batches is not None and load.next == parts

    @staticmethod
    def _landing(load: _Load) -> Landing:
        failed = load.blocks if load.ends else []
        lost, heard = load.lost and not load.stopped, load.came is not None
        chunks = 0 if load.stopped else load.came or 0
        error = load.error or ("" if heard else "Unavailable") if lost else ""
        return Landing(load.job, load.request_id, chunks, failed, error, lost, heard)
