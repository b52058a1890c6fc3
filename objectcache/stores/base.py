"""What any store must do. Not how one is chosen from a URL: see stores/__init__.py.

A store maps keys (see `check_key`) to immutable objects. All calls are coroutines of one
asyncio loop; a store may be used from that loop only. Every call ends in bounded time, by its
answer or by one of the errors of `objectcache.errors`; retries happen inside.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from operator import add, attrgetter

from objectcache.errors import Misconfigured
from objectcache.flow import StoreModel
from objectcache.order import Turns

KEY_BYTES_MAX = 900  # S3 allows 1024 with the prefix of the store
_SEGMENT = r"(?!\.)[!-.0-\[\]-~]+"  # printable ASCII but space and backslash; no leading dot
_KEY = re.compile(rf"{_SEGMENT}(/{_SEGMENT})*")


@dataclass
class StoreCounters:
    """What a store asked of its server and moved, for metrics and for the bill. Retries count."""

    get_requests: int = 0
    put_requests: int = 0
    head_requests: int = 0
    list_requests: int = 0
    delete_requests: int = 0
    read_bytes: int = 0  # body bytes received, whether they were of use or not
    written_bytes: int = 0  # body bytes sent, duplicates that the server then refused included
    handed_over: int = 0  # requests that a faster data path left to the library path
    hedged_requests: int = 0  # GETs sent because another one was late; among get_requests
    hedges_won: int = 0  # those that were answered before the late one

    def __add__(self, other: "StoreCounters") -> "StoreCounters":
        """What both asked and moved. A worker sums up several in each step."""
        return StoreCounters(*map(add, _COUNTS(self), _COUNTS(other)))


_COUNTS = attrgetter(*StoreCounters.__dataclass_fields__)


def check_key(key: str) -> None:
    """Raise Misconfigured unless every store can hold `key`.

    That is segments of printable ASCII (no space, no backslash, no leading dot), joined by single
    slashes. A key must not be a directory of another (`a` and `a/b`): files cannot do that.
    """
    if len(key) > KEY_BYTES_MAX or _KEY.fullmatch(key) is None:
        raise Misconfigured(f"{key[:80]!r} cannot be a key.")


@dataclass(frozen=True)
class Pace:
    """What a store was measured to give, and how many requests with bodies may be on their way."""

    model: StoreModel
    connections: int
    part_bytes: int | None = (
        None  # largest body that lands piece by piece; all of a larger one at once
    )


class Store(ABC):
    """An object store. `name` is its URL, safe to print (never a secret in it)."""

    name: str
    counters: StoreCounters

    async def open(self) -> None:  # noqa: B027  most stores have nothing to make ready
        """Make ready what the first call would have to wait for; asks the server nothing.

        Not needed before other calls. Raises as they do if nothing can be made ready.
        """

    def pace(self) -> Pace | None:
        """For plans; None if it makes no difference how an object is cut. On the loop."""
        return None

    @abstractmethod
    async def head(self, key: str) -> int:
        """Size of the object in bytes. Raises NotFound, Denied, Unavailable."""

    @abstractmethod
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
        """Fill `into` with bytes of the object, in order.

        With `start`, the range [start, start + len(into)); without, the whole object, which must be
        len(into) bytes long: any other length raises Corrupt, before or after the body is read.
        `landed(n)` says that into[:n] is final, n never falling: soon after each of the `marks`
        (rising offsets in `into`, where the caller has use for the news) is passed, perhaps more
        often; the last call has n == len(into). It may come from any thread, never from two at
        once for one read, and never after the read ended. Several reads with as many marks are
        served so that none gets far ahead of the others. `turns` says which jobs want it, and with that
        when its request goes; without, requests go in order of arrival. If a retry happens it goes on where the body stopped or starts
        over, but bytes that `landed` announced are not written again. An exception from `landed`
        ends the read and is passed on. Once the call ended, in whatever way, cancelled too,
        nothing writes to `into` any more.
        Raises NotFound, Corrupt (length, range outside the object), Denied, Unavailable.
        """

    @abstractmethod
    async def write(self, key: str, body: memoryview) -> bool:
        """Store the object unless the key exists already (If-None-Match: *).

        True if it was created, False if it was there before; an object is never seen in part and
        never replaced. `body` must not change until the call ends. Raises Denied, Unavailable.
        """

    @abstractmethod
    async def delete(self, key: str) -> None:
        """Remove the object; removing what is not there is no error."""

    @abstractmethod
    def list(self, prefix: str) -> AsyncIterator[tuple[str, int]]:
        """All (key, size in bytes) whose key starts with `prefix`, in key order."""

    @abstractmethod
    async def check(self) -> None:
        """Ask once whether this store can be used at all.

        Raises Denied (credentials, permissions), Unavailable (unreachable), Misconfigured (no such
        bucket, wrong region), each with a hint for the operator.
        """

    @abstractmethod
    async def close(self) -> None:
        """Give back connections and files. The store is not usable afterwards. Idempotent."""
