"""How a failure is told to people: once, then now and then with a count. Not what failed: see errors.py."""

import logging
import time
from collections.abc import Callable

from objectcache.errors import ObjectCacheError

REPEAT_S = 60.0

log = logging.getLogger(
    "vllm.objectcache"
)  # below "vllm", the only logger that has a handler there


class Reporter:
    """Warns at the first failure of a kind, then at most once a minute with how many there were."""

    def __init__(
        self, logger: logging.Logger = log, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._log = logger
        self._clock = clock
        self._said: dict[str, tuple[float, int]] = {}

    def warn(self, doing: str, error: ObjectCacheError) -> None:
        """`doing` says what was tried: "look up chunks". One line, with the hint."""
        self._say(f"could not {doing}", error, "Prompts are computed instead.")

    def ignore(self, what: str, error: ObjectCacheError) -> None:
        """`what` of a request is as if it were not there."""
        self._say(f"ignores {what}", error, "")

    def _say(self, what: str, error: ObjectCacheError, then: str) -> None:
        kind = f"{what}/{type(error).__name__}"
        now = self._clock()
        last, silent = self._said.get(kind, (-REPEAT_S, 0))
        if now - last < REPEAT_S:
            self._said[kind] = (last, silent + 1)
            return
        self._said[kind] = (now, 0)
        more = f" ({silent} more since the last warning)" if silent else ""
        self._log.warning("objectcache %s: %s%s%s", what, error, f" {then}" * bool(then), more)
