"""Copies between host ring slots and vLLM's paged blocks, layer by layer, on a CPU or a GPU. Not what is copied when: see worker.py.

Both kinds have one face. A load is submitted for a whole step; `wait_layer(l)` makes layer l safe
to read; after the step `loaded()` names the loads whose slots may be reused. A save is submitted
after the step's forward pass; `saved()` names those whose slots are final. For a request that does not
run yet pages are written apart from any step: whole chunks, which `chunks_loaded()` names, or a layer of
many, which `parts_loaded()` counts.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

import numpy as np
import torch

from objectcache.format import ObjectLayout
from objectcache.runs import Batch, Run, cut
from objectcache.slots import HostSlots
from objectcache.staging import (
    ALIGN_BYTES,
    Bus,
    Lane,
    Numbers,
    Pieces,
    ReturnLane,
    reserve_pinned,
    tables,
)

T = TypeVar("T")

STAGING_BYTES = 64 << 20  # GPU memory of each of three ways; half of it is 0.6 ms of PCIe
# A step's loads get more where the GPU has it: half of it is what goes in one call, and each call costs the
# host 0.14 ms within the forward pass (measured; 224 of them for 64K tokens with 64 MiB, 64 with this).
LOADS_STAGING_BYTES, LOADS_STAGING_SHARE = 256 << 20, 1 / 256
# What is loaded apart from steps is in no hurry, but each call takes a step's host time: so it goes in calls
# of all that it has.
APART_STAGING_BYTES, APART_STAGING_SHARE = 128 << 20, 1 / 512
CPU_PART_BLOCKS = 64
LAYERS_AHEAD = 2  # layers whose copies are submitted before the one that is waited for


class Bytes(Protocol):
    """What a step's loads copy from, while it is on its way."""

    def layers_ready(self) -> int:
        """Leading layers that may be copied now."""
        ...

    def wait(self, layer: int) -> None:
        """Until layer `layer` may be copied, or it does not matter any more."""
        ...


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
        self._coming: Bytes | None = None
        self._saves: list[tuple[int, Run]] = []
        self._layers_saved: set[int] = set()

    @property
    def loading(self) -> bool:
        """Whether this step has loads."""
        return bool(self._runs)

    def submit_loads(
        self, loads: Sequence[tuple[int, list[Run]]], coming: Bytes | None = None
    ) -> None:
        """The loads of this step, as (job, runs). Before the forward pass. With `coming` their bytes may
        still be on their way."""
        assert not self._runs, "a step's loads are submitted once"
        self._runs = list(loads)
        self._coming = coming
        if self._runs:
            self._waited = [False] * len(self._pages)
            self._begin_loads()

    def wait_layer(self, layer: int) -> None:
        """Make layer `layer` safe for what the caller's stream does next. Idempotent."""
        if not self._waited[layer]:
            self._waited[layer] = True
            if self._coming is not None:
                self._coming.wait(layer)
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

    @property
    def saving(self) -> bool:
        """Whether this step has saves that its layers may begin."""
        return bool(self._saves)

    def begin_saves(self, saves: Sequence[tuple[int, Run]]) -> None:
        """The chunks that this step completes, as (save, run). Before the forward pass."""
        assert not self._saves, "a step's saves are announced once"
        self._saves = list(saves)
        self._layers_saved = set()

    def save_layer(self, layer: int) -> None:
        """The caller's stream has written all that these chunks have of a layer. Idempotent."""
        if self._saves and layer not in self._layers_saved:
            self._layers_saved.add(layer)
            self._save_layer(layer)

    def end_saves(self) -> None:
        """After the forward pass: begin what its layers did not. The pages may change afterwards."""
        if not self._saves:
            return
        if self._layers_saved:
            for layer in range(len(self._pages)):
                self.save_layer(layer)
            self._end_saves([save for save, _ in self._saves])
        else:
            for save, run in self._saves:
                self.submit_save(save, run)
        self._saves = []

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
    def begin_apart(self, runs: list[Run]) -> list[Batch]:
        """Pages that are written apart from any step, layer by layer, behind what the caller's stream did to
        them until now. In parts of which a layer passes at once."""

    @abstractmethod
    def submit_part(self, job: int, layer: int, batch: Batch) -> None:
        """Copy one layer of a part. Until that is counted nobody may use its pages or its slots."""

    @abstractmethod
    def parts_loaded(self) -> list[int]:
        """The jobs of parts whose pages are written, and whose slots are not read any more. Each part
        counts once."""

    @abstractmethod
    def submit_save(self, save: int, run: Run) -> None:
        """Copy a whole chunk's pages to its slot. The pages may change after the caller's stream goes on."""

    @abstractmethod
    def _save_layer(self, layer: int) -> None: ...

    @abstractmethod
    def _end_saves(self, saves: list[int]) -> None: ...

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
        self._parts: list[int] = []
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

    def begin_apart(self, runs: list[Run]) -> list[Batch]:
        return cut(runs, CPU_PART_BLOCKS)

    def submit_part(self, job: int, layer: int, batch: Batch) -> None:
        for run in batch.runs:
            self._copy(layer, run)
        self._parts.append(job)

    def parts_loaded(self) -> list[int]:
        parts, self._parts = self._parts, []
        return parts

    def submit_save(self, save: int, run: Run) -> None:
        for layer in range(len(self._pages)):
            self._copy_out(layer, run)
        self._saved.append(save)

    def _copy_out(self, layer: int, run: Run) -> None:
        index = torch.tensor(run.block_ids, dtype=torch.int64)
        torch.index_select(self._pages[layer], 0, index, out=self._chunk_rows(layer, run))

    def _save_layer(self, layer: int) -> None:
        for _, run in self._saves:
            self._copy_out(layer, run)

    def _end_saves(self, saves: list[int]) -> None:
        self._saved += saves

    def saved(self) -> list[int]:
        saves, self._saved = self._saved, []
        return saves

    def finish(self) -> None:
        pass


class CudaCopies(Copies):
    """Copies on side streams: layer l+1 moves while layer l computes.

    A step's loads, chunks of requests that do not run, and saves have streams and staging each, so
    that none waits behind another. No stream of vLLM's ever waits for the bus, but for a layer's load.
    """

    def __init__(
        self,
        pages: Sequence[torch.Tensor],
        slots: HostSlots,
        layout: ObjectLayout,
        batched: bool | None = None,
        staging_bytes: int | None = None,
    ) -> None:
        super().__init__(pages, slots, layout)
        device = pages[0].device
        self._tables = tables(pages)
        self._page_bytes = [page.shape[1] for page in pages]
        self._offsets = np.array(layout.offsets, np.int64)
        # As a step moves them, layer by layer: there block b is row b * step.
        self._layers = [t.of_layer(at) for t in self._tables for at in range(len(t.layers))]
        self._step = self._tables[0].step
        bus = Bus(slots.tensor, batched)
        least = 2 * (max(layout.slice_bytes) + ALIGN_BYTES)
        size = max(least, STAGING_BYTES if staging_bytes is None else staging_bytes)
        loads = apart = size
        if staging_bytes is None:
            loads = max(size, _bytes_of(device, LOADS_STAGING_BYTES, LOADS_STAGING_SHARE))
            apart = max(size, _bytes_of(device, APART_STAGING_BYTES, APART_STAGING_SHARE))
        self._loads = Lane(bus, loads, device, urgent=True)
        self._chunks = Lane(bus, apart, device, urgent=False)
        self._saves_lane = ReturnLane(bus, size, device)
        reserve_pinned()
        self._layer_events = [torch.cuda.Event() for _ in pages]
        self._batches: list[Batch] = []
        self._submitted = 0  # layers of this step's loads
        self._save_batches: list[Batch] = []
        self._loaded: deque[tuple[list[int], torch.cuda.Event]] = deque()
        self._chunks_out: deque[tuple[tuple[int, int], torch.cuda.Event]] = deque()
        self._parts_out: deque[tuple[int, torch.cuda.Event]] = deque()
        self._saved: deque[tuple[list[int], torch.cuda.Event]] = deque()
        self._warm_up()

    def _warm_up(self) -> None:
        """The first use of a kernel loads it, which may stop all streams: now, and nothing changes.

        Nothing lies in the slots yet, and nobody uses the pages.
        """
        zero = np.zeros(1, np.int64)
        for table in self._tables:
            pieces = Pieces(zero, zero, zero + table.page_bytes)
            self._saves_lane.pull(table.table, self._saves_lane.index(zero), pieces)
            for lane in (self._loads, self._chunks):
                self.finish()
                lane.push(pieces, table.table, lane.index(zero))
        self.finish()

    @property
    def staging_bytes(self) -> int:
        """GPU memory that the copies take."""
        return sum(lane.staging_bytes for lane in (self._loads, self._chunks, self._saves_lane))

    # ---- a step's loads

    def _begin_loads(self) -> None:
        # Blocks may just have been zeroed or copied on the compute stream: stay behind that.
        self._loads.follow()
        runs = [run for _, runs in self._runs for run in runs if run.block_ids]
        self._batches = self._cut(runs, self._loads.most)
        for batch in self._batches:
            batch.index = self._loads.index(batch.block_ids * self._step)
        self._submitted = 0
        self._submit_layers(LAYERS_AHEAD)

    def _submit_layers(self, last: int) -> None:
        """Layers up to `last`. The rest follows while the first are computed on, so that neither the
        first kernel nor the first page waits for thousands of calls."""
        if self._coming is not None:
            last = min(last, self._coming.layers_ready())
        while self._submitted < min(last, len(self._pages)):
            layer = self._submitted
            for batch in self._batches:
                assert batch.index is not None
                self._loads.push(self._pieces(layer, batch), self._layers[layer], batch.index)
            self._loads.record(self._layer_events[layer])
            self._submitted += 1

    def _wait(self, layer: int) -> None:
        self._submit_layers(layer + 1 + LAYERS_AHEAD)
        torch.cuda.current_stream().wait_event(self._layer_events[layer])

    def _end_loads(self, jobs: list[int]) -> None:
        self._batches = []
        self._loaded.append((jobs, self._loads.record()))

    def loaded(self) -> list[int]:
        return [job for jobs in _happened(self._loaded) for job in jobs]

    # ---- chunks apart from steps

    def submit_chunk(self, chunk: tuple[int, int], run: Run) -> None:
        # Others may just have used these blocks, and vLLM may have zeroed them: stay behind that.
        self._chunks.follow()
        for pieces, table, rows in self._parts(run, self._chunks.most):
            self._chunks.push(pieces, table, self._chunks.index(rows))
        self._chunks_out.append((chunk, self._chunks.record()))

    def chunks_loaded(self) -> list[tuple[int, int]]:
        return _happened(self._chunks_out)

    def begin_apart(self, runs: list[Run]) -> list[Batch]:
        self._chunks.follow()
        batches = self._cut(runs, self._chunks.most)
        for batch in batches:
            batch.index = self._chunks.index(batch.block_ids * self._step)
        return batches

    def submit_part(self, job: int, layer: int, batch: Batch) -> None:
        assert batch.index is not None
        self._chunks.push(self._pieces(layer, batch), self._layers[layer], batch.index)
        self._parts_out.append((job, self._chunks.record()))

    def parts_loaded(self) -> list[int]:
        return _happened(self._parts_out)

    # ---- saves

    def submit_save(self, save: int, run: Run) -> None:
        for pieces, table, rows in self._parts(run, self._saves_lane.most):
            self._saves_lane.pull(table, self._saves_lane.index(rows), pieces)
        self._saved.append(([save], self._saves_lane.record()))

    def _save_layer(self, layer: int) -> None:
        if not self._save_batches:
            self._save_batches = self._cut([run for _, run in self._saves], self._saves_lane.most)
            for batch in self._save_batches:
                batch.index = self._saves_lane.index(batch.block_ids * self._step)
        for batch in self._save_batches:
            assert batch.index is not None
            self._saves_lane.pull(self._layers[layer], batch.index, self._pieces(layer, batch))

    def _end_saves(self, saves: list[int]) -> None:
        self._save_batches = []
        self._saved.append((saves, self._saves_lane.record()))

    def saved(self) -> list[int]:
        return [save for saves in _happened(self._saved) for save in saves]

    def finish(self) -> None:
        for stream in (*self._loads.streams, *self._chunks.streams, self._saves_lane.stream):
            stream.synchronize()

    # ---- what is where

    def _cut(self, runs: list[Run], most_bytes: int) -> list[Batch]:
        """Runs in groups that fit, whichever layer."""
        return cut(runs, most_bytes // max(self._page_bytes))

    def _pieces(self, layer: int, batch: Batch) -> Pieces:
        """What a batch's slots hold of one layer."""
        size = self._page_bytes[layer]
        return Pieces(batch.slots, self._offsets[layer] + batch.first * size, batch.counts * size)

    def _parts(self, run: Run, most_bytes: int) -> Iterator[tuple[Pieces, torch.Tensor, Numbers]]:
        """All layers of one run, table by table, in parts that fit."""
        block_ids = np.array(run.block_ids, np.int64)
        for table in self._tables:
            size = len(block_ids) * table.page_bytes
            at_once = max(1, most_bytes // max(size, 1))
            for first in range(0, len(table.layers), at_once):
                layers = table.layers[first : first + at_once]
                pieces = Pieces(
                    np.full(len(layers), run.slot, np.int64),
                    self._offsets[layers] + run.first_block * table.page_bytes,
                    np.full(len(layers), size, np.int64),
                )
                rows = table.of_blocks(block_ids, first, first + len(layers))
                yield pieces, table.table, rows


def _bytes_of(device: torch.device, most: int, share: float) -> int:
    """Of a GPU's memory."""
    memory = int(torch.cuda.get_device_properties(device).total_memory * share)
    return min(most, memory) // ALIGN_BYTES * ALIGN_BYTES


def _happened(waiting: deque[tuple[T, "torch.cuda.Event"]]) -> list[T]:
    """Take off the front what has happened."""
    done: list[T] = []
    while waiting and waiting[0][1].query():
        done.append(waiting.popleft()[0])
    return done


def open_copies(pages: Sequence[torch.Tensor], slots: HostSlots, layout: ObjectLayout) -> Copies:
    """The kind that fits where the pages are."""
    kind = CudaCopies if pages[0].is_cuda else CpuCopies
    return kind(pages, slots, layout)
