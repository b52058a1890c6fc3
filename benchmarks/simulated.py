"""A model of S3, of a machine's wire and of time, for simulate.py. No decisions: those are the package's own.

A request may be refused (so many a second below one prefix), waits for its first byte (lognormal, a
few much longer) and then has its equal share of the machine's wire, at most what one connection gives.
"""

import heapq
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

Call = Callable[[], None]
BURST_S = 0.5  # of requests that a prefix takes at once


class Timeline:
    """Calls functions at their times, in seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self._calls: list[tuple[float, int, Call]] = []
        self._numbers = itertools.count()

    def at(self, time: float, call: Call) -> None:
        heapq.heappush(self._calls, (max(time, self.now), next(self._numbers), call))

    def run(self, until: float = math.inf) -> None:
        while self._calls and self._calls[0][0] <= until:
            self.now, _, call = heapq.heappop(self._calls)
            call()


class Wire:
    """One machine's. Bodies under way have had the same service since any moment, so a body's bytes
    are the service since it began."""

    def __init__(self, line: Timeline, bytes_per_s: float, connection_bytes_per_s: float) -> None:
        self._line = line
        self._bytes_per_s, self._connection_bytes_per_s = bytes_per_s, connection_bytes_per_s
        self._served, self._at = 0.0, 0.0
        self.bodies = 0
        self._marks: list[tuple[float, int, Call]] = []
        self._numbers = itertools.count()
        self._next: tuple[float, Call] | None = None

    @property
    def served(self) -> float:
        """Bytes of a body that was always there."""
        return self._served + self._rate() * (self._line.now - self._at)

    def begin(self) -> float:
        """A body begins; returns the service from which its bytes count."""
        self._advance()
        self.bodies += 1
        self._schedule()
        return self._served

    def end(self) -> None:
        self._advance()
        self.bodies -= 1
        self._schedule()

    def when(self, served: float, call: Call) -> None:
        """Call when the service is so far. There must be a body under way until then."""
        heapq.heappush(self._marks, (served, next(self._numbers), call))
        self._advance()
        self._schedule()

    def _rate(self) -> float:
        if not self.bodies:
            return 0.0
        return min(self._connection_bytes_per_s, self._bytes_per_s / self.bodies)

    def _advance(self) -> None:
        self._served, self._at = self.served, self._line.now

    def _schedule(self) -> None:
        if not self._marks or not self.bodies:
            self._next = None
            return
        at = self._line.now + max(0.0, self._marks[0][0] - self._served) / self._rate()

        def reach() -> None:
            if self._next is not None and self._next[1] is reach:
                self._next = None
                self._reach()

        self._next = (at, reach)
        self._line.at(at, reach)

    def _reach(self) -> None:
        """All marks at this point: the end of the last body leaves none behind."""
        self._advance()
        self._served = max(self._served, self._marks[0][0])
        calls = []
        while self._marks and self._marks[0][0] <= self._served:
            calls.append(heapq.heappop(self._marks)[2])
        self._schedule()
        for call in calls:
            call()


@dataclass(frozen=True)
class S3Law:
    """What S3 gives in its region, as published; see the report for the sources."""

    first_byte_s: float = 0.027
    first_byte_p99_s: float = 0.114
    connection_bytes_per_s: float = 85e6
    requests_per_s: float = 5500.0  # below one prefix
    prefixes: int = 1
    tail: float = 0.001  # of first bytes, that take TAIL_FACTOR times as long
    tail_factor: float = 10.0


class S3:
    """The bucket that all machines share."""

    def __init__(self, line: Timeline, law: S3Law, seed: int) -> None:
        self._line, self._law = line, law
        self._random = random.Random(seed)
        self._sigma = math.log(law.first_byte_p99_s / law.first_byte_s) / 2.3263
        self._tokens = [law.requests_per_s * BURST_S] * law.prefixes
        self._tokens_at = [0.0] * law.prefixes
        self.requests = self.refused = 0
        self.each_second: dict[int, int] = {}  # requests by second, refused ones too

    def get(self, first_byte: Call) -> bool:
        """A request: False if it is refused, else `first_byte` is called when it comes."""
        now, law = self._line.now, self._law
        self.requests += 1
        self.each_second[int(now)] = self.each_second.get(int(now), 0) + 1
        prefix = self._random.randrange(law.prefixes)
        passed_s = now - self._tokens_at[prefix]
        most = law.requests_per_s * BURST_S
        self._tokens[prefix] = min(most, self._tokens[prefix] + passed_s * law.requests_per_s)
        self._tokens_at[prefix] = now
        if self._tokens[prefix] < 1.0:
            self.refused += 1
            return False
        self._tokens[prefix] -= 1.0
        wait_s = law.first_byte_s * math.exp(self._sigma * self._random.gauss(0, 1))
        if self._random.random() < law.tail:
            wait_s *= law.tail_factor
        self._line.at(now + wait_s, first_byte)
        return True
