"""What the pages of results share: a part for each machine, tables, plots that stay the same, and what was left out. What they show: transport_report.py, ttft_report.py, throughput_report.py."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import latest, read

Line = dict[str, Any]


def write(
    folder: Path,
    benchmark: str,
    head: Sequence[str],
    part: Callable[[list[Line]], Iterator[str]],
    plot: Callable[[list[Line], str, Path], None],
) -> None:
    """Write <benchmark>.md and, for each machine with results, <benchmark>-<machine>.svg into `folder`."""
    text = [*head, ""]
    for path in sorted(folder.glob(f"{benchmark}-*.jsonl")):
        lines = latest(read(path))
        if lines:
            machine = lines[0]["machine"]
            text += [f"## {machine}", "", *part(lines), ""]
            plot(lines, machine, folder / f"{benchmark}-{machine}.svg")
    (folder / f"{benchmark}.md").write_text("\n".join(text).rstrip() + "\n")


def environment(lines: Iterable[Line]) -> Line | None:
    """The line that says of what machine and settings the others are."""
    return next((one for one in lines if one["system"] == "environment"), None)


def measured(lines: Iterable[Line], facts: Line) -> str:
    """The commits and the versions, and where the stores ran if that was apart."""
    theirs = facts["metrics"].get("server_cores")
    where = f"The stores have {theirs} other cores of the same host. " if theirs else ""
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    return f"{where}Commit {', '.join(sorted({one['commit'] for one in lines}))}. {versions}."


def skipped(lines: Iterable[Line]) -> Iterator[str]:
    """What was left out, and why."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for one in lines:
        if "skipped" in one:
            case = {k: v for k, v in one["case"].items() if k != "group"}
            what = ", ".join(f"{name} {value}" for name, value in case.items())
            reasons.setdefault((one["system"], one["skipped"]), []).append(what)
    if reasons:
        yield from title("Left out")
    for (system, why), cases in reasons.items():
        shown = "; ".join(cases[:4]) + ("; ..." if len(cases) > 4 else "")
        yield f"- {system} ({shown}): {why}"


def title(text: str) -> Iterator[str]:
    yield from ("", f"### {text}", "")


def table_head(first: str, others: Sequence[str]) -> Iterator[str]:
    yield table_row(first, others)
    yield "|---" * (len(others) + 1) + "|"


def table_row(first: str, cells: Sequence[str]) -> str:
    return f"| {first} ".rstrip() + " | " + " | ".join(cells) + " |"


def drawing(salt: str) -> Any:
    """pyplot, without a screen; the same results give the same file."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = salt
    from matplotlib import pyplot

    return pyplot


def keep(pyplot: Any, figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
