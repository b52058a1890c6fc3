"""The tables and the plots of admission.py, from the files of results alone. Nothing is measured here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.admission_plan import ARRIVALS, BURSTS, LOADS, NEXT, SYSTEMS
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
_SHOWN = (
    ("TTFT, s: p50 / p99", "ttft_p50_s", "ttft_p99_s"),
    ("TPOT, ms: p50 / p99", "tpot_p50_ms", "tpot_p99_ms"),
    ("ITL, ms: p50 / p99", "itl_p50_ms", "itl_p99_ms"),
    ("GB/s: run / server", "gb_per_s", "server_gb_per_s"),
)
_KINDS = {
    BURSTS: "All users ask at the same moment; when all are answered the next burst comes. Nobody's arrival "
    "depends on the system. With so few requests p99 is about that of the one that took longest.",
    NEXT: "Each user asks again as soon as theirs is answered: a system that holds up answers holds up the "
    "next requests too, and has fewer on the wire at once. So TTFTs of systems say little beside each other, "
    "but where there are as many users as prompts, or more: nobody asks twice.",
}
_PANELS = (("TTFT, s", "ttft_p50_s", "ttft_p99_s"), ("TPOT, ms", "tpot_p50_ms", "tpot_p99_ms"))
_WITHOUT = ("hbm", "recompute")
_TTFT = {"ttft_p50_s": "TTFT p50", "ttft_p99_s": "p99", "ttft_mean_s": "mean"}
_TPOT = {"tpot_p50_ms": "TPOT p50", "tpot_p99_ms": "p99"}
_PAIRED = "ttft_by_request"
_COMPARED = {
    **_TTFT,
    _PAIRED: "by request",
    **{
        f"{name} {system}": f"{head} ({system})"
        for system in _WITHOUT
        for name, head in _TPOT.items()
    },
}


def write(folder: Path) -> None:
    """Write admission.md, and admission-<machine>.svg for each machine, into `folder`."""
    head = (
        "# Ways to admit a request",
        "",
        "Made by `python -m benchmarks.admission --report` from `admission-*.jsonl` here. What each system is,",
        "what is asked and what makes a run count, stands at the head of `benchmarks/admission.py`.",
    )
    report.write(folder, "admission", head, _machine, plot)


def _machine(lines: list[Line]) -> Iterator[str]:
    facts = environment(lines)
    if facts is not None:
        about = facts["metrics"]
        yield (
            f"{about['cores']} cores; {about['kv_bytes_per_token'] / 1024:g} KiB of KV a token; ring of "
            f"{about['ring_bytes'] / 2**30:.1f} GiB. {len(facts['requests'])} prompts of "
            f"{about['prompt_tokens']} tokens, {about['prefix_tokens']} of them prefixes; answers of "
            f"{about['answer_tokens']} tokens. {measured(lines, facts)}"
        )
        yield from [f"{name} {facts[name]}" for name in ("engine", "options") if facts[name]]
        yield ""
    yield f"![TTFT and TPOT](admission-{lines[0]['machine']}.svg)"
    for kind in ARRIVALS:
        those = arriving(lines, kind)
        if users_of(those):
            yield from title(f"Arrivals: {kind}")
            yield _KINDS[kind]
            for users in users_of(those):
                yield from _table(those, users)
            yield from _against(those, kind)
    yield from skipped(lines)


def arriving(lines: Iterable[Line], kind: str) -> list[Line]:
    """Those of requests that arrive in this way. Lines that do not say so are older than the other."""
    return [one for one in lines if one["case"].get("arrivals", NEXT) == kind]


def _subtitle(text: str) -> Iterator[str]:
    yield from ("", f"#### {text}", "")


def _table(lines: list[Line], users: int) -> Iterator[str]:
    yield from _subtitle(f"{users} users")
    yield from table_head("system, Gbit/s", [*(name for name, *_ in _SHOWN), "seconds", "runs"])
    rows = [("recompute", 0.0), ("hbm", 0.0)]
    rows += [(system, wire) for wire in wires_of(lines, users) for system in LOADS]
    for system, wire in rows:
        m = metrics_of(lines, system, users, wire)
        if m:
            cells = [f"{m[a]:.3g} / {m[b]:.3g}" if a in m else "" for _, a, b in _SHOWN]
            name = f"{system}, {wire:g}" if wire else system
            yield table_row(name, [*cells, f"{m['seconds']:.3g}", _runs(m)])


def _runs(metrics: dict[str, Any]) -> str:
    left_out = metrics.get("runs_left_out", 0)
    return (
        f"{metrics['runs']} of {metrics['runs'] + left_out}" if left_out else str(metrics["runs"])
    )


def _against(lines: list[Line], kind: str) -> Iterator[str]:
    """Just in time beside the better of the two others, and beside what loads nothing."""
    rows = []
    shown = [name for name in _COMPARED if name != _PAIRED or kind == BURSTS]
    for users in users_of(lines):
        for wire in wires_of(lines, users):
            found = compared(lines, users, wire)
            if found:
                cells = [f"{found[name]:+.1f}" if name in found else "" for name in shown]
                rows.append(table_row(f"{users} users, {wire:g} Gbit/s", cells))
    if rows:
        yield from _subtitle(
            "just-in-time: % more TTFT than the better of the others, % more TPOT than without loads"
        )
        yield "Without loads: with the prefixes in vLLM's own cache, and with all computed."
        if kind == BURSTS:
            yield "By request: the median over requests, each beside the better of the others for that very"
            yield "request, means over runs. Neither of them is that good for all of them."
        yield ""
        yield from table_head("", [_COMPARED[name] for name in shown])
        yield from rows


def compared(lines: Iterable[Line], users: int, wire: float) -> dict[str, float]:
    """By how many percent just-in-time is worse, for each metric of which the others are known."""
    lines = list(lines)
    mine = metrics_of(lines, "just-in-time", users, wire)
    others = [metrics_of(lines, system, users, wire) for system in ("staged", "at-once")]
    found = {}
    if mine and all(others):
        for name in _TTFT:
            found[name] = 100 * (mine[name] / min(one[name] for one in others) - 1)
        by_request = paired(mine, others)
        if by_request is not None:
            found[_PAIRED] = by_request
    for system in _WITHOUT:
        without = metrics_of(lines, system, users, 0.0)
        if mine and without:
            for name in _TPOT:
                found[f"{name} {system}"] = 100 * (mine[name] / without[name] - 1)
    return found


def paired(mine: dict[str, Any], others: Iterable[dict[str, Any]]) -> float | None:
    """The median of how many percent more TTFT a request has than with the better of the others for it."""
    each = [one.get("ttft_s_runs") for one in (mine, *others)]
    if not all(each) or len({len(run) for runs in each for run in runs}) != 1:
        return None  # nothing is known of single requests, or they are others
    first, *rest = (np.mean(runs, axis=0) for runs in each)
    return float(100 * (np.median(first / np.min(rest, axis=0)) - 1))


def users_of(lines: Iterable[Line]) -> list[int]:
    return sorted({one["case"]["concurrent"] for one in lines if one["system"] in SYSTEMS})


def wires_of(lines: Iterable[Line], users: int) -> list[float]:
    cases = (one["case"] for one in lines if one["system"] in LOADS)
    return sorted({case["wire_gbps"] for case in cases if case["concurrent"] == users})


def metrics_of(lines: Iterable[Line], system: str, users: int, wire: float) -> dict[str, Any]:
    """{} if there are none; of lines with and without the way of arrival those that came last."""
    found: dict[str, Any] = {}
    for one in lines:
        case = one["case"]
        if one["system"] == system and (case["concurrent"], case["wire_gbps"]) == (users, wire):
            found = one["metrics"]
    return found


def plot(lines: list[Line], machine: str, path: Path) -> None:
    """For each number of users TTFT and TPOT by the wire: medians as dots, to the 99th percentile a line."""
    kinds = [kind for kind in ARRIVALS if users_of(arriving(lines, kind))]
    counts = users_of(lines)
    if not counts:
        return
    pyplot = drawing("admission")
    size = (4.0 * len(counts) + 1.5, 6.0 * len(kinds))
    figure, panels = pyplot.subplots(2 * len(kinds), len(counts), figsize=size, squeeze=False)
    named: dict[str, Any] = {}
    for number, axes in enumerate(panels.flat):
        row, column = divmod(number, len(counts))
        kind, panel = kinds[row // 2], _PANELS[row % 2]
        those, users = arriving(lines, kind), counts[column]
        if users in users_of(those):
            named = _panel(axes, those, users, panel) | named
            axes.set_title(f"{users} users, {kind}", fontsize=10)
        else:
            axes.set_axis_off()
    figure.legend(named.values(), named.keys(), loc="lower center", ncol=5, fontsize=8)
    figure.suptitle(f"{machine}: median (dot) to 99th percentile")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    keep(pyplot, figure, path)


def _panel(axes: Any, lines: list[Line], users: int, panel: tuple[str, str, str]) -> dict[str, Any]:
    """Draw one; what stands for which system."""
    label, low, high = panel
    wires, named = wires_of(lines, users), {}
    for number, system in enumerate(SYSTEMS):
        for at, wire in enumerate(wires):
            m = metrics_of(lines, system, users, wire if system in LOADS else 0.0)
            if m:
                x = at + (number - 2) * 0.16
                axes.plot([x, x], [m[low], m[high]], color=f"C{number}")
                (named[system],) = axes.plot([x], [m[low]], "o", color=f"C{number}")
    axes.set_xticks(range(len(wires)), [f"{wire:g}" for wire in wires])
    axes.set_ylim(bottom=0)
    axes.set_ylabel(label)
    axes.set_xlabel("wire, Gbit/s")
    return named
