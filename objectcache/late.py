"""Bytes that a step needs and that are still on their way: how far they are, and a wait for them that ends. Not when a request may be admitted so early: see moment.py.

What does not come is counted as lost, and named: the request that needs it must fail, since its tokens would
be wrong. All others in the batch go on.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from objectcache.ring import FAILED

POLL_S = 50e-6


@dataclass
class Coming:
    """A load that began before all of its chunks were there. `blocks[k]` are the page numbers of chunk k."""

    job: int
    slots: npt.NDArray[np.int64]
    blocks: Sequence[Sequence[int]]
    first: int = 0  # of the job's chunks
    came: int | None = None  # chunks in all, once the mover has said so
    copied: bool = False
    lost: bool = False


class Late:
    """`progress[slot]` is how many leading layers there may be used; `hear` takes the mover's news.

    All of it belongs to vLLM's thread.
    """

    def __init__(
        self,
        progress: npt.NDArray[np.int16],
        layers: int,
        timeout_s: float,
        hear: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._progress = progress
        self._layers = layers
        self._timeout_s = timeout_s
        self._hear = hear
        self._clock, self._sleep = clock, sleep
        self._loads: dict[int, Coming] = {}
        self._until = 0.0
        self.failed_blocks: set[int] = set()
        self.lost_jobs: list[int] = []  # since somebody took them
        self.waits = 0  # layers that a step waited for
        self.lost = 0  # loads given up
        self.waited = False  # since somebody set this

    def begin(self, load: Coming) -> None:
        """A step computes on this load's pages from now on."""
        self._loads[load.job] = load
        self._until = self._clock() + self._timeout_s

    def ended(self, job: int, came: int) -> bool:
        """The mover brings no more of a job: so many of its chunks came. Whether that is a load of ours."""
        load = self._loads.get(job)
        if load is None:
            return False
        load.came = max(0, came - load.first)
        return True

    def copied(self, job: int) -> bool:
        """All pages of a job are written. Whether that is a load of ours."""
        load = self._loads.get(job)
        if load is None:
            return False
        load.copied = True
        return True

    def over(self) -> list[Coming]:
        """Loads whose slots nobody uses any more. Each is named once."""
        done = [load for load in self._loads.values() if load.copied and load.came is not None]
        for load in done:
            del self._loads[load.job]
        return done

    def jobs(self) -> list[int]:
        return list(self._loads)

    # ---- during a step

    def layers_ready(self) -> int:
        """Leading layers of all loads that may be copied now; what is lost holds up nothing."""
        ready = self._layers
        for load in self._loads.values():
            if not load.copied and not load.lost:
                ready = min(ready, int(self._progress[load.slots].min(initial=self._layers)))
        return max(0, ready)

    def wait(self, layer: int) -> None:
        """Until layer `layer` is there in all loads, or they are given up."""
        if self.layers_ready() > layer:
            return
        self.waits += 1
        self.waited = True
        while self.layers_ready() <= layer:
            self._hear()
            self._give_up(layer, late=self._clock() >= self._until)
            self._sleep(POLL_S)

    def _give_up(self, layer: int, late: bool) -> None:
        for load in self._loads.values():
            if load.copied or load.lost:
                continue
            missing = self._progress[load.slots] <= layer
            ended = load.came is not None and missing[load.came :].any()
            failed = (self._progress[load.slots] == FAILED).any()
            if missing.any() and (late or ended or failed):
                load.lost = True
                self.lost += 1
                self.lost_jobs.append(load.job)
                self.failed_blocks.update(page for pages in load.blocks for page in pages)
