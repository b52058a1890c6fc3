"""What an operator asks of a store: can it be used, what lies in it, why do two engines not share. Not how it is typed or printed: cli.py.

Nothing here imports vllm or torch, so that it runs on any machine that reaches the store.
"""

import json
import os
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from objectcache import keys
from objectcache.errors import Corrupt, Misconfigured, NotFound, ObjectCacheError
from objectcache.keys import Namespace
from objectcache.stores.base import Store

PROBE_BYTES = 64 << 10
NAMESPACE_DOCUMENT_BYTES_MAX = 4 << 20
PROBE_FOLDER = "objectcache-probe"

# ---- check


@dataclass(frozen=True)
class Step:
    """One thing that was tried. `error` is why it failed; `note` is news about one that did not."""

    what: str
    took_s: float
    error: ObjectCacheError | None = None
    note: str = ""


async def check(store: Store, *, save: bool = True) -> AsyncIterator[Step]:
    """Try all that engines and operators do with a store, on a small object of our own.

    Each step is given out as it ends. The first that fails is the last but for the removal of the
    probe. Without `save` nothing is written: what an engine that only reads needs.
    """
    first = await _step("reach the store, with credentials", store.check())
    yield first
    if first.error is not None or not save:
        return
    probe = _Probe(store, f"{PROBE_FOLDER}/{uuid.uuid4().hex}")
    for what, work in probe.steps():
        step = await _step(what, work())
        yield step
        if step.error is not None:
            break
    if probe.written:
        yield await _step("delete it", probe.delete())


class _Probe:
    """An object of random bytes that lives for one check."""

    def __init__(self, store: Store, key: str) -> None:
        self._store = store
        self._key = key
        self._body = os.urandom(PROBE_BYTES)
        self.written = False

    def steps(self) -> "list[tuple[str, Any]]":
        """What to try, in order; each a coroutine that returns a note."""
        return [
            (f"write an object of {PROBE_BYTES >> 10} KiB", self._write),
            ("write it again, which must change nothing", self._write_again),
            ("read it whole", self._read),
            ("read a range of it", self._read_range),
            ("list it", self._list),
        ]

    async def _write(self) -> str:
        self.written = True  # perhaps: also a PUT that failed may have come through
        await self._store.write(self._key, memoryview(self._body))
        return ""

    async def _write_again(self) -> str:
        if await self._store.write(self._key, memoryview(self._body)):
            return "the server ignores If-None-Match: equal chunks may be uploaded twice"
        return ""

    async def _read(self) -> str:
        into = bytearray(PROBE_BYTES)
        await self._store.read(self._key, memoryview(into))
        return self._compare(into, 0)

    async def _read_range(self) -> str:
        start = PROBE_BYTES // 4
        into = bytearray(PROBE_BYTES // 2)
        await self._store.read(self._key, memoryview(into), start=start)
        return self._compare(into, start)

    def _compare(self, into: bytearray, start: int) -> str:
        if into != self._body[start : start + len(into)]:
            raise Corrupt(
                f"{self._store.name} gave back other bytes than were written.",
                "look for a proxy that changes bodies; engines will treat such objects as misses.",
            )
        return ""

    async def _list(self) -> str:
        async for key, size in self._store.list(self._key):
            if (key, size) == (self._key, PROBE_BYTES):
                return ""
        raise NotFound(
            f"the list of {self._store.name} lacks an object that was just written.",
            "engines never list; `objectcache ls` will show less than there is.",
        )

    async def delete(self) -> str:
        try:
            await self._store.delete(self._key)
        except ObjectCacheError as error:
            raise type(error)(
                f"{error.message} {self._key} is left behind.",
                error.hint or "an engine deletes only corrupt objects, to replace them.",
            ) from error
        return ""


async def _step(what: str, work: Awaitable[str | None]) -> Step:
    began = time.monotonic()
    note, failure = "", None
    try:
        note = await work or ""
    except ObjectCacheError as error:
        failure = error
    return Step(what, time.monotonic() - began, failure, note)


# ---- what lies in a bucket


@dataclass(frozen=True)
class NamespaceUse:
    """One namespace's share of a bucket. `label` is of its document, or "?" if that is not readable."""

    name: str
    label: str
    chunks: int
    stored_bytes: int


@dataclass(frozen=True)
class Listing:
    """`other_objects` lie below the URL and are not objectcache's."""

    namespaces: list[NamespaceUse]
    other_objects: int


async def usage(store: Store) -> Listing:
    """All namespaces below the URL, with what they hold. Lists every object: a LIST per 1,000."""
    chunks: dict[str, int] = {}
    stored_bytes: dict[str, int] = {}
    other, last = 0, b""
    async for key, size in store.list(""):
        name = keys.parse_object_key(key)
        namespace, _, rest = key.partition("/")
        if name is None and rest != keys.NAMESPACE_FILE:
            other += 1
            continue
        chunks.setdefault(namespace, 0)
        stored_bytes[namespace] = stored_bytes.get(namespace, 0) + size
        if name is not None:
            # Keys come sorted, so that the parts of one chunk stand together.
            chunks[namespace] += name.chunk_hash != last
            last = name.chunk_hash
    return Listing(
        [
            NamespaceUse(name, await _label(store, name), chunks[name], stored_bytes[name])
            for name in sorted(chunks)
        ],
        other,
    )


async def _label(store: Store, name: str) -> str:
    try:
        label = (await namespace_facts(store, name)).get("label")
    except (NotFound, Corrupt):
        return "?"
    return label if isinstance(label, str) else "?"


# ---- what a namespace is


async def namespace_facts(store: Store, name: str) -> Mapping[str, Any]:
    """The facts in a namespace's document. Raises NotFound, Corrupt, and what stores raise."""
    if "/" in name or not name:
        raise Misconfigured(
            f"{name!r} is not the name of a namespace.", "`objectcache ls` shows the names."
        )
    key = f"{name}/{keys.NAMESPACE_FILE}"
    try:
        size = await store.head(key)
    except NotFound:
        raise NotFound(
            f"there is no {key} in {store.name}.",
            "`objectcache ls` shows the names. An engine writes this document when it starts.",
        ) from None
    if size > NAMESPACE_DOCUMENT_BYTES_MAX:
        raise Corrupt(f"{key} has {size} bytes: no namespace document is so large.")
    document = bytearray(size)
    await store.read(key, memoryview(document))
    namespace = Namespace.from_json(bytes(document))
    if namespace.name != name:
        raise Corrupt(f"{key} describes another namespace, {namespace.name}.")
    return namespace.facts


def flat(facts: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Facts as (path, value in JSON), sorted: `("model.config.hidden_size", "4096")`."""
    if isinstance(facts, Mapping) and facts:
        for name in sorted(facts):
            yield from flat(facts[name], f"{path}.{name}" if path else name)
    elif isinstance(facts, list) and any(isinstance(item, (Mapping, list)) for item in facts):
        for index, item in enumerate(facts):
            yield from flat(item, f"{path}[{index}]")
    else:
        yield path, json.dumps(facts)


@dataclass(frozen=True)
class Difference:
    """A fact that differs; None where one side does not have it."""

    path: str
    left: str | None
    right: str | None


def differences(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[Difference]:
    """Which facts make two namespaces two, by path."""
    ours, theirs = dict(flat(left)), dict(flat(right))
    return [
        Difference(path, ours.get(path), theirs.get(path))
        for path in sorted(ours.keys() | theirs.keys())
        if ours.get(path) != theirs.get(path)
    ]
