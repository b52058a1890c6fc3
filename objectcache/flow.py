"""How many bodies may be on their way from one store at once, and what that store gives, as measured. Not who waits: see stores/gate.py.

Pure: events and `now` (seconds, any monotonic clock) in, numbers out. It climbs a hill. A round is
some bodies that were received while the limit was in full use; its goodput is that of the round.
A trial is a round with another limit:

    twice as many, until that does harm          (at the start, and after a trial up that did none)
    a quarter more, until that does harm         (after a doubling that did harm)
    then rest; now and then a quarter more, or a fifth less, in turn

A trial that does harm goes back. On 503 the number is cut at once, after some seconds it rises by
small steps to less than was refused, and what is above that is tried again after a longer quiet.
"""

import math
from collections import deque
from dataclasses import dataclass, field

from objectcache.curve import FORGOTTEN, TELLING_BYTES, Curve

# Many engines may start at once; three doublings from what a large store rewards. Where one doubling is all
# that there may be (a process that is one of several), it begins with that: a chunk that has to wait for
# another's end brings even its first layer late. Measured on a GPU host with four processes of 56, that each
# began with 32: the first layer of 224 chunks came when a quarter to two thirds of all bytes had.
START = 32
ROUND_BODIES = 16  # and as many as the limit; half of that while it doubles. Fewer say little
USED = 0.8  # share of the limit, and of a body's time, from which a body tells about that limit
TWICE, MORE, LESS = 2.0, 1.25, 0.8  # steps of a trial
# Of the goodput that more connections would bring on an idle wire: else the wire is full.
PAYS = 1 / 3
NO_WORSE = 0.95  # of the goodput, at which more connections do no harm,
NO_LATER = 1 / 2  # if first bytes come later by less than this share of the growth: no line there
AS_GOOD = 0.9  # goodput that fewer connections must keep
SOONER = 0.9  # and by how much sooner their first bytes must come: else fewer are no gain
# Times the goodput of before, under the same limit: look at once if more will do. Less than MORE,
# since the limit may be so far above what filled the wire, and shows no more of a wider one.
CHANGED = 1.15
FULL_SHARE = 0.7  # of what a connection can give: with less the wire is full
LIKE = 1.5  # rounds whose mean bodies differ by more than this factor are not compared
REST_ROUNDS, REST_ROUNDS_MAX = 8, 32  # between trials; doubles with each that did not pay
CUT = 0.7  # on 503
ONE_BURST_S = 0.5  # refusals of one moment come within this, or two long first-byte times
ONE_BURST_MAX_S = 5.0
MEND_S = 5.0  # after a cut, until it mends by small steps
MEND_TO = 0.85  # of the number that was refused, half of what was cut
QUIET_S, QUIET_MAX_S = 5.0, 80.0  # no trial after a cut; doubles if the next trial led to one, too
FORGIVE_S = 160.0  # without a cut: the quiet is short again. S3 scales up in minutes
IDLE_S = 600.0  # after this the server may be another one: begin with half
SAMPLES = 256  # first-byte times remembered: enough for a p99
FADE_BODIES, FADE_ROUNDS = 1 / 1024, 1 / 64  # by which a best value fades with each new one


@dataclass(frozen=True)
class StoreModel:
    """What a store gives, for plans. The defaults are what S3 gives in its own region."""

    first_byte_s: float = 0.03  # median
    first_byte_p99_s: float = 0.2
    connection_bytes_per_s: float = 80e6
    wire_bytes_per_s: float = math.inf  # all connections together; infinite until it was met
    requests_per_s: float = 5500.0  # what S3 serves below one prefix; not measured


@dataclass
class _Round:
    """What was seen under one limit. Goodput by Little's law: mean in flight times mean rate of a
    body. Unlike bytes per second it does not depend on where in a body the round begins or ends."""

    bodies: int = 0
    body_bytes: int = 0
    seconds: float = 0.0  # of the bodies, one after the other
    used_s: float = 0.0  # in which the limit was in use
    in_flight_s: float = 0.0  # requests in flight, over that time
    first_bytes_s: list[float] = field(default_factory=list)


@dataclass
class _Seen:
    """A round's result."""

    bytes_per_s: float
    first_byte_s: float | None
    body_bytes: float

    def like(self, other: "_Seen") -> bool:
        return 1 / LIKE <= self.body_bytes / other.body_bytes <= LIKE


class Flow:
    """The limit for one store, between 1 and `most`. `began` and `ended` frame each request with a
    body, retries and pauses included; `arrived` comes before its `ended`."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._start = float(most if most <= 2 * START else START)
        self._base = self._start  # what the last trial that paid has shown
        self._trial: float | None = None
        self._known: _Seen | None = None  # at _base
        self._step, self._fine = TWICE, False
        self._rest, self._pause = 0, REST_ROUNDS  # rounds to the next trial; of the next rest
        self._round = _Round()
        self._in_flight = 0
        self._counted_at = -math.inf
        self._used: tuple[float, float] | None = None  # the latest time of use, in this round
        self._deaf_until = self._mend_at = self._quiet_until = -math.inf
        self._quiet_s, self._mend_to = QUIET_S, 0.0
        self._first_bytes_s: deque[float] = deque(maxlen=SAMPLES)
        self._telling = (0.0, 0.0)  # bytes and seconds of late bodies, fading
        self._connection_best = self._wire_best = 0.0
        self._wire_met, self._met_in = False, 0  # the curve's window in which that was seen last
        self._curve = Curve()

    def limit(self, now: float) -> int:
        """Most requests with bodies to have in flight."""
        self._wake(now)
        return self._limit()

    def calm(self, now: float) -> bool:
        """Whether the server did not ask for fewer requests lately."""
        return now >= self._quiet_until

    def began(self, now: float) -> None:
        self._wake(now)
        self._count(now, 1)
        self._curve.began(now)

    def ended(self, now: float) -> None:
        self._count(now, -1)
        self._curve.ended(now)
        if self._wire_met and self._curve.windows > self._met_in + FORGOTTEN:
            self._wire_met, self._wire_best = False, 0.0  # it may have been others' doing

    def arrived(
        self, now: float, body_bytes: int, first_byte_s: float | None, seconds: float
    ) -> None:
        """A body has come: `seconds` since its request, first byte after `first_byte_s` of them."""
        self._count(now, 0)
        if seconds <= 0.0 or body_bytes <= 0:
            return
        self._learn(body_bytes, first_byte_s, seconds)
        self._curve.arrived(now, body_bytes, seconds - (first_byte_s or 0.0))
        if self._used is None:
            return
        in_use_s = self._used[1] - max(self._used[0], now - seconds)
        if in_use_s < USED * seconds:
            return
        seen = self._round
        seen.bodies += 1
        seen.body_bytes += body_bytes
        seen.seconds += seconds
        if first_byte_s is not None:
            seen.first_bytes_s.append(first_byte_s)
        if seen.bodies >= self._enough():
            self._judge(now)

    def failed(self, now: float) -> None:
        """A request failed for another reason than 503. Under a larger number than before, that
        number is to blame; else it is the business of retries and breaker."""
        if self._trial is not None and self._trial > self._base:
            self._refuse(now)

    def throttled(self, now: float) -> None:
        """The server asked for fewer requests. Those of one burst count once."""
        if now < self._deaf_until:
            return
        p99_s = self.model().first_byte_p99_s
        self._deaf_until = now + min(max(ONE_BURST_S, 2 * p99_s), ONE_BURST_MAX_S)
        if now >= self._quiet_until + FORGIVE_S:
            self._quiet_s = QUIET_S
        elif now >= self._quiet_until:
            self._quiet_s = min(2 * self._quiet_s, QUIET_MAX_S)
        self._mend_at, self._quiet_until = now + MEND_S, now + self._quiet_s
        refused = self._limit()
        self._base = max(1.0, CUT * refused)
        self._mend_to = MEND_TO * refused
        self._step, self._fine = MORE, True
        self._known = None
        self._go(now, None)

    def model(self) -> StoreModel:
        prior = StoreModel()
        times = sorted(self._first_bytes_s)
        connection = self._curve.connection_bytes_per_s or self._connection_best
        connection = connection or prior.connection_bytes_per_s
        # The curve knows the wire of who never had the limit in use.
        wire = self._wire_best if self._wire_met else self._curve.wire_bytes_per_s
        return StoreModel(
            times[len(times) // 2] if times else prior.first_byte_s,
            times[len(times) * 99 // 100] if times else prior.first_byte_p99_s,
            connection,
            max(wire, connection) if wire is not None else math.inf,
        )

    # -- what is in flight -----------------------------------------------------------------------

    def _limit(self) -> int:
        return int(self._base if self._trial is None else self._trial)

    def _wake(self, now: float) -> None:
        if self._in_flight == 0 and -math.inf < self._counted_at < now - IDLE_S:
            self._base = max(self._start, self._base / 2)
            self._step, self._rest = TWICE, 0
            self._known = None
            self._mend_to = 0.0
            self._go(now, None)

    def _count(self, now: float, change: int) -> None:
        if self._used is not None and self._used[1] == self._counted_at and self._is_used():
            self._used = (self._used[0], now)
            self._round.used_s += now - self._counted_at
            self._round.in_flight_s += self._in_flight * (now - self._counted_at)
        self._in_flight += change
        self._counted_at = now
        if (self._used is None or self._used[1] < now) and self._is_used():
            self._used = (now, now)

    def _is_used(self) -> bool:
        return self._in_flight >= USED * self._limit()

    # -- rounds and trials -----------------------------------------------------------------------

    def _enough(self) -> int:
        return max(ROUND_BODIES, self._limit()) // (2 if self._step == TWICE else 1)

    def _go(self, now: float, trial: float | None) -> None:
        """Begin a round."""
        self._trial = trial
        self._round = _Round()
        self._used = None
        self._count(now, 0)

    def _judge(self, now: float) -> None:
        seen = self._result()
        if self._trial is None:
            self._settle(seen)
            self._go(now, self._next(now))
        elif self._known is None or not self._says(seen, self._known):
            self._rest = REST_ROUNDS
            self._go(now, None)
        elif self._pays(seen, self._known):
            if self._step == MORE and not self._fine:
                self._step = TWICE
            if self._trial < self._base:  # step by step it must not lose more than AS_GOOD
                seen.bytes_per_s = max(seen.bytes_per_s, self._known.bytes_per_s)
            self._base, self._known = self._trial, seen
            self._rest, self._pause = 0, REST_ROUNDS
            self._go(now, self._next(now))
        else:
            self._refuse(now)

    def _result(self) -> _Seen:
        of = self._round
        in_flight = min(of.in_flight_s / of.used_s, self._limit())
        times = sorted(of.first_bytes_s)
        return _Seen(
            in_flight * of.body_bytes / of.seconds,
            times[len(times) // 2] if times else None,
            of.body_bytes / of.bodies,
        )

    def _settle(self, seen: _Seen) -> None:
        """A round with the number as it is."""
        if self._base >= self._most and self._flows_slowly():
            self._meet_wire(seen)  # which else a trial with more would show
        known = self._known
        self._rest -= 1
        if known is None or not seen.like(known):
            self._known = seen
            return
        if seen.bytes_per_s > known.bytes_per_s * CHANGED:
            self._look(seen, MORE)
            return
        if known.first_byte_s is not None and seen.first_byte_s is not None:
            if seen.first_byte_s > 2 * known.first_byte_s and seen.bytes_per_s < known.bytes_per_s:
                self._look(seen, LESS)  # they stand in line there
                return
            known.first_byte_s += (seen.first_byte_s - known.first_byte_s) / 4
        known.bytes_per_s += (seen.bytes_per_s - known.bytes_per_s) / 4
        self._wire_best = max(known.bytes_per_s, self._wire_best * (1 - FADE_ROUNDS))
        self._met_in = self._curve.windows

    def _look(self, seen: _Seen, step: float) -> None:
        """The store has changed: a trial at once."""
        self._known, self._step, self._fine = seen, step, False
        self._rest, self._pause = 0, REST_ROUNDS

    def _next(self, now: float) -> float | None:
        """The limit of the next round if it is to be a trial."""
        if self._base < self._mend_to:
            if now >= self._mend_at:
                self._base = min(self._base + max(1.0, self._base / 16), self._mend_to)
                self._known = None
            return None
        if now < self._quiet_until or self._rest > 0 or self._known is None:
            return None
        wish = math.ceil(self._base * self._step) if self._step > 1 else int(self._base * LESS)
        wish = max(1, min(wish, self._most))
        # Who begins with all wants all: with fewer, the first layer of some chunks comes behind others' last.
        spared = wish < self._base and self._start >= self._most
        if wish == int(self._base) or spared:
            self._turn()
            return None
        return float(wish)

    def _says(self, seen: _Seen, known: _Seen) -> bool:
        """Can the trial be compared? Smaller bodies spend more of their time waiting, so that a gain
        with them is one all the more; it is plans for more connections that have smaller bodies."""
        smaller = seen.body_bytes < known.body_bytes and self._pays(seen, known)
        return smaller or seen.like(known)

    def _pays(self, seen: _Seen, known: _Seen) -> bool:
        assert self._trial is not None
        if self._trial > self._base:
            more = self._trial / self._base - 1
            if seen.bytes_per_s >= known.bytes_per_s * (1 + PAYS * more):
                return True
            self._meet_wire(known)
            # On a full wire more connections bring nothing sooner, but they keep more chunks in step
            # and need fewer requests: they are wanted as long as they do no harm.
            latest_s = (known.first_byte_s or math.inf) * (1 + NO_LATER * more)
            later = seen.first_byte_s is not None and seen.first_byte_s > latest_s
            return seen.bytes_per_s >= NO_WORSE * known.bytes_per_s and not later
        if seen.first_byte_s is None or known.first_byte_s is None:
            return False
        return (
            seen.bytes_per_s >= AS_GOOD * known.bytes_per_s
            and seen.first_byte_s <= SOONER * known.first_byte_s
        )

    def _refuse(self, now: float) -> None:
        """Back to what is known to be good."""
        if self._step > 1 and self._known is not None:
            self._meet_wire(self._known)
        if self._step == TWICE:
            self._step, self._fine, self._rest = MORE, True, 0
        else:
            self._turn()
        self._go(now, self._next(now) if self._rest == 0 else None)

    def _flows_slowly(self) -> bool:
        """Whether bodies flow slower lately than one that had the wire for itself."""
        late_bytes, late_s = self._telling
        return late_bytes < FULL_SHARE * self._connection_best * late_s

    def _meet_wire(self, known: _Seen) -> None:
        self._wire_met, self._met_in = True, self._curve.windows
        self._wire_best = max(known.bytes_per_s, self._wire_best)

    def _turn(self) -> None:
        """Rest, then look the other way."""
        self._step, self._fine = (MORE if self._step == LESS else LESS), False
        self._rest, self._pause = self._pause, min(2 * self._pause, REST_ROUNDS_MAX)

    # -- the model -------------------------------------------------------------------------------

    def _learn(self, body_bytes: int, first_byte_s: float | None, seconds: float) -> None:
        if first_byte_s is not None:
            self._first_bytes_s.append(first_byte_s)
        flowing_s = seconds - (first_byte_s or 0.0)
        if body_bytes < TELLING_BYTES or flowing_s <= 0.0:
            return
        late_bytes, late_s = (kept * (1 - 1 / 32) for kept in self._telling)
        self._telling = (late_bytes + body_bytes, late_s + flowing_s)
        rate = self._telling[0] / self._telling[1]
        # On a full wire a connection gets less than it could.
        fade = 0.0 if self._wire_met else FADE_BODIES
        self._connection_best = max(rate, self._connection_best * (1 - fade))
