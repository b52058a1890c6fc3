"""How a call that is cancelled waits for those who still use the caller's memory: for all stores."""

import asyncio
from typing import Any


async def outlast(done: "asyncio.Future[Any]") -> None:
    """Wait for `done` whatever happens: its thread uses memory that the caller wants back."""
    while not done.done():
        try:
            await asyncio.wait([done])
        except asyncio.CancelledError:
            continue
    if not done.cancelled():
        done.exception()  # seen
