"""When a request whose answer is late is asked a second time, and which of two answers counts. Not how requests are sent: see stores/hedged.py.

Pure. A store answers most requests soon and some late, and a prefix is there only when its last chunk
is. A request is late when it has no first byte after the time in which nearly all first requests had
theirs. It is then asked once more, and whichever answer comes first gets the memory. What that costs
is bounded: of all requests only a share is asked twice, the same share that is late by this measure.
If many are late at once it is the store or the wire that is slow, and more requests would make it worse.

A body that falls silent is late as well: its rest is asked for anew, within the same share.
"""

import threading
from collections import deque

FLOOR_S = 0.01  # sooner than this a second request, on a new connection perhaps, brings nothing
TIMES_USUAL = 2.0  # of the median: else the second answer would mostly come after the first
SAMPLES = 512  # first bytes remembered
REFRESH = 16  # first bytes between two looks at all of them
LEAST_SEEN = 32  # first bytes to know anything by, and
LEAST_LATE = 2  # so many of them beyond the quantile
RECENT = 32  # requests by which it is seen whether all are late
MANY_LATE = 1 / 4  # of those
BURST = 32.0  # most second requests that may be saved up: those of a wave of several hundred
STALL_S = 1.0  # no silence is shorter: a lost packet alone can cost some hundred milliseconds
STALL_TIMES = 8.0  # what the slowest bodies took for as many bytes


class Hedging:
    """For one store. `percent` of the first requests may have a second one; 0: none."""

    def __init__(self, percent: int) -> None:
        self._share = percent / 100
        self._budget = 0.0
        self._first_bytes_s: deque[float] = deque(maxlen=SAMPLES)
        self._s_per_byte: deque[float] = deque(maxlen=SAMPLES)
        self._recent: deque[bool] = deque(maxlen=RECENT)
        self._late_s: float | None = None
        self._slowest_s_per_byte = 0.0
        self._fresh = 0  # first bytes since the last look

    def began(self) -> float | None:
        """A first request goes out: after so many seconds without a first byte it is late. None: not known."""
        self._budget = min(BURST, self._budget + self._share)
        return self._late_s

    def looked(self, late: bool) -> None:
        """Whether a request was late, known when it is as old as `began` said."""
        self._recent.append(late)

    def came(self, first_byte_s: float) -> None:
        """The first byte of a first request came, or it was given up that long after it was sent."""
        self._first_bytes_s.append(first_byte_s)
        self._fresh += 1
        if self._share and self._fresh >= REFRESH:
            self._fresh = 0
            self._learn()

    def flowed(self, body_bytes: int, seconds: float) -> None:
        """A body took that long after its first byte."""
        if body_bytes > 0 and seconds > 0.0:
            self._s_per_byte.append(seconds / body_bytes)

    def may_ask(self) -> bool:
        """Whether one request more is allowed; if so it is taken from the budget."""
        if self._budget < 1.0 or sum(self._recent) > MANY_LATE * RECENT:
            return False
        self._budget -= 1.0
        return True

    def stalled_s(self, piece_bytes: int) -> float | None:
        """After so long without news of a piece of a body it has stalled. None: not known."""
        if self._late_s is None or not self._slowest_s_per_byte:
            return None
        return max(STALL_S, STALL_TIMES * piece_bytes * self._slowest_s_per_byte)

    def _learn(self) -> None:
        times = sorted(self._first_bytes_s)
        beyond = int(len(times) * self._share)
        if len(times) < LEAST_SEEN or beyond < LEAST_LATE:
            return
        usual_s = times[len(times) // 2]
        self._late_s = max(FLOOR_S, TIMES_USUAL * usual_s, times[len(times) - 1 - beyond])
        if self._s_per_byte:
            paces = sorted(self._s_per_byte)
            self._slowest_s_per_byte = paces[len(paces) * 95 // 100]


class Race:
    """Of two requests, 0 and 1, the first to be answered gets the memory. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._winner: int | None = None
        self._over = False

    @property
    def winner(self) -> int | None:
        return self._winner

    def claim(self, number: int) -> bool:
        """A request is answered: may it have the memory?"""
        with self._lock:
            if self._winner is None and not self._over:
                self._winner = number
            return self._winner == number and not self._over

    def end(self) -> None:
        """The memory is the caller's again: nobody gets it any more."""
        with self._lock:
            self._over = True
