"""How far one read of an object has come, and whether an answer fits what is missing: for all data paths to S3. No I/O."""

import re
from collections.abc import Callable

import numpy as np

from objectcache.errors import Corrupt

_LET_GO_BYTES = 32 << 10  # numpy copies without the GIL, which is worth its call from here on
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class Fill:
    """How far one read has come: `into[:have]` is final."""

    def __init__(
        self, into: memoryview, start: int | None, landed: Callable[[int], None] | None
    ) -> None:
        self.into = into
        self.start = start  # None: the whole object
        self.first = start or 0
        self.landed = landed
        self.have = 0
        self.etag = ""  # of the object that the first bytes came from

    @property
    def complete(self) -> bool:
        """Whether all has come; that nothing is wanted is not known before an answer."""
        return 0 < self.have == len(self.into)

    def range_header(self) -> str | None:
        """`Range` of the GET for what is missing; None for a whole object."""
        if self.start is None and self.have == 0:
            return None
        return f"bytes={self.first + self.have}-{self.first + len(self.into) - 1}"

    def if_match_header(self) -> str | None:
        """`If-Match` of that GET: what goes on must be the same object."""
        return self.etag if self.have and self.etag else None

    def offset(self, status: int, content_range: str, length: int | None) -> int:
        """Bytes of the body to skip. Raises Corrupt if it cannot be, or end in, what is wanted.

        `length` is Content-Length, None if the server did not say.
        """
        if status == 206:
            return self._offset_in_part(content_range, length)
        # 200: the whole object, asked for or not. Some servers ignore Range.
        if length is not None:
            self._check_size(length)
        return self.first + self.have

    def _offset_in_part(self, content_range: str, length: int | None) -> int:
        match = _CONTENT_RANGE.fullmatch(content_range)
        if match is None or int(match[1]) != self.first + self.have:
            raise Corrupt(f"the server sent the range {content_range[:60]!r}, not what was asked.")
        if match[3] != "*":
            self._check_size(int(match[3]))
        if length is not None and length != len(self.into) - self.have:
            raise Corrupt(f"the server sent {length} bytes, not {len(self.into) - self.have}.")
        return 0

    def _check_size(self, size: int) -> None:
        if self.start is None and size != len(self.into):
            raise Corrupt(f"the object has {size} bytes, expected {len(self.into)}.")
        if self.first + len(self.into) > size:
            raise Corrupt(
                f"the object has {size} bytes; {self.first}+{len(self.into)} was asked for."
            )

    def take(self, chunk: memoryview) -> None:
        into = self.into[self.have : self.have + len(chunk)]
        if len(chunk) < _LET_GO_BYTES:
            into[:] = chunk
        else:
            np.copyto(np.frombuffer(into, np.uint8), np.frombuffer(chunk, np.uint8))
        self.have += len(chunk)
        if self.landed is not None:
            self.landed(self.have)
