"""What the inner rooms are tested with: small objects, and a store that fails as a test says. No tests here."""

import asyncio
import random
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from objectcache.errors import Corrupt, NotFound
from objectcache.format import ObjectLayout
from objectcache.loop import LoopThread
from objectcache.order import Turns
from objectcache.stores.base import Pace, Store
from objectcache.stores.memory import MemoryStore

LAYOUT = ObjectLayout(
    namespace_digest=bytes(range(32)),
    chunk_tokens=8,
    block_tokens=4,
    shard=1,
    shards=2,
    slice_bytes=(64, 96, 32),
)


def chunk_hash(number: int) -> bytes:
    """A name for chunk `number`, 32 bytes."""
    return number.to_bytes(4, "big") * 8


def sealed(number: int, layout: ObjectLayout = LAYOUT) -> bytes:
    """The object of chunk `number`, with pages that are random but always the same."""
    body = bytearray(layout.object_bytes)
    noise = random.Random(number)
    for layer in range(len(layout.slice_bytes)):
        body[layout.slice_of(layer)] = noise.randbytes(layout.slice_bytes[layer])
    layout.seal(memoryview(body), chunk_hash(number))
    return bytes(body)


def eventually(holds: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    """Whether `holds` becomes true in time."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True


@contextmanager
def loop_thread(name: str = "test-loop") -> Iterator[LoopThread]:
    """A loop whose thread must end with the test."""
    loop = LoopThread(name)
    try:
        yield loop
    finally:
        loop.stop(None, 2.0)
    assert name not in {thread.name for thread in threading.enumerate()}


@dataclass
class Script:
    """What befalls each call for one key, in this order."""

    landing: int = 0
    """So many bytes of a read arrive before what follows."""
    gate: threading.Event | None = None
    """The call waits until this is set."""
    error: Exception | None = None
    """The call ends in this."""
    stops: bool = False
    """The read ends as if it were complete, and is not."""
    flip: int | None = None
    """The byte at this offset arrives changed."""
    lingers_s: float = 0.0
    """A cancelled call takes so long to end; until then a read goes on to write."""
    times: int = 1 << 30
    """So many calls follow the script; later ones succeed."""


class ScriptedStore(Store):
    """A MemoryStore of its own where calls fail by script: `scripts[operation, key]`.

    `calls` lists (operation, key) in the order in which they began; `busy` counts calls under way.
    """

    def __init__(self, piece_bytes: int = 1000) -> None:
        self.inner = MemoryStore(uuid.uuid4().hex)
        self.name = self.inner.name
        self.counters = self.inner.counters
        self.scripts: dict[tuple[str, str], Script] = {}
        self.calls: list[tuple[str, str]] = []
        self.ranges: list[tuple[str, int]] = []  # (key, first byte) of each read, in their order
        self.paced: Pace | None = None
        self.busy = 0
        self.most_busy = 0
        self._piece_bytes = piece_bytes

    def put(self, key: str, body: bytes) -> None:
        """Lay an object down, whatever was there."""
        self.inner._objects[key] = body

    def body(self, key: str) -> bytes:
        """The object as it lies there now; KeyError if it does not."""
        return self.inner._objects[key]

    def script(self, operation: str, key: str, **what: object) -> Script:
        self.scripts[operation, key] = script = Script(**what)  # type: ignore[arg-type]
        return script

    async def head(self, key: str) -> int:
        async with self._called("head", key):
            return await self.inner.head(key)

    async def read(
        self,
        key: str,
        into: memoryview,
        *,
        start: int | None = None,
        marks: Sequence[int] = (),
        landed: Callable[[int], None] | None = None,
        turns: Turns | None = None,
    ) -> None:
        script = self.scripts.get(("read", key), Script())
        script = script if script.times > 0 else Script()
        self.ranges.append((key, start or 0))

        async def land(first: int, last: int) -> None:
            await self._land(key, into, start, first, last, landed)

        try:
            async with self._called("read", key, lambda n: land(0, n)):
                if script.stops:
                    return
                await land(min(script.landing, len(into)), len(into))
        except asyncio.CancelledError:
            until = time.monotonic() + script.lingers_s
            while time.monotonic() < until:
                into[:] = b"\xee" * len(into)
                await asyncio.sleep(0.001)
            raise

    def pace(self) -> Pace | None:
        return self.paced

    async def write(self, key: str, body: memoryview) -> bool:
        async with self._called("write", key):
            return await self.inner.write(key, body)

    async def delete(self, key: str) -> None:
        async with self._called("delete", key):
            await self.inner.delete(key)

    def list(self, prefix: str) -> AsyncIterator[tuple[str, int]]:
        return self.inner.list(prefix)

    async def check(self) -> None:
        await self.inner.check()

    async def close(self) -> None:
        await self.inner.close()

    def _called(
        self, operation: str, key: str, land: "Callable[[int], object] | None" = None
    ) -> "_Call":
        self.calls.append((operation, key))
        script = self.scripts.get((operation, key), Script())
        if script.times <= 0:
            script = self.scripts[operation, key] = Script()
        script.times -= 1
        return _Call(self, script, land)

    async def _land(
        self,
        key: str,
        into: memoryview,
        start: int | None,
        first: int,
        last: int,
        landed: Callable[[int], None] | None,
    ) -> None:
        objects = self.inner._open()
        if key not in objects:
            raise NotFound(f"{key} is not there.")
        body = bytearray(objects[key])
        if len(body) < (start or 0) + len(into) or (start is None and len(body) != len(into)):
            raise Corrupt(f"{key} has {len(body)} bytes, expected {len(into)}.")
        flip = self.scripts.get(("read", key), Script()).flip
        if flip is not None:
            body[flip] ^= 1
        body = body[start or 0 :]
        while first < last:
            end = min(first + self._piece_bytes, last)
            into[first:end] = body[first:end]
            first = end
            if landed is not None:
                landed(first)
            await asyncio.sleep(0)


class _Call:
    """One call under way: counted, then as its script says."""

    def __init__(self, store: ScriptedStore, script: Script, land: object) -> None:
        self._store = store
        self._script = script
        self._land = land

    async def __aenter__(self) -> None:
        self._store.busy += 1
        self._store.most_busy = max(self._store.most_busy, self._store.busy)
        try:
            await self._follow()
        except BaseException:
            self._store.busy -= 1
            raise

    async def _follow(self) -> None:
        script = self._script
        if script.landing and callable(self._land):
            await self._land(script.landing)
        while script.gate is not None and not script.gate.is_set():
            await asyncio.sleep(0.001)
        if script.error is not None:
            raise script.error

    async def __aexit__(self, *_: object) -> None:
        self._store.busy -= 1
