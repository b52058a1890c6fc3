"""How soon a long prefix lies in pinned memory, as an engine with a GPU has it brought: processes, threads, layers.

    python -m benchmarks.movers                         224 chunks of 32 MiB from nginx on loopback; adds to benchmarks/results/
    python -m benchmarks.movers --processes 1,2,4 --threads 4,8 --rounds 3
    python -m benchmarks.movers --stores nginx,tls,s3-like,seaweedfs --chunks 16,64,224 --processes 4 --threads 4
    python -m benchmarks.movers --chunks 8 --slice-kib 16   to see that it all works
    python -m benchmarks.movers --report                    the table, from the results

Two prefixes take turns, so that none lies in the ring when it is asked for. Times are from the command to
the moment at which all chunks have the layer, verified; CPU time is that of the processes that move, after
their start. Stores as in transport.py. Through s3-like the share of the time is said that one GET for each
chunk, all at once, needs by its model, and the requests.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks import command, results
from benchmarks.command import say
from benchmarks.lab import BUCKET, MIB, Lab, Scale
from benchmarks.steps import SPACE, name_as_engines_do
from benchmarks.transport import modelled_best_s
from objectcache import keys
from objectcache.config import parse
from objectcache.mover import Berth, Placed
from objectcache.mover_process import MoverProcess
from objectcache.movers import Movers, split
from objectcache.slots import HostSlots
from objectcache.streamer import StageResult

LIMIT_S = 60.0
START_S = 2.5  # of processes, which in an engine nobody waits for
PINNED = torch.cuda.is_available()
CORES = os.sched_getaffinity(0)


def bring(mover: Movers, slots: HostSlots, job: int, hashes: list[bytes]) -> dict[str, float]:
    """One prefix: seconds until all of its chunks have each layer."""
    began = time.perf_counter()
    mover.stage(job, hashes)
    places: list[int] = []
    ready_s: list[float] = []
    while time.perf_counter() < began + LIMIT_S:
        for event in mover.take():
            if isinstance(event, Placed):
                places = event.slots
            elif isinstance(event, StageResult):
                if event.error is not None or len(event.slots) != len(hashes):
                    raise RuntimeError(f"only {len(event.slots)} chunks came: {event.error}")
                now = time.perf_counter() - began
                mover.release(job)
                layers = 32
                ready_s += [now] * (layers - len(ready_s))
                return {
                    "layer0_ms": ready_s[0] * 1e3,
                    "layer1_ms": ready_s[1] * 1e3,
                    "layer0_share_percent": 100 * ready_s[0] / now,
                    "middle_layer_ms": ready_s[layers // 2] * 1e3,
                    "last_layer_ms": now * 1e3,
                }
        if places:
            ready = int(slots.progress[places].min())
            ready_s += [time.perf_counter() - began] * (ready - len(ready_s))
        time.sleep(0.001)
    raise RuntimeError("it took too long")


def run(args: argparse.Namespace) -> int:
    path, lines, about = command.begin("movers", args)
    until = time.monotonic() + args.seconds
    stores, counts = args.stores.split(","), [int(n) for n in args.chunks.split(",")]
    scale = Scale(max(counts), 2 * max(counts), len(CORES), args.slice_kib << 10, split=0)
    with tempfile.TemporaryDirectory(prefix="movers-", dir=args.folder) as name:
        folder = Path(name)
        folder.chmod(0o755)
        with Lab(folder, scale, set(stores), destination=False) as lab:
            for store, why in lab.absent.items():
                say(f"no {store}: {why}")
            os.environ.update(lab.env())
            name_as_engines_do(lab.chunks)
            slots = HostSlots(max(counts), lab.chunks.object_bytes, PINNED, shared=True)
            for store in [store for store in stores if store in lab.servers]:
                if store == "seaweedfs":
                    upload(lab)
                for case in cases(args, store, counts):
                    if time.monotonic() > until:
                        say(f"time is up before {case}")
                        return 0
                    if not args.again and lines.has(
                        about | {"system": "objectcache", "case": case}
                    ):
                        continue
                    metrics = measure(lab, slots, case, args.rounds)
                    line = about | {"system": "objectcache", "case": case}
                    lines.put(line | {"metrics": results.rounded(metrics)})
                    say(f"{case} {metrics}")
    print(path)
    return 0


def cases(args: argparse.Namespace, store: str, counts: list[int]) -> Iterator[dict[str, Any]]:
    for chunks in counts:
        for processes in map(int, args.processes.split(",")):
            for threads in map(int, args.threads.split(",")):
                yield {
                    **{"store": store, "chunks": chunks, "processes": processes},
                    **{"threads": threads, "slice_kib": args.slice_kib, "pinned": PINNED},
                }


def upload(lab: Lab) -> None:
    """The chunks under the keys that a mover looks for, where they are not served from files."""
    client = lab.servers["seaweedfs"].client()

    def put(number: int) -> None:
        key = keys.object_key(SPACE, lab.chunks.chunk_hash(number), 0, 1)
        client.put_object(Bucket=BUCKET, Key=key, Body=bytes(lab.chunks.content(number)))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(put, range(lab.chunks.count)))
    client.close()


def measure(lab: Lab, slots: HostSlots, case: dict[str, Any], count: int) -> dict[str, Any]:
    """The first prefix finds no connection open, and a number in flight to be learned; then `count` more."""
    assert slots.descriptor is not None
    store, chunks = case["store"], case["chunks"]
    at, layout = lab.endpoints()[store], lab.chunks.layout
    options = parse(
        {
            **{"url": f"s3://{at['bucket']}/", "endpoint_url": at["url"]},
            **({"ca_bundle": at["ca"]} if at.get("ca") else {}),
            "stage_timeout_ms": int(LIMIT_S * 1000),
        }
    )
    # The memory has as many slots as the largest case needs: behind all of them lies what is told of progress.
    whole = Berth(options, layout, len(slots.progress), range(chunks), 0, PINNED, case["threads"])
    mover = Movers([MoverProcess(p, slots.descriptor) for p in split(whole, case["processes"])])
    mover.enter(SPACE, layout.namespace_digest)
    time.sleep(START_S)
    rounds = []
    for number in range(count + 1):
        first = (number % 2) * chunks
        hashes = [lab.chunks.chunk_hash(n) for n in range(first, first + chunks)]
        asked, used_s = lab.requests(store), movers_cpu_s()
        one = bring(mover, slots, number + 1, hashes)
        one["cpu_s"] = movers_cpu_s() - used_s
        one["requests"] = (lab.requests(store) or 0) - (asked or 0)
        rounds.append(one)
    mover.close(1.0)
    later = rounds[1:]
    middle = {name: statistics.median(one[name] for one in later) for name in later[0]}
    gb = chunks * lab.chunks.object_bytes / 1e9
    cpu_s, requests = middle.pop("cpu_s"), middle.pop("requests")
    found = middle | {
        "gb_per_s": gb / middle["last_layer_ms"] * 1e3,
        "first_gb_per_s": gb / rounds[0]["last_layer_ms"] * 1e3,
        "first_layer0_ms": rounds[0]["layer0_ms"],
        "cpu_s_per_gb": cpu_s / gb,
        "rounds": len(later),
    }
    if store == "s3-like":
        best_s = modelled_best_s(chunks, lab.chunks.object_bytes)
        for name, ms in (("", middle["last_layer_ms"]), ("first_", rounds[0]["last_layer_ms"])):
            found[f"{name}share_of_best_percent"] = 100 * best_s / (ms / 1e3)
        found["requests_per_gib"] = requests / (chunks * lab.chunks.object_bytes / (1 << 30))
    return found


def movers_cpu_s() -> float:
    """What the processes that move have used. Servers are started by others of ours, and not counted."""
    used_s = 0.0
    for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        if b"mover_process" in Path(f"/proc/{child}/cmdline").read_bytes():
            # As clock_getcpuclockid(3) says, in nanoseconds: a small round takes less than a tick.
            used_s += time.clock_gettime(~int(child) << 3 | 2)
    return used_s


def write_report(folder: Path) -> None:
    """A table of all machines' lines."""
    rows = [
        "# How soon a prefix lies in host memory",
        "",
        "Made by `python -m benchmarks.movers --report` from `movers-*.jsonl` here. What is measured stands at",
        "the head of `benchmarks/movers.py`. Medians; milliseconds until all chunks have the layer, verified.",
        "In parentheses: the first prefix of a process. Lines without a share of layer 0 count CPU of the start, too.",
        "",
        "| machine, commit | store | chunks | processes x threads | layer 0 | layer 1 | middle layer | all | layer 0, % of all | GB/s | CPU-s/GB | % of the modelled best | GETs per GiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for path in sorted(folder.glob("movers-*.jsonl")):
        for line in results.read(path):
            case, found = line["case"], line["metrics"]
            share = (
                f"{found['layer0_share_percent']:.3g}" if "layer0_share_percent" in found else ""
            )
            best = ""
            if "share_of_best_percent" in found:
                first = found["first_share_of_best_percent"]
                best = f"{found['share_of_best_percent']:.3g} ({first:.3g})"
            gets = f"{found['requests_per_gib']:.3g}" if "requests_per_gib" in found else ""
            cells = [
                f"{line['machine']}, {line['commit']}",
                *(case["store"], str(case["chunks"]), f"{case['processes']} x {case['threads']}"),
                f"{found['layer0_ms']:.3g} ({found['first_layer0_ms']:.3g})",
                *(
                    f"{found[name]:.3g}"
                    for name in ("layer1_ms", "middle_layer_ms", "last_layer_ms")
                ),
                share,
                f"{found['gb_per_s']:.3g} ({found['first_gb_per_s']:.3g})",
                *(f"{found['cpu_s_per_gb']:.2f}", best, gets),
            ]
            rows.append(f"| {' | '.join(cells)} |")
    (folder / "movers.md").write_text("\n".join(rows) + "\n")


def main() -> int:
    parser = command.parser(__doc__, "rounds", "seconds", "machine", "out", "again", "report")
    add = parser.add_argument
    add("--stores", default="nginx", help="of nginx, tls, s3-like, seaweedfs")
    add("--chunks", default="224", help="of a prefix")
    add("--slice-kib", type=int, default=MIB >> 10)
    add("--processes", default="1,2,4")
    add("--threads", default="4,8")
    add("--folder", default="/dev/shm", help="for the stores' data")
    args = parser.parse_args()
    if args.report:
        write_report(results.FOLDER)
        return 0
    return run(args)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
