"""How often a request to S3 is tried, and how long is waited in between: one meaning for all data paths. What a failure means: see s3_errors.py."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from objectcache.config import Options
from objectcache.stores.gate import Gate
from objectcache.stores.s3_errors import RETRY_AFTER_MAX_S, Verdict

T = TypeVar("T")

SLOWEST_BYTES_PER_S = 1 << 20  # a body may take this long on top of the timeouts, no longer
_PAUSE_S = 0.05  # mean of the first pause is half of it; doubles with each attempt
_THROTTLED_PAUSE_S = 0.25


class Failed(Exception):
    """One attempt failed; what to do is in the verdict. Never leaves the data path."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.error.message)
        self.verdict = verdict


class Attempts:
    """The loop of attempts. Clients' own retries are off, so that counters and limits mean one thing."""

    def __init__(self, options: Options, gate: Gate) -> None:
        self._most = options.attempts
        self._gate = gate
        self.silence_s = (options.connect_timeout_ms + options.read_timeout_ms) / 1000

    def limit_s(self, body_bytes: int) -> float:
        """Longest time for one attempt with a body of this size."""
        return self.silence_s + body_bytes / SLOWEST_BYTES_PER_S

    async def run(self, body_bytes: int, once: Callable[[float], Awaitable[T]]) -> T:
        """Run `once(until)` until it does, or attempts or time are used up. `until`: loop time.

        `once` raises Failed for what may be worth another try. Raises the verdict's error.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + self._most * self.silence_s + body_bytes / SLOWEST_BYTES_PER_S
        for attempt in range(1, self._most + 1):
            try:
                return await once(until)
            except Failed as failed:
                verdict = failed.verdict
                if verdict.throttled:
                    self._gate.throttled()
                elif verdict.retry:
                    self._gate.failed()
                pause_s = _pause_s(attempt, verdict)
                if (
                    not verdict.retry
                    or attempt == self._most
                    or verdict.retry_after_s > RETRY_AFTER_MAX_S
                    or loop.time() + pause_s >= until
                ):
                    raise verdict.error from None  # the cause may quote headers
            await asyncio.sleep(pause_s)
        raise AssertionError("unreachable: the last attempt returns or raises")


def _pause_s(attempt: int, verdict: Verdict) -> float:
    base_s = _THROTTLED_PAUSE_S if verdict.throttled else _PAUSE_S
    return max(random.random() * base_s * 2.0 ** (attempt - 1), verdict.retry_after_s)
