"""The format of objects: frozen bytes, every wrong byte caught, and docs/FORMAT.md true to the code.

tests/golden/*.bin are objects of version 1 as they lie in buckets. They change only with a new
format version. To write them anew, on purpose: `python tests/test_format.py --write`.
"""

import dataclasses
import random
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from objectcache import format as fmt
from objectcache.errors import Corrupt
from objectcache.format import ObjectLayout, Verifier

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "FORMAT.md"
HASH = bytes(range(100, 132))
TP2 = ObjectLayout(
    namespace_digest=bytes(range(32)),
    chunk_tokens=8,
    block_tokens=4,
    shard=1,
    shards=2,
    slice_bytes=(64, 96, 32),
)
GOLDEN = {
    "v1-three-layers-shard1of2": TP2,
    "v1-two-layers": ObjectLayout(bytes(32), 16, 16, 0, 1, (48, 8)),
    # The header of 130 layers does not fit one alignment unit.
    "v1-long-header": ObjectLayout(b"\xff" * 32, 4, 1, 0, 1, (4,) * 130),
}


def body_of(layout: ObjectLayout) -> bytearray:
    """An unsealed object. Its pages are a fixed pattern that no random module can change."""
    body = bytearray(layout.object_bytes)
    for at in range(layout.header_bytes, layout.object_bytes):
        body[at] = (at * 151 + at // 256 * 7 + 13) % 256
    return body


def sealed(layout: ObjectLayout, chunk_hash: bytes = HASH) -> bytes:
    body = body_of(layout)
    layout.seal(memoryview(body), chunk_hash)
    return bytes(body)


def golden(name: str) -> bytes:
    return (HERE / "golden" / f"{name}.bin").read_bytes()


def outcome(layout: ObjectLayout, stored: bytes, ends: list[int]) -> tuple[int, bool, str]:
    """(verified layers, complete, error) after feeding `stored` up to each of `ends`, ever growing.

    Bytes that did not land yet are poison, as in a reused slot.
    """
    buffer = bytearray(b"\xaa" * layout.object_bytes)
    verifier = Verifier(layout, HASH, memoryview(buffer))
    whole = verifier.part(0, len(layout.slice_bytes))
    landed = 0
    try:
        for end in ends:
            buffer[landed:end] = stored[landed:end]
            landed = end
            whole.landed(landed)
    except Corrupt as error:
        return verifier.verified_layers, verifier.complete, str(error)
    return verifier.verified_layers, verifier.complete, ""


def layer_at(layout: ObjectLayout, offset: int) -> int:
    """Layers that end at or before the byte at `offset`; -1 for the header."""
    if offset < layout.header_bytes:
        return 0
    return sum(layout.slice_of(layer).stop <= offset for layer in range(len(layout.slice_bytes)))


# ---- frozen objects


@pytest.mark.parametrize("name", GOLDEN)
def test_sealing_gives_the_frozen_bytes(name: str) -> None:
    assert sealed(GOLDEN[name]) == golden(name)


@pytest.mark.parametrize("name", GOLDEN)
def test_a_frozen_object_is_read_back(name: str) -> None:
    layout, stored = GOLDEN[name], golden(name)
    assert outcome(layout, stored, [len(stored)]) == (len(layout.slice_bytes), True, "")


@pytest.mark.parametrize("name", GOLDEN)
def test_a_frozen_object_is_read_by_hand_as_the_document_says(name: str) -> None:
    """Only struct and xxhash, with the numbers of docs/FORMAT.md."""
    layout, stored = GOLDEN[name], golden(name)
    magic, version, kind = struct.unpack_from("<8sHH", stored, 0)
    header_bytes, object_bytes, layers = struct.unpack_from("<IQI", stored, 12)
    assert (magic, version, kind) == (b"OBJCACHE", 1, 1)
    assert object_bytes == len(stored) and header_bytes % 4096 == 0
    assert struct.unpack_from("<IIIII", stored, 28) == (
        *(layout.chunk_tokens, layout.block_tokens, layout.shard, layout.shards, 0),
    )
    assert stored[48:80] == layout.namespace_digest and stored[80:112] == HASH
    blank = stored[:112] + bytes(16) + stored[128:header_bytes]
    assert xxhash.xxh3_128_digest(blank) == stored[112:128]
    end = header_bytes
    for layer in range(layers):
        first, size, digest = struct.unpack_from("<QQ16s", stored, 128 + 32 * layer)
        assert first == end and size == layout.slice_bytes[layer]
        assert xxhash.xxh3_128_digest(stored[first : first + size]) == digest
        end = first + size
    assert end == len(stored)
    assert not any(stored[128 + 32 * layers : header_bytes])


def test_seal_changes_no_page_and_overwrites_an_old_header() -> None:
    body = body_of(TP2)
    before = bytes(body)
    body[: TP2.header_bytes] = b"\x77" * TP2.header_bytes
    TP2.seal(memoryview(body), HASH)
    assert body[TP2.header_bytes :] == before[TP2.header_bytes :]
    assert bytes(body) == golden("v1-three-layers-shard1of2")


# ---- wrong bytes


def test_every_flipped_byte_is_caught_before_its_layer_counts() -> None:
    """All bytes of the header and of all slices, each by a random other value and by one bit."""
    stored = golden("v1-three-layers-shard1of2")
    noise = random.Random(1)
    for offset in range(len(stored)):
        for change in (1 << noise.randrange(8), noise.randrange(1, 256)):
            wrong = bytearray(stored)
            wrong[offset] ^= change
            layers, complete, error = outcome(TP2, bytes(wrong), [len(wrong)])
            assert error and not complete, offset
            assert layers == layer_at(TP2, offset), offset


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_wrong_bytes_in_any_number_are_caught(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(GOLDEN)))
    layout, stored = GOLDEN[name], golden(name)
    wrong = bytearray(stored)
    offsets = data.draw(st.sets(st.integers(0, len(stored) - 1), min_size=1, max_size=20))
    for offset in offsets:
        wrong[offset] ^= data.draw(st.integers(1, 255))
    layers, complete, error = outcome(layout, bytes(wrong), [len(wrong)])
    assert error and not complete
    assert layers == layer_at(layout, min(offsets))


def test_what_is_cut_off_never_completes() -> None:
    stored = golden("v1-three-layers-shard1of2")
    for length in range(len(stored)):
        layers, complete, error = outcome(TP2, stored, [length])
        assert not complete and not error
        assert layers == layer_at(TP2, length)


def test_slices_that_changed_places_are_caught() -> None:
    layout = dataclasses.replace(TP2, slice_bytes=(64, 64))
    stored = bytearray(sealed(layout))
    first, second = (bytes(stored[layout.slice_of(layer)]) for layer in (0, 1))
    stored[layout.slice_of(0)], stored[layout.slice_of(1)] = second, first
    assert outcome(layout, bytes(stored), [len(stored)])[:2] == (0, False)


@pytest.mark.parametrize("stored", [b"\0", b"\xff", b"\xaa"], ids=["zeros", "ones", "poison"])
def test_a_slot_that_nothing_was_read_into_is_no_object(stored: bytes) -> None:
    layers, complete, error = outcome(TP2, stored * TP2.object_bytes, [TP2.object_bytes])
    assert (layers, complete) == (0, False) and "not an object of objectcache" in error


# ---- how bytes arrive does not matter


@pytest.mark.parametrize("flip", [None, 5, 130, TP2.offsets[0], TP2.offsets[1] + 9])
def test_whole_or_byte_by_byte_is_the_same(flip: int | None) -> None:
    stored = bytearray(golden("v1-three-layers-shard1of2"))
    if flip is not None:
        stored[flip] ^= 0x10
    at_once = outcome(TP2, bytes(stored), [len(stored)])
    assert at_once == outcome(TP2, bytes(stored), list(range(len(stored) + 1)))
    assert at_once[1] is (flip is None)


@settings(max_examples=100, deadline=None)
@given(
    ends=st.lists(st.integers(0, TP2.object_bytes), max_size=12).map(sorted),
    flip=st.none() | st.integers(0, TP2.object_bytes - 1),
)
def test_the_points_where_it_is_split_do_not_matter(ends: list[int], flip: int | None) -> None:
    stored = bytearray(golden("v1-three-layers-shard1of2"))
    if flip is not None:
        stored[flip] ^= 0x80
    end = len(stored)
    assert outcome(TP2, bytes(stored), [*ends, end]) == outcome(TP2, bytes(stored), [end])


def test_a_layer_counts_as_soon_as_its_last_byte_landed() -> None:
    buffer = bytearray(golden("v1-three-layers-shard1of2"))
    verifier = Verifier(TP2, HASH, memoryview(buffer))
    whole = verifier.part(0, 3)
    for layer in range(3):
        end = TP2.slice_of(layer).stop
        whole.landed(end - 1)
        assert verifier.verified_layers == layer and not verifier.complete
        whole.landed(end)
        assert verifier.verified_layers == layer + 1
    assert verifier.complete


@pytest.mark.parametrize("flip", [None, 5])
def test_a_right_header_is_told_of_and_a_wrong_one_is_not(flip: int | None) -> None:
    buffer = bytearray(golden("v1-three-layers-shard1of2"))
    if flip is not None:
        buffer[flip] ^= 1
    told: list[int] = []
    verifier = Verifier(TP2, HASH, memoryview(buffer), told.append)
    first = verifier.part(0, 1)
    first.landed(TP2.header_bytes - 1)
    assert told == []
    if flip is not None:
        with pytest.raises(Corrupt):
            first.landed(TP2.header_bytes)
        assert told == []
        return
    first.landed(TP2.header_bytes)
    assert told == [0]
    first.landed(first.span.stop)
    assert told == [0, 1]


def test_a_corrupt_layer_stays_corrupt() -> None:
    buffer = bytearray(golden("v1-three-layers-shard1of2"))
    buffer[TP2.offsets[1]] ^= 1
    verifier = Verifier(TP2, HASH, memoryview(buffer))
    whole = verifier.part(0, 3)
    for _ in range(2):
        with pytest.raises(Corrupt):
            whole.landed(len(buffer))
        assert verifier.verified_layers == 1 and not verifier.complete


# ---- objects of others


def patched(offset: int, value: bytes) -> bytes:
    """An object with a field changed and its header checksum right for that."""
    stored = bytearray(sealed(TP2))
    stored[offset : offset + len(value)] = value
    stored[112:128] = bytes(16)
    stored[112:128] = xxhash.xxh3_128_digest(bytes(stored[: TP2.header_bytes]))
    return bytes(stored)


def other(**change: object) -> bytes:
    return sealed(dataclasses.replace(TP2, **change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("stored", "reason"),
    [
        (other(namespace_digest=bytes(32)), "another namespace"),
        (sealed(TP2, bytes(32)), "another chunk"),
        (other(shard=0), "another shard"),
        (other(shards=4), "another number of shards"),
        (other(slice_bytes=(64, 128)), "another number of layers"),
        (other(slice_bytes=(96, 64, 32)), "its slices lie elsewhere"),
        (other(block_tokens=8), "another block_tokens"),
        (other(chunk_tokens=16), "another chunk_tokens"),
        (patched(0, b"PK\x03\x04"), "not an object of objectcache"),
        (patched(8, b"\x02\x00"), "format version 2, this reads 1"),
        (patched(10, b"\x07\x00"), "checksums of kind 7, this knows 1"),
        (patched(12, struct.pack("<I", 8192)), "another header size"),
        (patched(16, struct.pack("<Q", 1)), "another object size"),
        (patched(44, b"\x01"), "another reserved field"),
        (patched(4000, b"\x01"), "slices lie elsewhere"),
    ],
)
def test_an_object_of_others_is_refused_with_a_reason(stored: bytes, reason: str) -> None:
    assert len(stored) == TP2.object_bytes
    layers, complete, error = outcome(TP2, stored, [len(stored)])
    assert (layers, complete) == (0, False)
    assert reason in error and HASH.hex()[:16] in error


# ---- layouts


@given(
    sizes=st.lists(st.integers(1, 1 << 24), min_size=1, max_size=300),
    shards=st.integers(1, 64),
)
def test_slices_follow_the_header_without_gaps(sizes: list[int], shards: int) -> None:
    layout = ObjectLayout(bytes(32), 256, 16, shards - 1, shards, tuple(sizes))
    assert layout.header_bytes % fmt.HEADER_ALIGN_BYTES == 0
    used = 128 + 32 * len(sizes)
    assert used <= layout.header_bytes < used + fmt.HEADER_ALIGN_BYTES
    end = layout.header_bytes
    for layer, size in enumerate(sizes):
        run = layout.slice_of(layer)
        assert (run.start, run.stop - run.start) == (end, size) and layout.offsets[layer] == end
        end = run.stop
    assert layout.object_bytes == end
    assert len(layout.header(HASH, [bytes(16)] * len(sizes))) == layout.header_bytes


def test_checksums_are_canonical_xxh3_128() -> None:
    """The reference value of the algorithm for no input, in its canonical byte order."""
    assert fmt.checksum(b"").hex() == "99aa06d3014798d86001c324468d497f"
    assert fmt.checksum(memoryview(bytearray(b"abc"))) == fmt.checksum(b"abc")


# ---- the document


def documented(table: str) -> list[tuple[int, int, str]]:
    """(offset, bytes, name) of the rows of a table in docs/FORMAT.md."""
    text = DOCUMENT.read_text().split(f"<!-- {table} -->")[1].split("\n\n")[0]
    rows = re.findall(r"^\| *(\d+) *\| *(\d+) *\| *`(\w+)` *\|", text, re.MULTILINE)
    return [(int(offset), int(size), name) for offset, size, name in rows]


def sizes_of(layout: struct.Struct) -> list[int]:
    width = {"H": 2, "I": 4, "Q": 8}
    items = re.findall(r"(\d+)s|([HIQ]+)", layout.format)
    return [n for text, run in items for n in ([int(text)] if text else [width[c] for c in run])]


@pytest.mark.parametrize(("table", "layout"), [("fixed", fmt._FIXED), ("entry", fmt._ENTRY)])
def test_the_document_has_the_codes_offsets(table: str, layout: struct.Struct) -> None:
    rows = documented(table)
    assert [size for _, size, _ in rows] == sizes_of(layout)
    end = 0
    for offset, size, _ in rows:
        assert offset == end
        end += size
    assert end == layout.size


def test_the_document_names_what_the_code_does() -> None:
    text = DOCUMENT.read_text()
    offset = next(offset for offset, _, name in documented("fixed") if name == "header_checksum")
    assert offset == fmt._CHECKSUM_OFFSET
    for fact in (
        f"`{fmt.MAGIC.decode()}`",
        f"version {fmt.VERSION}",
        f"multiple of {fmt.HEADER_ALIGN_BYTES}",
        "XXH3-128",
    ):
        assert fact in text, fact


def test_the_documents_example_runs() -> None:
    """The script by which a person reads an object, on a frozen object."""
    script = re.search(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert script is not None
    path = str(HERE / "golden" / "v1-three-layers-shard1of2.bin")
    said = subprocess.run(
        [sys.executable, "-c", script[1], path], capture_output=True, text=True, check=True
    ).stdout
    assert said.count("ok") == 4 and "wrong" not in said and HASH.hex() in said


def write() -> None:
    """Freeze the objects anew: only together with a new format version."""
    for name, layout in GOLDEN.items():
        (HERE / "golden" / f"{name}.bin").write_bytes(sealed(layout))


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("say --write to freeze the objects in tests/golden anew")
    write()
