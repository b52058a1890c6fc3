"""How fast a connection to one store is beside how many others, and what that tells of the wire. Not how many are best: see flow.py.

Pure: events and `now` (seconds, any monotonic clock) in. From idle to idle, or for so many bodies, is a
window. If w is the rate of the wire and c that of a connection which has it for itself, then beside n - 1
others a byte takes about 1/c + n/w: a line over n, through what was seen of few and of many. If connections
are as fast among many as among few there is no telling how wide the wire is. What was not seen again for
FORGOTTEN windows is forgotten: then parts are asked for anew where they may be better, which shows it.
"""

import math
from dataclasses import dataclass

WINDOW_BODIES = 64  # most in a window
LEAST_BODIES = 3  # of a window that says something
TELLING_BYTES = 256 << 10  # of smaller bodies, the rate is that of a buffer
APART = 1.5  # times as many connections: with fewer, noise looks like a slope
SHARES = 0.3  # of a byte's time among the most: with less it may be chance that they are slower
FULL = 0.75  # of the wire: who had that together may each be faster alone,
FASTER = 2.0  # but not so many times, for all that is known
LIKE = 16  # bodies that weigh as much as all that was seen before
FORGOTTEN = 64  # windows


@dataclass
class _Window:
    began_s: float
    first_s: float = math.inf  # when the first of its bodies began to flow
    last_s: float = -math.inf  # and when the last had come
    bodies: int = 0
    body_bytes: float = 0.0
    flowing_s: float = 0.0  # of the bodies, one after the other


@dataclass
class _Seen:
    """Of about so many connections at once: the rate of each."""

    connections: float
    bytes_per_s: float
    window: int  # in which it was seen last


class Curve:
    """`began` and `ended` frame each request with a body; `arrived` comes before its `ended`."""

    def __init__(self) -> None:
        self._in_flight = 0
        self._window = _Window(0.0)
        self.windows = 0  # that said something
        self._seen: dict[int, _Seen] = {}  # by the logarithm of how many

    def began(self, now: float) -> None:
        if not self._in_flight:
            self._window = _Window(now)
        self._in_flight += 1

    def arrived(self, now: float, body_bytes: int, flowing_s: float) -> None:
        """A body has come, `flowing_s` after its first byte."""
        window = self._window
        if body_bytes < TELLING_BYTES or flowing_s <= 0.0:
            return
        share = min(1.0, (now - window.began_s) / flowing_s)  # of it came in this window
        window.first_s = min(window.first_s, now - share * flowing_s)
        window.last_s = now
        window.bodies += 1
        window.body_bytes += share * body_bytes
        window.flowing_s += share * flowing_s

    def ended(self, now: float) -> None:
        self._in_flight -= 1
        if not self._in_flight or self._window.bodies >= WINDOW_BODIES:
            self._learn()
            self._window = _Window(now)

    @property
    def connection_bytes_per_s(self) -> float:
        """What one has if it shares nothing; 0.0 if nothing was seen."""
        if not self._seen:
            return 0.0
        best = max(self._seen.values(), key=lambda seen: seen.bytes_per_s)
        wire = self.wire_bytes_per_s
        if wire is None or best.connections * best.bytes_per_s < FULL * wire:
            return best.bytes_per_s
        alone_s, _ = self._line()  # even so few shared it
        return min(1 / alone_s if alone_s else math.inf, FASTER * best.bytes_per_s)

    @property
    def wire_bytes_per_s(self) -> float | None:
        """What all connections can have together; None if there is no telling."""
        counts = [seen.connections for seen in self._seen.values()]
        if not counts or max(counts) < APART * min(counts):
            return None
        alone_s, shared_s = self._line()
        if shared_s * max(counts) < SHARES * (alone_s + shared_s * max(counts)):
            return None
        return max(seen.connections * seen.bytes_per_s for seen in self._seen.values())

    def _line(self) -> tuple[float, float]:
        """Seconds that a byte of a connection takes: alone, and more with each connection. The line of
        least squares through what was seen; level, if it would fall."""
        points = [(seen.connections, 1 / seen.bytes_per_s) for seen in self._seen.values()]
        mean_n, mean_s = (sum(part) / len(points) for part in zip(*points, strict=True))
        spread = sum((n - mean_n) ** 2 for n, _ in points)
        slope = sum((n - mean_n) * (s - mean_s) for n, s in points) / spread if spread else 0.0
        slope = max(0.0, slope)
        return max(0.0, mean_s - slope * mean_n), slope

    def _learn(self) -> None:
        window = self._window
        lasted_s = window.last_s - window.first_s
        if window.bodies < LEAST_BODIES or lasted_s <= 0.0 or window.flowing_s <= 0.0:
            return
        self.windows += 1
        oldest = self.windows - FORGOTTEN
        self._seen = {one: seen for one, seen in self._seen.items() if seen.window > oldest}
        connections = max(1.0, window.flowing_s / lasted_s)
        rate = window.body_bytes / window.flowing_s
        new = _Seen(connections, rate, self.windows)
        before = self._seen.setdefault(round(math.log2(connections)), new)
        weight = window.bodies / (window.bodies + LIKE)
        before.connections += (connections - before.connections) * weight
        before.bytes_per_s += (rate - before.bytes_per_s) * weight
        before.window = self.windows
