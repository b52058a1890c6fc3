"""How long vLLM takes from our answer until the pass that computes on it can use a first layer, learned from passes. What follows from that: see moment.py.

Pure. Meanwhile blocks are given, the step is sent to the workers, and they prepare its input: so it
grows with the tokens that have blocks. What is taken for too long makes a layer late, and the whole
batch waits for it; what is taken for too short costs only what it is short of. So nothing is expected
before some passes of a size were seen, then a low quantile of them; what lies between two sizes is
interpolated, and no size is taken for longer than a larger one.
"""

from collections import deque
from collections.abc import Sequence

from objectcache.compute import Estimate

KEPT = 16  # passes of a size, a power of two of tokens
FEW = 3  # passes, before which nothing is expected
LOWER = 0.25  # quantile
TO_MIDDLE = 0.67  # standard deviations from there to the middle
LEAST_SPREAD = 0.1  # as a share
MOST_S = 0.1  # of an estimate
BELIEVED_S = 1.0  # of a pass
UNDER_WAY = 8  # steps
NO_LEAD = Estimate(0.0, 0.0)


class Lead:
    """Each step: `asked` for each load in it, then `scheduled`; `needed` when workers report it. Times in
    seconds of the host's monotonic clock: what other hosts say by clocks of their own is not heard."""

    def __init__(self, ranks: int = 1) -> None:
        self._ranks = ranks
        self.last_step = 0  # that loads
        self._asked: list[tuple[int, float]] = []  # of the step to come: tokens, and when
        self._under_way: dict[int, tuple[int, float, float]] = {}  # by step; and when it was sent
        self._seen: dict[int, deque[tuple[int, float]]] = {}  # by size

    def asked(self, tokens: int, at_s: float) -> None:
        """It was asked, and answered, then; in the step to come so many tokens of that request have blocks."""
        self._asked.append((tokens, at_s))

    def scheduled(self, step: int, now: float, quiet: bool) -> None:
        """The step is sent to the workers. With `quiet` nothing before it holds them up; and it tells of
        a load only if it has one."""
        asked, self._asked = self._asked, []
        if asked:
            self.last_step = step
        if len(asked) != 1 or not quiet:
            return
        ((tokens, at_s),) = asked
        self._under_way[step] = tokens, at_s, now
        if len(self._under_way) > UNDER_WAY:
            del self._under_way[min(self._under_way)]

    def needed(self, step: int, times: Sequence[float], now: float) -> None:
        """When each rank could first have used a layer in that step."""
        found = self._under_way.pop(step, None)
        if found is None or len(times) != self._ranks:
            return
        tokens, asked_s, sent_s = found
        took_s = min(times) - asked_s
        if sent_s <= min(times) and max(times) <= now and 0.0 <= took_s <= BELIEVED_S:
            size = self._seen.setdefault(tokens.bit_length(), deque(maxlen=KEPT))
            size.append((tokens, took_s))

    def seconds(self, tokens: int) -> Estimate:
        """What a request can count on of which so many tokens have blocks in its first pass."""
        above, best = None, NO_LEAD
        for at, low in self._points():
            if at <= tokens:
                share = (tokens - at) / (above - at) if above is not None else 1.0
                return _between(low, best if above is not None else low, share)
            above, best = at, low
        return _between(NO_LEAD, best, tokens / above) if above is not None else NO_LEAD

    def _points(self) -> list[tuple[int, Estimate]]:
        """Tokens and what is counted on, the largest first; the latter does not grow on the way."""
        points, best = [], Estimate(MOST_S, LEAST_SPREAD * MOST_S)
        for size in sorted(self._seen, reverse=True):
            times = sorted(took_s for _, took_s in self._seen[size])
            if len(times) < FEW:
                continue
            low_s, middle_s = times[int(LOWER * (len(times) - 1))], times[len(times) // 2]
            sigma_s = max(LEAST_SPREAD * low_s, (middle_s - low_s) / TO_MIDDLE)
            if low_s <= best.mean_s:
                best = Estimate(low_s, sigma_s)
            points.append((max(tokens for tokens, _ in self._seen[size]), best))
        return points


def _between(low: Estimate, high: Estimate, share: float) -> Estimate:
    return Estimate(*(a + share * (b - a) for a, b in zip(low, high, strict=True)))
