"""The way out: a ring slot that holds a chunk's pages becomes a sealed object in the store. Not which chunks: the scheduler half says so.

Behind the request: vLLM's blocks are free as soon as the pages were copied to the slot. The slot is free
when its outcome is told.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from objectcache.breaker import Breaker
from objectcache.errors import NotFound, ObjectCacheError, Unavailable
from objectcache.format import ObjectLayout
from objectcache.loop import LoopThread
from objectcache.stores.base import Store

SPOILT_MAX = 10_000


@dataclass(frozen=True)
class SaveResult:
    """Nothing reads the slot any more. `outcome` is as in messages.Saved, `error` why it is "failed"."""

    slot: int
    chunk_hash: bytes
    outcome: str
    error: ObjectCacheError | None = None


class Saver:
    """`saved` is called on the loop, once for each save."""

    def __init__(
        self,
        loop: LoopThread,
        store: Store,
        layout: ObjectLayout,
        slot_view: Callable[[int], memoryview],
        saved: Callable[[SaveResult], None],
    ) -> None:
        self._loop = loop
        self._store = store
        self._layout = layout
        self._slot_view = slot_view
        self._saved = saved
        self._breaker = Breaker()
        self._spoilt: OrderedDict[str, None] = OrderedDict()
        self._under_way: set[asyncio.Task[None]] = set()

    def spoilt(self, key: str) -> None:
        """The object at `key` is corrupt: the next save of it takes its place. On the loop."""
        self._spoilt[key] = None
        if len(self._spoilt) > SPOILT_MAX:
            self._spoilt.popitem(last=False)

    def save(self, key: str, chunk_hash: bytes, slot: int) -> None:
        """Seal and upload a slot whose pages are final. From any thread."""
        self._loop.call(self._start, key, chunk_hash, slot)

    async def drain(self) -> None:
        """Wait for all uploads under way. On the loop; the caller bounds it."""
        while self._under_way:
            await asyncio.wait(self._under_way)

    def _start(self, key: str, chunk_hash: bytes, slot: int) -> None:
        task = self._loop.spawn(self._upload(key, chunk_hash, slot))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def _write(self, key: str, chunk_hash: bytes, slot: int) -> str:
        if key in self._spoilt:
            await self._store.delete(key)
            self._spoilt.pop(key, None)  # another upload of it may have been faster
        elif await self._exists(key):
            # Since the lookup another engine may have computed the same prefix. A refused PUT has
            # sent its body in vain; to ask costs a twelfth of a PUT and no bytes.
            return "existed"
        view = self._slot_view(slot)[: self._layout.object_bytes]
        self._layout.seal(view, chunk_hash)
        return "written" if await self._store.write(key, view) else "existed"

    async def _exists(self, key: str) -> bool:
        try:
            await self._store.head(key)
        except NotFound:
            return False
        return True

    async def _upload(self, key: str, chunk_hash: bytes, slot: int) -> None:
        outcome, error = "failed", None
        try:
            if not self._breaker.allows(time.monotonic()):
                return  # the store is sick, and said so before
            outcome = await self._write(key, chunk_hash, slot)
            self._breaker.succeeded()
        except ObjectCacheError as failure:
            error = failure
            self._breaker.failed(time.monotonic())
        except asyncio.CancelledError:
            error = Unavailable("the engine stopped before the upload ended.")
            raise
        finally:
            self._saved(SaveResult(slot, chunk_hash, outcome, error))
