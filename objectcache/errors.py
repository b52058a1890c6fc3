"""The ways things fail, named by what the caller should do next. Not how they are reported: see report.py.

Nothing else may leave a room of this package. The connector turns `NotFound`, `Corrupt`,
`Unavailable` and `Denied` into "recompute"; only `Misconfigured` may stop an engine, at start-up.
"""


class ObjectCacheError(Exception):
    """Base of all. `hint` is what a user can do about it, one sentence, or ""."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} hint: {self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.message, self.hint)  # errors cross process boundaries


class NotFound(ObjectCacheError):
    """The object is not there: a miss. Compute instead."""


class Corrupt(ObjectCacheError):
    """The bytes are not what they must be: a miss, counted. Compute instead."""


class Unavailable(ObjectCacheError):
    """The store did not answer well or in time: compute now, ask again later."""


class Denied(ObjectCacheError):
    """The store refuses us: compute, and tell the operator."""


class Misconfigured(ObjectCacheError):
    """What the user asked for cannot work: refuse at start-up and say what to change."""
