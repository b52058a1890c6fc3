"""Whose waiting request goes next: reads of one job stand in line together. Not how many may go: see stores/gate.py; nor by which rule: see sharing.py.

Pure. Of jobs that wait the one with the fewest bytes left goes first, but a request that has waited
PATIENCE_S goes before all that came later. Within a job requests go in the order in which they came, which is that
of its plan. What several jobs want goes with the best of them. Requests of no job, uploads among
them, go last, and not later than others that came as long ago.
"""

import math
from collections import deque
from dataclasses import dataclass

PATIENCE_S = 2.5  # a quarter of the usual limit for a prefix
_LAST = 1 << 62


class Turn:
    """A job: when it came, and how many bytes of what it wants have not landed."""

    def __init__(self, came_s: float, left_bytes: int) -> None:
        self.came_s = came_s
        self.left_bytes = left_bytes

    def end(self) -> None:
        """It wants nothing any more."""
        self.left_bytes = _LAST
        self.came_s = math.inf


class Turns:
    """The jobs that want one object, of which `left_bytes` have not landed. Others may join at any time."""

    def __init__(self, first: Turn, left_bytes: int) -> None:
        self.jobs = [first]
        self.left_bytes = left_bytes
        self._waiting: list[_Waiting] = []

    def join(self, job: Turn) -> None:
        self.jobs.append(job)
        for one in self._waiting:
            one.line.join(one, job)

    def landed(self, count: int) -> None:
        self.left_bytes -= count
        for job in self.jobs:
            job.left_bytes -= count

    def waits(self, one: "_Waiting") -> None:
        self._waiting.append(one)

    def waits_no_more(self, one: "_Waiting") -> None:
        self._waiting.remove(one)


@dataclass(eq=False)
class _Waiting:
    line: "Line"
    number: int
    came_s: float
    turns: Turns | None
    gone: bool = False


class Line:
    """Requests that wait, each with the number by which it is known; numbers rise."""

    def __init__(self) -> None:
        self._alone: deque[_Waiting] = deque()
        self._of: dict[Turn, deque[_Waiting]] = {}
        self._known: dict[int, _Waiting] = {}

    def __len__(self) -> int:
        return len(self._known)

    @property
    def oldest(self) -> int:
        """The number of who came first. There must be one."""
        return next(iter(self._known))

    def add(self, number: int, now: float, turns: Turns | None = None) -> None:
        one = self._known[number] = _Waiting(self, number, now, turns)
        if turns is None:
            self._alone.append(one)
            return
        turns.waits(one)
        for job in turns.jobs:
            self.join(one, job)

    def join(self, one: _Waiting, job: Turn) -> None:
        """One job more wants what waits there."""
        self._of.setdefault(job, deque()).append(one)

    def remove(self, number: int) -> None:
        """It waits no more; nothing happens if it does not."""
        one = self._known.pop(number, None)
        if one is not None:
            one.gone = True
            if one.turns is not None:
                one.turns.waits_no_more(one)

    def take(self, now: float) -> int:
        """Whose turn it is; it waits no more. There must be one."""
        best = _first(self._alone)
        rank = _rank(best.came_s, _LAST, now) if best is not None else None
        for job in list(self._of):
            first = _first(self._of[job])
            if first is None:
                del self._of[job]
                continue
            # A stream asks for more as long as it lives: its age alone gives it no right.
            its = _rank(max(job.came_s, first.came_s), job.left_bytes, now)
            if rank is None or its < rank:
                best, rank = first, its
        assert best is not None
        self.remove(best.number)
        return best.number


def _rank(came_s: float, left_bytes: int, now: float) -> tuple[int, float]:
    """The least goes first. As sharing.line says, for as many jobs as there are chunks."""
    return (0, came_s) if now - came_s >= PATIENCE_S else (1, left_bytes)


def _first(waiting: deque[_Waiting]) -> _Waiting | None:
    while waiting and waiting[0].gone:
        waiting.popleft()
    return waiting[0] if waiting else None
