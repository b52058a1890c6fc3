"""How pages come from pinned host memory to a GPU and back: GB/s, and what it costs the host and the computing beside it.

    python -m benchmarks.copies                 on a GPU, about a minute; adds to benchmarks/results/
    python -m benchmarks.copies --systems staged,direct --cases load

A chunk is 16 blocks in each of 32 layers, as of an 8B model (64 KiB a page) or of one rank of eight
(8 KiB). Cases:

load
    All layers of n chunks, layer by layer. submit_ms is the host's time before the forward pass may
    begin, host_ms all of it, gb_per_s the rate with nothing beside it. beside_percent is how much
    longer 32 layers of matrix products take that wait for their pages, where the computing has 2.4
    times the time that the bus needs at 50 GB/s.
chunk
    Chunks of parked requests: the host's time for one, and the rate.
save
    Chunks from the pages to host memory after a step, or while it computes (layers-*): the host's time
    for one chunk, the time that the compute stream was held up, and the rate.

Systems: staged is objectcache; one-by-one is the same without vLLM's batched copy; direct copies each
page by itself, in one call a layer; triton does so with vLLM's kernel that reads host memory; each on
pinned memory, and registered is staged on memory that was mapped and registered.
"""

import functools
import mmap
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks import command, results
from objectcache.device import CudaCopies
from objectcache.format import ObjectLayout
from objectcache.runs import Run

LAYERS, BLOCKS, HEADER_BYTES = 32, 16, 4096
ROUNDS = 5
SLOTS = 48  # 1.5 GiB: much more than a cache holds; runs share slots
LOADS = {64: (14, 56, 224), 8: (224,)}  # chunks, by KiB of a page
SYSTEMS = ("staged", "registered", "one-by-one", "direct", "triton")
HIDDEN, INNER = 4096, 14336


@dataclass
class _Slots:
    """As much of HostSlots as the copies use."""

    tensor: torch.Tensor


def slots_of(kind: str, slot_bytes: int) -> _Slots:
    if kind != "registered":
        memory = torch.empty((SLOTS, slot_bytes), dtype=torch.uint8, pin_memory=True)
    else:
        mapped = mmap.mmap(-1, SLOTS * slot_bytes)
        memory = torch.frombuffer(mapped, dtype=torch.uint8).view(SLOTS, slot_bytes)
        memory.fill_(0)
        error = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
        if int(error):
            raise RuntimeError(f"cudaHostRegister: {error}")
    memory[:3] = torch.randint(0, 256, (3, slot_bytes), dtype=torch.uint8)  # those that are checked
    return _Slots(memory)


class Rig:
    """Pages and slots, and the ways between them."""

    def __init__(self, page_kib: int) -> None:
        self.page = page_kib << 10
        self.layout = ObjectLayout(bytes(32), 256, 16, 0, 1, (self.page * BLOCKS,) * LAYERS)
        self.blocks = max(LOADS[page_kib]) * BLOCKS
        memory = torch.zeros(LAYERS * self.blocks * self.page, dtype=torch.uint8, device="cuda")
        self.pages = list(memory.view(LAYERS, self.blocks, self.page))
        self.slots = {kind: slots_of(kind, self.layout.object_bytes) for kind in ("", "registered")}
        order = np.random.default_rng(1).permutation(self.blocks)
        self.runs = [
            Run(at % SLOTS, 0, order[at * BLOCKS : (at + 1) * BLOCKS].tolist())
            for at in range(self.blocks // BLOCKS)
        ]

    def close(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaHostUnregister(self.slots["registered"].tensor.data_ptr())

    def system(self, name: str) -> "CudaCopies | Direct":
        slots: Any = self.slots["registered" if name == "registered" else ""]
        if name in ("direct", "triton"):
            return Direct(self, slots, name == "triton")
        batched = None if name == "registered" else name == "staged"
        return CudaCopies(self.pages, slots, self.layout, batched)


class Direct:
    """Every page by itself, from its slot to its place: one call a layer. The alternative."""

    def __init__(self, rig: Rig, slots: _Slots, kernel: bool) -> None:
        self._rig, self._slots = rig, slots
        self._copy: Callable[..., None] = torch.ops._C_cache_ops.swap_blocks_batch
        if kernel:
            from vllm.v1.kv_offload.cpu.swap_blocks_triton import swap_blocks_batch

            self._copy = functools.partial(swap_blocks_batch, bytes_per_chunk=8192)
        self._stream = torch.cuda.Stream()
        self._events = [torch.cuda.Event() for _ in range(LAYERS)]
        self._base = np.array([page.data_ptr() for page in rig.pages], np.int64)

    def submit_loads(self, loads: list[tuple[int, list[Run]]]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        runs = loads[0][1]
        self._hosts = np.concatenate([self._host(run) for run in runs])
        self._ids = np.array([b for run in runs for b in run.block_ids], np.int64) * self._rig.page
        self._sizes = torch.full((len(self._ids),), self._rig.page, dtype=torch.int64)
        self._submitted = 0
        self._submit(2)

    def _host(self, run: Run) -> Any:
        first = self._slots.tensor.data_ptr() + run.slot * self._slots.tensor.stride(0)
        return first + HEADER_BYTES + np.arange(BLOCKS, dtype=np.int64) * self._rig.page

    def _submit(self, last: int) -> None:
        with torch.cuda.stream(self._stream):
            for layer in range(self._submitted, min(last, LAYERS)):
                hosts = torch.from_numpy(self._hosts + layer * BLOCKS * self._rig.page)
                pages = torch.from_numpy(self._base[layer] + self._ids)
                self._copy(hosts, pages, self._sizes, True)
                self._events[layer].record(self._stream)
        self._submitted = max(self._submitted, min(last, LAYERS))

    def wait_layer(self, layer: int) -> None:
        self._submit(layer + 3)
        torch.cuda.current_stream().wait_event(self._events[layer])

    def end_step(self) -> None:
        pass

    def loaded(self) -> list[int]:
        return []

    def submit_chunk(self, chunk: tuple[int, int], run: Run) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        step = np.arange(LAYERS, dtype=np.int64)[:, None] * BLOCKS * self._rig.page
        ids = np.array(run.block_ids, np.int64) * self._rig.page
        with torch.cuda.stream(self._stream):
            hosts = torch.from_numpy((self._host(run)[None, :] + step).ravel())
            pages = torch.from_numpy((self._base[:, None] + ids[None, :]).ravel())
            sizes = torch.full((LAYERS * BLOCKS,), self._rig.page, dtype=torch.int64)
            self._copy(hosts, pages, sizes, True)

    def chunks_loaded(self) -> list[tuple[int, int]]:
        return []


def check(rig: Rig, copies: "CudaCopies | Direct") -> None:
    """What is timed below brings the right bytes to the right pages."""
    runs = rig.runs[:3]
    for page in rig.pages:
        page[:] = 0xEE
    copies.submit_loads([(1, runs[:2])])
    for layer in range(LAYERS):
        copies.wait_layer(layer)
    copies.end_step()
    copies.submit_chunk((1, 1), runs[2])
    torch.cuda.synchronize()
    slots: Any = copies._slots
    for run in runs:
        for layer in range(LAYERS):
            there = rig.pages[layer][torch.tensor(run.block_ids).cuda()].cpu().ravel()
            assert torch.equal(there, slots.tensor[run.slot, rig.layout.slice_of(layer)])
    copies.loaded()
    copies.chunks_loaded()


def matrices(chunks: int) -> Callable[[], None]:
    """One layer's computing: about 2.4 times what the bus needs for its pages."""
    rows, times = (8192, max(1, round(chunks / 32))) if chunks >= 32 else (4096, 1)
    x = torch.randn(rows, HIDDEN, dtype=torch.bfloat16, device="cuda")
    w = torch.randn(HIDDEN, INNER, dtype=torch.bfloat16, device="cuda")
    out = torch.empty(rows, INNER, dtype=torch.bfloat16, device="cuda")

    def layer() -> None:
        for _ in range(times):
            torch.mm(x, w, out=out)

    return layer


def forward(
    layer: Callable[[], None], copies: "CudaCopies | Direct | None", runs: list[Run]
) -> float:
    """Milliseconds that a forward pass takes from its start on the host, loads included."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    if copies is not None:
        copies.submit_loads([(1, runs)])
    for at in range(LAYERS):
        if copies is not None:
            copies.wait_layer(at)
        layer()
    if copies is not None:
        copies.end_step()
    torch.cuda.synchronize()
    took = (time.perf_counter() - began) * 1e3
    if copies is not None:
        copies.loaded()
    return took


def load(rig: Rig, copies: "CudaCopies | Direct", chunks: int) -> Iterator[dict[str, float]]:
    runs = rig.runs[:chunks]
    layer = matrices(chunks)
    size = chunks * BLOCKS * LAYERS * rig.page
    for turn in range(ROUNDS + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        copies.submit_loads([(1, runs)])
        submitted = time.perf_counter()
        for at in range(LAYERS):
            copies.wait_layer(at)
        copies.end_step()
        called = time.perf_counter()
        torch.cuda.synchronize()
        took = time.perf_counter() - began
        copies.loaded()
        alone = forward(layer, None, runs)
        beside = forward(layer, copies, runs)
        if turn:  # the first round warms up
            yield {
                "submit_ms": (submitted - began) * 1e3,
                "host_ms": (called - began) * 1e3,
                "gb_per_s": size / took / 1e9,
                "compute_ms": alone,
                "beside_percent": (beside / alone - 1) * 100,
            }


def chunk(rig: Rig, copies: "CudaCopies | Direct", chunks: int) -> Iterator[dict[str, float]]:
    runs = rig.runs[:chunks]
    for turn in range(ROUNDS + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for at, run in enumerate(runs):
            copies.submit_chunk((1, at), run)
        called = time.perf_counter()
        torch.cuda.synchronize()
        took = time.perf_counter() - began
        copies.chunks_loaded()
        if turn:
            yield {
                "host_ms": (called - began) * 1e3 / chunks,
                "gb_per_s": chunks * BLOCKS * LAYERS * rig.page / took / 1e9,
            }


def save(
    rig: Rig, copies: CudaCopies, chunks: int, layers: bool = False
) -> Iterator[dict[str, float]]:
    """Without `layers` all of them after the step; else each after its layer's computing."""
    saves = list(enumerate(rig.runs[:chunks]))
    layer = matrices(chunks)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for turn in range(ROUNDS + 1):
        alone = forward(layer, None, []) if layers else 0.0
        torch.cuda.synchronize()
        start.record()
        began = time.perf_counter()
        if layers:
            copies.begin_saves(saves)
            for at in range(LAYERS):
                layer()
                copies.save_layer(at)
            copies.end_saves()
        else:
            for number, run in saves:
                copies.submit_save(number, run)
        called = time.perf_counter()
        end.record()
        torch.cuda.synchronize()
        took = time.perf_counter() - began
        copies.saved()
        if turn:
            yield {
                "host_ms": (called - began) * 1e3 / chunks,
                "caller_ms": start.elapsed_time(end) - alone,
                "alone_ms": alone,
                "gb_per_s": chunks * BLOCKS * LAYERS * rig.page / took / 1e9,
            }


def medians(samples: Iterator[dict[str, float]]) -> dict[str, Any]:
    found = list(samples)
    middle = {name: statistics.median(one[name] for one in found) for name in found[0]}
    return results.rounded(middle) | {"rounds": len(found)}


def cases(
    rig: Rig, copies: "CudaCopies | Direct", page_kib: int
) -> Iterator[tuple[dict[str, Any], Iterator[dict[str, float]]]]:
    for chunks in LOADS[page_kib]:
        about = {"page_kib": page_kib, "chunks": chunks}
        yield {"what": "load"} | about, load(rig, copies, chunks)
    yield {"what": "chunk", "page_kib": page_kib, "chunks": 16}, chunk(rig, copies, 16)
    if isinstance(copies, CudaCopies):
        for chunks in (1, 8, 32):
            about = {"page_kib": page_kib, "chunks": chunks}
            yield {"what": "save"} | about, save(rig, copies, chunks)
        yield {"what": "layers-save"} | about, save(rig, copies, 32, layers=True)


def main() -> None:
    parser = command.parser(__doc__, "systems", "machine", "out", systems=SYSTEMS)
    parser.add_argument("--cases", default="", help="beginnings, such as load,save")
    args = parser.parse_args()
    import vllm._custom_ops  # noqa: F401  registers the batched copy

    _, lines, about = command.begin("copies", args)
    wanted = tuple(args.cases.split(","))
    with torch.inference_mode():
        for page_kib in LOADS:
            rig = Rig(page_kib)
            for name in args.systems.split(","):
                copies = rig.system(name)
                check(rig, copies)
                for case, samples in cases(rig, copies, page_kib):
                    if not case["what"].startswith(wanted):
                        continue
                    line = about | {"system": name, "case": case, "metrics": medians(samples)}
                    lines.put(line)
                    print(name, case, line["metrics"], flush=True)
                del copies
            rig.close()
            del rig
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
