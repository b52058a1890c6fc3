"""A store in this process's memory: `memory://name`, and the executable specification of `Store`.

Two stores of one name in one process see the same objects; nothing is shared between processes.
"""

import threading
from collections.abc import AsyncIterator, Callable, Sequence

from objectcache.errors import Corrupt, NotFound, Unavailable
from objectcache.order import Turns
from objectcache.stores.base import Store, StoreCounters, check_key

_spaces: dict[str, dict[str, bytes]] = {}
_spaces_lock = threading.Lock()


class MemoryStore(Store):
    """Objects in a dict, by name. Safe between the loops of one process."""

    def __init__(self, space: str) -> None:
        self.name = f"memory://{space}"
        self.counters = StoreCounters()
        with _spaces_lock:
            self._objects = _spaces.setdefault(space, {})
        self._closed = False

    def _open(self) -> dict[str, bytes]:
        if self._closed:
            raise Unavailable(f"{self.name} is closed.")
        return self._objects

    async def head(self, key: str) -> int:
        self.counters.head_requests += 1
        objects = self._open()
        if key not in objects:
            raise NotFound(f"{key} is not in {self.name}.")
        return len(objects[key])

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
        self.counters.get_requests += 1
        objects = self._open()
        if key not in objects:
            raise NotFound(f"{key} is not in {self.name}.")
        body = objects[key]
        if start is None and len(body) != len(into):
            raise Corrupt(f"{key} has {len(body)} bytes, expected {len(into)}.")
        first = start or 0
        if first + len(into) > len(body):
            raise Corrupt(f"{key} has {len(body)} bytes; {first}+{len(into)} was asked for.")
        into[:] = body[first : first + len(into)]
        self.counters.read_bytes += len(into)
        if landed is not None:
            landed(len(into))

    async def write(self, key: str, body: memoryview) -> bool:
        self.counters.put_requests += 1
        objects = self._open()
        check_key(key)
        copy = bytes(body)
        self.counters.written_bytes += len(copy)
        with _spaces_lock:
            return objects.setdefault(key, copy) is copy

    async def delete(self, key: str) -> None:
        self.counters.delete_requests += 1
        self._open().pop(key, None)

    async def list(self, prefix: str) -> AsyncIterator[tuple[str, int]]:
        self.counters.list_requests += 1
        for key in sorted(self._open()):
            if key.startswith(prefix):
                yield key, len(self._objects[key])

    async def check(self) -> None:
        self._open()

    async def close(self) -> None:
        self._closed = True
