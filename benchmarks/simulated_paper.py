"""The concurrent workloads of the ObjectCache paper, each request on a GPU of its own, its layers paced by a rule. For simulate.py.

A fluid model: each fetch gets a rate, layers come in order, layer l computes once it is there and
layer l - 1 is computed. What a request adds to its time to the first token is when it ends, less what
computing alone takes. The paper measured each request alone, at a rate that a rule fixed beforehand,
with one layer fetched while another computes, and added up. "alone" does the same; "shared" has all
of them on one wire, fetches ahead as far as there is rate, and asks the rule again whenever a layer
came, so that freed rate goes to others.

Two constants make the model as slow as the paper's machines: layers do not come evenly, and something
is paid once. They were fitted to the nine sums of the equal share and of the two rules; those of its
other two rules were not used.
"""

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from objectcache import sharing
from objectcache.sharing import Wanted

GBPS = 1e9 / 8
LAYERS = 32
TOKEN_LAYER_BYTES = 4096
UNEVEN = 0.2  # standard deviation of the time in which a layer comes, as a share
ONCE_MS = 40.0  # for each request
CALIBRATED_GBPS = 5.0
REDECIDE_S = 0.02
# Tokens in the cache, seconds to compute the rest on an A100: its Table A8.
TABLE_A8 = {
    "16K 50%": (8192, 0.9559),
    "16K 87.5%": (14336, 0.2818),
    "32K 50%": (16384, 2.589),
    "32K 87.5%": (28672, 0.763),
    "64K 50%": (32768, 8.673),
    "64K 87.5%": (57344, 2.424),
}
_FOUR = ("16K 50%", "16K 87.5%", "64K 50%", "64K 87.5%")
WORKLOADS = {"A": (_FOUR, 80.0), "B": (_FOUR, 50.0), "C": (tuple(TABLE_A8), 50.0)}
# Milliseconds added, all requests together: its Table A12.
TABLE_A12 = {
    "equal": {"A": 1289, "B": 3834, "C": 9745},
    "by bytes": {"A": 1806, "B": 4129, "C": 10160},
    "by no-stall rate": {"A": 3147, "B": 11581, "C": 29082},
    "stall-optimal": {"A": 1517, "B": 2434, "C": 7453},
    "calibrated": {"A": 730, "B": 2171, "C": 7889},
}
Rule = Callable[[Sequence[Wanted], float, float], Sequence[float]]


def _proportional(weights: Sequence[float], rate: float) -> list[float]:
    return [rate * weight / sum(weights) for weight in weights]


RULES: dict[str, Rule] = {
    "equal": lambda wanted, now, rate: sharing.equal(wanted, rate),
    "by bytes": lambda wanted, now, rate: _proportional([w.layer_bytes for w in wanted], rate),
    "by no-stall rate": lambda wanted, now, rate: _proportional(
        [w.no_stall_bytes_per_s for w in wanted], rate
    ),
    "stall-optimal": lambda wanted, now, rate: sharing.stall_optimal(wanted, rate),
    "calibrated": lambda wanted, now, rate: sharing.stall_optimal(
        wanted, rate, CALIBRATED_GBPS * GBPS
    ),
    "ours": lambda wanted, now, rate: sharing.shares(wanted, now, rate, apart=True),
    "ours, as for one GPU": lambda wanted, now, rate: sharing.shares(wanted, now, rate),
}


@dataclass
class _Paced:
    """A request: what its layers weigh, when they came, and when the pass has computed them."""

    layer_bytes: int
    layer_s: float
    weights: list[float]
    came: int = 0
    part: float = 0.0  # bytes of the layer that comes
    computed_s: float = field(default=0.0)

    def wanted(self, now: float) -> Wanted:
        left = int(self.layer_bytes * (LAYERS - self.came) - self.part)
        ahead_s = max(0.0, self.computed_s - now)
        return Wanted(0.0, max(1, left), self.layer_bytes, self.layer_s, ahead_s, self.came > 0)

    def next_s(self, rate: float) -> float:
        return (self.weights[self.came] * self.layer_bytes - self.part) / max(rate, 1e-3)

    def move(self, now: float, size: float) -> None:
        self.part += size
        while self.came < LAYERS and self.part >= self.weights[self.came] * self.layer_bytes - 1.0:
            self.part -= self.weights[self.came] * self.layer_bytes
            self.came += 1
            self.computed_s = max(self.computed_s, now) + self.layer_s


def _requests(names: Sequence[str], chance: random.Random) -> list[_Paced]:
    shape = 1 / UNEVEN**2
    return [
        _Paced(
            TABLE_A8[name][0] * TOKEN_LAYER_BYTES,
            TABLE_A8[name][1] / LAYERS,
            [chance.gammavariate(shape, 1 / shape) for _ in range(LAYERS)],
        )
        for name in names
    ]


def added_ms(workload: str, rule: str, shared: bool, seeds: int = 20) -> list[float]:
    """Milliseconds that each request of a workload adds to its time to the first token, in its order."""
    names, gbps = WORKLOADS[workload]
    runs = []
    for seed in range(seeds):
        paced = _requests(names, random.Random(seed))
        if shared:
            _share(paced, RULES[rule], gbps * GBPS)
        else:
            rates = RULES[rule]([one.wanted(0.0) for one in paced], 0.0, gbps * GBPS)
            for one, rate in zip(paced, rates, strict=True):
                _alone(one, rate)
        runs.append([1e3 * (one.computed_s - LAYERS * one.layer_s) + ONCE_MS for one in paced])
    return [statistics.mean(values) for values in zip(*runs, strict=True)]


def _alone(one: _Paced, rate: float) -> None:
    """At a rate, each layer asked for when the one before it begins to compute."""
    asked_s = 0.0
    for weight in one.weights:
        came_s = asked_s + weight * one.layer_bytes / rate
        asked_s = max(came_s, one.computed_s)
        one.computed_s = asked_s + one.layer_s


def _share(paced: Sequence[_Paced], rule: Rule, bytes_per_s: float) -> None:
    """Until all layers of all came."""
    now = 0.0
    while open_ := [one for one in paced if one.came < LAYERS]:
        rates = rule([one.wanted(now) for one in open_], now, bytes_per_s)
        step_s = min(one.next_s(rate) for one, rate in zip(open_, rates, strict=True))
        step_s = max(1e-6, min(step_s, REDECIDE_S))
        now += step_s
        for one, rate in zip(open_, rates, strict=True):
            one.move(now, rate * step_s)
