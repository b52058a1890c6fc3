"""What a second request for late answers brings, and costs, through a store with S3's latency. Not what a store's answers cost the client: see transport.py.

    python -m benchmarks.hedges                   28 chunks at a time, 200 times for each share; adds to benchmarks/results/
    python -m benchmarks.hedges --percent 0,5 --paths direct,obstore,aiobotocore --slice-kib 16 --rounds 400
    python -m benchmarks.hedges --calculate       what the same decisions give if nothing but the store takes time

Shares of requests that may have a second one take turns, each with a store of its own, so that whatever
else the machine does hits all of them. Times are from the first request to the moment at which all
chunks have the layer, verified.
"""

import argparse
import asyncio
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import results
from benchmarks.chunks import Chunks
from benchmarks.lab import Lab, Scale
from benchmarks.s3_like import FIRST_BYTE_P50_MS, FIRST_BYTE_P99_MS, sigma
from objectcache.config import parse
from objectcache.format import Verifier
from objectcache.hedge import Hedging
from objectcache.stores import open_store
from objectcache.stores.base import Store, StoreCounters
from objectcache.stores.s3 import S3Store

LEARNING_ROUNDS = 6  # the store's times are not known before


def opened(path: str, percent: int, at: dict[str, str]) -> Store:
    options = parse(
        {
            "url": f"s3://{at['bucket']}/",
            "endpoint_url": at["url"],
            "transport": path,
            "hedge_percent": percent,
        }
    )
    return S3Store(options) if path == "aiobotocore" else open_store(options)


async def bring(store: Store, chunks: Chunks, memory: memoryview, count: int) -> tuple[float, ...]:
    """Seconds until all of `count` chunks have the first layer, and until they have all layers."""
    size = chunks.object_bytes
    first_s = [0.0] * count
    began = time.perf_counter()

    async def one(number: int) -> None:
        view = memory[number * size : (number + 1) * size]

        def layers(ready: int) -> None:
            if ready and not first_s[number]:
                first_s[number] = time.perf_counter() - began

        verifier = Verifier(chunks.layout, chunks.chunk_hash(number), view, layers)
        part = verifier.part(0, len(chunks.layout.slice_bytes))
        await store.read(chunks.key(number), view, marks=part.marks, landed=part.landed)
        if not verifier.complete:
            raise RuntimeError(f"chunk {number} is not right")

    await asyncio.gather(*(one(number) for number in range(count)))
    return max(first_s), time.perf_counter() - began


async def measured(
    args: argparse.Namespace, path: str, percents: Sequence[int], lab: Lab
) -> dict[int, dict[str, float]]:
    """For each share what it gave."""
    memory = memoryview(bytearray(args.chunks * lab.chunks.object_bytes))
    at = lab.endpoints()["s3-like"]
    stores = {percent: opened(path, percent, at) for percent in percents}
    times: dict[int, list[tuple[float, ...]]] = {percent: [] for percent in percents}
    chance = random.Random(1)
    for number in range(args.rounds + LEARNING_ROUNDS):
        if number == LEARNING_ROUNDS:
            for percent, store in stores.items():
                store.counters, times[percent] = StoreCounters(), []
        for percent in chance.sample(percents, len(percents)):
            store = stores[percent]
            times[percent].append(await bring(store, lab.chunks, memory, args.chunks))
    found = {}
    for percent, store in stores.items():
        first, last = zip(*times[percent], strict=True)
        asked = args.rounds * args.chunks
        found[percent] = {
            **{f"layer0_{name}_ms": value * 1e3 for name, value in spread(first).items()},
            **{f"last_layer_{name}_ms": value * 1e3 for name, value in spread(last).items()},
            "extra_requests_percent": 100 * store.counters.hedged_requests / asked,
            "hedges_won_percent": 100
            * store.counters.hedges_won
            / max(1, store.counters.hedged_requests),
            "requests_per_chunk": store.counters.get_requests / asked,
            "rounds": args.rounds,
        }
        await store.close()
    return found


def calculated(chunks: int, percent: int, rounds: int) -> dict[str, float]:
    """Waves of first bytes by the law of the S3-like server, and the package's own decisions."""
    chance, hedging = random.Random(1), Hedging(percent)
    deviation = sigma(FIRST_BYTE_P50_MS, FIRST_BYTE_P99_MS)

    def first_byte_s() -> float:
        return FIRST_BYTE_P50_MS / 1e3 * math.exp(deviation * chance.gauss(0.0, 1.0))

    latest_s, again, won = [], 0, 0
    for number in range(rounds + LEARNING_ROUNDS * 4):
        counts = number >= LEARNING_ROUNDS * 4
        wave = [(hedging.began(), first_byte_s()) for _ in range(chunks)]
        took_s = []
        for late_s, first_s in wave:
            came_s = first_s
            if late_s is not None:
                hedging.looked(first_s > late_s)
                if first_s > late_s and hedging.may_ask():
                    came_s = min(first_s, late_s + first_byte_s())
                    again += counts
                    won += counts and came_s < first_s
            hedging.came(came_s)
            took_s.append(came_s)
        if counts:
            latest_s.append(max(took_s))
    return {
        **{f"first_bytes_{name}_ms": value * 1e3 for name, value in spread(latest_s).items()},
        "extra_requests_percent": 100 * again / (rounds * chunks),
        "hedges_won_percent": 100 * won / max(1, again),
        "rounds": rounds,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"mean": statistics.fmean(values), "p50": cuts[49], "p95": cuts[94], "p99": cuts[98]}


def run(args: argparse.Namespace) -> int:
    about = {
        "benchmark": "hedges",
        "machine": args.machine or results.machine(),
        "commit": results.commit(),
        "system": "objectcache",
    }
    path = args.out or results.FOLDER / f"hedge-{about['machine']}.jsonl"
    lines = results.Lines(path)
    percents = [int(percent) for percent in args.percent.split(",")]
    if args.calculate:
        for percent in percents:
            metrics = results.rounded(calculated(args.chunks, percent, args.rounds))
            case = {"chunks": args.chunks, "hedge_percent": percent}
            lines.put(about | {"system": "calculated", "case": case, "metrics": metrics})
            print(case, metrics, file=sys.stderr, flush=True)
        print(path)
        return 0
    scale = Scale(
        args.chunks, args.chunks, len(os.sched_getaffinity(0)), slice_bytes=args.slice_kib << 10
    )
    with (
        tempfile.TemporaryDirectory(prefix="hedges-", dir="/dev/shm") as name,
        Lab(Path(name), scale, {"s3-like"}, destination=False) as lab,
    ):
        os.environ.update(lab.env())
        for transport in args.paths.split(","):
            found = asyncio.run(measured(args, transport, percents, lab))
            for percent, metrics in found.items():
                case = {
                    "store": "s3-like",
                    "transport": transport,
                    "chunks": args.chunks,
                    "chunk_bytes": lab.chunks.object_bytes,
                    "hedge_percent": percent,
                }
                lines.put(about | {"case": case, "metrics": results.rounded(metrics)})
                print(case, results.rounded(metrics), file=sys.stderr, flush=True)
    print(path)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--percent", default="0,1,5,10,20", help="of the requests that may have a second one")
    add("--paths", default="direct", help="direct, obstore, aiobotocore")
    add("--chunks", type=int, default=28)
    add("--slice-kib", type=int, default=64, help="a chunk has 32 slices")
    add("--rounds", type=int, default=200)
    add("--calculate", action="store_true", help="measure nothing")
    add("--machine", default="", help="its name in the results")
    add("--out", type=Path, help="another file for the results")
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
