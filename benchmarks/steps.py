"""What a stream of chunks into the engine's own process costs its decode steps. Clients side by side: transport.py.

    python -m benchmarks.steps                     a GPU with vLLM: 32 sequences of an 8B model decode
    python -m benchmarks.steps --threads 4,8,16 --rounds 3 --seconds 240
    python -m benchmarks.steps --cpu               a tiny model, to see that it all works

Engine, store and all run in one process; nginx on loopback serves the chunks. In each round every
transport (and number of receiving threads, where the path has any) streams chunks at full rate and
at a paced one, verified layer by layer as the streamer does it; before each of them the engine
decodes the same batch with no stream. A line says what a step took with the stream (p50, p99 over
all rounds) and how fast the stream was. The weights are random numbers: timing does not see that.

Not measured: prefills, copies to the GPU, the rest of the connector, and a network: the server's
processes share the machine's cores.
"""

import argparse
import importlib
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import command, results
from benchmarks.chunks import Chunks
from benchmarks.clients import (
    Absent,
    Endpoint,
    ObjectCache,
    ObjectCacheAiobotocore,
    ObjectCacheDirect,
    ObjectCacheObstore,
    Read,
)
from benchmarks.command import say
from benchmarks.decodes import SEQUENCES, Decodes
from benchmarks.engine import SETTINGS
from benchmarks.lab import MIB, Lab, Scale
from benchmarks.tiny_model import write_model
from objectcache import keys
from objectcache.config import parse
from objectcache.format import Verifier
from objectcache.mover import Berth
from objectcache.mover_process import MoverProcess
from objectcache.slots import HostSlots
from objectcache.streamer import StageResult

PACED_GB_PER_S = 10.0
SPACE = "steps"
CROWD, PACED_CROWD = 64, 8  # chunks at once
# The sizes of Llama-3.1-8B; what is made of them is random.
GEOMETRY: dict[str, Any] = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"},
    **{"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336},
    **{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
    **{"head_dim": 128, "max_position_embeddings": 131072, "rms_norm_eps": 1e-05},
    **{"rope_theta": 500000.0, "hidden_act": "silu", "tie_word_embeddings": False},
    **{"bos_token_id": 128000, "eos_token_id": 128001},
}
# As the worker of an engine with a GPU does it: in a process of its own.
PROCESS = "objectcache"
TRANSPORTS: dict[str, type[ObjectCache]] = {
    "objectcache-direct": ObjectCacheDirect,
    "objectcache-obstore": ObjectCacheObstore,
    "objectcache-aiobotocore": ObjectCacheAiobotocore,
}


class DirectWithThreads(ObjectCacheDirect):
    """The direct path with another number of receiving threads than it takes by itself."""

    threads = 0

    def make(self, options: Any) -> Any:
        from objectcache.stores.s3 import S3Store

        direct = importlib.import_module("objectcache.stores.s3_direct")  # older versions lack it
        library = S3Store(options)
        return direct.DirectStore(library, library, options, self.threads)


@dataclass(frozen=True)
class Stream:
    """One way to stream. `threads` (or processes) 0: as many as the path takes by itself."""

    system: str
    threads: int
    paced_gb_per_s: float  # 0: as fast as it goes

    def case(self) -> dict[str, Any]:
        case: dict[str, Any] = {"sequences": SEQUENCES, "rate": "full"}
        if self.paced_gb_per_s:
            case |= {"rate": "paced", "offered_gb_per_s": self.paced_gb_per_s}
        what = "processes" if self.system == PROCESS else "threads"
        return case | ({what: self.threads} if self.threads else {})


@dataclass
class Seen:
    """Steps with one stream, over all rounds, and those without it just before."""

    step_ms: list[float] = field(default_factory=list)
    alone_ms: list[float] = field(default_factory=list)
    gb_per_s: list[float] = field(default_factory=list)

    def metrics(self) -> dict[str, Any]:
        beside, alone = (
            np.percentile(self.step_ms, (50, 99)),
            np.percentile(self.alone_ms, (50, 99)),
        )
        return results.rounded(
            {
                "gb_per_s": statistics.median(self.gb_per_s),
                "step_p50_ms": float(beside[0]),
                "step_p99_ms": float(beside[1]),
                "alone_step_p50_ms": float(alone[0]),
                "alone_step_p99_ms": float(alone[1]),
                "step_slowdown_percent": float((beside[0] / alone[0] - 1) * 100),
                "steps": len(self.step_ms),
                "rounds": len(self.gb_per_s),
            }
        )


def open_engine(model: Path, cpu: bool) -> Any:
    """A vLLM engine in this process."""
    from vllm import LLM

    options: dict[str, Any] = {"load_format": "dummy", "gpu_memory_utilization": 0.8}
    if cpu:
        options = {
            **{"dtype": "float32", "enforce_eager": True, "gpu_memory_utilization": 0.05},
            **{"kv_cache_memory_bytes": 256 << 20, "distributed_executor_backend": "uni"},
        }
    # A prefix cache would not matter: the prompts are shorter than the time they take.
    return LLM(model=str(model), skip_tokenizer_init=True, max_model_len=8192, **options).llm_engine


class Source:
    """Streams chunks, driven by a thread, until it is stopped; it may be started again."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._landed_bytes = 0
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def start(self, paced_gb_per_s: float) -> None:
        self._over.clear()
        self._thread = threading.Thread(target=self._drive, args=(paced_gb_per_s,))
        self._thread.start()

    def landed_bytes(self) -> int:
        with self._lock:
            return self._landed_bytes

    def stop(self) -> None:
        """Wait for what is in flight. Raises what the stream ended of."""
        self._over.set()
        assert self._thread is not None
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        raise NotImplementedError

    def _stream(self, paced_gb_per_s: float) -> None:
        """Until `_over` is set."""
        raise NotImplementedError

    def _landed(self, count: int) -> None:
        with self._lock:
            self._landed_bytes += count

    def _drive(self, paced_gb_per_s: float) -> None:
        try:
            self._stream(paced_gb_per_s)
        except BaseException as exc:
            self._failure = exc  # told by stop()


class ClientSource(Source):
    """By a client in this process, into one destination, verified."""

    def __init__(self, chunks: Chunks, memory: memoryview, client: ObjectCache) -> None:
        super().__init__()
        self._chunks, self._memory, self._client = chunks, memory, client

    def close(self) -> None:
        self._client.close()

    def _stream(self, paced_gb_per_s: float) -> None:
        began, moved = time.perf_counter(), 0
        at_once = PACED_CROWD if paced_gb_per_s else CROWD
        slots = len(self._memory) // self._chunks.object_bytes
        first = 0
        while not self._over.is_set():
            if paced_gb_per_s:
                due = moved / (paced_gb_per_s * 1e9) - (time.perf_counter() - began)
                self._over.wait(max(0.0, due))
            numbers = [(first + n) % slots for n in range(min(at_once, slots))]
            self._client.fill([self._read(n) for n in numbers], min(at_once, slots))
            moved += len(numbers) * self._chunks.object_bytes
            first += len(numbers)

    def _read(self, slot: int) -> Read:
        chunks, size = self._chunks, self._chunks.object_bytes
        into = self._memory[slot * size : (slot + 1) * size]
        whole = Verifier(chunks.layout, chunks.chunk_hash(slot), into)
        verifier = whole.part(0, len(chunks.layout.slice_bytes))
        told = 0

        def landed(n: int) -> None:
            nonlocal told
            verifier.landed(n)
            self._landed(n - told)
            told = n

        return Read(chunks.key(slot), None, into, chunks.marks, landed)


class ProcessSource(Source):
    """Has chunks staged by movers in processes of their own, each with its share of the slots and chunks."""

    def __init__(self, chunks: Chunks, at: Endpoint, processes: int, pinned: bool) -> None:
        super().__init__()
        self._size = chunks.object_bytes
        self._hashes = [chunks.chunk_hash(n) for n in range(chunks.count)]
        # Half as many slots as chunks: what lies in a free slot would not be read again.
        self._ring_slots = chunks.count // 2
        self._slots = HostSlots(self._ring_slots, self._size, pinned, shared=True)
        options = parse(
            {
                **{"url": f"s3://{at.bucket}/", "endpoint_url": at.url, "ring_bytes": 1 << 40},
                **({"ca_bundle": at.ca} if at.ca else {}),
            }
        )
        share = self._ring_slots // processes
        assert self._slots.descriptor is not None
        self._movers = []
        for n in range(processes):
            berth = Berth(
                options,
                chunks.layout,
                self._ring_slots,
                range(n * share, (n + 1) * share),
                0,
                pinned,
            )
            self._movers.append(MoverProcess(berth, self._slots.descriptor))
            self._movers[-1].enter(SPACE, chunks.layout.namespace_digest)

    def close(self) -> None:
        for mover in self._movers:
            mover.close(1.0)

    def _stream(self, paced_gb_per_s: float) -> None:
        """Keep two jobs under way in each; a chunk is read again only after all others were."""
        count = len(self._movers)
        most = min(PACED_CROWD, self._ring_slots) if paced_gb_per_s else self._ring_slots
        at_once = max(1, most // (2 * count))
        began, moved, job = time.perf_counter(), 0, 0
        under_way: list[dict[int, int]] = [{} for _ in self._movers]  # job -> chunks
        first = [0] * count
        while not self._over.is_set() or any(under_way):
            for n, mover in enumerate(self._movers):
                mine = self._hashes[n::count]
                due = not paced_gb_per_s or moved < paced_gb_per_s * 1e9 * (
                    time.perf_counter() - began
                )
                while len(under_way[n]) < 2 and due and not self._over.is_set():
                    job += 1
                    wanted = [mine[(first[n] + k) % len(mine)] for k in range(at_once)]
                    first[n] += at_once
                    moved += at_once * self._size
                    mover.stage(job, wanted)
                    under_way[n][job] = at_once
                for event in mover.take():
                    if not isinstance(event, StageResult):
                        continue
                    if event.error is not None:
                        raise event.error
                    self._landed(under_way[n].pop(event.job) * self._size)
                    mover.release(event.job)
            time.sleep(0.005)  # an engine looks once a step


def name_as_engines_do(chunks: Chunks) -> None:
    """The chunks once more, under the keys that a mover looks for."""
    for n in range(chunks.count):
        path = chunks.folder / keys.object_key(SPACE, chunks.chunk_hash(n), 0, 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(chunks.folder / chunks.key(n), path)


def measure(engine: Decodes, source: Source, stream: Stream, seconds: float, seen: Seen) -> None:
    """One round of one stream."""
    names = engine.begin()
    seen.alone_ms += engine.step_times_ms(seconds / 2)
    source.start(stream.paced_gb_per_s)
    engine.step_times_ms(seconds / 10)  # until it flows
    before, began = source.landed_bytes(), time.perf_counter()
    seen.step_ms += engine.step_times_ms(seconds)
    moved, took_s = source.landed_bytes() - before, time.perf_counter() - began
    source.stop()
    seen.gb_per_s.append(moved / took_s / 1e9)
    engine.end(names)


def streams(args: argparse.Namespace) -> Iterator[Stream]:
    paced = 0.02 if args.cpu else PACED_GB_PER_S
    for system in args.systems.split(","):
        counts = [0]
        if system == PROCESS:
            counts = [int(count) for count in args.processes.split(",")]
        if system == "objectcache-direct" and args.threads:
            counts = [int(count) for count in args.threads.split(",")]
        for threads in counts:
            for rate in (0.0, paced):
                yield Stream(system, threads, rate)


def client_of(stream: Stream, at: Endpoint, memory: memoryview) -> ObjectCache:
    if not stream.threads:
        return TRANSPORTS[stream.system](at, CROWD, memory)
    kind = type("Direct", (DirectWithThreads,), {"threads": stream.threads})
    made: ObjectCache = kind(at, CROWD, memory)
    return made


def source_of(
    stream: Stream, chunks: Chunks, at: Endpoint, memory: memoryview, pinned: bool
) -> Source:
    if stream.system == PROCESS:
        return ProcessSource(chunks, at, stream.threads, pinned)
    return ClientSource(chunks, memory, client_of(stream, at, memory))


def pinned(size: int) -> memoryview:
    """Host memory that is populated, and page-locked where there is a GPU."""
    import torch

    return memoryview(
        torch.zeros(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available()).numpy()
    )


def run(args: argparse.Namespace) -> int:
    began = time.monotonic()
    slice_bytes, slots = (16 << 10, 8) if args.cpu else (MIB, 2 * CROWD)
    path, lines, about = command.begin("steps", args, args.cpu)
    scale = Scale(slots, slots, len(os.sched_getaffinity(0)), slice_bytes)
    with tempfile.TemporaryDirectory(prefix="steps-", dir="/dev/shm") as name:
        folder = Path(name)
        folder.chmod(0o755)
        with Lab(folder, scale, {"nginx"}, destination=False) as lab:
            os.environ.update(lab.env())
            name_as_engines_do(lab.chunks)
            if args.cpu:
                model = write_model(folder / "model")
            else:
                model = folder / "model"
                model.mkdir()
                (model / "config.json").write_text(json.dumps(GEOMETRY))
            engine = Decodes(open_engine(model, args.cpu))
            memory = pinned(slots * lab.chunks.object_bytes)
            at = Endpoint(**lab.endpoints()["nginx"])
            say(f"ready after {time.monotonic() - began:.0f} s")
            sources: dict[tuple[str, int], Source | None] = {}
            try:
                until = began + args.seconds
                rounds(args, engine, lab.chunks, memory, at, sources, lines, about, until)
            finally:
                for source in sources.values():
                    if source is not None:
                        source.close()
    print(path)
    return 0


def rounds(
    args: argparse.Namespace,
    engine: Decodes,
    chunks: Chunks,
    memory: memoryview,
    at: Endpoint,
    sources: dict[tuple[str, int], Source | None],
    lines: results.Lines,
    about: dict[str, str],
    until: float,
) -> None:
    """`sources` gets those that could be made; the caller closes them."""
    seen: dict[Stream, Seen] = {}
    for number in range(args.rounds):
        for stream in streams(args):
            if time.monotonic() > until:
                say(f"time is up in round {number + 1}")
                return
            line = about | {"system": stream.system, "case": stream.case()}
            key = (stream.system, stream.threads)
            if key not in sources:
                try:
                    sources[key] = source_of(stream, chunks, at, memory, not args.cpu)
                except (Absent, ImportError) as why:
                    sources[key] = None
                    say(f"{stream.system} is left out: {why}")
                    lines.put(line | {"metrics": {}, "skipped": str(why)})
            source = sources[key]
            if source is None:
                continue
            measure(engine, source, stream, args.window, seen.setdefault(stream, Seen()))
            lines.put(line | {"metrics": seen[stream].metrics()})
        say(f"round {number + 1} of {args.rounds} done")


def main() -> int:
    parser = command.parser(
        __doc__,
        *("systems", "rounds", "seconds", "machine", "out"),
        systems=[PROCESS, *TRANSPORTS],
    )
    add = parser.add_argument
    add("--cpu", action="store_true", help="a tiny model and tiny chunks")
    add("--threads", default="4,8,16", help="of the direct path; empty: what it takes by itself")
    add("--processes", default="1,2", help="that move bytes as in an engine with a GPU")
    add("--window", type=float, default=1.5, help="seconds of steps with each stream")
    args = parser.parse_args()
    # Before vLLM is imported: all of the engine in this process.
    os.environ.update(SETTINGS | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    return run(args)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # an engine and some clients leave threads that would not end
