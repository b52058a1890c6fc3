"""When to stop asking a sick store, and when to try again. Not what counts as sick: callers say so.

Pure: events and `now` (seconds, any monotonic clock) in, answers out.
"""

FAILURES_TO_OPEN = 3
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0


class Breaker:
    """Closed until some failures in a row; then one trial after a pause that doubles up to a minute."""

    def __init__(self) -> None:
        self._failures = 0
        self._pause_s = FIRST_PAUSE_S
        self._open_until: float | None = None
        self._trial_until: float | None = None  # of the trial under way

    def allows(self, now: float) -> bool:
        """May a request go out now? While open, one trial is let through after each pause."""
        if self._open_until is None:
            return True
        if now < self._open_until or (self._trial_until is not None and now < self._trial_until):
            return False
        self._trial_until = (
            now + self._pause_s
        )  # a trial that never reports does not block for ever
        return True

    def is_open(self, now: float) -> bool:
        """Whether nothing but a trial may go out now. To ask takes no trial."""
        return self._open_until is not None and now < self._open_until

    def succeeded(self) -> None:
        self._failures = 0
        self._pause_s = FIRST_PAUSE_S
        self._open_until = self._trial_until = None

    def failed(self, now: float) -> None:
        self._failures += 1
        if self._open_until is not None:
            if self._trial_until is None:
                return  # sent before it opened: no news
            self._trial_until = None
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
            self._open_until = now + self._pause_s
        elif self._failures >= FAILURES_TO_OPEN:
            self._open_until = now + self._pause_s
