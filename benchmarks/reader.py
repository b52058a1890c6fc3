"""One S3 client in a process of its own, which does what it is told on stdin and tells how long it took. When and why: transport.py.

Commands and answers are JSON, one a line. `{"do": "rate", ...}` calls `Reader.rate` with the rest; the
answer is what that returns, or `{"error": ...}`, or `{"absent": why}` if the client cannot be had here.
The CPU time is that of this process; the servers are others.
"""

import ctypes
import hashlib
import json
import mmap
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.chunks import Chunks
from benchmarks.clients import Absent, Client, Endpoint, Read, system
from objectcache.format import Part, Verifier

# SeaweedFS reads all of a stored piece for any range of it, so that 1 MiB of a chunk costs it 32.
# There the parts are objects of their own.
PARTED = {"seaweedfs"}
SPOT_BYTES = 16  # looked at on both ends of each read after a timed fill
STEP_PYTHON_S, STEP_WITHOUT_GIL_S = 40e-6, 280e-6  # of a decode step as a vLLM worker makes it
_BUSY_OVERTIME_S = 4.0  # how long after its end a starved reader may hold up a measurement


class Reader:
    """`most`: the largest number of reads in flight that will be asked for."""

    def __init__(
        self,
        name: str,
        memory: str,
        chunks: dict[str, Any],
        slots: int,
        split: int,
        most: int,
        endpoints: dict[str, dict[str, Any]],
    ) -> None:
        self._name, self._slots, self._split, self._most = name, slots, split, most
        self._chunks = Chunks(Path(chunks.pop("folder")), **chunks)
        self._memory = _mapped(memory)
        self.pinned = _pin(self._memory)
        self._contents = [self._chunks.content(n) for n in range(self._chunks.count)]
        self._endpoints = {server: Endpoint(**at) for server, at in endpoints.items()}
        self._clients: dict[str, Client | Absent] = {}
        self._worker = ThreadPoolExecutor(1)  # the main thread is left to what it is busy with

    def hello(self) -> dict[str, Any]:
        return {"pinned": self.pinned}

    def verify(self, server: str, request_bytes: int, in_flight: int) -> dict[str, Any]:
        """Read every byte that the server has of chunks once, and compare all of them."""
        has = self._split if server in PARTED else self._chunks.count
        slots = min(self._slots, has)
        per_slot = self._chunks.layout.slice_bytes[0] * 32 // request_bytes
        reads = self._reads(server, request_bytes, slots * per_slot, slots)
        for slot in range(slots):
            self._slot(slot)[:] = bytes(self._chunks.object_bytes)
        self._fill(server, reads, in_flight)
        header = self._chunks.layout.header_bytes
        for slot in range(slots):
            _compare(self._slot(slot)[header:], self._contents[slot][header:], self._name)
        return {"verified_bytes": sum(len(read.into) for read in reads)}

    def rate(self, server: str, request_bytes: int, in_flight: int, count: int) -> dict[str, Any]:
        """Time to bring `count` ranges, all in different places of the destination."""
        reads = self._reads(server, request_bytes, count, min(count, self._slots))
        self._clear(reads)
        took = self._fill(server, reads, in_flight)
        self._check(reads)
        return took

    def layers(self, server: str, chunks: int, verified: bool) -> dict[str, Any]:
        """Bring whole chunks, all at once, and note when each layer is there in all of them."""
        arrivals = [self._arrivals(n, verified) for n in range(chunks)]
        marks = self._chunks.marks
        reads = [
            Read(self._chunks.key(n), None, arrival.into, marks, arrival.landed)
            for n, arrival in enumerate(arrivals)
        ]
        self._clear(reads)
        began = time.perf_counter()
        took = self._fill(server, reads, chunks)
        self._check(reads)
        times = np.array([arrival.times for arrival in arrivals]) - began
        if not np.isfinite(times).all():
            raise RuntimeError(f"{self._name} did not tell of every layer")
        layer_ms = times.max(axis=0)[1:] * 1000  # [0] is the header
        return took | {
            "ttfb_ms": min(arrival.first for arrival in arrivals) * 1000 - began * 1000,
            "layer0_ms": layer_ms[0],
            "layer1_ms": layer_ms[1],
            "last_layer_ms": layer_ms[-1],
        }

    def busy(
        self,
        server: str,
        request_bytes: int,
        in_flight: int,
        main_thread: str,
        offered_gb_per_s: float,
        seconds: float,
    ) -> dict[str, Any]:
        """Read at an offered rate while the main thread is busy; its steps without and with that."""
        loop = {"idle": _idle, "steps": _Steps(), "spin": _spin}[main_thread]
        alone = 0.0
        reads = self._reads(server, request_bytes, in_flight, in_flight)
        self._fill(server, reads, in_flight)
        with _main_thread_alone():
            if main_thread != "idle":
                alone = loop(threading.Event(), seconds)
            over = threading.Event()
            stream = self._worker.submit(
                self._stream, server, reads, in_flight, offered_gb_per_s, seconds, over
            )
            beside = loop(over, seconds + _BUSY_OVERTIME_S)
            moved, took_s = stream.result()
        answer = {"gb_per_s": moved / took_s / 1e9}
        if main_thread != "idle":
            answer["steps_per_s"] = alone
            answer["step_slowdown_percent"] = (alone / beside - 1) * 100
        return answer

    def close(self) -> dict[str, Any]:
        for client in self._clients.values():
            if isinstance(client, Client):
                client.close()
        return {}

    # -- the work

    def _stream(
        self,
        server: str,
        reads: list[Read],
        in_flight: int,
        offered_gb_per_s: float,
        seconds: float,
        over: threading.Event,
    ) -> tuple[int, float]:
        """Batches of reads, each begun no sooner than the offered rate allows."""
        try:
            client, size = self._client(server), sum(len(read.into) for read in reads)
            began, moved = time.perf_counter(), 0
            while time.perf_counter() - began < seconds:
                ahead_s = moved / (offered_gb_per_s * 1e9) - (time.perf_counter() - began)
                time.sleep(max(0.0, ahead_s))
                client.fill(reads, in_flight)
                moved += size
            return moved, max(
                time.perf_counter() - began, moved / (offered_gb_per_s * 1e9)
            )  # the last batch is early, as it were
        finally:
            over.set()

    def _fill(self, server: str, reads: list[Read], in_flight: int) -> dict[str, float]:
        return self._worker.submit(self._timed, server, reads, in_flight).result()

    def _timed(self, server: str, reads: list[Read], in_flight: int) -> dict[str, float]:
        client = self._client(server)
        size = sum(len(read.into) for read in reads)
        counted = client.counts()
        cpu_s, began = _cpu_s(), time.perf_counter()
        client.fill(reads, in_flight)
        seconds, cpu_s = time.perf_counter() - began, _cpu_s() - cpu_s
        gb = size / 1e9
        more = {name: n - counted.get(name, 0) for name, n in client.counts().items()}
        return {"seconds": seconds, "gb_per_s": gb / seconds, "cpu_s_per_gb": cpu_s / gb, **more}

    def _client(self, server: str) -> Client:
        if server not in self._clients:
            try:
                made: Client | Absent = system(self._name)(
                    self._endpoints[server], self._most, self._memory
                )
            except Absent as why:
                made = why
            self._clients[server] = made
        found = self._clients[server]
        if isinstance(found, Absent):
            raise found
        return found

    def _slot(self, slot: int) -> memoryview:
        size = self._chunks.object_bytes
        return self._memory[slot * size : (slot + 1) * size]

    def _reads(self, server: str, request_bytes: int, count: int, slots: int) -> list[Read]:
        """Parts of chunks, as far from each other as can be; each to the place it has in its slot."""
        reads, header = [], self._chunks.layout.header_bytes
        for n in range(count):
            slot, part = n % slots, n // slots
            start = header + part * request_bytes
            into = self._slot(slot)[start : start + request_bytes]
            assert len(into) == request_bytes, "the destination is too small"
            if server in PARTED:
                key = self._chunks.part_key(slot % self._split, request_bytes, part)
                reads.append(Read(key, None, into))
            else:
                reads.append(Read(self._chunks.key(slot), start, into))
        return reads

    def _wanted(self, read: Read) -> memoryview:
        """What must be there after a read."""
        first, number = read.start or 0, int(read.key.rpartition("-")[2])
        if read.key.startswith("part-"):
            part = int(read.key.split("-")[2])
            first = self._chunks.layout.header_bytes + part * len(read.into)
        return self._contents[number][first : first + len(read.into)]

    def _arrivals(self, number: int, verified: bool) -> "_Arrivals":
        into = self._slot(number)
        verifier: Part | None = None
        if verified:
            layout = self._chunks.layout
            whole = Verifier(layout, self._chunks.chunk_hash(number), into)
            verifier = whole.part(0, len(layout.slice_bytes))
        return _Arrivals(into, self._chunks.marks, verifier)

    def _clear(self, reads: list[Read]) -> None:
        for read in reads:
            read.into[:SPOT_BYTES] = read.into[-SPOT_BYTES:] = bytes(SPOT_BYTES)

    def _check(self, reads: list[Read]) -> None:
        for read in reads:
            wanted = self._wanted(read)
            for part in (slice(0, SPOT_BYTES), slice(-SPOT_BYTES, None)):
                if read.into[part] != wanted[part]:
                    raise RuntimeError(f"{self._name} brought wrong bytes of {read.key}")


class _Arrivals:
    """When the header and each slice of one chunk were there (and right, with a verifier)."""

    def __init__(self, into: memoryview, marks: tuple[int, ...], verifier: Part | None) -> None:
        self.into, self.first = into, float("inf")
        self.times = [float("nan")] * len(marks)
        self._marks, self._verifier, self._next = marks, verifier, 0

    def landed(self, n: int) -> None:
        now = time.perf_counter()
        if n and self.first > now:
            self.first = now
        if n < self._marks[self._next if self._next < len(self._marks) else -1]:
            return
        if self._verifier is not None:
            self._verifier.landed(n)
            now = time.perf_counter()
        while self._next < len(self._marks) and n >= self._marks[self._next]:
            self.times[self._next] = now
            self._next += 1


class _Steps:
    """A main thread like that of a vLLM worker: some Python, then some work without the GIL."""

    def __init__(self) -> None:
        self._loops = 100
        self._loops = max(1, int(100 * STEP_PYTHON_S / _best_s(self._python)))
        self._data = bytes(1 << 16)
        size = len(self._data) * STEP_WITHOUT_GIL_S / _best_s(self._without_gil)
        self._data = bytes(max(4096, int(size)))

    def __call__(self, over: threading.Event, seconds: float) -> float:
        """Steps a second, until `over` or the time is up."""
        began, steps = time.perf_counter(), 0
        while not over.is_set() and time.perf_counter() - began < seconds:
            self._python()
            self._without_gil()
            steps += 1
        return steps / (time.perf_counter() - began)

    def _python(self) -> None:
        for _ in range(self._loops):
            pass

    def _without_gil(self) -> None:
        hashlib.sha256(self._data)


def _spin(over: threading.Event, seconds: float) -> float:
    """Python that never gives the GIL up by itself: the worst that a main thread can do."""
    began, loops = time.perf_counter(), 0
    while not over.is_set() and time.perf_counter() - began < seconds:
        for _ in range(200):
            pass
        loops += 1
    return loops / (time.perf_counter() - began)


def _idle(over: threading.Event, seconds: float) -> float:
    over.wait(seconds)
    return 0.0


def _best_s(work: Callable[[], None]) -> float:
    times = []
    for _ in range(200):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


@contextmanager
def _main_thread_alone() -> Iterator[None]:
    """The main thread has the first core for itself; all others share the rest."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        yield
        return
    threads = [int(name) for name in os.listdir("/proc/self/task")]
    for thread in threads:
        _bind(thread, set(cores[1:]))
    os.sched_setaffinity(0, {cores[0]})  # the calling thread, which is the main one
    try:
        yield
    finally:
        for thread in os.listdir("/proc/self/task"):
            _bind(int(thread), set(cores))


def _bind(thread: int, cores: set[int]) -> None:
    try:
        os.sched_setaffinity(thread, cores)
    except ProcessLookupError:
        return  # it has ended


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _compare(got: memoryview, wanted: memoryview, name: str) -> None:
    if not np.array_equal(np.frombuffer(got, np.uint8), np.frombuffer(wanted, np.uint8)):
        raise RuntimeError(f"{name} brought wrong bytes")


def _mapped(path: str) -> memoryview:
    """The destination, which all readers share, since only one reads at a time."""
    with open(path, "r+b") as file:
        # Populated: no page is faulted in while it is received into.
        return memoryview(mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE))


def _pin(memory: memoryview) -> bool:
    """Page-lock it for a GPU, by CUDA's driver; whether that was possible."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    device, context = ctypes.c_int(), ctypes.c_void_p()
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return not (
        cuda.cuInit(0)
        or cuda.cuDeviceGet(ctypes.byref(device), 0)
        or cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
        or cuda.cuCtxSetCurrent(context)
        or cuda.cuMemHostRegister_v2(
            ctypes.c_void_p(address), ctypes.c_size_t(len(memory)), ctypes.c_uint(1)
        )
    )


def _raise_limits() -> None:
    """As many connections as the system allows."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main() -> None:
    """Obey until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    _raise_limits()
    reader = Reader(**json.loads(sys.argv[1]))
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(reader, command.pop("do"))(**command)
        except Absent as why:
            answer = {"absent": str(why)}
        except Exception as exc:  # told to the one who commands
            answer = {"error": f"{type(exc).__name__}: {exc}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    os._exit(0)  # some clients' threads would not end


if __name__ == "__main__":
    main()
