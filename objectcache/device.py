"""Copies between host ring slots and vLLM's paged blocks, layer by layer, on a CPU or a GPU. Not what is copied when: see worker.py.

Both kinds have one face. A load is submitted for a whole step; `wait_layer(l)` makes layer l safe
to read; after the step `loaded()` names the loads whose slots may be reused. A save is submitted
after the step's forward pass; `saved()` names those whose slots are final. A chunk for a request that
does not run yet is loaded apart from any step, with all its layers; `chunks_loaded()` names it when its
pages are written.
"""

import mmap
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from objectcache.format import ObjectLayout

STAGING_BYTES = 64 << 20  # GPU memory through which a layer's blocks pass, 1 ms of PCIe


@dataclass(frozen=True)
class Run:
    """Blocks [first_block, first_block + len(block_ids)) of a slot's chunk, and their page numbers."""

    slot: int
    first_block: int
    block_ids: Sequence[int]


class HostSlots:
    """The memory of the ring: `slots` rows of `slot_bytes`, pinned if a GPU copies from it.

    With `shared` another process can map it, by `descriptor`. Raises OSError if there is no such memory.
    """

    def __init__(self, slots: int, slot_bytes: int, pinned: bool, shared: bool = False) -> None:
        self.descriptor: int | None = None
        if shared:
            self.tensor = self._shared(slots * slot_bytes, pinned).view(slots, slot_bytes)
        else:
            self.tensor = torch.empty((slots, slot_bytes), dtype=torch.uint8, pin_memory=pinned)
        self._views = [memoryview(row) for row in self.tensor.numpy()]

    def _shared(self, size: int, pinned: bool) -> torch.Tensor:
        # Not in /dev/shm, which is small in many containers.
        self.descriptor = os.memfd_create("objectcache-ring")
        os.ftruncate(self.descriptor, size)
        memory = torch.frombuffer(mmap.mmap(self.descriptor, size), dtype=torch.uint8)
        if pinned:
            code = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), size, 0)
            if int(code) != 0:
                raise OSError(f"CUDA does not pin shared memory (error {int(code)})")
        return memory

    def view(self, slot: int) -> memoryview:
        """The bytes of one slot, writable."""
        return self._views[slot]


class Copies(ABC):
    """`pages[l]` is layer l as uint8 [blocks, page_bytes]; layers in the order of the object format."""

    def __init__(
        self, pages: Sequence[torch.Tensor], slots: HostSlots, layout: ObjectLayout
    ) -> None:
        self._pages = list(pages)
        self._slots = slots
        self._layout = layout
        self._runs: list[tuple[int, list[Run]]] = []
        self._waited = [True] * len(self._pages)

    @property
    def loading(self) -> bool:
        """Whether this step has loads."""
        return bool(self._runs)

    def submit_loads(self, loads: Sequence[tuple[int, list[Run]]]) -> None:
        """The loads of this step, as (job, runs). Before the forward pass."""
        assert not self._runs, "a step's loads are submitted once"
        self._runs = list(loads)
        if self._runs:
            self._waited = [False] * len(self._pages)
            self._begin_loads()

    def wait_layer(self, layer: int) -> None:
        """Make layer `layer` safe for what the caller's stream does next. Idempotent."""
        if not self._waited[layer]:
            self._waited[layer] = True
            self._wait(layer)

    def wait_all(self) -> None:
        for layer in range(len(self._pages)):
            self.wait_layer(layer)

    def end_step(self) -> None:
        """After the forward pass. Raises if a layer was computed on before its load was waited for."""
        if not self._runs:
            return
        missed = [layer for layer, waited in enumerate(self._waited) if not waited]
        if missed:
            raise RuntimeError(
                f"objectcache: the model never waited for the KV of layers {missed}; its output "
                "would be wrong, so this step fails. Please report the model and its backend."
            )
        self._end_loads([job for job, _ in self._runs])
        self._runs = []

    def _chunk_rows(self, layer: int, run: Run) -> torch.Tensor:
        """The run's pages of one layer in its slot: uint8 [blocks, page_bytes], contiguous."""
        layout = self._layout
        rows = self._slots.tensor[run.slot, layout.slice_of(layer)].view(layout.chunk_blocks, -1)
        return rows[run.first_block : run.first_block + len(run.block_ids)]

    @abstractmethod
    def _begin_loads(self) -> None: ...

    @abstractmethod
    def _wait(self, layer: int) -> None: ...

    @abstractmethod
    def _end_loads(self, jobs: list[int]) -> None: ...

    @abstractmethod
    def loaded(self) -> list[int]:
        """Jobs whose slots are not read any more. Each is named once."""

    @abstractmethod
    def submit_chunk(self, chunk: tuple[int, int], run: Run) -> None:
        """Copy a run's pages of all layers, behind what the caller's stream did to them. Until the
        chunk is named nobody may use the pages."""

    @abstractmethod
    def chunks_loaded(self) -> list[tuple[int, int]]:
        """Chunks whose pages are written, and whose slots are not read any more. Each is named once."""

    @abstractmethod
    def submit_save(self, save: int, run: Run) -> None:
        """Copy a whole chunk's pages to its slot. The pages may change after the caller's stream goes on."""

    @abstractmethod
    def saved(self) -> list[int]:
        """Saves whose slots hold all pages now. Each is named once."""

    @abstractmethod
    def finish(self) -> None:
        """Wait for all copies under way."""


class CpuCopies(Copies):
    """Copies in the caller's thread, each layer when it is waited for."""

    def __init__(
        self, pages: Sequence[torch.Tensor], slots: HostSlots, layout: ObjectLayout
    ) -> None:
        super().__init__(pages, slots, layout)
        self._loaded: list[int] = []
        self._chunks: list[tuple[int, int]] = []
        self._saved: list[int] = []

    def _begin_loads(self) -> None:
        pass

    def _wait(self, layer: int) -> None:
        for _, runs in self._runs:
            for run in runs:
                self._copy(layer, run)

    def _copy(self, layer: int, run: Run) -> None:
        index = torch.tensor(run.block_ids, dtype=torch.int64)
        self._pages[layer].index_copy_(0, index, self._chunk_rows(layer, run))

    def _end_loads(self, jobs: list[int]) -> None:
        self._loaded += jobs

    def loaded(self) -> list[int]:
        jobs, self._loaded = self._loaded, []
        return jobs

    def submit_chunk(self, chunk: tuple[int, int], run: Run) -> None:
        for layer in range(len(self._pages)):
            self._copy(layer, run)
        self._chunks.append(chunk)

    def chunks_loaded(self) -> list[tuple[int, int]]:
        chunks, self._chunks = self._chunks, []
        return chunks

    def submit_save(self, save: int, run: Run) -> None:
        index = torch.tensor(run.block_ids, dtype=torch.int64)
        for layer, pages in enumerate(self._pages):
            torch.index_select(pages, 0, index, out=self._chunk_rows(layer, run))
        self._saved.append(save)

    def saved(self) -> list[int]:
        saves, self._saved = self._saved, []
        return saves

    def finish(self) -> None:
        pass


class CudaCopies(Copies):
    """Copies on side streams: layer l+1 moves while layer l computes.

    Blocks pass through a staging buffer on the GPU and are scattered from there (or gathered into
    it) by one indexed kernel, because pages are small and the bus likes long runs. Chunks of requests
    that do not run have a stream of their own: no step waits behind them.
    """

    def __init__(
        self, pages: Sequence[torch.Tensor], slots: HostSlots, layout: ObjectLayout
    ) -> None:
        super().__init__(pages, slots, layout)
        device = pages[0].device
        self._load_stream = torch.cuda.Stream(device)
        self._chunk_stream = torch.cuda.Stream(device)
        self._save_stream = torch.cuda.Stream(device)
        self._layer_events = [torch.cuda.Event() for _ in pages]
        staging_bytes = max(STAGING_BYTES, max(layout.slice_bytes))
        self._load_staging = torch.empty(staging_bytes, dtype=torch.uint8, device=device)
        self._chunk_staging = torch.empty(max(layout.slice_bytes), dtype=torch.uint8, device=device)
        self._save_staging = torch.empty(max(layout.slice_bytes), dtype=torch.uint8, device=device)
        self._loaded: deque[tuple[list[int], torch.cuda.Event]] = deque()
        self._chunks: deque[tuple[tuple[int, int], torch.cuda.Event]] = deque()
        self._saved: deque[tuple[int, torch.cuda.Event]] = deque()

    def _begin_loads(self) -> None:
        # Blocks may just have been zeroed or copied on the compute stream: stay behind that.
        self._load_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._load_stream):
            runs = [run for _, runs in self._runs for run in runs]
            batches = [
                (batch, self._to_device([block for run in batch for block in run.block_ids]))
                for batch in self._batches(runs)
            ]
            for layer, event in enumerate(self._layer_events):
                for batch, index in batches:
                    self._scatter(layer, batch, index, self._load_staging)
                event.record(self._load_stream)

    def _batches(self, runs: list[Run]) -> list[list[Run]]:
        """Runs in groups that fit the staging buffer, whichever layer."""
        most = self._load_staging.numel() // max(self._layout.slice_bytes)
        return [runs[first : first + most] for first in range(0, len(runs), most)]

    def _to_device(self, block_ids: list[int]) -> torch.Tensor:
        host = torch.tensor(block_ids, dtype=torch.int64).pin_memory()
        return host.to(self._pages[0].device, non_blocking=True)

    def _scatter(
        self, layer: int, batch: list[Run], index: torch.Tensor, buffer: torch.Tensor
    ) -> None:
        page_bytes = self._pages[layer].shape[1]
        staging = buffer[: index.numel() * page_bytes].view(-1, page_bytes)
        first = 0
        for run in batch:
            last = first + len(run.block_ids)
            staging[first:last].copy_(self._chunk_rows(layer, run), non_blocking=True)
            first = last
        self._pages[layer].index_copy_(0, index, staging)

    def _wait(self, layer: int) -> None:
        torch.cuda.current_stream().wait_event(self._layer_events[layer])

    def _end_loads(self, jobs: list[int]) -> None:
        self._loaded.append((jobs, self._recorded(self._load_stream)))

    def loaded(self) -> list[int]:
        done: list[int] = []
        while self._loaded and self._loaded[0][1].query():
            done += self._loaded.popleft()[0]
        return done

    def submit_chunk(self, chunk: tuple[int, int], run: Run) -> None:
        # Others may just have used these blocks, and vLLM may have zeroed them: stay behind that.
        self._chunk_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._chunk_stream):
            index = self._to_device(list(run.block_ids))
            for layer in range(len(self._pages)):
                self._scatter(layer, [run], index, self._chunk_staging)
        self._chunks.append((chunk, self._recorded(self._chunk_stream)))

    def chunks_loaded(self) -> list[tuple[int, int]]:
        done: list[tuple[int, int]] = []
        while self._chunks and self._chunks[0][1].query():
            done.append(self._chunks.popleft()[0])
        return done

    def submit_save(self, save: int, run: Run) -> None:
        current = torch.cuda.current_stream()
        self._save_stream.wait_stream(current)
        with torch.cuda.stream(self._save_stream):
            index = self._to_device(list(run.block_ids))
            for layer, pages in enumerate(self._pages):
                size = self._layout.slice_bytes[layer]
                staging = self._save_staging[:size].view(-1, pages.shape[1])
                torch.index_select(pages, 0, index, out=staging)
                self._chunk_rows(layer, run).copy_(staging, non_blocking=True)
        self._saved.append((save, self._recorded(self._save_stream)))
        # vLLM may hand these blocks to another request in the next step.
        current.wait_stream(self._save_stream)

    def saved(self) -> list[int]:
        done: list[int] = []
        while self._saved and self._saved[0][1].query():
            done.append(self._saved.popleft()[0])
        return done

    def finish(self) -> None:
        self._load_stream.synchronize()
        self._chunk_stream.synchronize()
        self._save_stream.synchronize()

    @staticmethod
    def _recorded(stream: "torch.cuda.Stream") -> "torch.cuda.Event":
        event = torch.cuda.Event()
        event.record(stream)
        return event


def open_copies(pages: Sequence[torch.Tensor], slots: HostSlots, layout: ObjectLayout) -> Copies:
    """The kind that fits where the pages are."""
    kind = CudaCopies if pages[0].is_cuda else CpuCopies
    return kind(pages, slots, layout)
