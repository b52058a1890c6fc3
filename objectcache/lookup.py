"""Asks the store which chunks of a prefix exist, off the scheduler's thread. Not what to ask: see index.py."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from objectcache import index
from objectcache.errors import NotFound, ObjectCacheError, Unavailable
from objectcache.loop import LoopThread
from objectcache.stores.base import Store


@dataclass(frozen=True)
class LookupResult:
    """`chunks` leading chunks exist; where the store could not say so of all, `error` is why."""

    ticket: int
    chunks: int
    error: ObjectCacheError | None


class Lookup:
    """Results wait in a list until `poll` takes them."""

    def __init__(self, loop: LoopThread, store: Store, timeout_s: float) -> None:
        self._loop = loop
        self._store = store
        self._timeout_s = timeout_s
        self._results: list[LookupResult] = []
        self._lock = threading.Lock()
        self._news = threading.Event()

    def submit(self, ticket: int, keys: Sequence[str]) -> None:
        """Find out how many leading `keys` exist. From any thread; never blocks."""
        names = list(keys)  # now: the caller may go on to change its list
        self._loop.call(lambda: self._loop.spawn(self._run(ticket, names)))

    def poll(self) -> list[LookupResult]:
        """Results since the last call. From any thread; does not block."""
        if not self._results:
            return []
        with self._lock:
            results, self._results = self._results, []
            self._news.clear()
        return results

    def wait(self, timeout_s: float) -> None:
        """Until there is a result, or that is over. Only for who has nothing better to do: it leaves the
        GIL to those who bring it."""
        self._news.wait(timeout_s)

    async def _run(self, ticket: int, keys: list[str]) -> None:
        chunks = 0
        error: ObjectCacheError | None = None
        try:
            async with asyncio.timeout(self._timeout_s):
                chunks = await search(len(keys), lambda at: self._exists(keys[at]))
        except TimeoutError:
            error = Unavailable(
                "the store did not answer in time.",
                "raise lookup_timeout_ms, or look at the store.",
            )
        except ObjectCacheError as failure:
            error = failure
        with self._lock:
            self._results.append(LookupResult(ticket, chunks, error))
            self._news.set()

    async def _exists(self, key: str) -> bool:
        try:
            await self._store.head(key)
        except NotFound:
            return False
        return True


async def search(chunks: int, exists: "Callable[[int], asyncio.Future[bool] | object]") -> int:
    """How many leading chunks exist, in at most two rounds of concurrent questions."""
    answers = await _ask(index.first_round(chunks), exists)
    answers |= await _ask(index.second_round(chunks, answers), exists)
    return index.found(chunks, answers)


async def _ask(positions: list[int], exists: Callable[[int], object]) -> dict[int, bool]:
    tasks = [asyncio.ensure_future(exists(at)) for at in positions]  # type: ignore[call-overload]
    try:
        return dict(zip(positions, await asyncio.gather(*tasks), strict=True))
    finally:
        for task in tasks:
            task.cancel()


async def check(store: Store, timeout_s: float) -> None:
    """Whether the store can be used at all. Raises as `Store.check` does, in time."""
    try:
        async with asyncio.timeout(timeout_s):
            await store.check()
    except TimeoutError:
        raise Unavailable(
            f"{store.name} did not answer in {timeout_s:.0f} s.", "is the address right?"
        ) from None
