"""How soon a long prefix lies in pinned memory, as an engine with a GPU has it brought: processes, threads, layers.

    python -m benchmarks.movers                         224 chunks of 32 MiB from nginx on loopback; adds to benchmarks/results/
    python -m benchmarks.movers --processes 1,2,4 --threads 4,8 --rounds 3
    python -m benchmarks.movers --chunks 8 --slice-kib 16   to see that it all works

Two prefixes take turns, so that none lies in the ring when it is asked for. Times are from the command to
the moment at which all chunks have the layer, verified; CPU time is that of the processes that move.
"""

import argparse
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import command, results
from benchmarks.command import say
from benchmarks.lab import MIB, Lab, Scale
from benchmarks.steps import SPACE, name_as_engines_do
from objectcache.config import parse
from objectcache.mover import Berth, Placed
from objectcache.mover_process import MoverProcess
from objectcache.movers import Movers, split
from objectcache.slots import HostSlots
from objectcache.streamer import StageResult

LIMIT_S = 60.0


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
                    "middle_layer_ms": ready_s[layers // 2] * 1e3,
                    "last_layer_ms": now * 1e3,
                }
        if places:
            ready = int(slots.progress[places].min())
            ready_s += [time.perf_counter() - began] * (ready - len(ready_s))
        time.sleep(0.001)
    raise RuntimeError("it took too long")


def run(args: argparse.Namespace) -> int:
    pinned = torch.cuda.is_available()
    path, lines, about = command.begin("movers", args)
    cores = len(os.sched_getaffinity(0))
    scale = Scale(args.chunks, 2 * args.chunks, cores, args.slice_kib << 10)
    with tempfile.TemporaryDirectory(prefix="movers-", dir="/dev/shm") as name:
        folder = Path(name)
        folder.chmod(0o755)
        with Lab(folder, scale, {args.store}, destination=False) as lab:
            os.environ.update(lab.env())
            name_as_engines_do(lab.chunks)
            at = lab.endpoints()[args.store]
            slots = HostSlots(args.chunks, lab.chunks.object_bytes, pinned, shared=True)
            options = parse(
                {
                    **{"url": f"s3://{at['bucket']}/", "endpoint_url": at["url"]},
                    **({"ca_bundle": at["ca"]} if at.get("ca") else {}),
                    "stage_timeout_ms": int(LIMIT_S * 1000),
                }
            )
            for processes in map(int, args.processes.split(",")):
                for threads in map(int, args.threads.split(",")):
                    metrics = measure(args, lab, slots, options, processes, threads, pinned)
                    case = {
                        **{"store": args.store, "chunks": args.chunks, "processes": processes},
                        **{"threads": threads, "slice_kib": args.slice_kib, "pinned": pinned},
                    }
                    line = about | {"system": "objectcache", "case": case}
                    lines.put(line | {"metrics": results.rounded(metrics)})
                    say(f"{case} {metrics}")
    print(path)
    return 0


def measure(
    args: argparse.Namespace,
    lab: Lab,
    slots: HostSlots,
    options: Any,
    processes: int,
    threads: int,
    pinned: bool,
) -> dict[str, Any]:
    assert slots.descriptor is not None
    layout = lab.chunks.layout
    whole = Berth(options, layout, args.chunks, range(args.chunks), 0, pinned, threads)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    mover = Movers([MoverProcess(part, slots.descriptor) for part in split(whole, processes)])
    mover.enter(SPACE, layout.namespace_digest)
    rounds = []
    for number in range(args.rounds + 1):
        first = (number % 2) * args.chunks
        hashes = [lab.chunks.chunk_hash(n) for n in range(first, first + args.chunks)]
        rounds.append(bring(mover, slots, number + 1, hashes))
    mover.close(1.0)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
    gb = args.chunks * lab.chunks.object_bytes / 1e9
    later = rounds[1:]  # the first finds no connection open, and a number in flight to be learned
    return {
        **{name: statistics.median(one[name] for one in later) for name in later[0]},
        "gb_per_s": gb / statistics.median(one["last_layer_ms"] for one in later) * 1e3,
        "first_gb_per_s": gb / rounds[0]["last_layer_ms"] * 1e3,
        "first_layer0_ms": rounds[0]["layer0_ms"],
        "cpu_s_per_gb": cpu_s / gb / len(rounds),
        "rounds": len(later),
    }


def main() -> int:
    parser = command.parser(__doc__, "rounds", "machine", "out")
    add = parser.add_argument
    add("--store", default="nginx", help="nginx, tls or s3-like")
    add("--chunks", type=int, default=224)
    add("--slice-kib", type=int, default=MIB >> 10)
    add("--processes", default="1,2,4")
    add("--threads", default="4,8")
    return run(parser.parse_args())


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
