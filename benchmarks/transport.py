"""How fast S3 clients bring chunks into host memory, side by side, and at what cost in CPU and in the engine's steps.

    python -m benchmarks.transport                      everything; adds to benchmarks/results/
    python -m benchmarks.transport --cases rate-nginx,layers --systems boto3,objectcache-direct
    python -m benchmarks.transport --seconds 240        stop then; the next call goes on from there
    python -m benchmarks.transport --report             the table and the plots, from the results

Servers, and each client, are processes of their own; CPU time is the client's alone. All clients
read the same random chunks (a header of 4 KiB and 32 slices of 1 MiB) into one destination that is
populated before, and pinned where there is a GPU. Before a client is timed on a server, all it
brings is compared byte for byte; after each timed fill both ends of every read are. In each round
every case is run by every client in turn, each round in another order; results are medians over
rounds. A fill that takes longer than SLOW_S is not repeated. Cases (`--cases` takes beginnings):

rate-nginx, rate-seaweedfs, rate-tls
    GB/s and CPU-seconds for each GB, by size of the request and requests in flight. nginx ignores
    signatures and is the ceiling; tls is nginx by https. SeaweedFS is a real S3 server; it reads all
    of a stored piece for any range of it, so there each request is for a whole object of its size.
layers-nginx
    Whole chunks, all at once: time to the first byte, and until layers 0, 1 and 31 are there in all
    of them. objectcache also with its checksums verified; nobody else checks any.
busy-nginx, busy-tls
    Reading at an offered rate while the process's main thread runs steps (40 us of Python, 280 us
    without the GIL) or spins (never gives up the GIL by itself): the rate that is kept, and how
    much slower the steps get. The main thread has a core for itself, all else the others.
latency-s3-like
    Behind first bytes of 27 ms (median) and 114 ms (p99) and 85 MB/s a connection: 224 chunks (7 GiB,
    the 64K tokens of an 8B model at 87.5 % hit), fewer on fewer than 16 cores. The share of the time that one GET for each
    chunk, all at once, needs by that model; and the requests, which S3 bills.

botocore signs with awscrt where that is installed. objectcache leaves an eighth of its connections
to requests without a body; it gets so many more that as many reads are in flight as with the others.

Not measured: a network (loopback has no loss, no round trip, no card, and no two machines); real
S3; writing; a client's start; memory used; virtual-host addresses. Client and servers share the
machine's cores, so a rate is that of the pair. Chunks repeat after `--objects` of them, so servers
read from fewer pages than they send.
"""

import argparse
import json
import math
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import command, results
from benchmarks.clients import SYSTEMS
from benchmarks.command import clean, say
from benchmarks.lab import MIB, Gone, Lab, ReaderProcess, Scale
from benchmarks.s3_like import BYTES_PER_S, FIRST_BYTE_P50_MS, FIRST_BYTE_P99_MS, sigma
from benchmarks.servers import apart

SIZES_MIB, IN_FLIGHT = (1, 4, 16, 32), (1, 16, 64, 256)
TLS_CELLS = ((1, 16), (4, 1), (4, 16), (4, 64), (16, 16), (32, 16), (32, 64))
HEAVY_MIB = 2048
LAYER_CHUNKS = (16, 64, 256)
LATENCY_CHUNKS, LATENCY_CORES = 224, 16
BUSY_MIB, BUSY_IN_FLIGHT = 4, 8
SLOW_S = 1.5
_MODULES = ("aiobotocore", "boto3", "obstore", "awscrt", "s3torchconnectorclient", "nixl", "xxhash")


@dataclass(frozen=True)
class Case:
    """`plan` is its name for --cases; `command` what a reader is told; `case` what results say of it."""

    plan: str
    server: str
    case: dict[str, Any]
    command: dict[str, Any]
    reads: int  # at once
    read_bytes: int  # of each, a chunk's header left out
    ours_only: bool = False


def cases(scale: Scale) -> Iterator[Case]:
    """All of them, the most telling first."""
    yield from _chunks(scale, "latency", "s3-like", _latency_chunks(scale))
    for count in LAYER_CHUNKS:
        yield from _chunks(scale, "layers", "nginx", count)
    grid = [(size_mib, in_flight) for size_mib in SIZES_MIB for in_flight in IN_FLIGHT]
    heavy = [cell for cell in grid if cell[0] * cell[1] > HEAVY_MIB]  # seconds for each client
    light = [cell for cell in grid if cell not in heavy]
    for server, cells in (("nginx", light), ("tls", TLS_CELLS), ("seaweedfs", light)):
        for cell in cells:
            yield _rate(scale, server, *cell)
        for main_thread in ("idle", "steps", "spin") if server != "seaweedfs" else ():
            yield _busy(scale, server, main_thread)
    for server in ("nginx", "seaweedfs"):
        for cell in heavy:
            yield _rate(scale, server, *cell)


def smoke_cases(scale: Scale) -> Iterator[Case]:
    """One of each kind, on servers that are there wherever the tests run."""
    yield from _chunks(scale, "latency", "s3-like", scale.slots)
    yield _rate(scale, "seaweedfs", 1, 4)
    yield _rate(scale, "seaweedfs", 32, 1)
    yield _busy(scale, "s3-like", "steps")


def _rate(scale: Scale, server: str, size_mib: int, in_flight: int) -> Case:
    size = _range_bytes(scale, size_mib)
    case = {
        **{"group": "rate", "server": server},
        **{"request_mib": _mib(size), "in_flight": in_flight},
    }
    command = {"do": "rate", "request_bytes": size, "in_flight": in_flight}
    return Case(f"rate-{server}", server, case, command, in_flight, size)


def _chunks(scale: Scale, group: str, server: str, count: int) -> Iterator[Case]:
    """Whole chunks, by everybody; and by us with each slice verified."""
    for verified in (False, True):
        case = {"group": group, "server": server, "chunks": count, "verified": verified}
        command = {"do": "layers", "chunks": count, "verified": verified}
        name = f"{group}-{server}"
        yield Case(name, server, case, command, count, scale.chunk_bytes, ours_only=verified)


def _busy(scale: Scale, server: str, main_thread: str) -> Case:
    size, offered = _range_bytes(scale, BUSY_MIB), 0.125 if server == "tls" else 0.25
    if scale.slice_bytes < MIB:
        offered = 0.001
    offered *= min(scale.cores, LATENCY_CORES)
    case = {
        **{"group": "busy", "server": server, "main_thread": main_thread},
        **{"request_mib": _mib(size), "in_flight": min(BUSY_IN_FLIGHT, scale.slots)},
        "offered_gb_per_s": offered,
    }
    command = {
        **{"do": "busy", "request_bytes": size, "in_flight": case["in_flight"]},
        **{"main_thread": main_thread, "offered_gb_per_s": offered, "seconds": scale.busy_s},
    }
    return Case(f"busy-{server}", server, case, command, case["in_flight"], size)


def _latency_chunks(scale: Scale) -> int:
    """The whole prefix on 16 cores; on fewer, what they can receive at the modelled rate."""
    cores = min(scale.cores, LATENCY_CORES)
    return min(LATENCY_CHUNKS * cores // LATENCY_CORES, scale.slots)


def _range_bytes(scale: Scale, size_mib: int) -> int:
    return scale.chunk_bytes * size_mib // 32  # so that a smoke run has small ones


def _mib(size: int) -> float:
    return size // MIB if size % MIB == 0 else size / MIB


def modelled_best_s(chunks: int, chunk_bytes: int) -> float:
    """One GET for each chunk, all at once: the median of the latest first byte, then a body's time."""
    latest = statistics.NormalDist().inv_cdf(0.5 ** (1 / chunks))
    spread = sigma(FIRST_BYTE_P50_MS, FIRST_BYTE_P99_MS)
    return FIRST_BYTE_P50_MS / 1000 * math.exp(spread * latest) + chunk_bytes / BYTES_PER_S


class Run:
    """Rounds over cases and systems; a line is written as soon as there is something to say."""

    def __init__(self, lab: Lab, lines: results.Lines, about: dict[str, str], until: float) -> None:
        self._lab, self._lines, self._about, self._until = lab, lines, about, until
        self._readers: dict[str, ReaderProcess] = {}
        self._samples: dict[tuple[str, int], list[dict[str, float]]] = {}
        self._verified: set[tuple[str, str]] = set()
        self._out: set[tuple[str, str]] = set()  # of these no more is asked: (system, server)
        self._rates: dict[tuple[str, str, int], float] = {}  # GB/s seen lately, for the next count

    def rounds(self, plan: list[tuple[Case, list[str]]], count: int) -> None:
        for number in range(count):
            for at, (case, systems) in enumerate(plan):
                shift = number % len(systems)
                for system in systems[shift:] + systems[:shift]:
                    if time.monotonic() > self._until:
                        say(f"time is up in round {number + 1}, at case {at + 1} of {len(plan)}")
                        return
                    self._one(system, at, case)
            say(f"round {number + 1} of {count} done")

    def _one(self, system: str, at: int, case: Case) -> None:
        if (system, case.server) in self._out:
            return
        samples = self._samples.setdefault((system, at), [])
        if samples and samples[-1].get("seconds", 0.0) > SLOW_S:
            return
        try:
            sample = self._measure(system, case) if self._right(system, case.server) else None
        except Gone as gone:
            self._readers.pop(system).end()
            self._skip(system, case, str(gone))
            return
        if sample is not None:
            samples.append(sample)
            self._put(system, case.case, {"metrics": medians(samples)})

    def end(self) -> None:
        for reader in self._readers.values():
            reader.end()

    def start(self, systems: Sequence[str], most: int) -> dict[str, Any]:
        """All readers at once: importing takes them seconds."""
        self._readers |= {name: ReaderProcess(name, self._lab, most) for name in systems}
        self._most = most
        hellos = [self._readers[name].ask({"do": "hello"}) for name in systems]
        return {"pinned": all(hello.get("pinned") for hello in hellos)}

    def _right(self, system: str, server: str) -> bool:
        """Whether what it brings from this server is right, byte for byte; asked once."""
        if (system, server) in self._verified:
            return True
        size = self._lab.scale.chunk_bytes // 8
        command = {"do": "verify", "server": server, "request_bytes": size, "in_flight": 8}
        answer = self._ask(system, command)
        why = answer.get("absent") or answer.get("error")
        if why:
            self._out.add((system, server))
            say(f"{system} is left out on {server}: {why}")
            case = {"group": "all", "server": server}
            self._put(system, case, {"metrics": {}, "skipped": clean(why)})
            return False
        self._verified.add((system, server))
        self._put(system, {"group": "verify", "server": server}, {"metrics": answer})
        return True

    def _measure(self, system: str, case: Case) -> dict[str, float] | None:
        command = case.command | {"server": case.server}
        self._warm(system, case)
        if command["do"] == "rate":
            command["count"] = self._count(system, case)
        asked = self._lab.requests(case.server) if command["do"] == "layers" else None
        with self._lab.off_first_core(case.server, command["do"] == "busy"):
            answer = self._ask(system, command)
        if "error" in answer:
            self._skip(system, case, answer["error"])
            return None
        if "seconds" in answer and command["do"] == "rate":
            self._rates[system, case.server, case.reads] = answer["gb_per_s"]
        if asked is not None:
            requests = (self._lab.requests(case.server) or 0) - asked
            gib = case.reads * self._lab.chunks.object_bytes / (1 << 30)
            answer |= {"requests": requests, "requests_per_gib": requests / gib}
        if case.case["group"] == "latency":
            best_s = modelled_best_s(case.reads, self._lab.chunks.object_bytes)
            share = 100 * best_s / answer["seconds"]
            answer |= {"modelled_best_s": best_s, "share_of_best_percent": share}
        return answer

    def _count(self, system: str, case: Case) -> int:
        """As many reads as fill the time, in whole crowds of those in flight."""
        wanted = self._rates[system, case.server, case.reads] * 1e9 * self._lab.scale.fill_s
        room = self._lab.scale.slots * (self._lab.scale.chunk_bytes // case.read_bytes)
        crowds = round(wanted / case.read_bytes / case.reads)
        return max(1, min(crowds, room // case.reads)) * case.reads

    def _warm(self, system: str, case: Case) -> None:
        """Open the connections that the case will use, once; and see about how fast they are."""
        key = (system, case.server, case.reads)
        if key not in self._rates:
            size = min(case.read_bytes, self._lab.scale.chunk_bytes // 32)
            command = {"do": "rate", "server": case.server, "request_bytes": size}
            answer = self._ask(system, command | {"in_flight": case.reads, "count": case.reads})
            self._rates[key] = answer.get("gb_per_s", 1.0)

    def _ask(self, system: str, command: dict[str, Any]) -> dict[str, Any]:
        if system not in self._readers:
            self._readers[system] = ReaderProcess(system, self._lab, self._most)
        return self._readers[system].ask(command)

    def _skip(self, system: str, case: Case, why: str) -> None:
        say(f"{system}, {case.case}: {why}")
        self._put(system, case.case, {"metrics": {}, "skipped": clean(why)})

    def _put(self, system: str, case: dict[str, Any], said: dict[str, Any]) -> None:
        self._lines.put(self._about | {"system": system, "case": case} | said)


def medians(samples: list[dict[str, float]]) -> dict[str, Any]:
    """Of each metric; of the rate the lowest and the highest as well, to see how far to trust it."""
    found = {name: statistics.median(s[name] for s in samples) for name in samples[0]}
    rates = [sample["gb_per_s"] for sample in samples]
    if len(rates) > 1:
        found |= {"gb_per_s_min": min(rates), "gb_per_s_max": max(rates)}
    return results.rounded(found) | {"rounds": len(samples)}


def scale_of(args: argparse.Namespace) -> Scale:
    cores = len(os.sched_getaffinity(0))
    if args.smoke:
        return Scale(4, 4, cores, slice_bytes=16 << 10, split=2, fill_s=0.01, busy_s=0.1)
    total_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    memory_gib = args.memory_gib or (8 if total_gib > 64 else 2)
    slots = int(memory_gib * 1024) // 32
    objects = args.objects or min(64, max(1, slots // 2))
    return Scale(slots, objects, cores, split=min(objects, 8 if slots < 256 else 16))


def planned(
    args: argparse.Namespace, scale: Scale, lines: results.Lines, about: dict[str, str]
) -> tuple[list[tuple[Case, list[str]]], list[str]]:
    """Which systems still have to run which case; and the cases that do not fit this machine."""
    chosen = args.cases.split(",") if args.cases else [""]
    plan, too_large = [], []
    for case in smoke_cases(scale) if args.smoke else cases(scale):
        if not any(case.plan.startswith(name) for name in chosen):
            continue
        if case.reads * case.read_bytes > scale.slots * scale.chunk_bytes:
            too_large.append(json.dumps(case.case))
            continue
        systems = [
            name
            for name in args.systems.split(",")
            if name.startswith("objectcache") or not case.ours_only
            if args.again or not lines.has(about | {"system": name, "case": case.case})
        ]
        if systems:
            plan.append((case, systems))
    return plan, too_large


def measure(args: argparse.Namespace) -> int:
    until = time.monotonic() + args.seconds
    scale = scale_of(args)
    path, lines, about = command.begin("transport", args, args.smoke)
    plan, too_large = planned(args, scale, lines, about)
    for case in too_large:
        say(f"does not fit {scale.slots} chunks of destination: {case}")
    if not plan:
        say("nothing is left to measure; --again measures anew")
        return 0
    names = [n for n in args.systems.split(",") if any(n in systems for _, systems in plan)]
    servers = {case.server for case, _ in plan}
    with tempfile.TemporaryDirectory(prefix="transport-", dir="/dev/shm") as folder:
        Path(folder).chmod(0o755)
        with Lab(Path(folder), scale, servers) as lab:
            plan = [(case, systems) for case, systems in plan if case.server in lab.servers]
            for server, why in lab.absent.items():
                say(f"no {server}: {why}")
            run = Run(lab, lines, about, until)
            try:
                facts = run.start(names, max(case.reads for case, _ in plan))
                lines.put(about | _environment(scale, facts, too_large))
                say(f"ready {args.seconds - (until - time.monotonic()):.0f} s after the start")
                run.rounds(plan, args.rounds)
            finally:
                run.end()
    print(path)
    return 0


def _environment(scale: Scale, facts: dict[str, Any], too_large: list[str]) -> dict[str, Any]:
    """What a reader of the results must know of the machine."""
    metrics = {
        **{"cores": scale.cores, **apart()},
        "destination_chunks": scale.slots,
        "different_chunks": scale.objects,
        "pinned": facts["pinned"],
    }
    case = {"group": "machine"}
    return {
        **{"system": "environment", "case": case, "metrics": metrics},
        **{"versions": command.versions(_MODULES), "too_large": too_large},
    }


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parser = command.parser(
        __doc__,
        *("systems", "seconds", "rounds", "machine", "out", "again", "report"),
        systems=SYSTEMS,
    )
    add = parser.add_argument
    add("--cases", default="", help="beginnings of the cases' names, with commas between")
    add("--memory-gib", type=float, help="destination; 2, or 8 on a machine with over 64 GiB")
    add("--objects", type=int, help="different chunks")
    add("--smoke", action="store_true", help="tiny sizes, to see that it all works")
    args = parser.parse_args()
    if args.report:
        from benchmarks.transport_report import write

        write(results.FOLDER)
        return 0
    return measure(args)


if __name__ == "__main__":
    sys.exit(main())
