"""Draws what became of requests, from the file that the option `trace_path` names: arrival, lookup, layers that land, admission, the forward pass and its waits, the first token. What is in the file: objectcache/trace.py.

    python -m benchmarks.timeline trace.jsonl --out docs/timeline.svg
    python -m benchmarks.timeline trace.jsonl --requests request7,request8     these, one below the other
    python -m benchmarks.timeline trace.jsonl --last 4                         and those that loaded last
    python -m benchmarks.timeline --make --out docs/timeline.svg               makes a trace first

`--make` starts two real engines on the CPU with a small random model, one after the other. The first leaves a
prefix in a folder; the second reads it from a server as slow as S3 (s3_like.py) and admits just in time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.engine import run_engines
from benchmarks.s3_like import S3Like
from benchmarks.tiny_model import ModelShape, prompt_tokens, write_model

Record = dict[str, Any]
SHAPE = ModelShape(layers=24, hidden=128, intermediate=512, heads=4, kv_heads=4)
PROMPT_TOKENS, PREFIX_TOKENS = 1536, 1280
BYTES_PER_S = 6e6  # of a connection: beside so small a model a wire must be slow
LEARNS_FROM = 12  # prompts
BUCKET = "kvcache"
WIDTH_IN, HEIGHT_IN = 9.0, 3.2
NEAR = 0.05  # of a picture: what is nearer than that is one mark


def records(lines: Iterable[str]) -> list[Record]:
    """Of a trace file, in the order in which they ended; half a line at its end is left out."""
    found = []
    for line in lines:
        if line.endswith("\n"):
            found.append(json.loads(line))
    return found


def chosen(all_: Sequence[Record], names: Sequence[str], last: int) -> list[Record]:
    """Those with these names, else the `last` that loaded something; in the order of their arrival."""
    if names:
        picked = [record for record in all_ if record["request"] in names]
    else:
        picked = [r for r in all_ if of(r, "pass") or of(r, "staged")][-last:] or list(all_[-last:])
    return sorted(picked, key=lambda record: float(record["arrived_s"]))


def of(record: Record, what: str) -> list[tuple[float, dict[str, Any]]]:
    """When something happened to a request, in ms since its arrival, and what is known of it."""
    return [
        (event[0] * 1e3, event[2] if len(event) > 2 else {})
        for event in record["events"]
        if event[1] == what
    ]


def layers(record: Record) -> int:
    """Of the model, as far as the trace tells."""
    waits = [len(about["waits"]) for _, about in of(record, "pass")]
    ready = [about["ready"] for _, about in of(record, "progress")]
    return max([1, *waits, *ready])


def landed(record: Record) -> list[tuple[float, int]]:
    """When so many layers were there; all of them when the prefix was staged, or when the pass had them."""
    steps = [(at, max(0, int(about["ready"]))) for at, about in of(record, "progress")]
    steps += [(at, layers(record)) for at, about in of(record, "staged") if not about.get("error")]
    for _, about in of(record, "pass"):
        for (at_s, wait_ms), ready, layer in zip(
            about["waits"], about["ready"], range(layers(record)), strict=False
        ):
            steps.append((at_s * 1e3, ready))
            steps.append((at_s * 1e3 + wait_ms, max(ready, layer + 1)))
    return sorted(steps)


def draw(picked: Sequence[Record], out: Path) -> None:
    """One row for each request, all on one clock."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "objectcache"  # the same picture for the same trace
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(
        len(picked), 1, sharex=True, squeeze=False, figsize=(WIDTH_IN, HEIGHT_IN * len(picked))
    )
    zero_s = min(record["arrived_s"] for record in picked)
    for record, row in zip(picked, rows[:, 0], strict=True):
        _row(row, record, (record["arrived_s"] - zero_s) * 1e3)
    rows[-1, 0].set_xlabel("ms since the first arrival" if len(picked) > 1 else "ms since arrival")
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})
    pyplot.close(figure)


def _row(row: Any, record: Record, shift: float) -> None:
    count = layers(record)
    ends = of(record, "first token") or of(record, "ended")
    end = shift + (ends[0][0] if ends else max(event[0] for event in record["events"]) * 1e3)
    lookups, reads = of(record, "found"), of(record, "staging")
    marks = [(at, " looked up", 0.92, "#888888") for at, _ in lookups[:1]]
    if lookups and reads and reads[0][0] > lookups[0][0] + NEAR * (end - shift):
        marks.append((reads[0][0], " reads", 0.84, "#888888"))  # it had to wait
    marks += [(at, " admitted", 1.02, "#2a7f3f") for at, _ in of(record, "admitted")[:1]]
    for at, label, height, colour in marks:
        row.axvline(shift + at, color=colour, linewidth=1.2)
        row.text(shift + at, count * height, label, color=colour, va="bottom", fontsize=8)
    row.axvline(shift, color="black", linewidth=1.2)
    row.axvline(end, color="black", linewidth=1.2)
    last = "first token" if of(record, "first token") else "end"
    row.text(end, count * 1.02, last, ha="right", va="bottom", fontsize=8)
    steps = [(shift, 0), *((shift + at, ready) for at, ready in landed(record))]
    row.step(*zip(*steps, strict=True), where="post", color="#1f5fa8", label="layers there")
    for began, about in of(record, "pass"):
        _pass(row, shift, began, about)
    row.set_ylim(0, count * 1.12)
    row.set_ylabel("layer")
    loaded = sum(about["loaded"] for _, about in of(record, "admitted"))
    title = f"{record['request']}: {record['prompt_tokens']} tokens, {loaded} of them loaded"
    row.set_title(title, fontsize=9, loc="left", pad=14)
    row.legend(loc="lower right", fontsize=8, frameon=False)


def _pass(row: Any, shift: float, began: float, about: dict[str, Any]) -> None:
    """Layer l computes from the end of its wait to the begin of the next one's."""
    waits = [(at * 1e3, at * 1e3 + wait_ms) for at, wait_ms in about["waits"]]
    begins = [at for at, _ in waits[1:]] + [began + about["took_ms"]]
    computes = [
        (layer, shift + ready, shift + end)
        for layer, ((_, ready), end) in enumerate(zip(waits, begins, strict=True))
    ]
    stalls = [(layer, shift + at, shift + ready) for layer, (at, ready) in enumerate(waits)]
    for bars, colour, label in (
        (computes, "#2a7f3f", "computes"),
        (stalls, "#c0392b", "waits and copies"),
    ):
        row.barh(
            [layer + 0.5 for layer, _, _ in bars],
            [end - start for _, start, end in bars],
            left=[start for _, start, _ in bars],
            height=0.8,
            color=colour,
            label=label,
        )


def make(folder: Path) -> Path:
    """A trace of one prompt whose prefix comes slowly; returns the file."""
    objects, trace = folder / "objects", folder / "trace.jsonl"
    (objects / BUCKET).mkdir(parents=True)
    model = str(write_model(folder / "model", SHAPE))
    prefix = prompt_tokens(PREFIX_TOKENS, 1, SHAPE)
    rest = PROMPT_TOKENS - PREFIX_TOKENS
    writes = _engine(model, {"url": f"file://{objects}/{BUCKET}/kv"}, [prefix])
    writes["steps"].append({"do": "wait", "seconds": 5.0})
    # What it learns from how long such a pass takes: equal ones, whose prefix is in its own cache.
    known = prompt_tokens(PREFIX_TOKENS, 3, SHAPE)
    others = [known + prompt_tokens(rest, 100 + n, SHAPE) for n in range(LEARNS_FROM)]
    with S3Like(folder / "s3", BUCKET, objects, 1, bytes_per_s=BYTES_PER_S) as server:
        reads = {
            **{"url": f"s3://{BUCKET}/kv", "endpoint_url": server.endpoint_url, "anonymous": True},
            **{"admission": "just-in-time", "save": False, "trace_path": str(trace)},
        }
        prompts = [*others, prefix + prompt_tokens(rest, 2, SHAPE)]
        run_engines([writes, _engine(model, reads, prompts)], log=folder / "engine.log")
    return trace


def _engine(model: str, options: dict[str, Any], prompts: list[list[int]]) -> dict[str, Any]:
    transfer = {
        **{"kv_connector": "ObjectCacheConnector", "kv_role": "kv_both"},
        "kv_connector_module_path": "objectcache.connector",
        "kv_load_failure_policy": "fail" if "admission" in options else "recompute",
        "kv_connector_extra_config": options | {"ring_bytes": "512MiB"},
    }
    steps: list[dict[str, Any]] = [
        {
            "do": "generate",
            "prompts": [{"prompt_token_ids": tokens}],
            "sampling": {
                "max_tokens": 4 if tokens is prompts[-1] else 1
            },  # so it learns of no decodes
        }
        for tokens in prompts
    ]
    kwargs = {"model": model, "kv_transfer_config": transfer, "max_num_batched_tokens": 4096}
    return {"kwargs": kwargs, "steps": steps}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("trace", type=Path, nargs="?", help="a file that trace_path named")
    parser.add_argument("--out", type=Path, default=Path("timeline.svg"))
    parser.add_argument("--requests", default="", help="names, with commas between")
    parser.add_argument("--last", type=int, default=1, help="so many that loaded something")
    parser.add_argument("--make", action="store_true", help="start engines that make a trace")
    asked = parser.parse_args()
    if asked.make == bool(asked.trace):
        raise SystemExit("give the file of a trace, or --make.")
    with tempfile.TemporaryDirectory(prefix="timeline-") as folder:
        path = make(Path(folder)) if asked.make else asked.trace
        with path.open() as file:
            found = records(file)
    names = [name for name in asked.requests.split(",") if name]
    picked = chosen(found, names, asked.last)
    if not picked:
        raise SystemExit(f"there is no such request among the {len(found)} of this trace.")
    draw(picked, asked.out)
    print(asked.out)


if __name__ == "__main__":
    main()
