"""Which blocks of which slots go to which pages, and how many of them pass at once. Not the copying: see device.py."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from objectcache.staging import Numbers


@dataclass(frozen=True)
class Run:
    """Blocks [first_block, first_block + len(block_ids)) of a slot's chunk, and their page numbers."""

    slot: int
    first_block: int
    block_ids: Sequence[int]


def lying_at(slots: Sequence[int], chunks: Sequence[tuple[int, list[int]]]) -> list[Run]:
    """Of each chunk its first block and the page numbers; the chunks lie in the first of the slots."""
    return [Run(slot, *chunk) for slot, chunk in zip(slots, chunks, strict=False)]


@dataclass
class Batch:
    """Runs that pass together, layer by layer."""

    runs: list[Run]
    slots: Numbers
    first: Numbers  # block of the slot's chunk
    counts: Numbers
    block_ids: Numbers
    index: torch.Tensor | None = None  # their rows, where the pages are

    @classmethod
    def of(cls, runs: list[Run]) -> "Batch":
        return cls(
            runs,
            np.array([run.slot for run in runs], np.int64),
            np.array([run.first_block for run in runs], np.int64),
            np.array([len(run.block_ids) for run in runs], np.int64),
            np.array([block for run in runs for block in run.block_ids], np.int64),
        )


def cut(runs: list[Run], most_blocks: int) -> list[Batch]:
    """Runs in groups of at most so many blocks, or of one run."""
    groups: list[list[Run]] = []
    count = most_blocks
    for run in runs:
        if count + len(run.block_ids) > most_blocks:
            groups.append([])
            count = 0
        groups[-1].append(run)
        count += len(run.block_ids)
    return [Batch.of(group) for group in groups]
