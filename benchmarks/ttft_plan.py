"""Which session of ttft.py measures what, in which order, and what is said of its runs. Nothing is measured here."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks import results
from benchmarks.command import clean
from benchmarks.ttft_systems import (
    Case,
    CpuTier,
    Plain,
    Reading,
    S3Tier,
    Sample,
    Saving,
    Session,
)

COLD = ("recompute", "saving")  # which no prefix helps
Wanted = tuple[str, Case]  # a system and its case
Plan = dict[tuple[type[Session], str], list[Wanted]]  # by session and store


def cases_of(text: str, contexts: Sequence[int], ratios: Sequence[float]) -> list[Case]:
    """`4096` is that context with all ratios, `4096x0.5` just one; nothing is all of them."""
    found: list[Case] = []
    for part in text.split(",") if text else [str(context) for context in contexts]:
        context, _, ratio = part.partition("x")
        for one in [float(ratio)] if ratio else ratios:
            found.append(Case(int(context), one))
    return found


def planned(
    systems: Sequence[str],
    cases: Sequence[Case],
    stores: Sequence[str],
    has: Callable[[str, Case, str], bool],
) -> Plan:
    """What each session has to measure, the most telling sessions first; what `has` a line is not.

    `has(system, case, store)`.
    """
    first, *others = stores or [""]
    order: list[tuple[type[Session], str]] = [(Saving, first), (Reading, first), (Plain, "none")]
    order += [(Reading, store) for store in others] + [(CpuTier, "none")]
    order += [(S3Tier, store) for store in stores]
    cold = [Case(context, 0.0) for context in dict.fromkeys(c.context_tokens for c in cases)]
    longest = max(cases, key=lambda case: case.hit_tokens)
    middle = sorted(cold, key=lambda case: case.context_tokens)[len(cold) // 2]
    plan: Plan = {}
    for kind, store in order:
        mine = [system for system in kind.systems if system in systems]
        wanted = [
            (system, case)
            for case in [*cases, *cold]
            for system in mine
            if (system in COLD) == (case.hit_ratio == 0)
        ]
        if kind is Reading and "decodes" in systems:
            wanted.append(("decodes", longest))
        if kind is Plain and "decodes" in systems:
            wanted += [("decodes-hbm", longest), ("decodes-cold", middle)]
        if kind is Saving and "decodes" in systems:
            wanted.append(("decodes-saving", middle))
        plan[kind, store] = [(s, case) for s, case in wanted if not has(s, case, store)]
    return plan


def written(plan: Plan) -> Iterator[Case]:
    """The cases whose prefixes must lie in a store, each once."""
    wanted = [one for (kind, _), some in plan.items() if kind is Reading for one in some]
    yield from dict.fromkeys(case for _, case in wanted)


def told(case: Case, store: str) -> dict[str, Any]:
    return {
        **{"context_tokens": case.context_tokens, "hit_ratio": case.hit_ratio},
        "store": store,
    }


def said(samples: Sequence[Sample], case: Case, system: str) -> dict[str, Any]:
    """Of all runs of a case, those that do not count left out and counted."""
    good = [sample for sample in samples if not sample.wrong]
    if not good:
        return {"metrics": {}, "skipped": clean(samples[-1].wrong)}
    ttft_s = statistics.median(sample.ttft_s for sample in good)
    metrics: dict[str, Any] = {"ttft_s": ttft_s}
    read = [sample.counted.get("read_bytes", 0.0) for sample in good]
    if system == "objectcache":  # what came until the first token, in the time until then
        rate = statistics.median(sample.counted["read_bytes"] / sample.ttft_s for sample in good)
        metrics |= {"gb_per_s": rate / 1e9}
    if system in ("objectcache", "local"):
        metrics |= {"read_bytes": int(statistics.median(read))}
    metrics = results.rounded(metrics) | {
        "ttft_s_runs": [float(f"{sample.ttft_s:.4g}") for sample in good],
        "hit_tokens": good[-1].cached_tokens,
        "runs": len(good),
    }
    if len(good) < len(samples):
        metrics |= {"runs_left_out": len(samples) - len(good)}
    return {"metrics": metrics}
