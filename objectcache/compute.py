"""How long a forward pass computes, learned from passes that were timed. Not what to do with it: see moment.py and worth.py.

Pure. A pass costs a fixed time, a time for each token that it computes, one for each pair of a
prompt's token and a token that it attends to, and one for each token whose KV its decodes read. The
first values come from a prior; each timed pass corrects them. Passes of one kind form a cell, which
counts by its middle passes: a compile or a neighbour on the GPU makes some passes slow, none fast.
"""

import math
from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

KEPT = 8  # passes of a cell
CELLS = 64  # and those that were seen longest ago go
FADE_PASSES = 4096  # after which a cell that was not seen again counts half
FEW = 3  # passes; before that their times may be those of compiling
PRIOR_SPREAD = 0.5  # of each cost of the prior, once its scale is known
UNSEEN_SPREAD = 1.0  # of all of it together, before that
PASS_SPREAD, PASS_SPREAD_WEIGHT = 0.2, 4  # of one pass around its prediction, and worth so many
LEAST_SPREAD = 0.02
LOWER = 0.25  # quantile of the passes' times by which a prior is scaled: slow ones say nothing
REFIT_PASSES = 32  # at most, between fits; fewer while few are known
ROUNDS = 3  # of choosing middle passes and fitting to them
SWEEPS = 40  # of a fit that keeps each cost at zero or above

Vector = npt.NDArray[np.float64]


class Estimate(NamedTuple):
    """Seconds, and their standard deviation."""

    mean_s: float
    sigma_s: float

    def over(self, parts: int) -> "Estimate":
        """One of so many equal parts that are late or early together."""
        return Estimate(self.mean_s / parts, self.sigma_s / parts)


class Work(NamedTuple):
    """What forward passes compute, in the terms of their cost. Add what is computed one after the other."""

    passes: int = 0
    tokens: int = 0  # of prompts, and one for each decode
    pairs: float = 0.0  # a prompt's token and one that it attends to
    read_tokens: int = 0  # whose KV decodes read

    def then(self, other: "Work") -> "Work":
        return Work(
            self.passes + other.passes,
            self.tokens + other.tokens,
            self.pairs + other.pairs,
            self.read_tokens + other.read_tokens,
        )

    def beside(self, other: "Work") -> "Work":
        """Both in the same passes."""
        return self.then(other)._replace(passes=max(self.passes, other.passes))


def prefill(tokens: int, context: int, budget: int) -> Work:
    """`tokens` of a prompt behind `context` tokens whose KV is there, at most `budget` in a pass."""
    return Work(-(-tokens // budget), tokens, tokens * (context + tokens / 2))


def first_pass(tokens: int, context: int, budget: int) -> Work:
    """The first pass of that prefill: the one that loaded layers must keep pace with."""
    return prefill(min(tokens, budget), context, budget)


def decodes(sequences: int, read_tokens: int) -> Work:
    """One pass in which each sequence gets a token; `read_tokens` is how long they are together."""
    return Work(1, sequences, 0.0, read_tokens)


class Costs(NamedTuple):
    """Seconds for a pass, a token, a pair and a token read. The defaults: 8B, bf16, on an H100."""

    pass_s: float = 8e-3
    token_s: float = 2.1e-5
    pair_s: float = 8.45e-10
    read_s: float = 4e-8


H100_8B = Costs()


def prior(
    parameters: float,
    weight_bytes: float,
    layers: int,
    attention_width: int,
    kv_token_bytes: float,
    flops_per_s: float = 6e14,
    memory_bytes_per_s: float = 2.5e12,
) -> Costs:
    """Costs by arithmetic; `attention_width` is query heads times head size. Half or twice is near enough."""
    return Costs(
        pass_s=3e-3 + weight_bytes / memory_bytes_per_s,
        token_s=2 * parameters / flops_per_s,
        pair_s=4 * layers * attention_width / flops_per_s,
        read_s=kv_token_bytes / memory_bytes_per_s,
    )


@dataclass
class _Cell:
    timed: "deque[tuple[Work, float]]" = field(default_factory=lambda: deque(maxlen=KEPT))
    seen: int = 0  # number of the latest pass


class ComputeModel:
    """`timed` for each pass that was measured, `seconds` for what is to come. For one thread."""

    def __init__(self, costs: Costs = H100_8B) -> None:
        self._prior: Vector = np.array(costs)
        self._cells: dict[tuple[int, ...], _Cell] = {}
        self._passes = self._fitted = 0
        self._costs: Vector = self._prior.copy()
        self._covariance: Vector = np.diag((UNSEEN_SPREAD * self._prior) ** 2)
        self._spread = PASS_SPREAD
        _rehearse()

    @property
    def costs(self) -> Costs:
        """As learned so far."""
        self._fit()
        return Costs(*map(float, self._costs))

    def timed(self, work: Work, seconds: float) -> None:
        """One pass of `work` took `seconds`. What is no pass, or took no time, is not heard."""
        if work.passes != 1 or work.tokens < 1 or not 0.0 < seconds < math.inf:
            return
        self._passes += 1
        cell = self._cells.setdefault(_kind(work), _Cell())
        cell.timed.append((work, seconds))
        cell.seen = self._passes
        if len(self._cells) > CELLS:
            del self._cells[min(self._cells, key=lambda key: self._cells[key].seen)]

    def seconds(self, work: Work) -> Estimate:
        """How long it will take, as far as is known now."""
        self._fit()
        terms: Vector = np.array(work, dtype=np.float64)
        mean_s = float(terms @ self._costs)
        variance = float(terms @ self._covariance @ terms)
        return Estimate(mean_s, math.sqrt(max(0.0, variance) + (self._spread * mean_s) ** 2))

    # ---- the fit

    def _fit(self) -> None:
        new = self._passes - self._fitted
        if self._passes < FEW or new < min(REFIT_PASSES, 1 + self._fitted // 8):
            return
        self._fitted = self._passes
        cells = list(self._cells.values())
        timed = [one for cell in cells for one in cell.timed]
        terms: Vector = np.array([work for work, _ in timed], dtype=np.float64)
        seconds: Vector = np.array([seconds for _, seconds in timed])
        ends = np.cumsum([len(cell.timed) for cell in cells])
        ages = np.array([self._passes - cell.seen for cell in cells])
        weights = np.diff(ends, prepend=0) * 0.5 ** (ages / FADE_PASSES)
        costs = center = self._prior * np.quantile(
            seconds / (terms @ self._prior), LOWER, method="lower"
        )
        for _ in range(ROUNDS):
            ratios = seconds / np.maximum(1e-12, terms @ costs)
            spread = _spread(ratios)
            middle = [_middle(ratios, first, end) for first, end in pairwise((0, *ends))]
            relative = terms[middle] / seconds[middle, None]
            costs, covariance = _least_squares(relative, weights / spread**2, center)
        self._costs, self._covariance, self._spread = costs, covariance, spread


def _rehearse() -> None:
    """What a fit calls for the first time takes its time then: at the start, not while an engine waits."""
    ones = np.ones(8)
    _spread(ones)
    _middle(ones, 0, 8)
    np.quantile(ones, LOWER, method="lower")
    _least_squares(np.ones((8, 4)), ones, -ones[:4])


def _kind(work: Work) -> tuple[int, ...]:
    """Passes that cost about the same in each of their terms."""
    return (
        work.tokens.bit_length(),
        int(work.pairs).bit_length() // 2,
        work.read_tokens.bit_length() // 2,
    )


def _spread(ratios: Vector) -> float:
    """How far a pass is from its prediction, as a share: by the middle distance."""
    middle = 1.48 * float(np.median(np.abs(np.log(ratios))))
    known = PASS_SPREAD_WEIGHT * PASS_SPREAD**2 + len(ratios) * middle**2
    return max(LEAST_SPREAD, math.sqrt(known / (PASS_SPREAD_WEIGHT + len(ratios))))


def _middle(ratios: Vector, first: int, end: int) -> int:
    """Which of [first, end) is in the middle; of two the faster one."""
    return first + int(np.argsort(ratios[first:end])[(end - first - 1) // 2])


def _least_squares(relative: Vector, weights: Vector, center: Vector) -> tuple[Vector, Vector]:
    """Costs, none negative, with the least weighted squares of relative errors, near `center`; and
    their covariance. Each row of `relative` is the terms of a pass over its seconds."""
    terms = relative * center  # in units of `center` all costs are about 1
    inverse = np.eye(len(center)) / PRIOR_SPREAD**2 + terms.T @ (terms * weights[:, None])
    right = np.ones(len(center)) / PRIOR_SPREAD**2 + terms.T @ weights
    covariance = np.linalg.inv(inverse)
    found = covariance @ right
    if found.min() < 0.0:
        found = _none_negative(inverse, right)
    return found * center, covariance * np.outer(center, center)


def _none_negative(inverse: Vector, right: Vector) -> Vector:
    found = np.ones(len(right))
    for _ in range(SWEEPS):
        for i in range(len(found)):
            rest = right[i] - inverse[i] @ found + inverse[i, i] * found[i]
            found[i] = max(0.0, rest / inverse[i, i])
    return found
