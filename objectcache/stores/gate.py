"""How many requests to one S3 endpoint are in flight, whichever data path sends them. How many that should be: see flow.py."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Gate:
    """At most `most` requests at once. HEADs must not stand in line behind bulk: bodies may use all but an eighth."""

    def __init__(self, most: int) -> None:
        self._all = asyncio.Semaphore(most)
        self._bulk = asyncio.Semaphore(max(1, most - max(1, most // 8)))

    @asynccontextmanager
    async def slot(self, bulk: bool = False) -> AsyncIterator[None]:
        """Wait for room, hold it. On the loop."""
        if bulk:
            async with self._bulk, self._all:
                yield
        else:
            async with self._all:
                yield

    def arrived(self, body_bytes: int, seconds: float) -> None:
        """A body came in so many seconds, first byte included."""

    def throttled(self) -> None:
        """The server asked for fewer requests."""
