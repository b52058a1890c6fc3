"""Draws what a GPU does until a first token, from a profile of torch: the bus, the pages that are written, the computing. What the host does: timeline.py.

    python -m benchmarks.ttft --systems objectcache --cases 65536x0.875 --profile DIR    makes profiles
    python -m benchmarks.gpu_timeline DIR/*.json.gz --out docs/gpu-timeline.svg          one below the other
    python -m benchmarks.gpu_timeline DIR/*.json.gz --lines benchmarks/results/profile-16-core-h100.jsonl

Of a profile of decodes (`ttft --decodes --profile`) its steps are told as well, before and while a prefix is copied.

A request is computed in one pass or more; what the profile has of it ends with its first token. Copies from
host memory that are smaller than BUS_LEAST_BYTES are vLLM's own, of numbers.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import command, results

BUS_LEAST_BYTES = 64 << 10
WRITES = "reshape_and_cache"  # the kernel by which a layer writes its new KV
NEAR_MS = 0.05  # two spans that are nearer than that are drawn as one
GAPS = 5
WIDTH_IN, HEIGHT_IN = 9.0, 1.9
ROWS = {"bus": "#1f5fa8", "pages": "#c9892a", "computes": "#2a7f3f"}
Span = tuple[float, float]  # ms


@dataclass
class Profile:
    """Spans of each row in ms, from the first of them on, and bytes that crossed the bus."""

    rows: dict[str, list[Span]]
    bus_bytes: int

    @property
    def end_ms(self) -> float:
        return max((last for spans in self.rows.values() for _, last in spans), default=0.0)

    def busy_ms(self, row: str) -> float:
        return sum(last - first for first, last in self.rows[row])

    def gaps(self) -> list[Span]:
        """The longest times in which nothing is computed, from the first span of all on."""
        edges = [(0.0, 0.0), *self.rows["computes"]]
        found = [(before[1], after[0]) for before, after in itertools.pairwise(edges)]
        return sorted(sorted(found, key=lambda gap: gap[0] - gap[1])[:GAPS])


def row_of(event: dict[str, Any]) -> str:
    """Which row an event of the profile belongs to; "" if to none."""
    kind, name = event.get("cat", ""), event.get("name", "")
    if kind == "gpu_memcpy":
        large = event.get("args", {}).get("bytes", 0) >= BUS_LEAST_BYTES
        return "bus" if "HtoD" in name and large else ""
    if kind != "kernel":
        return ""
    return "pages" if "index_copy" in name or "index_put" in name else "computes"


def joined(spans: Iterable[Span], near_ms: float = 0.0) -> list[Span]:
    """Those that overlap or are near each other as one."""
    found: list[Span] = []
    for first, last in sorted(spans):
        if found and first <= found[-1][1] + near_ms:
            found[-1] = (found[-1][0], max(found[-1][1], last))
        else:
            found.append((first, last))
    return found


def profile(events: Sequence[dict[str, Any]]) -> Profile:
    """Of a trace's events; their times are in microseconds."""
    spans: dict[str, list[Span]] = {row: [] for row in ROWS}
    bus_bytes = 0
    for event in events:
        row = row_of(event) if event.get("ph") == "X" else ""
        if row:
            first = event["ts"] / 1e3
            spans[row].append((first, first + event["dur"] / 1e3))
        if row == "bus":
            bus_bytes += event["args"]["bytes"]
    zero = min((first for row in spans.values() for first, _ in row), default=0.0)
    rows = {
        row: joined((first - zero, last - zero) for first, last in some)
        for row, some in spans.items()
    }
    return Profile(rows, bus_bytes)


def events_of(path: Path) -> list[dict[str, Any]]:
    told = path.read_bytes()
    text = gzip.decompress(told) if path.suffix == ".gz" else told
    found: list[dict[str, Any]] = json.loads(text)["traceEvents"]
    return found


def steps(events: Sequence[dict[str, Any]], layers: int) -> dict[str, Any]:
    """Of decode steps: medians of the time from one to the next and of the time from a step's first layer to
    its last, in ms, while nothing crosses the bus and while a prefix is copied; and the longest of these.
    A layer begins with its write to the pages."""
    writes = sorted(e["ts"] / 1e3 for e in events if WRITES in e.get("name", "") and e.get("dur"))
    copies = [(e["ts"] / 1e3, (e["ts"] + e["dur"]) / 1e3) for e in events if row_of(e) == "bus"]
    begin = min((first for first, _ in copies), default=math.inf)
    end = max((last for _, last in copies), default=-math.inf)
    firsts, lasts = writes[::layers], writes[layers - 1 :: layers]
    spent: dict[str, list[tuple[float, float]]] = {"before": [], "copying": []}
    for (first, after), last in zip(itertools.pairwise(firsts), lasts, strict=False):
        where = "before" if after < begin else "copying" if begin <= first < end else ""
        if where:
            spent[where].append((after - first, last - first))
    found: dict[str, Any] = {}
    for where, some in spent.items():
        if some:
            found[f"{where}_steps"] = len(some)
            found[f"{where}_step_p50_ms"] = round(statistics.median(all_ for all_, _ in some), 2)
            found[f"{where}_layers_p50_ms"] = round(statistics.median(one for _, one in some), 2)
            found[f"{where}_step_max_ms"] = round(max(all_ for all_, _ in some), 2)
    return found


def name_of(path: Path) -> str:
    """What the profile was called; vLLM adds a rank and a time."""
    return path.name.partition("_rank")[0].partition(".pt.")[0]


def metrics(one: Profile) -> dict[str, Any]:
    found: dict[str, Any] = {f"{row}_busy_ms": round(one.busy_ms(row), 2) for row in ROWS}
    bus_s = one.busy_ms("bus") / 1e3
    found |= {"spans_ms": round(one.end_ms, 2), "bus_bytes": one.bus_bytes}
    found |= {"bus_gb_per_s": round(one.bus_bytes / bus_s / 1e9, 2) if bus_s else 0.0}
    gaps = [[round(first, 2), round(last, 2)] for first, last in one.gaps()]
    return found | {"computes_not_ms": gaps}


def draw(named: Sequence[tuple[str, Profile]], out: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "objectcache"  # the same picture for the same profile
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(named), 1, squeeze=False, figsize=(WIDTH_IN, HEIGHT_IN * len(named))
    )
    for (name, one), axis in zip(named, axes[:, 0], strict=True):
        for at, (row, colour) in enumerate(reversed(ROWS.items())):
            spans = joined(one.rows[row], NEAR_MS)
            axis.broken_barh(
                [(first, last - first) for first, last in spans], (at + 0.1, 0.8), color=colour
            )
        axis.set_yticks([0.5, 1.5, 2.5], list(reversed(ROWS)))
        axis.set_title(name, fontsize=9, loc="left")
        axis.set_xlim(0, one.end_ms)
    axes[-1, 0].set_xlabel("ms since the first copy or kernel")
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("profiles", type=Path, nargs="+", help="files that the profiler left")
    parser.add_argument("--out", type=Path, help="a picture, SVG")
    parser.add_argument("--lines", type=Path, help="a file of results to add to")
    parser.add_argument("--layers", type=int, default=32, help="of the model")
    parser.add_argument("--machine", default="", help="its name there")
    args = parser.parse_args()
    events = [events_of(path) for path in args.profiles]
    named = [(name_of(path), profile(of)) for path, of in zip(args.profiles, events, strict=True)]
    for (name, one), of in zip(named, events, strict=True):
        line = {"benchmark": "profile", "machine": args.machine or results.machine()}
        line |= {"commit": results.commit(), "system": "objectcache", "case": {"name": name}}
        decodes = steps(of, args.layers) if name.startswith("decodes") else {}
        line |= {"metrics": metrics(one) | decodes}
        print(json.dumps(line))
        if args.lines is not None:
            results.Lines(args.lines).put(line)
    if args.out is not None:
        draw(named, args.out)
        command.say(str(args.out))


if __name__ == "__main__":
    main()
