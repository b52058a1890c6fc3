"""Which name a chunk of KV has: pure functions of facts and tokens. Not which facts: identity.py.

A chunk is an object `<namespace>/<hh>/<hash>.r<rank>of<world>`. The namespace digests all that
changes KV bytes of a whole engine; the hash chains all that changes them within one request.
Nothing here depends on PYTHONHASHSEED, byte order, the host, or how tokens arrived.

Encoding of the chain, all integers little-endian, S(x) = u32 length || bytes:
    root = sha256("objectcache.root.1" || A(cache_salt) || A(lora)),  A = 0x00 | 0x01 S(x)
    h_k  = sha256("objectcache.chunk1" || h_(k-1) || u32 n || n * u32 id || u32 m || m * item)
    item = S(kind) S(identifier) i64 offset-from-chunk-start i64 length
Every field has a fixed width or a length before it, so different inputs have different encodings.
"""

import hashlib
import json
import re
import struct
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from objectcache.errors import Corrupt

NAMING_VERSION = 1
"""Changes with the meaning of a name: other chains, other canonical form, other key layout."""
NAMESPACE_FILE = "namespace.json"
HASH_BYTES = 32

_ROOT_TAG = b"objectcache.root.1"
_CHUNK_TAG = b"objectcache.chunk1"
_KEY = re.compile(
    r"(?P<namespace>[A-Za-z0-9._-]+)/(?P<fan>[0-9a-f]{2})/"
    r"(?P<hash>[0-9a-f]{64})\.r(?P<rank>0|[1-9][0-9]{0,5})of(?P<world>[1-9][0-9]{0,5})"
)


# ---- namespaces


@dataclass(frozen=True)
class Namespace:
    """All that changes the KV bytes of an engine, or their meaning.

    `facts` is JSON: dicts with string keys, lists, strings, numbers, booleans, None; anything else
    is a TypeError. `facts["label"]`, if it is a string, is what the directory's name begins with.
    """

    facts: Mapping[str, Any] = field(compare=False, hash=False)
    canonical: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        text = canonical_json({"naming": NAMING_VERSION, "facts": self.facts})
        object.__setattr__(self, "canonical", text)
        # A copy, so that a caller who changes its dict later does not make facts and digest differ.
        object.__setattr__(self, "facts", json.loads(text)["facts"])

    @cached_property
    def digest(self) -> bytes:
        """32 bytes: SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.canonical).digest()

    @cached_property
    def name(self) -> str:
        """Directory in the bucket: `<label, at most 40 characters>-<32 hex of the digest>`."""
        return f"{_slug(self.facts.get('label'))}-{self.digest.hex()[:32]}"

    def to_json(self) -> bytes:
        """The document that stands at `<name>/namespace.json`, for people and for `from_json`."""
        document = {
            "about": "What the KV chunks beside this file were computed with.",
            "naming": NAMING_VERSION,
            "digest": self.digest.hex(),
            "facts": self.facts,
        }
        return json.dumps(document, indent=2, sort_keys=True).encode() + b"\n"

    @classmethod
    def from_json(cls, document: bytes) -> "Namespace":
        """Read `to_json` back. Raises Corrupt if it is not one, or if its digest is not its own."""
        try:
            parsed = json.loads(document)
            naming, digest, facts = parsed["naming"], parsed["digest"], parsed["facts"]
            namespace = cls(facts)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Corrupt(
                f"a namespace document cannot be read: {type(error).__name__}."
            ) from error
        if naming != NAMING_VERSION or digest != namespace.digest.hex():
            raise Corrupt(
                "a namespace document does not match its digest.",
                "it was changed by hand, or written by another version of objectcache.",
            )
        return namespace


def canonical_json(value: Any) -> bytes:
    """The one ASCII text of `value`: sorted keys, no spaces. TypeError if it is not JSON."""
    _require_json(value, "facts")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def _require_json(value: Any, where: str) -> None:
    # Exact types: an enum or a subclass may print differently in the next Python.
    if value is None or type(value) in (bool, int, float, str):
        return
    if type(value) in (list, tuple):
        for index, item in enumerate(value):
            _require_json(item, f"{where}[{index}]")
        return
    if isinstance(value, dict):
        for key, item in value.items():
            if type(key) is not str:  # json would make 1 and "1" the same key
                raise TypeError(f"{where} has a key of type {type(key).__name__}, not str.")
            _require_json(item, f"{where}.{key}")
        return
    raise TypeError(f"{where} is of type {type(value).__name__}, which is not JSON.")


def _slug(label: Any) -> str:
    text = re.sub(r"[^a-z0-9.]+", "-", label.lower()) if isinstance(label, str) else ""
    return text[:40].strip("-.") or "kv"


# ---- chains


@dataclass(frozen=True)
class Item:
    """An input that is not tokens, such as an image, and the tokens it stands behind.

    `offset` counts from the start of the prompt. `identifier` must name the content.
    """

    kind: str
    identifier: str
    offset: int
    length: int

    @property
    def end(self) -> int:
        """First token after the item; an item of no tokens counts for the one at its offset."""
        return self.offset + max(self.length, 1)


def root_hash(cache_salt: str | None = None, lora: bytes | None = None) -> bytes:
    """Parent of a request's first chunk (32 bytes). None and empty are different identities."""
    salt = None if cache_salt is None else cache_salt.encode("utf-8", "surrogatepass")
    return hashlib.sha256(_ROOT_TAG + _optional(salt) + _optional(lora)).digest()


class ChunkChain:
    """Hashes of the whole chunks of one growing token sequence; each new chunk costs O(chunk)."""

    def __init__(self, root: bytes, chunk_tokens: int, items: Iterable[Item] = ()) -> None:
        if len(root) != HASH_BYTES:
            raise ValueError(f"root has {len(root)} bytes, not {HASH_BYTES}")
        if chunk_tokens < 1:
            raise ValueError(f"chunk_tokens is {chunk_tokens}, not positive")
        self.root = root
        self.chunk_tokens = chunk_tokens
        self.hashes: list[bytes] = []
        """One per whole chunk, 32 bytes each. Read only."""
        self._pending = bytearray()  # little-endian u32 of the tokens after the last whole chunk
        self._items: list[Item] = []  # by offset; those that ended in a hashed chunk are dropped
        self._add(items)

    @property
    def tokens(self) -> int:
        """Tokens taken so far, those after the last whole chunk included."""
        return len(self.hashes) * self.chunk_tokens + len(self._pending) // 4

    def extend(self, tokens: Sequence[int], items: Iterable[Item] = ()) -> None:
        """Append tokens, and items of this or later chunks.

        ValueError for an item that begins in a chunk already hashed (it would have changed that
        hash) and for a token that is no u32; the chain is then as before.
        """
        encoded = _encode_tokens(tokens)
        self._add(items)
        self._pending += encoded
        size = 4 * self.chunk_tokens
        whole = len(self._pending) // size
        with memoryview(self._pending) as view:
            for index in range(whole):
                self._append(view[index * size : (index + 1) * size])
        del self._pending[: whole * size]

    def _append(self, chunk: memoryview) -> None:
        start = len(self.hashes) * self.chunk_tokens
        end = start + self.chunk_tokens
        digest = hashlib.sha256(_CHUNK_TAG)
        digest.update(self.hashes[-1] if self.hashes else self.root)
        digest.update(struct.pack("<I", self.chunk_tokens))
        digest.update(chunk)
        digest.update(_encode_items(self._items, start, end))
        self.hashes.append(digest.digest())
        while self._items and self._items[0].end <= end:
            self._items.pop(0)

    def _add(self, items: Iterable[Item]) -> None:
        new = list(items)
        if not new:
            return
        hashed = len(self.hashes) * self.chunk_tokens
        for item in new:
            if item.offset < hashed or item.length < 0:
                raise ValueError(
                    f"item at token {item.offset} of length {item.length} comes after "
                    f"{hashed} tokens were hashed"
                )
        self._items = sorted(
            self._items + new,
            key=lambda item: (item.offset, item.length, item.kind, item.identifier),
        )


def chunk_hashes(
    tokens: Sequence[int], chunk_tokens: int, root: bytes, items: Iterable[Item] = ()
) -> list[bytes]:
    """Hashes (32 bytes each) of all whole chunks of a sequence; see ChunkChain to extend one."""
    chain = ChunkChain(root, chunk_tokens, items)
    chain.extend(tokens)
    return chain.hashes


def _encode_tokens(tokens: Sequence[int]) -> bytes:
    try:
        # array checks type and range of each token, and is thrice as fast as numpy from a list.
        encoded = array("I", tokens)
    except (OverflowError, TypeError) as error:
        raise ValueError(f"a token is not an unsigned 32-bit integer: {error}") from error
    if encoded.itemsize != 4:  # pragma: no cover - no platform that vLLM runs on
        raise AssertionError("array('I') does not hold 32-bit integers here")
    if sys.byteorder == "big":
        encoded.byteswap()
    return encoded.tobytes()


def _encode_items(items: Sequence[Item], start: int, end: int) -> bytes:
    parts: list[bytes] = []
    for item in items:
        if item.offset >= end:
            break
        if item.end > start:
            parts.append(
                _string(item.kind.encode())
                + _string(item.identifier.encode("utf-8", "surrogatepass"))
                + struct.pack("<qq", item.offset - start, item.length)
            )
    return struct.pack("<I", len(parts)) + b"".join(parts)


def _string(value: bytes) -> bytes:
    return struct.pack("<I", len(value)) + value


def _optional(value: bytes | None) -> bytes:
    return b"\x00" if value is None else b"\x01" + _string(value)


# ---- object keys


@dataclass(frozen=True)
class ObjectName:
    """What an object's key says."""

    namespace: str
    chunk_hash: bytes
    rank: int
    world: int


def object_key(namespace_name: str, chunk_hash: bytes, rank: int, world: int) -> str:
    """Key of one rank's part of a chunk, below the URL's prefix.

    `<namespace>/<hh>/<64 hex>.r<rank>of<world>`: the first hash byte as a directory keeps
    directories of a file store small; each of `world` ranks has an object of its own.
    """
    if len(chunk_hash) != HASH_BYTES:
        raise ValueError(f"chunk_hash has {len(chunk_hash)} bytes, not {HASH_BYTES}")
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} is not within world {world}")
    text = chunk_hash.hex()
    return f"{namespace_name}/{text[:2]}/{text}.r{rank}of{world}"


def parse_object_key(key: str) -> ObjectName | None:
    """The inverse of `object_key`, or None if that function cannot have made this key."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    name = ObjectName(
        match["namespace"], bytes.fromhex(match["hash"]), int(match["rank"]), int(match["world"])
    )
    if name.rank >= name.world or not match["hash"].startswith(match["fan"]):
        return None
    return name
