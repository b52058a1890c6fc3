"""A store as an event simulation in virtual time, the reference model for flow.py and plan.py. No tests here.

A request waits for a free server, then for its first byte (lognormal), then shares the wire equally
with all bodies under way, none faster than one connection can be.
"""

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from objectcache.flow import Flow


class Timeline:
    """Calls functions at their times."""

    def __init__(self) -> None:
        self.now = 0.0
        self._calls: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def at(self, time: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._calls, (time, next(self._numbers), call))

    def run(self, until: float = math.inf) -> None:
        while self._calls and self._calls[0][0] <= until:
            self.now, _, call = heapq.heappop(self._calls)
            call()
        if until < math.inf:
            self.now = until


class Wire:
    """Bodies share it equally. All have had the same service since any moment, so that the order in
    which marks are passed is known when a body starts."""

    def __init__(self, line: Timeline, connection_bytes_per_s: float, bytes_per_s: float) -> None:
        self._line = line
        self._connection_bytes_per_s = connection_bytes_per_s
        self._bytes_per_s = bytes_per_s
        self._served = 0.0  # bytes of a body that was always there
        self._served_at = 0.0
        self._bodies = 0
        self._marks: list[tuple[float, int, bool, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._version = 0

    def change(self, connection_bytes_per_s: float, bytes_per_s: float) -> None:
        self._advance()
        self._connection_bytes_per_s = connection_bytes_per_s
        self._bytes_per_s = bytes_per_s
        self._schedule()

    def send(self, marks: Sequence[tuple[float, Callable[[], None]]]) -> None:
        """A body; each call is made when so many bytes of it have passed. The last mark is its end."""
        self._advance()
        self._bodies += 1
        for i, (size, call) in enumerate(marks):
            mark = (self._served + size, next(self._numbers), i == len(marks) - 1, call)
            heapq.heappush(self._marks, mark)
        self._schedule()

    def _rate(self) -> float:
        return min(self._connection_bytes_per_s, self._bytes_per_s / max(1, self._bodies))

    def _advance(self) -> None:
        self._served += self._rate() * (self._line.now - self._served_at) if self._bodies else 0.0
        self._served_at = self._line.now

    def _schedule(self) -> None:
        self._version += 1
        version = self._version
        if self._marks:
            wait_s = max(0.0, self._marks[0][0] - self._served) / self._rate()
            self._line.at(self._line.now + wait_s, lambda: self._pass(version))

    def _pass(self, version: int) -> None:
        if version != self._version:
            return
        self._advance()
        at, _, last, call = heapq.heappop(self._marks)
        self._served = max(self._served, at)
        self._bodies -= last
        self._schedule()
        call()


class SimulatedStore:
    def __init__(
        self,
        line: Timeline,
        *,
        connection_bytes_per_s: float = 80e6,
        wire_bytes_per_s: float = math.inf,
        first_byte_s: float = 0.03,
        first_byte_p99_s: float = 0.2,
        servers: int = 1 << 30,
        requests_per_s: float = math.inf,
        seed: int = 0,
    ) -> None:
        self.line = line
        self.wire = Wire(line, connection_bytes_per_s, wire_bytes_per_s)
        self._first_byte_s = first_byte_s
        self._sigma = math.log(first_byte_p99_s / first_byte_s) / 2.326
        self._servers = self._idle = servers
        self._waiting: deque[Callable[[], None]] = deque()
        self._requests_per_s = requests_per_s
        self._tokens, self._tokens_at = min(requests_per_s / 2, 1e9), 0.0
        self.random = random.Random(seed)
        self.refused = 0

    def serve_with(self, servers: int) -> None:
        """From now on as many requests are served at once."""
        self._idle += servers - self._servers
        self._servers = servers

    def get(
        self,
        marks: Sequence[tuple[float, Callable[[], None]]],
        first_byte: Callable[[], None] = lambda: None,
    ) -> bool:
        """Begin a request. False: refused, and nothing will be called."""
        self._tokens += (self.line.now - self._tokens_at) * min(self._requests_per_s, 1e9)
        self._tokens = min(self._tokens, self._requests_per_s / 2, 1e9)
        self._tokens_at = self.line.now
        if self._tokens < 1:
            self.refused += 1
            return False
        self._tokens -= 1

        def serve() -> None:
            wait_s = self._first_byte_s * math.exp(self._sigma * self.random.gauss(0, 1))
            self.line.at(self.line.now + wait_s, send)

        def send() -> None:
            first_byte()
            *before, (size, last) = marks
            self.wire.send([*before, (size, lambda: end(last))])

        def end(last: Callable[[], None]) -> None:
            self._idle += 1
            if self._waiting and self._idle > 0:
                self._idle -= 1
                self._waiting.popleft()()
            last()

        if self._idle > 0:
            self._idle -= 1
            serve()
        else:
            self._waiting.append(serve)
        return True


class Client:
    """Reads bodies, as many at once as its flow says, for as long as there are any to read."""

    def __init__(self, store: SimulatedStore, flow: Flow, body_bytes: int = 32 << 20) -> None:
        self.store, self.flow, self.body_bytes = store, flow, body_bytes
        self.line = store.line
        self.wanted: float = 0
        self.in_flight = 0
        self.asked = 0
        self.rounds = 0.0  # a body is one part in `limit` of a round
        self.came: list[tuple[float, float, int]] = []  # when, in which round, bytes

    def read(self, bodies: float) -> None:
        self.wanted += bodies
        self._pump()

    def _pump(self) -> None:
        while self.wanted > 0 and self.in_flight < self.flow.limit(self.line.now):
            self.wanted -= 1
            self.in_flight += 1
            self.flow.began(self.line.now)
            self._ask(1)

    def _ask(self, attempt: int) -> None:
        began = self.line.now
        first_byte_at = [began]
        self.asked += 1

        def first() -> None:
            first_byte_at[0] = self.line.now

        def end() -> None:
            now = self.line.now
            self.rounds += 1 / self.flow.limit(now)
            self.came.append((now, self.rounds, self.body_bytes))
            self.flow.arrived(now, self.body_bytes, first_byte_at[0] - began, now - began)
            self.flow.ended(now)
            self.in_flight -= 1
            self._pump()

        def refused() -> None:
            self.flow.throttled(self.line.now)
            pause_s = self.store.random.random() * 0.25 * 2.0 ** min(attempt - 1, 2)
            self.line.at(self.line.now + pause_s, lambda: self._ask(attempt + 1))

        if not self.store.get([(self.body_bytes, end)], first):
            self.line.at(self.line.now + 0.01, refused)

    def goodput(self, from_s: float) -> float:
        """Bytes a second from then on."""
        return sum(size for at, _, size in self.came if at > from_s) / (self.line.now - from_s)

    def after_rounds(self, rounds: float) -> float:
        return next(at for at, passed, _ in self.came if passed >= rounds)


def client(flow: Flow, body_bytes: int = 32 << 20, **store: Any) -> Client:
    return Client(SimulatedStore(Timeline(), **store), flow, body_bytes)


def fetch_all(
    store: SimulatedStore, fetches: Iterable[Sequence[tuple[int, int]]], connections: int
) -> dict[int, float]:
    """Run fetches in order. Each is its marks: (bytes so far, label). When each label was last met."""
    line, met = store.line, dict[int, float]()
    left = iter(fetches)

    def mark(label: int) -> None:
        met[label] = line.now

    def begin() -> None:
        fetch = next(left, None)
        if fetch is None:
            return

        def end() -> None:
            mark(fetch[-1][1])
            begin()

        marks = [(size, lambda label=label: mark(label)) for size, label in fetch[:-1]]
        assert store.get([*marks, (fetch[-1][0], end)])

    for _ in range(connections):
        begin()
    line.run()
    return met
