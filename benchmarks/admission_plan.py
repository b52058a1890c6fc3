"""What the users of admission.py ask for, in which order it is measured, and what is said of the runs. Nothing is measured here."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from benchmarks import results
from benchmarks.command import clean
from benchmarks.ttft_systems import Case

SYSTEMS = ("staged", "at-once", "just-in-time", "recompute", "hbm")
LOADS = SYSTEMS[:3]
BURSTS, NEXT = ARRIVALS = ("bursts", "next")
SETS = 2  # of prefixes, by turns: what one run leaves in host memory is of no use to the next
# Contexts and how many of two dozen requests have them.
MIX = {65536: 1, 32768: 2, 16384: 4, 8192: 6, 4096: 11}
RATIOS = (0.0, 0.25, 0.5, 0.75, 0.875, 1.0)
LONGEST_RATIO = 0.75  # of the longest, that host memory need not be larger
SMOKE_MIX, SMOKE_RATIOS = {1536: 3, 1024: 3, 512: 2}, (0.0, 0.5, 1.0)


@dataclass(frozen=True)
class Scene:
    """So many users who ask in this way, and a wire of so many Gbit/s; 0 where nothing comes by it."""

    users: int
    wire_gbps: float
    arrivals: str = BURSTS

    @property
    def wire_bytes_per_s(self) -> float:
        return self.wire_gbps * 1e9 / 8


SCENES = tuple(
    Scene(users, gbps)
    for users, gbps in (
        *((16, 25), (16, 100), (4, 25), (16, 10), (16, 50), (64, 25)),
        *((4, 100), (64, 100), (4, 10), (4, 50), (64, 10), (64, 50)),
    )
)
SMOKE_SCENES = (Scene(4, 0.4),)


@dataclass
class Run:
    """All requests of one run. `wrong` says why it does not count."""

    ttft_s: list[float] = field(default_factory=list)
    tpot_ms: list[float] = field(default_factory=list)
    gaps_ms: list[float] = field(default_factory=list)
    seconds: float = 0.0
    hit_tokens: int = 0
    read_bytes: float = 0.0
    counted: dict[str, float] = field(default_factory=dict)
    wrong: str = ""


def scenes_of(text: str, all_: Sequence[Scene], arrivals: Sequence[str]) -> list[Scene]:
    """`16x25` is 16 users at 25 Gbit/s; nothing is all of them. Each in each way of arrival."""
    found = list(all_)
    if text:
        parts = [part.partition("x") for part in text.split(",")]
        found = [Scene(int(users), float(gbps)) for users, _, gbps in parts]
    return [replace(scene, arrivals=kind) for scene in found for kind in arrivals]


def pool(mix: dict[int, int], ratios: Sequence[float], seed: int = 0) -> list[Case]:
    """One request for each of the mix, in a random order; each ratio comes as often as the others, about."""
    chance = random.Random(seed)
    contexts = [context for context, count in mix.items() for _ in range(count)]
    rates = [ratios[number % len(ratios)] for number in range(len(contexts))]
    chance.shuffle(rates)
    longest = max(contexts)
    cases = [
        Case(context, min(LONGEST_RATIO, max(0.5, rate)) if context == longest else rate)
        for context, rate in zip(contexts, rates, strict=True)
    ]
    chance.shuffle(cases)
    return cases


def asked(cases: Sequence[Case], scene: Scene) -> list[int]:
    """Which of the pool are asked for, in this order. With more users than it has, a prefix serves several.

    A burst is the next of the pool, as many as there are users. The last one is filled with its own once
    more: what an earlier one loaded lies in vLLM's own cache, so there would be nothing to load.
    """
    users, all_ = scene.users, range(len(cases))
    if scene.arrivals == NEXT:
        return [number % len(cases) for number in range(max(len(cases), users))]
    bursts = [all_[first : first + users] for first in range(0, len(cases), users)]
    return [burst[at % len(burst)] for burst in bursts for at in range(users)]


def distinct_hit_tokens(cases: Sequence[Case], numbers: Sequence[int]) -> int:
    return sum(cases[number].hit_tokens for number in set(numbers))


def turns(
    scenes: Sequence[Scene],
    systems: Sequence[str],
    rounds: int,
    has: Callable[[str, Scene], bool],
) -> Iterator[tuple[int, Scene, str]]:
    """(round, scene, system). In a round each scene has all systems, one after the other, beginning with
    another one in each round; what loads nothing is measured once for so many users and their way of arrival."""
    done = {
        (scene, system) for scene in scenes for system in systems if has(system, of(scene, system))
    }
    for number in range(rounds):
        told_of: set[tuple[str, Scene]] = set()
        for scene in scenes:
            first = number % len(systems)
            for system in [*systems[first:], *systems[:first]]:
                named = of(scene, system)
                if system not in LOADS and (system, named) in told_of:
                    continue
                told_of.add((system, named))
                if (scene, system) not in done:
                    yield number, named, system


def of(scene: Scene, system: str) -> Scene:
    """The scene by which a system is named."""
    return scene if system in LOADS else replace(scene, wire_gbps=0.0)


def told(scene: Scene, law: dict[str, float]) -> dict[str, Any]:
    """As a case of the results."""
    named = {"concurrent": scene.users, "wire_gbps": scene.wire_gbps, "arrivals": scene.arrivals}
    if not scene.wire_gbps:
        return named | {"store": "none"}
    first = {f"first_byte_{name}": law[name] for name in ("p50_ms", "p99_ms")}
    return named | {"store": "s3-like", **first, "connection_mb_per_s": law["bytes_per_s"] / 1e6}


def said(runs: Sequence[Run], server_bytes_per_s: float) -> dict[str, Any]:
    """Of all runs of a system in a scene, those that do not count left out and counted."""
    good = [run for run in runs if not run.wrong]
    if not good:
        return {"metrics": {}, "skipped": clean(runs[-1].wrong)}
    metrics: dict[str, Any] = {}
    for name, values in (
        ("ttft_{}_s", [value for run in good for value in run.ttft_s]),
        ("tpot_{}_ms", [value for run in good for value in run.tpot_ms]),
        ("itl_{}_ms", [value for run in good for value in run.gaps_ms]),
    ):
        for quantile in (50, 99):
            metrics[name.format(f"p{quantile}")] = float(np.percentile(values, quantile))
    metrics["ttft_mean_s"] = float(np.mean([value for run in good for value in run.ttft_s]))
    metrics["itl_max_ms"] = max(value for run in good for value in run.gaps_ms)
    metrics["seconds"] = float(np.median([run.seconds for run in good]))
    read = float(np.median([run.read_bytes for run in good]))
    if read:
        rate = float(np.median([run.read_bytes / run.seconds for run in good]))
        metrics |= {"gb_per_s": rate / 1e9, "server_gb_per_s": server_bytes_per_s / 1e9}
    found = results.rounded(metrics) | {
        "read_bytes": int(read),
        "requests": len(good[-1].ttft_s),
        "hit_tokens": good[-1].hit_tokens,
        "runs": len(good),
        "ttft_s_runs": [[float(f"{value:.4g}") for value in run.ttft_s] for run in good],
    }
    for name in ("waited_layers", "timely_prompts", "late_prompts"):
        found[name] = int(sum(run.counted.get(name, 0.0) for run in good))
    if len(good) < len(runs):
        found |= {"runs_left_out": len(runs) - len(good), "why_left_out": clean(_why(runs))}
    return {"metrics": found}


def _why(runs: Sequence[Run]) -> str:
    return next(run.wrong for run in reversed(runs) if run.wrong)
