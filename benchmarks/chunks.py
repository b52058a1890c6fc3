"""Random chunks in the real format, as files that servers serve and that readers compare with. Not how they are read: reader.py."""

import hashlib
import mmap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from objectcache.format import ObjectLayout

LAYERS = 32


@dataclass(frozen=True)
class Chunks:
    """`count` different objects of a header and 32 slices of `slice_bytes`, below `folder`."""

    folder: Path
    count: int
    slice_bytes: int

    @cached_property
    def layout(self) -> ObjectLayout:
        namespace = hashlib.sha256(b"transport").digest()
        return ObjectLayout(namespace, 256, 16, 0, 1, (self.slice_bytes,) * LAYERS)

    @property
    def object_bytes(self) -> int:
        return self.layout.object_bytes

    @property
    def marks(self) -> tuple[int, ...]:
        """The ends of the header and of each slice."""
        return (*self.layout.offsets, self.object_bytes)

    def key(self, number: int) -> str:
        return f"chunk-{number % self.count:04}"

    def chunk_hash(self, number: int) -> bytes:
        return hashlib.sha256(self.key(number).encode()).digest()

    def make(self) -> None:
        """Write them all. The same numbers give the same bytes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(self._make, range(self.count)))

    def _make(self, number: int) -> None:
        random = np.random.Generator(np.random.SFC64(number))
        words = random.integers(0, 1 << 64, size=self.object_bytes // 8, dtype=np.uint64)
        view = memoryview(words).cast("B")
        self.layout.seal(view, self.chunk_hash(number))
        (self.folder / self.key(number)).write_bytes(view)

    def part_key(self, number: int, part_bytes: int, part: int) -> str:
        """Of an object that holds one of the equal parts of a chunk's slices, and no header."""
        return f"part-{part_bytes}-{part}-{number:04}"

    def content(self, number: int) -> memoryview:
        """The bytes of a chunk, not copied."""
        with (self.folder / self.key(number)).open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
