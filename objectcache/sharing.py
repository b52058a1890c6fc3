"""Who of several fetches gets the wire, whose request goes next, and who may begin. Not how much the wire gives: see flow.py.

Pure. A client has the wire in its hand only by whose requests it sends, so a share is a number of
requests in flight. What is shared is a rate: of all time that first tokens come later, as little as
possible. In this order, each as much as it can use:

    1. who is admitted and about to run dry: a batch waits for it
    2. who has waited longer than is fair, the oldest first: nobody starves
    3. who has the fewest bytes left

That is for fetches which one GPU waits for: it computes one prompt after the other, so it is best
if the prefixes come one after the other, too. Fetches for GPUs of their own (`apart`: engines that
share a wire) cost nobody time while the layers that came keep their GPU busy. There, instead of 3:

    3. who has no first layer yet, the smallest layer first: each waits for that alone
    4. who is about to run dry, as much as it computes in that time, and a little more
    5. who has the least left times the rate at which it computes: few bytes that last long

equal and stall_optimal are the rules that these are held against.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

PATIENCE_S = 15.0  # to wait at most behind who came later
DRY_LAYERS = 2.0  # with fewer than so many layers ahead it is about to run dry
HEADROOM = 1.25  # times the rate at which layers are computed: they do not come evenly
LEAST_LAYER_S = 1e-6


class Wanted(NamedTuple):
    """One fetch under way. Seconds are on any monotonic clock, or spans."""

    arrived_s: float  # when its request came
    left_bytes: int
    layer_bytes: int
    layer_s: float  # to compute one layer in its first pass
    ahead_s: float = (
        0.0  # until a pass wants a layer that is not there; also while the GPU is taken
    )
    begun: bool = False  # its first layer is there
    admitted: bool = False  # its pass runs: if it stalls, all in its batch do
    most_requests: int = 1 << 30  # that it can have in flight

    @property
    def no_stall_bytes_per_s(self) -> float:
        """At which its layers come as fast as they are computed."""
        return self.layer_bytes / max(self.layer_s, LEAST_LAYER_S)


def line(
    fetches: Sequence[Wanted], now: float, patience_s: float = PATIENCE_S, apart: bool = False
) -> list[int]:
    """Their indices, the first in line first."""

    def key(i: int) -> tuple[float, ...]:
        one = fetches[i]
        if one.admitted:
            return (0, one.ahead_s, i)
        if now - one.arrived_s >= patience_s:
            return (1, one.arrived_s, i)
        return (2, one.left_bytes * (one.no_stall_bytes_per_s if apart else 1.0), i)

    return sorted(range(len(fetches)), key=key)


def shares(
    fetches: Sequence[Wanted],
    now: float,
    bytes_per_s: float,
    connection_bytes_per_s: float = math.inf,
    patience_s: float = PATIENCE_S,
    apart: bool = False,
) -> list[float]:
    """Bytes a second for each; together `bytes_per_s` if they can use that."""
    given = [0.0] * len(fetches)
    left = bytes_per_s

    def give(i: int, rate: float) -> None:
        nonlocal left
        can = fetches[i].most_requests * connection_bytes_per_s - given[i]
        more = max(0.0, min(rate, can, left))
        given[i] += more
        left -= more

    in_line = line(fetches, now, patience_s, apart)
    dry = [one.ahead_s < DRY_LAYERS * one.layer_s for one in fetches]
    for i in in_line:
        one = fetches[i]
        if one.admitted and dry[i]:
            give(i, math.inf if one.ahead_s <= 0.0 else HEADROOM * one.no_stall_bytes_per_s)
    for i in in_line:
        if not fetches[i].admitted and now - fetches[i].arrived_s >= patience_s:
            give(i, math.inf)
    if apart:
        for i in sorted(in_line, key=lambda i: fetches[i].layer_bytes):
            if not fetches[i].begun and fetches[i].ahead_s <= 0.0:
                give(i, math.inf)
        for i in in_line:
            if dry[i] and given[i] == 0.0:
                give(i, HEADROOM * fetches[i].no_stall_bytes_per_s)
    for i in in_line:
        give(i, math.inf)
    return given


def equal(fetches: Sequence[Wanted], bytes_per_s: float) -> list[float]:
    """The same for each."""
    return [bytes_per_s / len(fetches)] * len(fetches)


def stall_optimal(
    fetches: Sequence[Wanted], bytes_per_s: float, beyond_bytes_per_s: float = 0.0
) -> list[float]:
    """The rule of the ObjectCache paper: proportional to the square root of the bytes of a layer, none
    above the rate that does not stall, and `beyond_bytes_per_s` ("calibrated")."""
    given = [0.0] * len(fetches)
    left, open_ = bytes_per_s, set(range(len(fetches)))
    while open_:
        unit = left / sum(math.sqrt(fetches[i].layer_bytes) for i in open_)
        caps = {i: fetches[i].no_stall_bytes_per_s + beyond_bytes_per_s for i in open_}
        full = {i for i in open_ if unit * math.sqrt(fetches[i].layer_bytes) >= caps[i]}
        for i in full or open_:
            given[i] = caps[i] if full else unit * math.sqrt(fetches[i].layer_bytes)
        left -= sum(given[i] for i in full)
        open_ = open_ - full if full else set()
    return given


# ---- requests in flight


def slots(
    fetches: Sequence[Wanted],
    now: float,
    limit: int,
    bytes_per_s: float,
    connection_bytes_per_s: float,
    patience_s: float = PATIENCE_S,
) -> list[int]:
    """How many requests each is to have in flight, `limit` together if there are so many. `bytes_per_s`
    is what the wire gives, infinite while nobody met its end."""
    wire = min(bytes_per_s, limit * connection_bytes_per_s)
    rates = shares(fetches, now, wire, connection_bytes_per_s, patience_s)
    return requests_for(fetches, rates, line(fetches, now, patience_s), limit)


def requests_for(
    fetches: Sequence[Wanted], rates: Sequence[float], in_line: Sequence[int], limit: int
) -> list[int]:
    """Requests in flight that share a wire as these rates do: who has a rate has one request at least;
    what is left over goes to who is first in line."""
    given, left = [0] * len(fetches), limit
    total = sum(rates)
    for i in sorted(in_line, key=lambda i: -rates[i]):
        if rates[i] > 0.0:
            wants = max(1, round(limit * rates[i] / total))
            given[i] = min(wants, fetches[i].most_requests, left)
            left -= given[i]
    for i in in_line:
        more = min(fetches[i].most_requests - given[i], left)
        given[i] += more
        left -= more
    return given


def next_request(
    fetches: Sequence[Wanted],
    now: float,
    given: Sequence[int],
    in_flight: Sequence[int],
    waiting: Sequence[int],
    patience_s: float = PATIENCE_S,
) -> int | None:
    """Whose waiting request goes when there is room for one; None if nobody should send one.

    `given` is from `slots`; `in_flight` and `waiting` are how many requests each has. Who lacks the
    largest part of what it was given goes first, then who is first in line.
    """
    place = {i: at for at, i in enumerate(line(fetches, now, patience_s))}
    may = [i for i in range(len(fetches)) if waiting[i] > 0 and in_flight[i] < given[i]]
    return min(may, key=lambda i: (in_flight[i] / given[i], place[i]), default=None)


# ---- who may begin


class Waiting(NamedTuple):
    """A fetch that has not begun: what it takes of the ring and, once admitted, of the GPU's blocks."""

    fetch: Wanted
    ring_slots: int
    gpu_blocks: int


def begin(
    waiting: Sequence[Waiting],
    now: float,
    free_slots: int,
    free_blocks: int,
    promised_blocks: int,
    patience_s: float = PATIENCE_S,
) -> list[int]:
    """Which of them begin, in this order.

    None takes slots that are not free, and together with those that are fetched or staged already
    (`promised_blocks`) they need no more blocks than are free: more could not be admitted, and would
    only fill memory. One at least may always go, since blocks become free as others end. Who has
    waited long enough is not overtaken any more.
    """
    chosen: list[int] = []
    for i in line([one.fetch for one in waiting], now, patience_s):
        one = waiting[i]
        blocks_fit = promised_blocks + one.gpu_blocks <= free_blocks or promised_blocks == 0
        if one.ring_slots <= free_slots and blocks_fit:
            chosen.append(i)
            free_slots -= one.ring_slots
            promised_blocks += one.gpu_blocks
        elif now - one.fetch.arrived_s >= patience_s:
            break
    return chosen
