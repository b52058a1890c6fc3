"""GPU memory that pages pass through: the circle of its parts, and pages as rows of a table. Copies themselves: test_device.py."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from objectcache.staging import ALIGN_BYTES, Staging, tables

BLOCKS, LAYERS = 7, 3
CPU = torch.device("cpu")


class Clock:
    """A stream that others wait on: it knows up to which event it has waited."""

    def __init__(self) -> None:
        self.waited = -1

    def wait_event(self, event: int) -> None:
        self.waited = max(self.waited, event)


@given(sizes=st.lists(st.integers(1, 4 * ALIGN_BYTES), max_size=60))
def test_no_part_is_handed_out_while_it_is_in_use(sizes: list[int]) -> None:
    """Events happen in order, so who has waited for one has waited for those before it."""
    staging, stream = Staging(9 * ALIGN_BYTES, CPU), Clock()
    assert staging.most == 4 * ALIGN_BYTES
    parts: list[tuple[int, int]] = []
    for event, size in enumerate(sizes):
        part = staging.take(size, stream)
        first = part.storage_offset()
        assert part.numel() == size and first % ALIGN_BYTES == 0
        for other, (start, end) in enumerate(parts):
            if start < first + size and first < end:
                assert stream.waited >= other, f"part {event} lies on part {other}"
        staging.leave(event)
        parts.append((first, first + size))


def test_what_lies_elsewhere_is_not_waited_for() -> None:
    """Two halves: one is filled while the other is emptied."""
    staging, stream = Staging(8 * ALIGN_BYTES, CPU), Clock()
    for event in range(6):
        staging.take(staging.most, stream)
        assert stream.waited == event - 2 if event > 1 else stream.waited == -1
        staging.leave(event)


def test_one_part_is_all_of_it_and_waits_for_the_one_before() -> None:
    staging, stream = Staging(8 * ALIGN_BYTES, CPU, parts=1), Clock()
    assert staging.most == 8 * ALIGN_BYTES
    for event in range(4):
        staging.take(staging.most, stream)
        assert stream.waited == event - 1
        staging.leave(event)


def pages_of(layout: str, size: int = 64) -> list[torch.Tensor]:
    """Pages of three layers as vLLM lays them out, in memory filled with their numbers."""
    memory = torch.zeros(BLOCKS * LAYERS * (size + 8) + 128, dtype=torch.uint8)
    strides = {
        "layer by layer": (BLOCKS * size, size),
        "block by block": (size, LAYERS * size),
        "with padding": (size + 8, LAYERS * (size + 8)),
        "off the grid": (BLOCKS * size + 8, size),
    }
    per_layer, per_block = strides.get(layout, (BLOCKS * size, size))
    if layout == "apart":
        return [torch.zeros((BLOCKS, size), dtype=torch.uint8) for _ in range(LAYERS)]
    if layout == "of two sizes":
        return [
            torch.zeros((BLOCKS, size * (1 + at % 2)), dtype=torch.uint8) for at in range(LAYERS)
        ]
    return [
        memory.as_strided((BLOCKS, size), (per_block, 1), 16 + at * per_layer)
        for at in range(LAYERS)
    ]


@pytest.mark.parametrize("size", [64, 60])
@pytest.mark.parametrize(
    ("layout", "count"),
    [
        ("layer by layer", 1),
        ("block by block", 1),
        ("with padding", 3),
        ("off the grid", 3),
        ("apart", 3),
        ("of two sizes", 3),
    ],
)
def test_rows_of_a_table_are_the_pages(layout: str, count: int, size: int) -> None:
    pages = pages_of(layout, size)
    found = tables(pages)
    assert len(found) == count
    assert [layer for rows in found for layer in rows.layers] == list(range(LAYERS))
    for rows in found:
        for at, layer in enumerate(rows.layers):
            for block in range(BLOCKS):
                mark = 1 + layer * BLOCKS + block
                pages[layer][block] = mark
                numbers = rows.of_blocks(np.array([block], np.int64), at, at + 1)
                same = rows.table[int(numbers[0])].contiguous().view(torch.uint8)
                assert same.tolist() == [mark] * rows.page_bytes
                one = rows.of_layer(at)[block * rows.step].contiguous().view(torch.uint8)
                assert one.tolist() == [mark] * rows.page_bytes


def test_rows_of_several_layers_come_layer_by_layer() -> None:
    (rows,) = tables(pages_of("block by block"))
    numbers = rows.of_blocks(np.array([5, 2], np.int64), 1, 3)
    assert numbers.tolist() == [5 * LAYERS + 1, 2 * LAYERS + 1, 5 * LAYERS + 2, 2 * LAYERS + 2]


def test_rows_are_wide_where_they_can_be() -> None:
    """A kernel that moves single bytes is eight times slower."""
    assert tables(pages_of("layer by layer"))[0].table.dtype == torch.int64
    assert tables(pages_of("layer by layer", 60))[0].table.dtype == torch.uint8
