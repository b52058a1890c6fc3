"""What the package decides about admission, the wire and load-or-recompute, played on a model of S3, wire and GPU.

    python -m benchmarks.simulate               everything; adds to benchmarks/results/
    python -m benchmarks.simulate --cases paper,rules
    python -m benchmarks.simulate --report      the table and the plot, from the results

The decisions are those of objectcache itself (compute, arrival, moment, worth, sharing, plan, flow);
all else is a model, and its numbers are no measurements. The same seed gives the same results. Cases:

paper
    The three concurrent workloads of the ObjectCache paper: its rules as it measured them and on a
    shared wire, and ours. See simulated_paper.py.
modes
    One engine (8B on an H100), so many users who each send their next prompt when the last is
    answered: 4K to 64K tokens, hits of 0 to 100 %, 128 tokens out. Admit when staged, at once, just
    in time (with its margin, and without leave to be early), or compute everything.
bursts
    The prompts of admission.py (4K to 64K, 157K of 291K tokens in the store), by so many users who all
    ask at once and again when all are answered; everything that is found is loaded.
rules
    16 or 64 prompts at once, or two a second: who of them gets the wire; with all that is found
    loaded, and with load or recompute decided, which changes what is loaded with every rule.
fleet
    1,000 engines on one bucket, each with a wire of 25 Gbps, bursts of five times the usual rate: what
    is refused below so many prefixes, what users wait and what S3 bills.

S3: first bytes lognormal, 27 ms (median) and 114 ms (p99), one in a thousand ten times that, 85 MB/s a
connection, 5,500 GETs a second below a prefix, as published. GPU: the costs measured on an H100, 3 %
of noise. Not modelled: preemption, lookups beyond a fixed time, hedges, loss, the client's CPU.
"""

import argparse
import random
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import results, simulate_report
from benchmarks.admission_plan import MIX, RATIOS, Scene, asked, pool
from benchmarks.simulated import S3, S3Law, Timeline
from benchmarks.simulated_engine import Engine
from benchmarks.simulated_paper import RULES, TABLE_A12, WORKLOADS, added_ms
from benchmarks.simulated_prompts import CHUNK_TOKENS, RECOMPUTE, Request, Setting
from objectcache.moment import AT_ONCE, JUST_IN_TIME, STAGED

GBPS = 1e9 / 8
WIRES_GBPS = (10, 25, 50, 100)
USERS = (4, 16, 64)
PROMPTS = 240  # of all users
RUNS = 3  # with other seeds, of which the mean is told
CONTEXTS = (4096, 8192, 16384, 32768, 65536)
HITS = (0.0, 0.5, 0.875, 1.0)
GET_USD = 0.4e-6
GPU_HOUR_USD = 2.5
ALONE = S3Law(requests_per_s=1e9)
MODES = {
    "recompute": {"mode": RECOMPUTE},
    "staged": {"mode": STAGED},
    "at once": {"mode": AT_ONCE},
    "just in time": {"mode": JUST_IN_TIME},
    "just in time, never early": {"mode": JUST_IN_TIME, "early": False},
}
BURST_MODES = ("staged", "at once", "just in time")
BURST_RUNS, BURST_GAP_S = 6, 60.0  # in which all are answered
BURST_RING_SLOTS = 416  # 13 GiB, as there
LOADS = {"16 at once": (16, None), "64 at once": (64, None), "2 a second": (64, 2.0)}
FLEET_ENGINES, FLEET_S, FLEET_PER_S = 1000, 10.0, 0.25
BURST_EVERY_S, BURST_S, BURST_TIMES = 5.0, 0.5, 5.0


@dataclass(frozen=True)
class Case:
    group: str
    system: str
    case: dict[str, Any]


def cases(smoke: bool = False) -> Iterator[Case]:
    for workload in WORKLOADS:
        for rule in RULES:
            for wire in ("alone", "shared") if rule in TABLE_A12 else ("shared",):
                yield Case("paper", rule, {"workload": workload, "wire": wire})
    for users in USERS[:1] if smoke else USERS:
        for gbps in WIRES_GBPS[-1:] if smoke else WIRES_GBPS:
            for system in MODES:
                yield Case("modes", system, {"users": users, "gbps": gbps})
            for system in BURST_MODES:
                yield Case("bursts", system, {"users": users, "gbps": gbps})
    for load in LOADS:
        for gbps in (25, 100):
            for rule in ("ours", "equal", "calibrated", "in-order"):
                for loads in ("all", "decided"):
                    if not smoke or (load == "16 at once" and loads == "all"):
                        yield Case("rules", rule, {"load": load, "gbps": gbps, "loads": loads})
    for prefixes in (1,) if smoke else (1, 4, 16):
        for system in ("recompute", "staged", "just in time"):
            if prefixes == 1 or system != "recompute":
                engines = 4 if smoke else FLEET_ENGINES
                yield Case("fleet", system, {"engines": engines, "prefixes": prefixes})


def measure(case: Case, seed: int = 0) -> dict[str, Any]:
    """The metrics of a case; names carry their units."""
    about = case.case
    if case.group == "paper":
        each = added_ms(about["workload"], case.system, about["wire"] == "shared")
        told = TABLE_A12.get(case.system, {}).get(about["workload"])
        return {"added_ms": sum(each), "worst_ms": max(each), "printed_ms": told}
    if case.group == "modes":
        setting = Setting(wire_bytes_per_s=about["gbps"] * GBPS, **MODES[case.system])
        return _averaged(
            [_closed(setting, about["users"], run) for run in range(seed, seed + RUNS)]
        )
    if case.group == "bursts":
        wire = about["gbps"] * GBPS
        slots = {"ring_slots": BURST_RING_SLOTS, "lookup_s": 0.1}
        setting = Setting(wire_bytes_per_s=wire, split=False, **slots, **MODES[case.system])
        return _bursts(setting, about["users"], seed)
    if case.group == "rules":
        wire = about["gbps"] * GBPS
        split = about["loads"] == "decided"
        setting = Setting(JUST_IN_TIME, case.system, wire_bytes_per_s=wire, split=split)
        return _open(setting, *LOADS[about["load"]], seed)
    return _fleet(MODES[case.system], about["engines"], about["prefixes"], seed)


def _prompt(number: int, at_s: float, chance: random.Random, output_tokens: int) -> Request:
    tokens, hit = chance.choice(CONTEXTS), chance.choice(HITS)
    return Request(number, at_s, tokens, int(tokens * hit) // CHUNK_TOKENS, output_tokens)


def _closed(setting: Setting, users: int, seed: int) -> dict[str, Any]:
    """Each user sends the next prompt when the last is answered. All systems get the same prompts."""
    line = Timeline()
    s3 = S3(line, ALONE, seed)
    engine = Engine(line, s3, setting, seed)
    chances = [random.Random(seed * 1000 + user) for user in range(users)]
    sent = [0] * users

    def send(user: int) -> None:
        if sent[user] < PROMPTS // users:
            sent[user] += 1
            engine.arrive(_prompt(user, line.now, chances[user], 128))

    engine.finished = lambda request: send(request.number)
    for user in range(users):
        line.at(0.05 * user, lambda user=user: send(user))
    line.run()
    return _told([engine], s3, line.now)


def _open(setting: Setting, count: int, per_s: float | None, seed: int) -> dict[str, Any]:
    told = []
    for run in range(seed, seed + RUNS):
        line = Timeline()
        s3 = S3(line, ALONE, run)
        engine = Engine(line, s3, setting, run)
        chance, at_s = random.Random(run), 0.0
        for number in range(count):
            at_s += chance.expovariate(per_s) if per_s else 0.0
            engine.arrive(_prompt(number, at_s, chance, 64))
        line.run()
        told.append(_told([engine], s3, line.now))
    return _averaged(told)


def _bursts(setting: Setting, users: int, seed: int) -> dict[str, Any]:
    told = []
    for run in range(seed, seed + BURST_RUNS):
        line = Timeline()
        s3 = S3(line, ALONE, run)
        engine = Engine(line, s3, setting, run)
        prompts = pool(MIX, RATIOS)
        for number, at in enumerate(asked(prompts, Scene(users, 0.0))):
            one, begins_s = prompts[at], number // users * BURST_GAP_S
            hit = one.hit_tokens // CHUNK_TOKENS
            engine.arrive(Request(number, begins_s, one.context_tokens, hit, 48))
        line.run()
        told.append(_told([engine], s3, line.now))
    return _averaged(told)


def _averaged(told: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: statistics.mean(one[name] for one in told) for name in told[0]}


def _fleet(mode: dict[str, Any], engines: int, prefixes: int, seed: int) -> dict[str, Any]:
    line = Timeline()
    s3 = S3(line, S3Law(prefixes=prefixes), seed)
    setting = Setting(wire_bytes_per_s=25 * GBPS, **mode)
    every = []
    for number in range(engines):
        engine = Engine(line, s3, setting, seed * engines + number)
        chance, at_s = random.Random(seed * engines + number), 0.0
        while True:
            burst = BURST_TIMES if at_s % BURST_EVERY_S < BURST_S else 1.0
            at_s += chance.expovariate(FLEET_PER_S * burst)
            if at_s > FLEET_S:
                break
            engine.arrive(_prompt(number, at_s, chance, 1))
        every.append(engine)
    line.run()
    told = _told(every, s3, line.now)
    rates = list(s3.each_second.values()) or [0]
    told["gets_per_s_mean"] = s3.requests / FLEET_S
    told["gets_per_s_most"] = max(rates)
    told["gets_per_s_most_each_prefix"] = max(rates) / prefixes
    told["refused_percent"] = 100 * s3.refused / max(1, s3.requests)
    return told


def _told(engines: list[Engine], s3: S3, lasted_s: float) -> dict[str, Any]:
    requests = [one for engine in engines for one in engine.tally.requests]
    firsts = [1e3 * one.first_token_s for one in requests]
    tokens = [1e3 * one for engine in engines for one in engine.tally.token_s]
    served = s3.requests - s3.refused
    gpu_s = sum(engine.tally.busy_s for engine in engines)
    return {
        "requests": len(requests),
        "ttft_mean_ms": statistics.mean(firsts),
        "ttft_p50_ms": _quantile(firsts, 0.5),
        "ttft_p99_ms": _quantile(firsts, 0.99),
        "tpot_mean_ms": statistics.mean(tokens) if tokens else 0.0,
        "tpot_p50_ms": _quantile(tokens, 0.5),
        "tpot_p99_ms": _quantile(tokens, 0.99),
        "stalled_s": sum(engine.tally.stalled_s for engine in engines),
        "lasted_s": lasted_s,
        "loaded_gb": sum(engine.tally.loaded_bytes for engine in engines) / 1e9,
        "gets": served,
        "given_up": sum(engine.tally.given_up for engine in engines),
        "ring_most_slots": max(engine.tally.ring_most for engine in engines),
        "s3_usd_per_1000": 1e3 * served * GET_USD / len(requests),
        "gpu_usd_per_1000": 1e3 * gpu_s / 3600 * GPU_HOUR_USD / len(requests),
    }


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulate")
    parser.add_argument("--cases", default="", help="groups, by commas")
    parser.add_argument("--out", type=Path, default=results.FOLDER, help="folder of results")
    parser.add_argument("--smoke", action="store_true", help="few and small cases")
    parser.add_argument("--again", action="store_true", help="also what has a line already")
    parser.add_argument("--report", action="store_true", help="only write the table and the plot")
    asked = parser.parse_args()
    if not asked.report:
        for case in cases(asked.smoke):
            if asked.cases and case.group not in asked.cases.split(","):
                continue
            lines = results.Lines(asked.out / f"simulate-{case.group}.jsonl")
            line = {
                "benchmark": "simulate",
                "machine": "a model",
                "commit": results.commit(),
                "system": case.system,
                "case": {"group": case.group, **case.case},
            }
            if asked.again or not lines.has(line):
                metrics = results.rounded(measure(case))
                lines.put(line | {"metrics": metrics})
                print(case.group, case.system, case.case, metrics, file=sys.stderr)
    simulate_report.write(asked.out)


if __name__ == "__main__":
    main()
