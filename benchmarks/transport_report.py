"""The table and the plots of transport.py, from the files of results alone. Nothing is measured here."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.clients import SYSTEMS
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
_SERVERS = {
    "nginx": "nginx, http: the ceiling, signatures ignored",
    "seaweedfs": "SeaweedFS, http: a real S3 server",
    "tls": "nginx, https",
    "s3-like": "a server as slow as S3",
}


def write(folder: Path) -> None:
    """Write transport.md, and transport-<machine>.svg for each machine, into `folder`."""
    head = (
        "# S3 clients side by side",
        "",
        "Made by `python -m benchmarks.transport --report` from `transport-*.jsonl` here. What each",
        "case is, and what is not measured, stands at the head of `benchmarks/transport.py`.",
    )
    report.write(folder, "transport", head, _machine, plot)


def _machine(lines: list[Line]) -> Iterator[str]:
    facts = environment(lines)
    if facts is not None:
        about = facts["metrics"]
        pinned = "pinned" if about["pinned"] else "not pinned (no GPU)"
        yield (
            f"{about['cores']} cores; destination of {about['destination_chunks']} chunks, {pinned}; "
            f"{about['different_chunks']} different chunks. {measured(lines, facts)}"
        )
        if facts["too_large"]:
            yield f"{len(facts['too_large'])} cases do not fit the destination and are left out."
        yield ""
    yield f"![rates](transport-{lines[0]['machine']}.svg)"
    for server in ("nginx", "seaweedfs", "tls"):
        yield from _rates(server, _of(lines, "rate", server))
    yield from _latency(_of(lines, "latency", "s3-like"))
    yield from _layers(_of(lines, "layers", "nginx"))
    for server in ("nginx", "tls"):
        yield from _busy(server, _of(lines, "busy", server))
    yield from skipped(lines)


def _rates(server: str, lines: list[Line]) -> Iterator[str]:
    cells = sorted({(c["request_mib"], c["in_flight"]) for c in (one["case"] for one in lines)})
    if not cells:
        return
    yield from title(f"{_SERVERS[server]}: GB/s [client CPU-s/GB]")

    def cell(system: str, key: Any) -> str:
        found = _find(lines, system, request_mib=key[0], in_flight=key[1])
        return found and f"{found['gb_per_s']:.2f} [{found['cpu_s_per_gb']:.2f}]"

    yield from _table([f"{size} MiB x {n}" for size, n in cells], lines, cells, cell)


def _latency(lines: list[Line]) -> Iterator[str]:
    if not lines:
        return
    chunks = lines[0]["case"]["chunks"]
    scaled = "" if chunks == 224 else f" (of 224, scaled down to {lines[0]['machine']})"
    yield from title(f"Through a store with S3's latency: {chunks} chunks of 32 MiB{scaled}")
    names = ("share_of_best_percent", "gb_per_s", "cpu_s_per_gb", "layer0_ms", "last_layer_ms")
    columns = [*names, "requests_per_gib"]

    def cell(system: str, name: str) -> str:
        system, verified = _verified(system)
        found = _find(lines, system, verified=verified)
        return found and f"{found[name]:.4g}"

    heads = ["% of the modelled best", "GB/s", "CPU-s/GB", "layer 0, ms", "layer 31, ms"]
    yield from _table([*heads, "GETs per GiB"], lines, columns, cell)


def _layers(lines: list[Line]) -> Iterator[str]:
    counts = sorted({one["case"]["chunks"] for one in lines})
    if not counts:
        return
    yield from title("Layers, nginx, http: ms to first byte / layer 0 / layer 1 / layer 31; GB/s")

    def cell(system: str, count: int) -> str:
        system, verified = _verified(system)
        found = _find(lines, system, chunks=count, verified=verified)
        if not found:
            return ""
        names = ("ttfb_ms", "layer0_ms", "layer1_ms", "last_layer_ms")
        return " / ".join(f"{found[name]:.3g}" for name in names) + f"; {found['gb_per_s']:.2f}"

    yield from _table([f"{count} chunks" for count in counts], lines, counts, cell)


def _busy(server: str, lines: list[Line]) -> Iterator[str]:
    if not lines:
        return
    offered = lines[0]["case"]["offered_gb_per_s"]
    yield from title(f"Main thread busy, {_SERVERS[server]}: {offered} GB/s offered")

    def cell(system: str, column: tuple[str, str]) -> str:
        found = _find(lines, system, main_thread=column[0])
        return found and f"{found[column[1]]:.3g}"

    slower = "step_slowdown_percent"
    columns = [("idle", "gb_per_s"), ("steps", "gb_per_s"), ("steps", slower)]
    columns += [("spin", "gb_per_s"), ("spin", slower)]
    heads = ["idle: GB/s", "steps: GB/s", "steps slower by %", "spin: GB/s", "spin slower by %"]
    yield from _table(heads, lines, columns, cell)


def _table(
    heads: Sequence[str],
    lines: list[Line],
    columns: Sequence[Any],
    cell: Callable[[str, Any], str],
) -> Iterator[str]:
    yield from table_head("", heads)
    for system in _rows(lines):
        cells = [cell(system, column) for column in columns]
        if any(cells):
            yield table_row(system, cells)


def _rows(lines: Iterable[Line]) -> list[str]:
    known = {one["system"] for one in lines}
    rows = []
    for system in SYSTEMS:
        if system in known:
            rows.append(system)
        if any(one["system"] == system and one["case"].get("verified") for one in lines):
            rows.append(f"{system}, verified")
    return rows


def _verified(row: str) -> tuple[str, bool]:
    return row.removesuffix(", verified"), row.endswith(", verified")


def _of(lines: Iterable[Line], group: str, server: str) -> list[Line]:
    return [
        one
        for one in lines
        if one["metrics"] and (one["case"]["group"], one["case"].get("server")) == (group, server)
    ]


def _find(lines: Iterable[Line], system: str, **case: Any) -> Any:
    """The metrics of one case, or ""."""
    for one in lines:
        if one["system"] == system and case.items() <= one["case"].items():
            return one["metrics"]
    return ""


def plot(lines: list[Line], machine: str, path: Path) -> None:
    """Rate by requests in flight, CPU by size, and what is left behind S3's latency."""
    pyplot = drawing("transport")
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4.5))
    nginx = _of(lines, "rate", "nginx")
    systems = [s for s in SYSTEMS if any(one["system"] == s for one in lines)]
    for n, system in enumerate(systems):
        look = {
            "color": f"C{n}",
            "linewidth": 2.5 if system.startswith("objectcache") else 1.2,
            "marker": "o",
            "label": system,
        }
        _curve(left, nginx, system, "in_flight", "gb_per_s", {"request_mib": 4}, look)
        _curve(middle, nginx, system, "request_mib", "cpu_s_per_gb", {"in_flight": 16}, look)
    left.set(title="nginx, 4 MiB requests", xlabel="in flight", ylabel="GB/s", xscale="log")
    middle.set(
        title="nginx, 16 in flight", xlabel="MiB a request", ylabel="client CPU-s/GB", xscale="log"
    )
    for axes, name in ((left, "in_flight"), (middle, "request_mib")):
        ticks = sorted({one["case"][name] for one in nginx})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
    latency = _of(lines, "latency", "s3-like")
    rows = [s for s in systems if _find(latency, s, verified=False)]
    shares = [_find(latency, s, verified=False)["share_of_best_percent"] for s in rows]
    colors = [f"C{systems.index(s)}" for s in rows]
    right.barh(rows[::-1], shares[::-1], color=colors[::-1])
    right.set(title="with S3's latency", xlabel="% of the modelled best")
    if nginx:
        left.legend(fontsize=7)
    figure.suptitle(machine)
    figure.tight_layout()
    keep(pyplot, figure, path)


def _curve(
    axes: Any,
    lines: list[Line],
    system: str,
    by: str,
    metric: str,
    at: dict[str, Any],
    look: dict[str, Any],
) -> None:
    points = sorted(
        (one["case"][by], one["metrics"][metric])
        for one in lines
        if one["system"] == system and at.items() <= one["case"].items()
    )
    if points:
        axes.plot(*zip(*points, strict=True), **look)
