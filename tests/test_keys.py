"""Names: injective, equal everywhere, frozen. Not which facts count: see test_identity.py."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from objectcache.errors import Corrupt
from objectcache.keys import (
    ChunkChain,
    Item,
    Namespace,
    ObjectName,
    chunk_hashes,
    object_key,
    parse_object_key,
    root_hash,
)

GOLDEN = Path(__file__).parent / "golden" / "keys.json"
ROOT = root_hash()

small_items = st.builds(
    Item,
    kind=st.sampled_from(["", "a", "image"]),
    identifier=st.sampled_from(["", "a", "ab", "b"]),
    offset=st.integers(0, 8),
    length=st.integers(0, 5),
)
small_text = st.sampled_from([None, "", "a", "aa"])
small_bytes = st.sampled_from([None, b"", b"a", b"\x00", b"\x01\x00\x00\x00\x00"])


def _chunk_items(items: list[Item], chunk: int, size: int) -> list[tuple[Any, ...]]:
    """What of the items a chunk must know, said independently of the code under test."""
    start, end = chunk * size, (chunk + 1) * size
    return sorted(
        (i.offset - start, i.length, i.kind, i.identifier)
        for i in items
        if i.offset < end and i.offset + max(1, i.length) > start
    )


# ---- chains


@given(st.lists(st.integers(0, 3), max_size=12), st.lists(small_items, max_size=3), st.data())
def test_a_chain_does_not_depend_on_how_tokens_arrive(
    tokens: list[int], items: list[Item], data: st.DataObject
) -> None:
    size = data.draw(st.integers(1, 5))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=4)))
    whole = chunk_hashes(tokens, size, ROOT, items)
    chain = ChunkChain(ROOT, size, reversed(items))
    for begin, end in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        chain.extend(tokens[begin:end])
    assert chain.hashes == whole
    assert len(whole) == len(tokens) // size
    assert chain.tokens == len(tokens)


@given(st.lists(st.integers(0, 3), min_size=4, max_size=8), st.lists(small_items, max_size=3))
def test_items_may_come_with_the_tokens_they_stand_behind(
    tokens: list[int], items: list[Item]
) -> None:
    chain = ChunkChain(ROOT, 2)
    for begin in range(0, len(tokens), 2):
        last = begin + 2 >= len(tokens)
        new = [i for i in items if begin <= i.offset and (last or i.offset < begin + 2)]
        chain.extend(tokens[begin : begin + 2], new)
    assert chain.hashes == chunk_hashes(tokens, 2, ROOT, items)


some_tokens = st.lists(st.integers(0, 2), min_size=1, max_size=3)
Case = tuple[str | None, bytes | None, list[int], list[Item]]


@st.composite
def near_pairs(draw: st.DrawFn) -> tuple[Case, Case]:
    """Two chunks that differ in one thing at most: what a careless encoding would confuse."""
    fields: list[Any] = [small_text, small_bytes, some_tokens, st.lists(small_items, max_size=2)]
    one = [draw(field) for field in fields]
    other = list(one)
    which = draw(st.integers(0, 4))
    if which < 4:
        other[which] = draw(fields[which])
    elif one[3]:
        name = draw(st.sampled_from(["kind", "identifier", "offset", "length"]))
        item = dataclasses.replace(one[3][0], **{name: getattr(draw(small_items), name)})
        other[3] = [item, *one[3][1:]]
    return tuple(one), tuple(other)  # type: ignore[return-value]


@settings(max_examples=1000)
@given(near_pairs())
def test_chunks_are_equal_only_if_all_they_depend_on_is(pair: tuple[Case, Case]) -> None:
    def known(case: Case) -> Any:
        salt, lora, tokens, items = case
        return salt, lora, tokens, _chunk_items(items, 0, len(tokens))

    def name(case: Case) -> bytes:
        salt, lora, tokens, items = case
        return chunk_hashes(tokens, len(tokens), root_hash(salt, lora), items)[0]

    a, b = pair
    assert (name(a) == name(b)) == (known(a) == known(b))


@given(st.lists(st.integers(0, 2), min_size=6, max_size=6), st.integers(0, 5))
def test_a_changed_token_changes_its_chunk_and_all_after_it_and_none_before(
    tokens: list[int], where: int
) -> None:
    changed = [*tokens[:where], tokens[where] + 1, *tokens[where + 1 :]]
    before, after = chunk_hashes(tokens, 2, ROOT), chunk_hashes(changed, 2, ROOT)
    assert [x == y for x, y in zip(before, after, strict=True)] == [
        k < where // 2 for k in range(3)
    ]


@given(small_text, small_bytes, small_text, small_bytes)
def test_roots_are_equal_only_if_salt_and_lora_are(
    salt: str | None, lora: bytes | None, salt2: str | None, lora2: bytes | None
) -> None:
    assert (root_hash(salt, lora) == root_hash(salt2, lora2)) == ((salt, lora) == (salt2, lora2))


def test_a_root_changes_every_chunk() -> None:
    plain, salted = (chunk_hashes(range(12), 4, root_hash(salt)) for salt in (None, "s"))
    assert len({*plain, *salted}) == 6


def test_the_same_item_elsewhere_in_equal_placeholders_is_another_chunk() -> None:
    placeholders = [9] * 8
    there = {
        tuple(chunk_hashes(placeholders, 4, ROOT, [Item("image", "x", offset, 2)]))
        for offset in range(6)
    }
    assert len(there) == 6


def test_an_item_counts_in_each_chunk_it_covers_and_no_other() -> None:
    plain = chunk_hashes([9] * 16, 4, ROOT)
    chain = ChunkChain(plain[0], 4, [])  # a chain that goes on after chunk 0
    chain.extend([9] * 12)
    assert chain.hashes == plain[1:]
    late = chunk_hashes([9] * 16, 4, ROOT, [Item("image", "x", 6, 4)])
    assert late[0] == plain[0]
    assert late[1] != plain[1]


def test_an_item_too_late_is_refused_and_changes_nothing() -> None:
    chain = ChunkChain(ROOT, 4)
    chain.extend([1, 2, 3, 4, 5])
    with pytest.raises(ValueError, match="4 tokens were hashed"):
        chain.extend([6, 7, 8], [Item("image", "x", 3, 2)])
    assert chain.tokens == 5
    chain.extend([6, 7, 8])
    assert chain.hashes == chunk_hashes([1, 2, 3, 4, 5, 6, 7, 8], 4, ROOT)


@pytest.mark.parametrize("bad", [[-1], [1 << 32], [1.5], ["1"], [None]])
def test_what_is_no_token_is_refused_and_changes_nothing(bad: list[Any]) -> None:
    chain = ChunkChain(ROOT, 1)
    with pytest.raises(ValueError, match="token"):
        chain.extend([1, *bad])
    assert chain.tokens == 0


@given(st.lists(st.integers(0, (1 << 32) - 1), min_size=1, max_size=6))
def test_tokens_may_be_any_sequence(tokens: list[int]) -> None:
    expected = chunk_hashes(tokens, 1, ROOT)
    for same in (tuple(tokens), np.array(tokens, dtype=np.int64), np.array(tokens, np.uint32)):
        assert chunk_hashes(same, 1, ROOT) == expected  # type: ignore[arg-type]


def test_a_long_prompt_is_named_in_milliseconds() -> None:
    tokens = list(range(65536))
    fastest = min(_seconds(lambda: chunk_hashes(tokens, 256, ROOT)) for _ in range(5))
    assert fastest < 0.02  # measured 0.9 ms; the bound allows for a loaded machine


def _seconds(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# ---- namespaces

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


def _exact(value: Any) -> Any:
    """`value` so that == tells 1 from 1.0 from True, and 0.0 from -0.0."""
    if isinstance(value, dict):
        return {key: _exact(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_exact(item) for item in value]
    return type(value).__name__, repr(value)


@given(
    st.dictionaries(st.text(max_size=3), json_values),
    st.dictionaries(st.text(max_size=3), json_values),
)
def test_namespaces_are_equal_only_if_their_facts_are(a: dict[str, Any], b: dict[str, Any]) -> None:
    equal = _exact(a) == _exact(b)
    assert (Namespace(a).digest == Namespace(b).digest) == equal
    assert (Namespace(a) == Namespace(b)) == equal


@given(st.dictionaries(st.text(max_size=3), json_values))
def test_a_namespace_reads_back_from_its_document(facts: dict[str, Any]) -> None:
    namespace = Namespace(facts)
    back = Namespace.from_json(namespace.to_json())
    assert (back, back.name, back.digest) == (namespace, namespace.name, namespace.digest)


def test_the_order_of_facts_does_not_matter() -> None:
    assert Namespace({"a": 1, "b": {"c": 2, "d": 3}}) == Namespace({"b": {"d": 3, "c": 2}, "a": 1})


def test_facts_are_copied() -> None:
    facts = {"a": [1]}
    namespace = Namespace(facts)
    facts["a"].append(2)
    assert namespace.facts == {"a": [1]}
    assert Namespace.from_json(namespace.to_json()) == namespace


class Thing:
    """Prints with its address, as most objects do."""


@pytest.mark.parametrize("value", [Thing(), Thing, {1: 2}, {1, 2}, b"x", np.float32(1), {True: 1}])
def test_what_is_not_json_is_refused_with_its_place(value: Any) -> None:
    with pytest.raises(TypeError, match=r"facts\.a\[0\]"):
        Namespace({"a": [value]})


@pytest.mark.parametrize(
    "label, start",
    [
        ("meta-llama/Llama-3.1-8B", "meta-llama-llama-3.1-8b-"),
        ("../../etc/passwd", "etc-passwd-"),
        ("x" * 99, "x" * 40 + "-"),
        ("模型", "kv-"),
        (None, "kv-"),
        (7, "kv-"),
    ],
)
def test_a_directory_name_is_readable_and_safe(label: Any, start: str) -> None:
    namespace = Namespace({"label": label})
    assert namespace.name == start + namespace.digest.hex()[:32]
    key = object_key(namespace.name, ROOT, 0, 1)
    assert parse_object_key(key) == ObjectName(namespace.name, ROOT, 0, 1)


def test_a_document_that_was_changed_is_refused() -> None:
    document = Namespace({"theta": 10000.0}).to_json()
    with pytest.raises(Corrupt):
        Namespace.from_json(document.replace(b"10000.0", b"10001.0"))
    with pytest.raises(Corrupt):
        Namespace.from_json(document.replace(b'"naming": 1', b'"naming": 2'))


@pytest.mark.parametrize("document", [b"", b"[]", b"{}", b"\xff", b"[" * 100_000, b"null"])
def test_what_is_no_document_is_refused(document: bytes) -> None:
    with pytest.raises(Corrupt):
        Namespace.from_json(document)


# ---- object keys


@given(
    st.binary(min_size=32, max_size=32),
    st.integers(1, 64).flatmap(lambda w: st.tuples(st.integers(0, w - 1), st.just(w))),
)
def test_an_object_key_reads_back(chunk: bytes, place: tuple[int, int]) -> None:
    assert parse_object_key(object_key("n-1", chunk, *place)) == ObjectName("n-1", chunk, *place)


@given(st.from_regex(r"[a./]{1,2}/[0a]{2}/a?0{63,64}\.r[0-9]{1,2}of[0-9]{1,2}\n?", fullmatch=True))
def test_only_keys_that_we_make_are_read(key: str) -> None:
    name = parse_object_key(key)
    if name is not None:
        assert object_key(name.namespace, name.chunk_hash, name.rank, name.world) == key


@pytest.mark.parametrize(
    "change",
    [
        ("/00/", "/01/"),
        (".r0of2", ".r2of2"),
        (".r0of2", ".r00of2"),
        (".r0", ".R0"),
        ("of2", ""),
        ("of2", "of2٣"),
    ],
)
def test_a_key_that_we_cannot_have_made_is_not_read(change: tuple[str, str]) -> None:
    key = object_key("n", bytes(32), 0, 2)
    assert parse_object_key(key) is not None
    assert change[0] in key
    assert parse_object_key(key.replace(*change)) is None


@pytest.mark.parametrize("args", [(b"short", 0, 1), (bytes(32), 1, 1), (bytes(32), -1, 1)])
def test_an_impossible_object_is_not_named(args: tuple[bytes, int, int]) -> None:
    with pytest.raises(ValueError):
        object_key("n", *args)


# ---- frozen: a change here makes every stored chunk of every user unreachable


def _named() -> dict[str, Any]:
    image = Item("image", "sha:1", 3, 6)
    cases = {
        "plain": chunk_hashes(range(8), 4, root_hash()),
        "largest token": chunk_hashes([(1 << 32) - 1] * 4, 4, root_hash()),
        "empty salt": chunk_hashes(range(4), 4, root_hash("")),
        "salt": chunk_hashes(range(4), 4, root_hash("tenant-é")),
        "lora": chunk_hashes(range(4), 4, root_hash(None, bytes(range(32)))),
        "image over three chunks": chunk_hashes([7] * 12, 4, root_hash(), [image]),
        "chunk of 256": chunk_hashes(range(256), 256, root_hash()),
    }
    facts = {"label": "Org/Model", "a": [1, 1.0, True, None, "é", 1e100], "b": {"y": 1, "x": 2}}
    return {
        "chains": {name: [h.hex() for h in hashes] for name, hashes in cases.items()},
        "namespace": Namespace(facts).name,
        "digest": Namespace(facts).digest.hex(),
        "object": object_key(Namespace(facts).name, cases["plain"][0], 1, 2),
    }


def test_names_are_what_they_were() -> None:
    assert _named() == json.loads(GOLDEN.read_text())


def test_names_do_not_depend_on_the_hash_seed() -> None:
    code = "import json, sys; sys.path.insert(0, sys.argv[1]); import test_keys; print(json.dumps(test_keys._named()))"
    for seed in ("0", "4242"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code, str(Path(__file__).parent)]
        out = subprocess.run(command, env=environment, capture_output=True, check=True, timeout=60)
        assert json.loads(out.stdout) == json.loads(GOLDEN.read_text())
