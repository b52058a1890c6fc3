"""The tables and the plots of ttft.py, from the files of results alone. Nothing is measured here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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
Cell = tuple[int, float]  # context and hit ratio
Row = tuple[str, str]  # system and store
_ORDER = ("recompute", "hbm", "local", "objectcache", "vllm-cpu", "vllm-s3")
_MEANS = {
    "recompute": "computed, nothing cached",
    "hbm": "prefix in vLLM's cache on the GPU",
    "local": "objectcache, from pinned memory",
    "objectcache": "objectcache, from the store",
    "vllm-cpu": "vLLM's tier in host memory",
    "vllm-s3": "vLLM's tier in S3",
}


def write(folder: Path) -> None:
    """Write ttft.md, and ttft-<machine>.svg for each machine, into `folder`."""
    head = (
        "# Time to the first token",
        "",
        "Made by `python -m benchmarks.ttft --report` from `ttft-*.jsonl` here. What each system is,",
        "what makes a run count, and what is not measured, stands at the head of `benchmarks/ttft.py`.",
    )
    report.write(folder, "ttft", head, _machine, plot)


def _machine(lines: list[Line]) -> Iterator[str]:
    facts = environment(lines)
    if facts is not None:
        about = facts["metrics"]
        yield (
            f"{about['cores']} cores; {about['kv_bytes_per_token'] / 1024:g} KiB of KV a token; ring of "
            f"{about['ring_bytes'] / 2**30:.1f} GiB. {measured(lines, facts)}"
        )
        changed = [f"{name} {facts[name]}" for name in ("engine", "options") if facts[name]]
        yield from changed
        yield ""
    yield f"![TTFT](ttft-{lines[0]['machine']}.svg)"
    yield from _ttft(lines)
    yield from _against(lines)
    yield from _saving(lines)
    yield from _decodes(lines)
    yield from _saves_beside(lines)
    yield from skipped(lines)


def _ttft(lines: list[Line]) -> Iterator[str]:
    cells = cells_of(lines)
    if not cells:
        return
    yield from title("TTFT, s: median (all runs)")
    yield from _table([_head(cell) for cell in cells], lines, cells)


def _table(heads: Sequence[str], lines: list[Line], cells: Sequence[Cell]) -> Iterator[str]:
    yield from table_head("", heads)
    for row in rows_of(lines):
        found = [metrics_of(lines, row, cell) for cell in cells]
        shown = [f"{m['ttft_s']:.3g} ({_runs(m)})" if m else "" for m in found]
        if any(shown):
            yield table_row(_name(row), shown)


def _against(lines: list[Line]) -> Iterator[str]:
    """Ours from a store beside the baselines of the same run."""
    cells = cells_of(lines)
    ours = [row for row in rows_of(lines) if row[0] == "objectcache"]
    if not ours:
        return
    yield from title("objectcache from the store, against")
    yield from table_head("", [_head(cell) for cell in cells])
    for row in ours:
        others = [("local", row[1]), ("hbm", "none"), ("vllm-cpu", "none")]
        others += [("vllm-s3", row[1]), ("recompute", "none")]
        for other in others:
            shown = [_compared(lines, row, other, cell) for cell in cells]
            if any(shown):
                yield table_row(f"{row[1]}: {other[0]}", shown)


def _compared(lines: list[Line], row: Row, other: Row, cell: Cell) -> str:
    mine, its = metrics_of(lines, row, cell), metrics_of(lines, other, cell)
    if not mine or not its:
        return ""
    more_s = mine["ttft_s"] - its["ttft_s"]
    if other[0] in ("local", "hbm"):
        return f"{100 * more_s / its['ttft_s']:+.1f} % ({more_s * 1000:+.0f} ms)"
    return f"{mine['ttft_s'] / its['ttft_s']:.2f} of it"


def _saving(lines: list[Line]) -> Iterator[str]:
    saving = [one for one in lines if one["system"] == "saving" and one["metrics"]]
    if not saving:
        return
    yield from title("What saving costs a cold prompt: TTFT, s")
    yield from table_head("tokens, store", ["saved", "no connector", "more"])
    for one in sorted(saving, key=lambda one: int(one["case"]["context_tokens"])):
        cell = (one["case"]["context_tokens"], 0.0)
        plain = metrics_of(lines, ("recompute", "none"), cell)
        shown = [f"{one['metrics']['ttft_s']:.4g} ({_runs(one['metrics'])})", "", ""]
        if plain:
            more = 100 * (one["metrics"]["ttft_s"] / plain["ttft_s"] - 1)
            shown[1:] = [f"{plain['ttft_s']:.4g} ({_runs(plain)})", f"{more:+.1f} %"]
        yield table_row(f"{cell[0]}, {one['case']['store']}", shown)


def _decodes(lines: list[Line]) -> Iterator[str]:
    kinds = ("decodes", "decodes-hbm")
    decodes = [one for one in lines if one["system"] in kinds and one["metrics"]]
    if not decodes:
        return
    yield from title("Steps of 32 decoding sequences while prefixes come, ms")
    yield "A slow step takes over 1.5 times as long as the median alone."
    yield ""
    heads = ["alone p50 / p99", "beside p50 / p99", "worse, %", "with those that admit p50 / p99"]
    more = ["longest that admits", "slow steps per prefix", "GB/s"]
    yield from table_head("prefix, store", [*heads, *more])
    for one in decodes:
        case, m = one["case"], one["metrics"]
        pair = [f"{m[f'{w}_step_p50_ms']:.3g} / {m[f'{w}_step_p99_ms']:.3g}" for w in _STEPS]
        worse = f"{m['p50_worse_percent']:+.1f} / {m['p99_worse_percent']:+.1f}"
        shown = [pair[0], pair[1], worse, pair[2], f"{m['admitting_step_max_ms']:.3g}"]
        slow = m.get("slow_steps_per_prefix")
        shown.append("" if slow is None else f"{slow:.2g}")
        where = "vLLM's own cache" if one["system"] == "decodes-hbm" else case["store"]
        name = f"{case['context_tokens']} x {case['hit_ratio']}, {where}"
        yield table_row(name, [*shown, f"{m['gb_per_s']:.3g}" if m["gb_per_s"] else ""])


def _saves_beside(lines: list[Line]) -> Iterator[str]:
    kinds = ("decodes-saving", "decodes-cold")
    found = [one for one in lines if one["system"] in kinds and one["metrics"]]
    if not found:
        return
    yield from title("Steps of 32 decoding sequences beside cold prompts, ms")
    yield "Behind: in the second after each prompt, while what it computed is written, if it is."
    yield ""
    heads = [
        "alone p50 / p99",
        "that compute a prompt, mean",
        "behind p50 / p99",
        "mean",
        "longest",
    ]
    yield from table_head("prompt, saved to", [*heads, "worse than alone, %", "GB/s"])
    for one in found:
        case, m = one["case"], one["metrics"]
        alone, after = ([m[f"{w}_step_{q}_ms"] for q in ("p50", "p99")] for w in ("alone", "after"))
        worse = " / ".join(f"{100 * (b / a - 1):+.1f}" for a, b in zip(alone, after, strict=True))
        shown = [f"{alone[0]:.3g} / {alone[1]:.3g}", f"{m['all_step_mean_ms']:.4g}"]
        shown += [f"{after[0]:.3g} / {after[1]:.3g}", f"{m['after_step_mean_ms']:.3g}"]
        shown += [f"{m['after_step_max_ms']:.3g}", worse]
        where = "nowhere, no connector" if case["store"] == "none" else case["store"]
        rate = f"{m['gb_per_s']:.3g}" if m["gb_per_s"] else ""
        yield table_row(f"{case['context_tokens']}, {where}", [*shown, rate])


_STEPS = ("alone", "beside", "all")


def cells_of(lines: Iterable[Line]) -> list[Cell]:
    """The cases with a prefix, short prompts first."""
    cases = (one["case"] for one in lines if one["system"] in _ORDER)
    return sorted({(c["context_tokens"], c["hit_ratio"]) for c in cases if c["hit_ratio"]})


def rows_of(lines: Sequence[Line]) -> list[Row]:
    """Systems in their order, each with the stores that it was measured with."""
    known = {(one["system"], one["case"]["store"]) for one in lines if one["system"] in _ORDER}
    return sorted(known, key=lambda row: (_ORDER.index(row[0]), row[1]))


def metrics_of(lines: Iterable[Line], row: Row, cell: Cell) -> dict[str, Any]:
    """Of a system in a case, {} if there are none. What no prefix helps is the same for all ratios."""
    context, ratio = cell
    case = {"context_tokens": context, "hit_ratio": ratio, "store": row[1]}
    if row[0] == "recompute":
        case["hit_ratio"] = 0.0
    for one in lines:
        if one["system"] == row[0] and one["case"] == case:
            metrics: dict[str, Any] = one["metrics"]
            return metrics
    return {}


def _head(cell: Cell) -> str:
    return f"{cell[0]} x {100 * cell[1]:g} %"


def _name(row: Row) -> str:
    return row[0] if row[1] == "none" else f"{row[0]}, {row[1]}"


def _runs(metrics: dict[str, Any]) -> str:
    return ", ".join(f"{value:.3g}" for value in metrics["ttft_s_runs"])


def plot(lines: list[Line], machine: str, path: Path) -> None:
    """A panel for each case: medians as bars, all runs as dots."""
    cells = cells_of(lines)
    rows = [row for row in rows_of(lines) if any(metrics_of(lines, row, one) for one in cells)]
    if not rows:
        return
    ratios = sorted({ratio for _, ratio in cells})
    contexts = sorted({context for context, _ in cells})
    pyplot = drawing("ttft")
    size = (4.2 * len(contexts) + 1.5, (0.32 * len(rows) + 0.9) * len(ratios))
    figure, panels = pyplot.subplots(
        len(ratios), len(contexts), figsize=size, squeeze=False, sharey=True
    )
    for at, ratio in enumerate(ratios):
        for column, context in enumerate(contexts):
            axes = panels[at][column]
            for y, row in enumerate(reversed(rows)):
                metrics = metrics_of(lines, row, (context, ratio))
                if metrics:
                    runs = metrics["ttft_s_runs"]
                    axes.barh(y, metrics["ttft_s"], color=f"C{_ORDER.index(row[0])}")
                    axes.plot(runs, [y] * len(runs), "k.", markersize=4)
            axes.set_yticks(range(len(rows)), [_name(row) for row in reversed(rows)])
            axes.set_title(_head((context, ratio)), fontsize=10)
    for axes in panels[-1]:
        axes.set_xlabel("TTFT, s")
    means = ". ".join(f"{name}: {text}" for name, text in _MEANS.items())
    figure.suptitle(machine)
    figure.text(0.01, 0.005, means, fontsize=6)
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    keep(pyplot, figure, path)
