"""Copies between slots and pages, on a CPU and on a GPU: the right bytes, in the right pages, and only there."""

import random
import re
import time

import pytest
import torch
from device_lab import (  # noqa: F401 (pytest looks for the fixture here)
    BLOCKS,
    CHUNK_BLOCKS,
    LAYERS,
    PAGE_BYTES,
    POISON,
    SLOTS,
    Rig,
    make,
    rig_fixture,
)

from objectcache.device import CpuCopies, CudaCopies, open_copies
from objectcache.runs import Run
from objectcache.slots import HostSlots


def test_the_kind_fits_where_the_pages_are() -> None:
    assert isinstance(make("cpu").copies, CpuCopies)
    if torch.cuda.is_available():
        rig = make("cuda")
        assert isinstance(open_copies(rig.pages, rig.slots, rig.layout), CudaCopies)


def test_opening_changes_no_page() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    for lie in PAGE_BYTES:
        for memory in make("cuda", lie).snapshot():
            assert bool((memory == POISON).all())


def soon(take: "object", count: int) -> list[int]:
    """What `loaded` or `saved` name until there are `count`."""
    named: list[int] = []
    deadline = time.monotonic() + 5.0
    while len(named) < count and time.monotonic() < deadline:
        named += take()  # type: ignore[operator]
    return named


def load_all(rig: Rig, loads: list[tuple[int, list[Run]]]) -> None:
    rig.copies.submit_loads(loads)
    for layer in range(LAYERS):
        rig.copies.wait_layer(layer)
    rig.copies.end_step()
    assert sorted(soon(rig.copies.loaded, len(loads))) == sorted(job for job, _ in loads)


def check_loaded(rig: Rig, before: list[torch.Tensor], runs: list[Run]) -> None:
    """The pages that the runs name hold their slots' bytes; no other byte changed."""
    expected = [memory.clone() for memory in before]
    for run in runs:
        for at, block in enumerate(run.block_ids):
            for layer in range(LAYERS):
                stored = rig.in_slot(layer, run.slot, run.first_block + at)
                page = torch.frombuffer(bytearray(stored), dtype=torch.uint8)
                rig.place(expected, layer, block).copy_(page)
    for at, now in enumerate(rig.snapshot()):
        assert torch.equal(now, expected[at]), f"memory {at}"


def test_a_whole_chunk_into_scattered_pages(rig: Rig) -> None:
    before = rig.snapshot()
    runs = [Run(3, 0, [17, 2, 39, 0])]
    load_all(rig, [(1, runs)])
    check_loaded(rig, before, runs)


@pytest.mark.parametrize(("first", "blocks"), [(0, 1), (1, 2), (3, 1), (2, 2)])
def test_a_part_of_a_chunk(rig: Rig, first: int, blocks: int) -> None:
    before = rig.snapshot()
    runs = [Run(0, first, [9, 8, 7][:blocks])]
    load_all(rig, [(1, runs)])
    check_loaded(rig, before, runs)


@pytest.mark.parametrize("seed", range(8))
def test_random_block_tables_of_several_jobs(rig: Rig, seed: int) -> None:
    """Several requests in one step; slots may be shared, pages never are."""
    dice = random.Random(seed)
    free = dice.sample(range(BLOCKS), BLOCKS)
    loads, all_runs = [], []
    for job in range(dice.randint(1, 4)):
        runs = []
        for _ in range(dice.randint(1, 3)):
            first = dice.randrange(CHUNK_BLOCKS)
            count = min(dice.randint(1, CHUNK_BLOCKS - first), len(free))
            ids = [free.pop() for _ in range(count)]
            if ids:
                runs.append(Run(dice.randrange(SLOTS), first, ids))
        loads.append((job, runs))
        all_runs += runs
    rig.fill_pages(seed)
    before = rig.snapshot()
    load_all(rig, loads)
    check_loaded(rig, before, all_runs)


def test_saves_take_the_pages_and_nothing_else(rig: Rig) -> None:
    rig.fill_pages(1)
    before = rig.slots.tensor.clone()
    pages = rig.snapshot()
    blocks = [31, 4, 5, 38]
    rig.copies.submit_save(9, Run(2, 0, blocks))
    assert soon(rig.copies.saved, 1) == [9]
    expected = before.clone()
    for layer, size in enumerate(rig.sizes):
        for at, block in enumerate(blocks):
            first = rig.layout.offsets[layer] + at * size
            expected[2, first : first + size] = rig.place(pages, layer, block)
    assert torch.equal(rig.slots.tensor, expected)
    assert all(torch.equal(a, b) for a, b in zip(rig.snapshot(), pages, strict=True))


def test_what_was_saved_is_loaded_byte_for_byte(rig: Rig) -> None:
    rig.fill_pages(2)
    saved = [[rig.page(layer, block) for block in (1, 2, 3, 4)] for layer in range(3)]
    rig.copies.submit_save(1, Run(5, 0, [1, 2, 3, 4]))
    assert soon(rig.copies.saved, 1) == [1]
    load_all(rig, [(1, [Run(5, 0, [30, 20, 10, 0])])])
    rig.settle()
    assert saved == [[rig.page(layer, block) for block in (30, 20, 10, 0)] for layer in range(3)]


@pytest.mark.parametrize("slow", ["caller", "bus"])
def test_a_save_takes_what_the_callers_stream_wrote_before_and_not_what_it_writes_after(
    rig: Rig, slow: str
) -> None:
    """vLLM gives the blocks to others in its next step, on the same stream."""
    rig.delay(slow)
    for memory in rig.memory:
        memory.fill_(7)
    for save in range(SLOTS):
        rig.copies.submit_save(save, Run(save, 0, [0, 1, 2, 3]))
    for memory in rig.memory:
        memory.fill_(0)
    assert soon(rig.copies.saved, SLOTS) == list(range(SLOTS))
    for slot in range(SLOTS):
        pages = bytes(rig.slots.view(slot))[rig.layout.header_bytes :]
        assert pages == b"\x07" * len(pages), f"slot {slot}"


@pytest.mark.parametrize("slow", ["caller", "bus"])
def test_a_layer_is_safe_to_read_once_it_was_waited_for(rig: Rig, slow: str) -> None:
    """On the caller's stream, without any other wait, layer by layer."""
    rig.delay(slow)
    rig.copies.submit_loads([(1, [Run(1, 0, [6, 7, 8, 9])])])
    reads = []
    for layer in range(3):
        rig.copies.wait_layer(layer)
        reads.append(rig.pages[layer][6:10].clone())
    rig.copies.end_step()
    for layer, read in enumerate(reads):
        stored = [rig.in_slot(layer, 1, at) for at in range(4)]
        assert read.cpu().numpy().tobytes() == b"".join(stored), f"layer {layer}"
    assert soon(rig.copies.loaded, 1) == [1]


@pytest.mark.parametrize("slow", ["caller", "bus"])
def test_a_slot_may_be_reused_once_its_load_is_named(rig: Rig, slow: str) -> None:
    before = rig.snapshot()
    run = Run(1, 0, [6, 7, 8, 9])
    rig.delay(slow)
    rig.copies.submit_loads([(1, [run])])
    rig.copies.wait_all()
    rig.copies.end_step()
    assert soon(rig.copies.loaded, 1) == [1]
    old = rig.slots.tensor[1].clone()
    rig.slots.tensor[1] = POISON
    now = rig.snapshot()
    rig.slots.tensor[1] = old
    check_loaded(rig, before, [run])
    assert not all(torch.equal(a, b) for a, b in zip(now, before, strict=True))


@pytest.mark.parametrize("slow", ["caller", "bus"])
def test_what_the_callers_stream_did_before_does_not_overwrite_a_load(rig: Rig, slow: str) -> None:
    """vLLM zeroes new blocks just before."""
    run = Run(1, 0, [6, 7, 8, 9])
    rig.delay(slow)
    for memory in rig.memory:
        memory.fill_(0)
    before = [torch.zeros_like(memory, device="cpu") for memory in rig.memory]
    load_all(rig, [(1, [run])])
    check_loaded(rig, before, [run])


def test_waiting_again_does_nothing(rig: Rig) -> None:
    """Hybrid models and recomputation call a layer's hook more than once."""
    run = Run(1, 0, [6, 7, 8, 9])
    rig.copies.submit_loads([(1, [run])])
    rig.copies.wait_layer(0)
    rig.pages[0][6] = 1  # what the forward pass writes after its wait stays
    rig.copies.wait_layer(0)
    rig.copies.wait_all()
    rig.copies.end_step()
    rig.settle()
    assert rig.page(0, 6) == b"\x01" * rig.sizes[0]
    assert rig.page(0, 7) == rig.in_slot(0, 1, 1)
    assert soon(rig.copies.loaded, 1) == [1]


@pytest.mark.parametrize("waited", [[], [0], [0, 1], [1, 2]])
def test_a_step_whose_model_did_not_wait_for_a_layer_fails(rig: Rig, waited: list[int]) -> None:
    rig.copies.submit_loads([(1, [Run(0, 0, [0, 1, 2, 3])])])
    for layer in waited:
        rig.copies.wait_layer(layer)
    missed = [layer for layer in range(3) if layer not in waited]
    with pytest.raises(RuntimeError, match=re.escape(f"layers {missed};")):
        rig.copies.end_step()
    assert rig.copies.loaded() == []


# ---- chunks apart from steps


@pytest.mark.parametrize(("first", "blocks"), [(0, 4), (0, 1), (1, 2), (3, 1)])
def test_a_chunk_apart_from_any_step(rig: Rig, first: int, blocks: int) -> None:
    before = rig.snapshot()
    run = Run(3, first, [17, 2, 39, 0][:blocks])
    rig.copies.submit_chunk((5, 2), run)
    assert soon(rig.copies.chunks_loaded, 1) == [(5, 2)]
    check_loaded(rig, before, [run])
    assert rig.copies.chunks_loaded() == [] and rig.copies.loaded() == []


def test_many_chunks_and_the_loads_of_a_step(rig: Rig) -> None:
    """Each is named by its own, once."""
    rig.fill_pages(7)
    before = rig.snapshot()
    ids = random.Random(7).sample(range(BLOCKS), BLOCKS)
    runs = [Run(at % SLOTS, 0, ids[4 * at : 4 * at + 4]) for at in range(BLOCKS // 4)]
    for chunk, run in enumerate(runs[:4]):
        rig.copies.submit_chunk((1, chunk), run)
    rig.copies.submit_loads([(2, runs[4:6])])
    for chunk, run in enumerate(runs[6:]):
        rig.copies.submit_chunk((3, chunk), run)
    rig.copies.wait_all()
    rig.copies.end_step()
    chunks = [(1, at) for at in range(4)] + [(3, at) for at in range(len(runs[6:]))]
    assert soon(rig.copies.chunks_loaded, len(chunks)) == chunks
    assert soon(rig.copies.loaded, 1) == [2]
    check_loaded(rig, before, runs)


@pytest.mark.parametrize("slow", ["caller", "bus"])
def test_layers_apart_from_any_step(rig: Rig, slow: str) -> None:
    """Behind what the caller's stream did before; each part is counted once, when its pages are written."""
    runs = [Run(3, 1, [17, 2]), Run(0, 0, [39, 0, 5, 6]), Run(7, 0, [30])]
    rig.delay(slow)
    for memory in rig.memory:
        memory.fill_(9)
    batches = rig.copies.begin_apart(runs)
    assert [run for batch in batches for run in batch.runs] == runs
    for layer in range(3):
        for batch in batches:
            rig.copies.submit_part(4, layer, batch)
    assert soon(rig.copies.parts_loaded, 3 * len(batches)) == [4] * 3 * len(batches)
    before = [torch.full_like(memory, 9, device="cpu") for memory in rig.memory]
    check_loaded(rig, before, runs)
    assert rig.copies.parts_loaded() == rig.copies.chunks_loaded() == rig.copies.loaded() == []


@pytest.mark.parametrize("slow", ["caller", "bus"])
def test_a_chunk_stays_behind_what_the_callers_stream_did_before(rig: Rig, slow: str) -> None:
    """Its blocks were somebody else's a moment ago, and may just have been zeroed."""
    rig.delay(slow)
    for memory in rig.memory:
        memory.fill_(9)
    before = [torch.full(memory.shape, 9, dtype=torch.uint8) for memory in rig.memory]
    runs = [Run(slot, 0, [4 * slot, 4 * slot + 1, 4 * slot + 2, 4 * slot + 3]) for slot in range(4)]
    for chunk, run in enumerate(runs):
        rig.copies.submit_chunk((1, chunk), run)
    assert soon(rig.copies.chunks_loaded, 4) == [(1, chunk) for chunk in range(4)]
    check_loaded(rig, before, runs)


def test_a_chunk_is_named_when_its_slot_is_not_read_any_more(rig: Rig) -> None:
    rig.delay("bus")
    before = rig.slots.tensor.clone()
    rig.copies.submit_chunk((1, 0), Run(2, 0, [6, 7, 8, 9]))
    assert soon(rig.copies.chunks_loaded, 1) == [(1, 0)]
    rig.slots.tensor.fill_(0)
    rig.settle()
    for layer, size in enumerate(rig.sizes):
        first = rig.layout.offsets[layer]
        stored = bytes(before[2, first : first + 4 * size].numpy())
        assert b"".join(rig.page(layer, block) for block in (6, 7, 8, 9)) == stored


def test_finish_waits_for_chunks(rig: Rig) -> None:
    before = rig.snapshot()
    rig.delay("bus")
    run = Run(2, 0, [6, 7, 8, 9])
    rig.copies.submit_chunk((1, 0), run)
    rig.copies.finish()
    assert rig.copies.chunks_loaded() == [(1, 0)]
    check_loaded(rig, before, [run])


def test_steps_without_loads_do_nothing(rig: Rig) -> None:
    before = rig.snapshot()
    rig.copies.submit_loads([])
    assert not rig.copies.loading
    rig.copies.wait_layer(1)
    rig.copies.wait_all()
    rig.copies.end_step()
    assert rig.copies.loaded() == [] and rig.copies.saved() == []
    assert rig.copies.chunks_loaded() == []
    assert all(torch.equal(a, b) for a, b in zip(rig.snapshot(), before, strict=True))


def test_many_steps_one_after_the_other(rig: Rig) -> None:
    """Each step's waits are its own, and a job is named once."""
    dice = random.Random(5)
    for step in range(12):
        rig.fill_pages(step)
        before = rig.snapshot()
        runs = [Run(dice.randrange(SLOTS), 0, dice.sample(range(BLOCKS), CHUNK_BLOCKS))]
        assert not rig.copies.loading
        load_all(rig, [(step, runs)])
        check_loaded(rig, before, runs)
    assert rig.copies.loaded() == []


@pytest.mark.parametrize("slow", ["caller", "bus"])
def test_more_than_fits_the_staging_buffer(rig: Rig, slow: str) -> None:
    """A GPU takes the runs in batches then, and waits for its own staging."""
    before = rig.snapshot()
    ids = random.Random(6).sample(range(BLOCKS), BLOCKS)
    runs = [Run(at % SLOTS, 0, ids[4 * at : 4 * at + 4]) for at in range(BLOCKS // 4)]
    rig.delay(slow)
    for chunk, run in enumerate(runs[7:]):
        rig.copies.submit_chunk((3, chunk), run)
    load_all(rig, [(1, runs[:5]), (2, runs[5:7])])
    assert len(soon(rig.copies.chunks_loaded, len(runs[7:]))) == len(runs[7:])
    check_loaded(rig, before, runs)


# ---- saves that begin while the step computes


def all_blocks(slot: int) -> list[int]:
    return [4 * slot, 4 * slot + 1, 4 * slot + 2, 4 * slot + 3]


def write_layer(rig: Rig, layer: int, value: int) -> None:
    rig.pages[layer][:] = value


def check_saved(rig: Rig, slot: int, values: list[int]) -> None:
    for layer, value in enumerate(values):
        for block in range(CHUNK_BLOCKS):
            assert rig.in_slot(layer, slot, block) == bytes([value]) * rig.sizes[layer], (
                f"slot {slot}, layer {layer}, block {block}"
            )


@pytest.mark.parametrize("slow", ["caller", "bus"])
@pytest.mark.parametrize("hooked", [[0, 1, 2], [0], [2, 1], []])
def test_a_layer_is_saved_as_its_hook_left_it(rig: Rig, slow: str, hooked: list[int]) -> None:
    """Layers whose hook does not fire are saved as they are after the forward pass. What the next
    step does to the pages does not show."""
    rig.delay(slow)
    for layer in range(LAYERS):
        write_layer(rig, layer, 10 + layer)
    assert not rig.copies.saving
    rig.copies.begin_saves([(save, Run(save, 0, all_blocks(save))) for save in range(SLOTS)])
    assert rig.copies.saving
    for layer in hooked:
        rig.copies.save_layer(layer)
        rig.copies.save_layer(layer)
    for layer in set(range(LAYERS)) - set(hooked):
        write_layer(rig, layer, 20 + layer)
    rig.copies.end_saves()
    for layer in range(LAYERS):
        write_layer(rig, layer, 0)
    assert sorted(soon(rig.copies.saved, SLOTS)) == list(range(SLOTS))
    for slot in range(SLOTS):
        check_saved(rig, slot, [10 + at if at in hooked else 20 + at for at in range(LAYERS)])
    assert not rig.copies.saving and rig.copies.saved() == []


def test_no_save_is_named_before_the_step_ends(rig: Rig) -> None:
    rig.copies.begin_saves([(1, Run(0, 0, [0, 1, 2, 3]))])
    for layer in range(LAYERS):
        rig.copies.save_layer(layer)
    rig.settle()
    assert rig.copies.saved() == []
    rig.copies.end_saves()
    assert soon(rig.copies.saved, 1) == [1]


def test_steps_without_saves_save_nothing(rig: Rig) -> None:
    before = rig.slots.tensor.clone()
    rig.copies.begin_saves([])
    rig.copies.save_layer(1)
    rig.copies.end_saves()
    rig.settle()
    assert rig.copies.saved() == [] and torch.equal(rig.slots.tensor, before)


@pytest.mark.parametrize("slow", ["caller", "bus"])
def test_blocks_of_a_save_are_loaded_into_at_once(rig: Rig, slow: str) -> None:
    """vLLM frees a request's blocks after its last step, and gives them to one with a hit."""
    rig.delay(slow)
    for layer in range(LAYERS):
        write_layer(rig, layer, 5)
    for save in range(4):
        rig.copies.submit_save(save, Run(save, 0, all_blocks(save)))
    before = [memory.cpu().clone() for memory in rig.memory] if slow == "caller" else None
    runs = [Run(4 + at, 0, all_blocks(at)) for at in range(3)]
    rig.copies.submit_chunk((1, 0), runs[0])
    rig.copies.submit_loads([(2, runs[1:])])
    rig.copies.wait_all()
    rig.copies.end_step()
    assert soon(rig.copies.saved, 4) == [0, 1, 2, 3]
    for slot in range(4):
        check_saved(rig, slot, [5, 5, 5])
    assert soon(rig.copies.loaded, 1) == [2] and soon(rig.copies.chunks_loaded, 1) == [(1, 0)]
    if before is not None:
        check_loaded(rig, before, runs)


@pytest.mark.parametrize("slot_bytes", [100, 101])
@pytest.mark.parametrize("shared", [False, True])
def test_slots_do_not_overlap(shared: bool, slot_bytes: int) -> None:
    slots = HostSlots(3, slot_bytes, pinned=False, shared=shared)
    slots.progress[:] = 0x7FFF
    for slot in range(3):
        assert not slots.view(slot).readonly and len(slots.view(slot)) == slot_bytes
        slots.view(slot)[:] = bytes([slot]) * slot_bytes
    assert [set(slots.view(slot)) for slot in range(3)] == [{0}, {1}, {2}]
    assert slots.tensor[2].tolist() == [2] * slot_bytes and set(slots.progress) == {0x7FFF}
    slots.close()
    slots.close()
    assert slots.descriptor is None and set(slots.view(1)) == {1}


def test_slots_are_where_the_copies_look_for_them() -> None:
    slots = HostSlots(4, 100, pinned=False)
    for slot in range(4):
        slots.view(slot)[:] = bytes([slot]) * 100
    assert [set(slots.view(slot)) for slot in range(4)] == [{0}, {1}, {2}, {3}]
    assert slots.tensor[2].tolist() == [2] * 100
