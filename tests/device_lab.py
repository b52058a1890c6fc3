"""Pages and slots to copy between, on a CPU and on a GPU, for the suite of the copies. No tests here."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from objectcache.device import Copies, CpuCopies, CudaCopies, open_copies
from objectcache.format import ObjectLayout
from objectcache.slots import HostSlots

LAYERS = 3
CHUNK_BLOCKS = 4
BLOCKS = 40
SLOTS = 8
POISON = 0xEE
# How pages lie: each layer in memory of its own and of its own size, or all on one grid.
PAGE_BYTES = {"apart": (64, 96, 32), "together": (64, 64, 64)}


@dataclass
class Rig:
    """Pages whose blocks have a stride that is larger than a page, as in vLLM's KV."""

    device: str
    sizes: tuple[int, ...]
    layout: ObjectLayout
    pages: list[torch.Tensor]
    memory: list[torch.Tensor]
    slots: HostSlots
    copies: Copies

    def settle(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def delay(self, where: str) -> None:
        """Keep the `caller`'s stream or the copies' (the `bus`) busy for a while, so that what
        does not wait for it shows. Only a GPU has streams."""
        if not isinstance(self.copies, CudaCopies):
            return
        streams = [torch.cuda.current_stream()]
        if where == "bus":
            copies = self.copies
            streams = [*copies._loads.streams, *copies._chunks.streams, copies._saves_lane.stream]
        for stream in streams:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(100_000_000)  # cycles, about 60 ms

    def fill_slots(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = self.slots.tensor.shape
        self.slots.tensor.copy_(
            torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        )

    def fill_pages(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for memory in self.memory:
            noise = torch.randint(0, 256, memory.shape, dtype=torch.uint8, generator=generator)
            memory.copy_(noise)

    def place(self, memory: list[torch.Tensor], layer: int, block: int) -> torch.Tensor:
        """Where the page lies in (a copy of) the memory."""
        return memory[layer][block, 1] if len(memory) > 1 else memory[0][block, layer]

    def page(self, layer: int, block: int) -> bytes:
        return self.pages[layer][block].cpu().numpy().tobytes()

    def in_slot(self, layer: int, slot: int, block: int) -> bytes:
        """The bytes of one page in a slot, found by the format's arithmetic alone."""
        first = self.layout.offsets[layer] + block * self.sizes[layer]
        return bytes(self.slots.view(slot)[first : first + self.sizes[layer]])

    def snapshot(self) -> list[torch.Tensor]:
        self.settle()
        return [memory.cpu().clone() for memory in self.memory]


def make(
    device: str, lie: str = "apart", batched: bool | None = None, staging_bytes: int = 1 << 20
) -> Rig:
    sizes = PAGE_BYTES[lie]
    layout = ObjectLayout(
        bytes(32), CHUNK_BLOCKS * 2, 2, 0, 1, tuple(size * CHUNK_BLOCKS for size in sizes)
    )
    if lie == "apart":
        memory = [torch.full((BLOCKS, 3, size), POISON, dtype=torch.uint8) for size in sizes]
        memory = [tensor.to(device) for tensor in memory]
        pages = [tensor[:, 1, :] for tensor in memory]
    else:
        memory = [torch.full((BLOCKS, LAYERS, sizes[0]), POISON, dtype=torch.uint8).to(device)]
        pages = [memory[0][:, layer, :] for layer in range(LAYERS)]
    assert all(page.stride(0) > page.shape[1] for page in pages)
    slots = HostSlots(SLOTS, layout.object_bytes, pinned=device == "cuda", shared=True)
    copies = (
        CudaCopies(pages, slots, layout, batched, staging_bytes)
        if device == "cuda"
        else open_copies(pages, slots, layout)
    )
    rig = Rig(device, sizes, layout, pages, memory, slots, copies)
    rig.fill_slots(0)
    return rig


@pytest.fixture(
    name="rig", params=["cpu", "cuda", "cuda-together", "cuda-tight", "cuda-one-by-one"]
)
def rig_fixture(request: pytest.FixtureRequest) -> Iterator[Rig]:
    """On a GPU also with staging that holds two slices, and without vLLM's batched copy."""
    device, _, how = request.param.partition("-")
    if device == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no GPU here")
        pytest.importorskip("vllm._custom_ops")
    made = make(
        device,
        lie="together" if how == "together" else "apart",
        batched=how != "one-by-one",
        staging_bytes=0 if how == "tight" else 1 << 20,
    )
    assert isinstance(made.copies, CudaCopies if device == "cuda" else CpuCopies)
    yield made
    made.copies.finish()
    made.slots.close()
