"""Bytes between host slots and a GPU's pages, through bounded GPU memory. Not which jobs and when: see device.py.

Pages are small and lie scattered; the bus likes long runs, and the host few calls. So the pieces of
slots (a run of pages each) cross the bus in one call, to or from a staging buffer, and one indexed
kernel scatters or gathers the pages.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

Numbers = NDArray[np.int64]
ALIGN_BYTES = 256


@dataclass(frozen=True)
class Pieces:
    """Runs of bytes in slots: of each its slot, its first byte there, and its size in bytes."""

    slots: Numbers
    first: Numbers
    sizes: Numbers

    @property
    def total_bytes(self) -> int:
        return int(self.sizes.sum())


class Rows:
    """Pages as rows of one tensor: page b of `layers[i]` is row `first[i] + b * step`.

    Rows are as wide integers as their size allows: a kernel that moves single bytes is slow.
    """

    def __init__(self, table: torch.Tensor, layers: Sequence[int], first: Numbers, step: int):
        self.page_bytes = table.shape[1]
        places = (self.page_bytes, int(table.stride(0)), int(table.storage_offset()))
        wide = all(place % 8 == 0 for place in places)
        self.table = table.view(torch.int64) if wide else table
        self.layers = list(layers)
        self.step = step
        self._first = first

    def of_layer(self, at: int) -> torch.Tensor:
        """The table from layer `layers[at]`'s first page on: there block b is row `b * step`."""
        return self.table[int(self._first[at]) :]

    def of_blocks(self, block_ids: Numbers, first: int, last: int) -> Numbers:
        """Row numbers of these blocks in `layers[first:last]`, layer by layer."""
        return (self._first[first:last, None] + block_ids[None, :] * self.step).ravel()


def tables(pages: Sequence[torch.Tensor]) -> list[Rows]:
    """All layers in one table if they lie in one memory on a grid of pages, else a table each."""
    one = pages[0]
    size, memory = one.shape[1], one.untyped_storage()
    start = min(page.storage_offset() for page in pages)
    if all(
        page.shape == one.shape
        and page.stride() == one.stride()
        and page.untyped_storage().data_ptr() == memory.data_ptr()
        and (page.storage_offset() - start) % size == 0
        for page in pages
    ) and (one.stride(0) % size == 0):
        first = np.array([(page.storage_offset() - start) // size for page in pages], np.int64)
        step = one.stride(0) // size
        count = int(first.max()) + (one.shape[0] - 1) * step + 1
        table = torch.as_strided(one, (count, size), (size, 1), start)
        return [Rows(table, range(len(pages)), first, step)]
    return [Rows(page, [at], np.zeros(1, np.int64), 1) for at, page in enumerate(pages)]


class Bus:
    """Copies between slots and staging on the current stream: one call for all pieces.

    Slots are rows of `slots`, in pinned or registered memory. vLLM's batched copy is taken where
    there is one; `batched` is whether it is.
    """

    def __init__(self, slots: torch.Tensor, batched: bool | None = None) -> None:
        self._slots = slots
        self._base, self._pitch = slots.data_ptr(), slots.stride(0)
        self._batch = _batched_copy() if batched is not False else None
        if batched and self._batch is None:
            raise RuntimeError("vLLM's swap_blocks_batch is not there")

    @property
    def batched(self) -> bool:
        return self._batch is not None

    def up(self, pieces: Pieces, staging: torch.Tensor) -> None:
        """Slots to GPU. What lies in the slots is final and stays until the copy has ended."""
        if self._batch is not None:
            # The order of reads does not matter to it: no stream writes to these slots now.
            self._batch(self._hosts(pieces), _devices(pieces, staging), _tensor(pieces.sizes), True)
            return
        for host, device in self._pairs(pieces, staging):
            device.copy_(host, non_blocking=True)

    def down(self, staging: torch.Tensor, pieces: Pieces) -> None:
        """GPU to slots."""
        if self._batch is not None:
            devices = _devices(pieces, staging)
            self._batch(devices, self._hosts(pieces), _tensor(pieces.sizes), False)
            return
        for host, device in self._pairs(pieces, staging):
            host.copy_(device, non_blocking=True)

    def _hosts(self, pieces: Pieces) -> torch.Tensor:
        return _tensor(self._base + pieces.slots * self._pitch + pieces.first)

    def _pairs(
        self, pieces: Pieces, staging: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        pairs, at = [], 0
        for slot, first, size in zip(
            pieces.slots.tolist(), pieces.first.tolist(), pieces.sizes.tolist(), strict=True
        ):
            pairs.append((self._slots[slot, first : first + size], staging[at : at + size]))
            at += size
        return pairs


def _batched_copy() -> Any:
    """vLLM's binding of cuMemcpyBatchAsync, registered with its kernels; None where it is missing."""
    return getattr(torch.ops._C_cache_ops, "swap_blocks_batch", None)


def _devices(pieces: Pieces, staging: torch.Tensor) -> torch.Tensor:
    return _tensor(staging.data_ptr() + pieces.sizes.cumsum() - pieces.sizes)


def _tensor(numbers: Numbers) -> torch.Tensor:
    return torch.from_numpy(numbers)


class _Stream(Protocol):
    def wait_event(self, event: Any) -> None: ...


class Staging:
    """GPU memory that is handed out in a circle. What was handed out is free once its event happened.

    Events of one buffer happen in the order in which they are left here. With two `parts` one is filled while
    another is emptied; one part is as large as it can be, where calls cost more than the bus does.
    """

    def __init__(self, size_bytes: int, device: torch.device, parts: int = 2) -> None:
        self._parts = parts
        self.memory = torch.empty(size_bytes, dtype=torch.uint8, device=device)
        self._next = 0
        self._taken = (0, 0)
        self._busy: deque[tuple[int, int, Any]] = deque()

    @property
    def most(self) -> int:
        """Bytes of the largest part."""
        return self.memory.numel() // self._parts // ALIGN_BYTES * ALIGN_BYTES

    def take(self, size_bytes: int, stream: _Stream) -> torch.Tensor:
        """A part of the buffer; `stream` waits for what lies there. Call `leave` when it is in use."""
        size = -(-size_bytes // ALIGN_BYTES) * ALIGN_BYTES
        first = self._next if self._next + size <= self.memory.numel() else 0
        taken = (first, first + size)
        assert taken[1] <= self.memory.numel(), "larger than `most`"
        event = None
        while any(start < taken[1] and taken[0] < end for start, end, _ in self._busy):
            event = self._busy.popleft()[2]
        if event is not None:
            stream.wait_event(event)  # those before it happen before it
        self._taken, self._next = taken, taken[1]
        return self.memory[taken[0] : taken[0] + size_bytes]

    def leave(self, event: Any) -> None:
        """After `event` the part that was taken last is not used any more."""
        self._busy.append((*self._taken, event))


class Lane:
    """From slots to pages: the bus fills staging on one stream, another scatters from it."""

    def __init__(self, bus: Bus, size_bytes: int, device: torch.device, urgent: bool) -> None:
        self._bus = bus
        self._staging = Staging(size_bytes, device, parts=2 if urgent else 1)
        # The compute stream waits for urgent pages: their kernels go before its own.
        self._page_stream = torch.cuda.Stream(device, priority=-1 if urgent else 0)
        self._bus_stream = torch.cuda.Stream(device)
        self._device = device

    @property
    def streams(self) -> tuple["torch.cuda.Stream", "torch.cuda.Stream"]:
        """Of the bus and of the pages."""
        return self._bus_stream, self._page_stream

    @property
    def most(self) -> int:
        """Bytes of the largest push."""
        return self._staging.most

    @property
    def staging_bytes(self) -> int:
        return self._staging.memory.numel()

    def follow(self) -> None:
        """Write to pages behind what the caller's stream does with them until now."""
        self._page_stream.wait_stream(torch.cuda.current_stream())

    def index(self, rows: Numbers) -> torch.Tensor:
        with torch.cuda.stream(self._page_stream):
            return to_device(rows, self._device)

    def push(self, pieces: Pieces, table: torch.Tensor, index: torch.Tensor) -> None:
        """Pieces of slots to the rows `index` of `table`, in that order."""
        filled, emptied = torch.cuda.Event(), torch.cuda.Event()
        with torch.cuda.stream(self._bus_stream):
            part = self._staging.take(pieces.total_bytes, self._bus_stream)
            self._bus.up(pieces, part)
            filled.record(self._bus_stream)
        with torch.cuda.stream(self._page_stream):
            self._page_stream.wait_event(filled)
            table.index_copy_(0, index, part.view(table.dtype).view(-1, table.shape[1]))
            emptied.record(self._page_stream)
        self._staging.leave(emptied)

    def record(self, event: "torch.cuda.Event | None" = None) -> "torch.cuda.Event":
        """An event behind all pages that were pushed."""
        event = event or torch.cuda.Event()
        event.record(self._page_stream)
        return event


class ReturnLane:
    """From pages to slots: gathered on the caller's stream, so that the pages are the caller's again
    at once, and brought over the bus on another."""

    def __init__(self, bus: Bus, size_bytes: int, device: torch.device) -> None:
        self._bus = bus
        self._staging = Staging(size_bytes, device)
        self._bus_stream = torch.cuda.Stream(device)
        self._device = device

    @property
    def stream(self) -> "torch.cuda.Stream":
        return self._bus_stream

    @property
    def most(self) -> int:
        """Bytes of the largest pull."""
        return self._staging.most

    @property
    def staging_bytes(self) -> int:
        return self._staging.memory.numel()

    def index(self, rows: Numbers) -> torch.Tensor:
        return to_device(rows, self._device)

    def pull(self, table: torch.Tensor, index: torch.Tensor, pieces: Pieces) -> None:
        """The rows `index` of `table` to pieces of slots, in that order."""
        current = torch.cuda.current_stream()
        part = self._staging.take(pieces.total_bytes, current)
        rows = part.view(table.dtype).view(-1, table.shape[1])
        torch.index_select(table, 0, index, out=rows)
        gathered, emptied = torch.cuda.Event(), torch.cuda.Event()
        gathered.record(current)
        with torch.cuda.stream(self._bus_stream):
            self._bus_stream.wait_event(gathered)
            self._bus.down(part, pieces)
            emptied.record(self._bus_stream)
        self._staging.leave(emptied)

    def record(self) -> "torch.cuda.Event":
        """An event behind all slots that were pulled to."""
        event = torch.cuda.Event()
        event.record(self._bus_stream)
        return event


def to_device(numbers: Numbers, device: torch.device) -> torch.Tensor:
    """On the current stream. torch keeps the pinned copy until the stream has read it."""
    return torch.from_numpy(numbers).pin_memory().to(device, non_blocking=True)


def reserve_pinned() -> None:
    """Let torch keep pinned memory for the indices: to make some later stops all streams."""
    kept = [
        torch.empty(1 << power, dtype=torch.uint8, pin_memory=True)
        for power in range(9, 18)
        for _ in range(8)
    ]
    del kept
