"""The tables and the plot of throughput.py, from the files of results alone. Nothing is measured here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.report import (
    drawing,
    environment,
    keep,
    measured,
    skipped,
    table_head,
    table_row,
    title,
)

Line = dict[str, Any]
_HEADS = (
    *("requests/s", "output tokens/s", "TTFT p50 / p99, s", "TPOT p50 / p99, ms"),
    *("hit tokens", "GPU hit tokens"),
)


def write(folder: Path) -> None:
    """Write throughput.md, and throughput-<machine>.svg for each machine, into `folder`."""
    head = (
        "# Throughput",
        "",
        "Made by `python -m benchmarks.throughput --report` from `throughput-*.jsonl` here. What each system",
        "and pass is, and what is not measured, stands at the head of `benchmarks/throughput.py`.",
    )
    report.write(folder, "throughput", head, _machine, plot)


def _machine(lines: list[Line]) -> Iterator[str]:
    facts = environment(lines)
    if facts is not None:
        about = facts["metrics"]
        yield (
            f"{about['cores']} cores; {about['kv_bytes_per_token'] / 1024:g} KiB of KV a token; "
            f"{about['host_bytes'] / 2**30:.3g} GiB of host memory. {measured(lines, facts)}"
        )
        yield from [f"{name} {facts[name]}" for name in ("engine", "options") if facts[name]]
        yield ""
    yield f"![throughput](throughput-{lines[0]['machine']}.svg)"
    for load, mine in loads_of(lines).items():
        yield from title(load)
        yield from table_head("system, pass", _HEADS)
        for one in mine:
            m = one["metrics"]
            pairs = [f"{m[f'{w[0]}50_{w[1]}']:.3g} / {m[f'{w[0]}99_{w[1]}']:.3g}" for w in _PAIRS]
            rates = [f"{m['requests_per_s']:.4g}", f"{m['output_tokens_per_s']:.4g}"]
            hits = [f"{m['hit_tokens']:,}", f"{m['gpu_hit_tokens']:,}"]
            yield table_row(_name(one), [*rates, *pairs, *hits])
    yield from skipped(lines)


_PAIRS = (("ttft_p", "s"), ("tpot_p", "ms"))


def loads_of(lines: Iterable[Line]) -> dict[str, list[Line]]:
    """What was measured, by what was sent, in the order of the file."""
    found: dict[str, list[Line]] = {}
    for one in lines:
        if one["system"] != "environment" and one["metrics"]:
            found.setdefault(_load(one["case"]), []).append(one)
    return found


def _load(case: dict[str, Any]) -> str:
    rate = case["requests_per_s"]
    return (
        f"{case['prompts']} prompts, {case['prefixes']} prefixes of {case['prefix_tokens']} tokens, "
        f"suffixes of {case['suffix_tokens']}, {case['output_tokens']} tokens out, "
        f"{rate if isinstance(rate, str) else f'{rate:g} requests/s'}, "
        f"{case['in_flight']} in flight"
    )


def _name(line: Line) -> str:
    case = line["case"]
    store = "" if case["store"] == "none" else f", {case['store']}"
    return f"{line['system']}{store}, {case['pass']}"


def plot(lines: list[Line], machine: str, path: Path) -> None:
    """A panel for each load: requests a second of each system and pass."""
    loads = loads_of(lines)
    if not loads:
        return
    pyplot = drawing("throughput")
    rows = max(len(mine) for mine in loads.values())
    size = (8.0, (0.32 * rows + 1.1) * len(loads))
    figure, panels = pyplot.subplots(len(loads), 1, figsize=size, squeeze=False)
    for axes, (load, mine) in zip(panels[:, 0], loads.items(), strict=True):
        rates = [one["metrics"]["requests_per_s"] for one in reversed(mine)]
        again = [one["case"]["pass"] == "again" for one in reversed(mine)]
        axes.barh(range(len(mine)), rates, color=["C0" if is_so else "C7" for is_so in again])
        axes.set_yticks(range(len(mine)), [_name(one) for one in reversed(mine)])
        axes.set_title(load, fontsize=8)
    panels[-1][0].set_xlabel("requests/s")
    figure.suptitle(machine)
    figure.tight_layout()
    keep(pyplot, figure, path)
