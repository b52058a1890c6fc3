"""Where bytes are in an object, and whether they are right: header, layer table, checksums. Not what an object is called: see keys.py.

docs/FORMAT.md describes version 1; tests/golden/ holds frozen objects. Nothing else in this
package computes an offset. All integers are little-endian.
"""

import struct
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import xxhash

from objectcache.errors import Corrupt

MAGIC = b"OBJCACHE"
VERSION = 1
CHECKSUM_XXH3_128 = 1
HEADER_ALIGN_BYTES = 4096  # so that the first slice is page-aligned in a page-aligned buffer

_FIXED = struct.Struct("<8sHHIQIIIIII32s32s16s")
_ENTRY = struct.Struct("<QQ16s")
_CHECKSUM_OFFSET = _FIXED.size - 16
_NO_CHECKSUM = bytes(16)
_FIELDS = (
    "magic",
    "version",
    "checksum kind",
    "header size",
    "object size",
    "number of layers",
    "chunk_tokens",
    "block_tokens",
    "shard",
    "number of shards",
    "reserved field",
    "namespace",
    "chunk",
)


def checksum(data: bytes | memoryview) -> bytes:
    """XXH3-128 of `data`, 16 bytes, big-endian as the algorithm's canonical form has it."""
    return xxhash.xxh3_128_digest(data)


@dataclass(frozen=True)
class ObjectLayout:
    """The shape that all objects of one engine's rank share.

    `slice_bytes[l]` is the size of layer l's run: chunk_tokens / block_tokens pages, one after the
    other, each as vLLM holds it.
    """

    namespace_digest: bytes
    chunk_tokens: int
    block_tokens: int
    shard: int
    shards: int
    slice_bytes: tuple[int, ...]

    @property
    def chunk_blocks(self) -> int:
        return self.chunk_tokens // self.block_tokens

    @cached_property
    def header_bytes(self) -> int:
        used = _FIXED.size + _ENTRY.size * len(self.slice_bytes)
        return -(-used // HEADER_ALIGN_BYTES) * HEADER_ALIGN_BYTES

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """First byte of each layer's slice."""
        first, offsets = self.header_bytes, []
        for size in self.slice_bytes:
            offsets.append(first)
            first += size
        return tuple(offsets)

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """First byte behind each layer's slice."""
        return tuple(map(int.__add__, self.offsets, self.slice_bytes))

    @cached_property
    def object_bytes(self) -> int:
        return self.header_bytes + sum(self.slice_bytes)

    def slice_of(self, layer: int) -> slice:
        """The byte range of one layer."""
        return slice(self.offsets[layer], self.offsets[layer] + self.slice_bytes[layer])

    def span(self, first: int, last: int) -> slice:
        """The byte range of layers [first, last); the header goes with layer 0."""
        start = self.offsets[first] if first else 0
        return slice(start, self.offsets[last - 1] + self.slice_bytes[last - 1])

    def seal(self, buffer: memoryview, chunk_hash: bytes) -> None:
        """Write the header for the slices that `buffer` (object_bytes long) holds already."""
        sums = [checksum(buffer[self.slice_of(layer)]) for layer in range(len(self.slice_bytes))]
        buffer[: self.header_bytes] = self.header(chunk_hash, sums)

    def header(self, chunk_hash: bytes, sums: Sequence[bytes]) -> bytes:
        """The header bytes for slices with these checksums."""
        fixed = _FIXED.pack(
            MAGIC,
            VERSION,
            CHECKSUM_XXH3_128,
            self.header_bytes,
            self.object_bytes,
            len(self.slice_bytes),
            self.chunk_tokens,
            self.block_tokens,
            self.shard,
            self.shards,
            0,
            self.namespace_digest,
            chunk_hash,
            _NO_CHECKSUM,
        )
        table = b"".join(map(_ENTRY.pack, self.offsets, self.slice_bytes, sums))
        header = bytearray((fixed + table).ljust(self.header_bytes, b"\0"))
        header[_CHECKSUM_OFFSET : _FIXED.size] = checksum(bytes(header))
        return bytes(header)

    def expected_sums(self, header: memoryview, chunk_hash: bytes) -> list[bytes]:
        """The slices' checksums from a header, which must be exactly that of this chunk. Raises Corrupt."""
        sums = [
            _ENTRY.unpack_from(header, _FIXED.size + _ENTRY.size * layer)[2]
            for layer in range(len(self.slice_bytes))
        ]
        expected = self.header(chunk_hash, sums)
        if expected != header:
            why = _why(bytes(header), expected)
            raise Corrupt(f"The header is not that of chunk {chunk_hash.hex()[:16]}: {why}.")
        return sums


def _why(header: bytes, expected: bytes) -> str:
    """Why a header that differs from the expected one does so, for people."""
    found = dict(zip(_FIELDS, _FIXED.unpack_from(header), strict=False))
    wanted = dict(zip(_FIELDS, _FIXED.unpack_from(expected), strict=False))
    if found["magic"] != MAGIC:
        return "it is not an object of objectcache"
    if found["version"] != VERSION:
        return f"it has format version {found['version']}, this reads {VERSION}"
    if found["checksum kind"] != CHECKSUM_XXH3_128:
        return f"it has checksums of kind {found['checksum kind']}, this knows {CHECKSUM_XXH3_128}"
    blank = header[:_CHECKSUM_OFFSET] + _NO_CHECKSUM + header[_FIXED.size :]
    if checksum(blank) != header[_CHECKSUM_OFFSET : _FIXED.size]:
        return "its checksum is wrong"
    other = [name for name in _FIELDS if found[name] != wanted[name]]
    return f"it has another {', another '.join(other)}" if other else "its slices lie elsewhere"


class Verifier:
    """Checks one object slice by slice while its bytes land, in one part or in several.

    The parts of an object may land at the same time, each in a thread of its own: a slice is checked
    by the thread that brought it, or, where that was before the header, by the one that brings the
    header. `told` hears from these threads how many leading layers may be used, first 0 when the
    header is verified; a number that is told late may be less than one before.
    """

    def __init__(
        self,
        layout: ObjectLayout,
        chunk_hash: bytes,
        buffer: memoryview,
        told: Callable[[int], None] = lambda layers: None,
    ) -> None:
        self._layout = layout
        self._told = told
        self._chunk_hash = chunk_hash
        self._buffer = buffer
        self._sums: list[bytes] | None = None
        self._unchecked: deque[int] = deque()  # layers that landed before the header
        self._verified = bytearray(len(layout.slice_bytes))

    @property
    def verified_layers(self) -> int:
        """How many leading layers may be used; it only grows."""
        bad = self._verified.find(0)
        return len(self._verified) if bad < 0 else bad

    @property
    def complete(self) -> bool:
        return self.verified_layers == len(self._verified) and self._sums is not None

    def part(self, first: int, last: int) -> "Part":
        """The part that holds layers [first, last), and the header if `first` is 0."""
        return Part(self, self._layout, first, last)

    def header_landed(self) -> None:
        header = self._buffer[: self._layout.header_bytes]
        sums = self._layout.expected_sums(header, self._chunk_hash)
        self._told(0)  # the first layer comes in this part, behind the header
        self._sums = sums
        self._check_landed(sums)

    def layer_landed(self, layer: int) -> None:
        self._unchecked.append(layer)
        if self._sums is not None:  # else whoever brings the header finds it in the queue
            self._check_landed(self._sums)

    def _check_landed(self, sums: list[bytes]) -> None:
        while True:
            try:
                layer = self._unchecked.popleft()
            except IndexError:
                return
            if checksum(self._buffer[self._layout.slice_of(layer)]) != sums[layer]:
                raise Corrupt(
                    f"Layer {layer} of chunk {self._chunk_hash.hex()[:16]} has a wrong checksum."
                )
            self._verified[layer] = 1
            self._told(self.verified_layers)


class Part:
    """A run of an object's bytes that lands in order: layers [first, last), after the header if first is 0."""

    def __init__(self, verifier: Verifier, layout: ObjectLayout, first: int, last: int) -> None:
        self._verifier = verifier
        self._layers = list(range(first, last))
        self.span = layout.span(first, last)
        begin = self.span.start
        self.marks = [end - begin for end in layout.ends[first:last]]
        self._next = 0
        if first == 0:
            self.marks.insert(0, layout.header_bytes)
            self._layers.insert(0, -1)

    def landed(self, n: int) -> None:
        """The first n bytes of the part are final. Raises Corrupt at the first run that is wrong."""
        while self._next < len(self.marks) and self.marks[self._next] <= n:
            layer = self._layers[self._next]
            if layer < 0:
                self._verifier.header_landed()
            else:
                self._verifier.layer_landed(layer)
            self._next += 1
