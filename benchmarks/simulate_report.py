"""The tables and the plot of simulate.py, from the files of results alone. Nothing is simulated here."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import latest, read

Line = dict[str, Any]
GROUPS = ("paper", "modes", "bursts", "rules", "fleet")


def write(folder: Path) -> None:
    """Write simulate.md and simulate.svg into `folder`."""
    found = {group: latest(read(folder / f"simulate-{group}.jsonl")) for group in GROUPS}
    text = [
        "# Admission, the wire and load-or-recompute, simulated",
        "",
        "Made by `python -m benchmarks.simulate --report` from `simulate-*.jsonl` here. The decisions are",
        "those of the package; store, wire and GPU are models: see the head of `benchmarks/simulate.py`.",
        "",
        "![added time and time to the first token](simulate.svg)",
        *_paper(found["paper"]),
        *_modes(found["modes"], "on one engine"),
        *_modes(found["bursts"], "who ask at once"),
        *_rules(found["rules"]),
        *_fleet(found["fleet"]),
    ]
    (folder / "simulate.md").write_text("\n".join(text).rstrip() + "\n")
    plot(found, folder / "simulate.svg")


def _paper(lines: list[Line]) -> Iterator[str]:
    if not lines:
        return
    yield from _title("The paper's workloads: ms added to the first token, all requests together")
    yield "Printed: its Table A12. Each alone: our model of how it measured. Shared: all on one wire."

    def cell(system: str, column: tuple[str, str]) -> str:
        workload, what = column
        if what == "printed":
            told = _find(lines, system, workload=workload)
            return told and (f"{told['printed_ms']:.0f}" if told["printed_ms"] else "")
        told = _find(lines, system, workload=workload, wire=what)
        return told and f"{told['added_ms']:.0f}{_off(told) if what == 'alone' else ''}"

    columns = [(w, what) for w in "ABC" for what in ("printed", "alone", "shared")]
    yield from _table([f"{w}: {what}" for w, what in columns], _systems(lines), columns, cell)


def _off(told: dict[str, Any]) -> str:
    return f" ({100 * (told['added_ms'] / told['printed_ms'] - 1):+.0f} %)"


def _modes(lines: list[Line], how: str) -> Iterator[str]:
    wires = sorted({one["case"]["gbps"] for one in lines})
    for users in sorted({one["case"]["users"] for one in lines}):
        yield from _title(f"{users} users {how}: TTFT mean, p50 / p99, s; TPOT mean, p99, ms")

        def cell(system: str, gbps: int, users: int = users) -> str:
            told = _find(lines, system, users=users, gbps=gbps)
            return told and (
                f"{told['ttft_mean_ms'] / 1e3:.3g}, {told['ttft_p50_ms'] / 1e3:.3g} / "
                f"{told['ttft_p99_ms'] / 1e3:.3g}; "
                f"{told['tpot_mean_ms']:.3g}, {told['tpot_p99_ms']:.3g}"
            )

        heads = [f"{gbps} Gbps" for gbps in wires]
        yield from _table(heads, _systems(lines), wires, cell)


def _rules(lines: list[Line]) -> Iterator[str]:
    for loads in ("all", "decided"):
        of = [one for one in lines if one["case"]["loads"] == loads]
        columns = list(dict.fromkeys((one["case"]["load"], one["case"]["gbps"]) for one in of))
        if not columns:
            continue
        told = "everything is loaded" if loads == "all" else "load or recompute is decided"
        yield from _title(f"Who gets the wire, one GPU, {told}: TTFT mean / p99, s")

        def cell(system: str, column: tuple[str, int], of: list[Line] = of) -> str:
            told = _find(of, system, load=column[0], gbps=column[1])
            return told and f"{told['ttft_mean_ms'] / 1e3:.3g} / {told['ttft_p99_ms'] / 1e3:.3g}"

        heads = [f"{load}, {gbps} Gbps" for load, gbps in columns]
        yield from _table(heads, _systems(of), columns, cell)


def _fleet(lines: list[Line]) -> Iterator[str]:
    if not lines:
        return
    engines = lines[0]["case"]["engines"]
    yield from _title(f"{engines} engines on one bucket")
    names = {
        "TTFT p50, ms": "ttft_p50_ms",
        "TTFT p99, ms": "ttft_p99_ms",
        "GET/s, mean": "gets_per_s_mean",
        "GET/s below a prefix, most": "gets_per_s_most_each_prefix",
        "refused, %": "refused_percent",
        "loads given up": "given_up",
        "S3, USD per 1,000 prompts": "s3_usd_per_1000",
        "GPU, USD per 1,000 prompts": "gpu_usd_per_1000",
    }
    prefixes = sorted({one["case"]["prefixes"] for one in lines})
    rows = [(system, n) for system in _systems(lines) for n in prefixes]
    yield "| | prefixes | " + " | ".join(names) + " |"
    yield "|---" * (len(names) + 2) + "|"
    for system, n in rows:
        told = _find(lines, system, prefixes=n)
        if told:
            values = " | ".join(f"{told[name]:.3g}" for name in names.values())
            yield f"| {system} | {n} | {values} |"


def _title(text: str) -> Iterator[str]:
    yield from ("", f"## {text}", "")


def _table(
    heads: Sequence[str],
    systems: Sequence[str],
    columns: Sequence[Any],
    cell: Callable[[str, Any], str],
) -> Iterator[str]:
    yield ""
    yield "| | " + " | ".join(heads) + " |"
    yield "|---" * (len(heads) + 1) + "|"
    for system in systems:
        yield f"| {system} | " + " | ".join(cell(system, column) for column in columns) + " |"


def _systems(lines: Iterable[Line]) -> list[str]:
    return list(dict.fromkeys(one["system"] for one in lines))


def _find(lines: Iterable[Line], system: str, **case: Any) -> Any:
    """The metrics of one case, or ""."""
    for one in lines:
        if one["system"] == system and case.items() <= one["case"].items():
            return one["metrics"]
    return ""


def plot(found: dict[str, list[Line]], path: Path) -> None:
    """Added time of the paper's workloads, and how the modes compare as the wire grows."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "simulate"  # the same results give the same file
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4.5))
    _bars(left, found["paper"])
    modes = found["modes"]
    users = 16 if any(one["case"]["users"] == 16 for one in modes) else 4
    for axes, name, what in (
        (middle, "ttft_mean_ms", "mean TTFT, ms"),
        (right, "tpot_p99_ms", "p99 TPOT, ms"),
    ):
        for system in _systems(modes):
            points = sorted(
                (one["case"]["gbps"], one["metrics"][name])
                for one in modes
                if one["system"] == system and one["case"]["users"] == users
            )
            axes.plot(*zip(*points, strict=True), marker="o", label=system)
        axes.set(title=f"{users} users, one engine", xlabel="wire, Gbps", ylabel=what, xscale="log")
        axes.set_ylim(bottom=0)
    right.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _bars(axes: Any, lines: list[Line]) -> None:
    bars = [
        ("equal", "alone", "equal, as printed", "printed_ms"),
        ("calibrated", "alone", "calibrated, as printed", "printed_ms"),
        ("equal", "shared", "equal, shared wire", "added_ms"),
        ("calibrated", "shared", "calibrated, shared wire", "added_ms"),
        ("ours", "shared", "ours, shared wire", "added_ms"),
    ]
    for n, (system, wire, label, metric) in enumerate(bars):
        heights = [_find(lines, system, workload=w, wire=wire)[metric] / 1e3 for w in "ABC"]
        axes.bar([i + 0.16 * (n - 2) for i in range(3)], heights, 0.16, label=label)
    axes.set_xticks(range(3), ["A, 80 Gbps", "B, 50 Gbps", "C, 50 Gbps"])
    axes.set(title="The paper's workloads", ylabel="s added, all requests")
    axes.legend(fontsize=7)
