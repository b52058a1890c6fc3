"""When the layers of a prefix that is on its way will be in host memory. Not what follows from that: see moment.py.

Pure: reports and `now` (seconds, any monotonic clock) in, times out. A layer is there when its last
chunk has it, so several things can hold it up, and the latest of them counts:

    its bytes           at the rate at which bytes came lately
    the slowest stream  has its share of that rate, and is where the last complete layer is
    the pace            at which the last layers became complete; the latest of them count most
    a first byte        of a request that got none yet
    the last begin      when all had their headers; its share brings it the first layer
"""

import math
from collections.abc import Sequence
from itertools import accumulate
from statistics import NormalDist
from typing import NamedTuple

from objectcache.flow import FULL_SHARE, StoreModel

LATELY_S = 0.5  # time constant in which what was seen fades
PRIOR_S = 0.03  # seconds of looking that a prior rate is worth
BURST_S = 0.02  # of traffic that comes or stays away as one, in the prior
PRIOR_SPREAD = 0.9  # of a prior rate, as a share
SHARE_SPREAD = 0.1  # of one stream's share of the rate
LEAST_LEFT_S = 1e-3  # of what is not there
BEGIN_KEPT = 0.3  # of what was seen before the first layer was there
PACE_SPREAD = 0.35  # of the time between two layers, as a share
PACE_PRIOR = 1.0  # layers that an equal share of the rate is worth, beside the layers seen
PACE_KEPT = 0.7  # with each layer, of what those before it count
BODIES = 64  # of late, that tell the rate of a wire
TELLING_BYTES = 256 << 10  # of smaller bodies, the rate is that of a buffer
FORGET_S = 60.0  # after which a rate is not known any more
_NORMAL = NormalDist()
_ONE_SIGMA = _NORMAL.cdf(1.0)


class Arrivals(NamedTuple):
    """For each layer when it, and all before it, will be there (seconds, the clock of the reports), and
    the standard deviation. What is there already has the time at which that was seen, and none."""

    mean_s: tuple[float, ...]
    sigma_s: tuple[float, ...]

    def later_s(self, sigmas: float) -> tuple[float, ...]:
        """Each by so many of its standard deviations."""
        return tuple(m + sigmas * s for m, s in zip(self.mean_s, self.sigma_s, strict=True))


class _At(NamedTuple):
    mean_s: float
    sigma_s: float


class _Rate(NamedTuple):
    """Of bytes. What takes t seconds at this rate has the variance (walk_s + variance * t) * t."""

    bytes_per_s: float
    walk_s: float
    variance: float
    unsure: float  # of a rate that is still that of the prior, as a share


class Coming:
    """One prefix on its way since `began`: `layer_bytes` of each layer, all `chunks` together, by
    `streams` requests at once. `groups` are the layers [first, last) of a request, as in a plan; none
    if requests are for whole chunks. `store` is what is expected until something came."""

    def __init__(
        self,
        layer_bytes: Sequence[int],
        chunks: int,
        streams: int,
        began: float,
        store: StoreModel,
        groups: Sequence[tuple[int, int]] = (),
    ) -> None:
        self._chunks = max(1, chunks)
        groups = groups or ((0, len(layer_bytes)),)
        self._group_of = [first for first, last in groups for _ in range(first, last)]
        self._behind = list(accumulate(layer_bytes))  # bytes up to the end of each layer
        self._streams = max(1, streams)
        self._began = began
        self._store = store
        self._at = began
        self._landed = self._ready = self._waiting = 0
        self._left: tuple[int, ...] | None = None
        self._ready_at: list[float] = []  # of each layer that is there
        self._paced_s = self._paced = 0.0  # seconds, and layers that came in them, lately
        self._first_at: float | None = None  # when bytes were first seen
        self._begun_at = began  # when a request got its first byte last
        self._all_begun_at: float | None = None
        prior = min(self._streams * store.connection_bytes_per_s, store.wire_bytes_per_s)
        self._prior_bytes_per_s = prior
        self._seconds = self._bytes = 0.0  # lately
        self._surplus = self._reports = 0.0  # squares of bytes beyond the rate, per second

    @property
    def bytes_per_s(self) -> float:
        """At which bytes come now."""
        known = PRIOR_S * self._prior_bytes_per_s + self._bytes
        return known / (PRIOR_S + self._seconds)

    def seen(
        self,
        now: float,
        landed_bytes: int,
        layers_ready: int,
        waiting: int = 0,
        left_bytes: Sequence[int] | None = None,
    ) -> None:
        """So many bytes and leading layers are there by now; `waiting` requests have no byte yet.

        `left_bytes`, if known, is for each layer what is still to come of it and those before it; else
        bytes are taken to come in the order of layers. Report silence, too: it is news.
        """
        if now < self._at or landed_bytes < self._landed:
            return
        if landed_bytes > 0:
            if self._first_at is None:
                # The rest of the interval passed before the first byte.
                self._first_at = max(
                    self._at, now - landed_bytes / max(1.0, self._prior_bytes_per_s)
                )
                self._at = self._first_at
            self._flowed(now - self._at, landed_bytes - self._landed)
        if waiting < self._waiting:
            self._begun_at = now
        if layers_ready and not self._ready:
            self._fade(BEGIN_KEPT)  # some had hardly begun: it says little of how they go on
        self._at, self._landed, self._waiting = now, landed_bytes, waiting
        self._left = tuple(left_bytes) if left_bytes is not None else None
        self._ready = min(max(self._ready, layers_ready), len(self._behind))
        more = self._ready - len(self._ready_at)
        if more and self._ready_at:
            kept = PACE_KEPT**more
            self._paced_s = self._paced_s * kept + now - self._ready_at[-1]
            self._paced = self._paced * kept + more
        self._ready_at += [now] * more

    def begun(self, now: float) -> None:
        """All chunks have their headers, the last of them since now."""
        self._all_begun_at = now

    def arrivals(self, now: float) -> Arrivals:
        """As it looks after what was seen. `now` is not before the last report."""
        mean_s, sigma_s = list(self._ready_at), [0.0] * self._ready
        first_byte = self._last_first_byte(now)
        rate = self._rate()
        latest = _At(now, 0.0)
        for layer in range(self._ready, len(self._behind)):
            reasons = [latest, self._by_bytes(layer, now, rate), self._by_slowest(layer, now, rate)]
            others = (self._by_pace(layer, now, rate), self._by_begin(layer, now, rate))
            reasons += [reason for reason in others if reason is not None]
            if first_byte is not None:
                first = self._group_of[layer]
                size = self._behind[layer] - (self._behind[first - 1] if first else 0)
                flows_s = size / self._chunks / self._store.connection_bytes_per_s
                reasons.append(_At(first_byte.mean_s + flows_s, first_byte.sigma_s))
            latest = max(reasons)
            mean_s.append(latest.mean_s)
            sigma_s.append(latest.sigma_s)
        return Arrivals(tuple(mean_s), tuple(sigma_s))

    # ---- the reasons

    def _flowed(self, seconds: float, size: int) -> None:
        if seconds <= 0.0:
            self._bytes += size
            return
        beyond = size - self.bytes_per_s * seconds
        self._fade(math.exp(-seconds / LATELY_S))
        self._seconds += seconds
        self._bytes += size
        self._surplus += beyond**2 / seconds
        self._reports += 1

    def _fade(self, kept: float) -> None:
        """Of what was seen until now so much still counts."""
        self._seconds *= kept
        self._bytes *= kept
        self._surplus *= kept
        self._reports *= kept

    def _rate(self) -> _Rate:
        rate = max(1.0, self.bytes_per_s)
        prior = self._prior_bytes_per_s**2 * BURST_S
        diffusion = (prior + self._surplus) / (1 + self._reports)
        unsure = PRIOR_SPREAD * PRIOR_S / (PRIOR_S + self._seconds)
        walk = diffusion / rate**2
        return _Rate(rate, walk, walk / (PRIOR_S + self._seconds) + unsure**2, unsure)

    def _by_bytes(self, layer: int, now: float, rate: _Rate) -> _At:
        """A walk with drift: the variance of what comes grows with time, and the rate is not sure."""
        left = self._left[layer] if self._left else max(0, self._behind[layer] - self._landed)
        begins = now
        if self._first_at is None and not self._waiting:
            begins = max(now, self._began + self._store.first_byte_s)
        takes_s = left / rate.bytes_per_s
        return _At(begins + takes_s, math.sqrt((rate.walk_s + rate.variance * takes_s) * takes_s))

    def _by_slowest(self, layer: int, now: float, rate: _Rate) -> _At:
        """Its stream is at least as far as the last complete layer, or at the begin of its request."""
        if self._first_at is None:
            return _At(now, 0.0)
        first = self._group_of[layer]
        begins = max(self._first_at, self._begun_at)
        if first < self._ready:
            first, begins = self._ready, self._ready_at[-1]
        size = self._behind[layer] - (self._behind[first - 1] if first else 0)
        takes_s = size / self._chunks * self._streams / rate.bytes_per_s
        left_s = max(0.0, begins + takes_s - now)
        return _At(now + left_s, left_s * math.hypot(SHARE_SPREAD, rate.unsure))

    def _by_begin(self, layer: int, now: float, rate: _Rate) -> _At | None:
        """Of a stream that began when the last one did. None once a layer is there, and for layers of later
        requests. A first layer that is overdue is expected to take as long again as it is overdue."""
        if self._all_begun_at is None or self._ready or self._group_of[layer]:
            return None
        stream_bytes_per_s = rate.bytes_per_s / self._streams * self._chunks
        first_s, takes_s = (self._behind[at] / stream_bytes_per_s for at in (0, layer))
        overdue_s = max(0.0, now - self._all_begun_at - first_s)
        left_s = max(LEAST_LEFT_S, self._all_begun_at + takes_s + 2 * overdue_s - now)
        return _At(
            now + left_s, math.hypot(overdue_s, left_s * math.hypot(SHARE_SPREAD, rate.unsure))
        )

    def _by_pace(self, layer: int, now: float, rate: _Rate) -> _At | None:
        """None until a layer came, and for layers of later requests. A begin is often slow, and says
        little of the rest: so the latest layers count most, and beside them an equal share of the rate.
        What is overdue is expected to take as long again as it is overdue, and slows down the rest."""
        if not self._paced or self._group_of[layer] >= self._ready:
            return None
        last, count = self._ready_at[-1], len(self._ready_at)
        share_s = (self._behind[layer] - self._behind[count - 1]) / (layer + 1 - count)
        share_s /= rate.bytes_per_s
        seen, seconds = PACE_PRIOR + self._paced, PACE_PRIOR * share_s + self._paced_s
        pace_s = seconds / seen
        overdue_s = max(0.0, now - last - pace_s)
        if overdue_s:
            pace_s = (seconds * PACE_KEPT + now - last) / (seen * PACE_KEPT + 1)
        more = layer + 1 - count
        mean_s = max(last + pace_s, now + overdue_s) + (more - 1) * pace_s
        spread = PACE_SPREAD / math.sqrt(1 + seen)
        return _At(mean_s, math.hypot(overdue_s, spread * more * pace_s))

    def _last_first_byte(self, now: float) -> _At | None:
        """When the last of the waiting requests gets its first byte: they are lognormal, and none has
        come by now."""
        if not self._waiting:
            return None
        waited_s = max(0.0, now - self._began)
        middle = latest_first_byte_s(self._store, self._waiting, waited_s, 0.5)
        high = latest_first_byte_s(self._store, self._waiting, waited_s, _ONE_SIGMA)
        return _At(self._began + middle, high - middle)


class WireRate:
    """What all streams together get when the wire, not a connection, is what limits them."""

    def __init__(self) -> None:
        self._bytes = self._seconds = self._flowing_s = 0.0
        self._at = -math.inf

    def body(self, now: float, size: int, flowing_s: float, beside: float) -> None:
        """A body came in so many seconds from its first byte on, one of `beside` that flowed then."""
        if flowing_s <= 0.0 or beside < 1.0 or size < TELLING_BYTES:
            return
        kept = 1 - 1 / BODIES if now - self._at < FORGET_S else 0.0
        self._bytes = self._bytes * kept + size
        self._flowing_s = self._flowing_s * kept + flowing_s
        self._seconds = self._seconds * kept + flowing_s / beside
        self._at = now

    def bytes_per_s(self, now: float, connection_bytes_per_s: float) -> float:
        """Infinite while streams get about what a connection can give, or nothing is known."""
        if now - self._at >= FORGET_S or self._seconds <= 0.0:
            return math.inf
        if self._bytes / self._flowing_s >= FULL_SHARE * connection_bytes_per_s:
            return math.inf
        return self._bytes / self._seconds


def latest_first_byte_s(
    store: StoreModel, requests: int, waited_s: float = 0.0, share: float = 0.5
) -> float:
    """When the last of so many requests gets its first byte, in seconds from when they were sent: the
    quantile `share` of that, if none got it in the `waited_s` that have passed."""
    sigma = max(1e-6, math.log(store.first_byte_p99_s / store.first_byte_s) / _NORMAL.inv_cdf(0.99))
    came = 0.0
    if waited_s > 0.0:
        came = _NORMAL.cdf(math.log(waited_s / store.first_byte_s) / sigma)
    # Of one request the chance to come later still, given that it has not come.
    later = (1.0 - came) * -math.expm1(math.log(share) / requests)
    if later < 1e-12:  # so late that the law says nothing: as long again
        return 2.0 * waited_s
    return max(waited_s, store.first_byte_s * math.exp(-sigma * _NORMAL.inv_cdf(later)))
