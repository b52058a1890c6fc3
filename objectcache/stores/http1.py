"""The head of one HTTP/1.1 answer: bytes in, status and the headers that matter out. Not its body; no I/O.

Strict where leniency could mistake bytes for an answer. Whoever meets NotHttp gives the connection up.
"""

import re
from dataclasses import dataclass

HEAD_BYTES_MAX = 32 << 10  # interim answers (1xx) included
_PREFIX = b"HTTP/1."
_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"
_HEAD = re.compile(
    rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: [^\x00\r\n]*+)?(?:\r\n" + _TOKEN + rb":[^\x00\r\n]*+)*+"
)
_WANTED = re.compile(
    rb"\r\n(content-length|content-range|etag|connection|retry-after|transfer-encoding):([^\r]*)",
    re.IGNORECASE,
)
_LENGTH = re.compile(r"[0-9]{1,15}")


class NotHttp(Exception):
    """These bytes are not the head of an HTTP/1.1 answer. Says why, and quotes nothing of them."""


@dataclass(slots=True)
class Head:
    """What an answer says of itself, and `rest`: what came behind the head, mostly of the body."""

    status: int
    length: int | None  # Content-Length; None if there is none that counts
    content_range: str
    etag: str
    retry_after: str
    coded: bool  # in a transfer coding: what comes is not just the body
    keep: bool  # the connection may carry another request
    rest: bytes


class HeadReader:
    """Feed it what arrives until it gives a Head. Use it for one answer."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._skipped = 0  # bytes of interim answers

    @property
    def begun(self) -> bool:
        """Whether any byte of an answer has come."""
        return bool(self._bytes) or self._skipped > 0

    def feed(self, data: "bytes | memoryview") -> Head | None:
        """Take bytes; None if the head is not complete. Raises NotHttp."""
        searched = max(0, len(self._bytes) - 3)
        self._bytes += data
        while True:
            if not self._bytes.startswith(_PREFIX[: len(self._bytes)]):
                raise NotHttp("it does not begin as HTTP/1.1 does")
            end = self._bytes.find(b"\r\n\r\n", searched)
            length = len(self._bytes) if end < 0 else end + 4
            if self._skipped + length > HEAD_BYTES_MAX:
                raise NotHttp(f"its head is longer than {HEAD_BYTES_MAX} bytes")
            if end < 0:
                return None
            head = _parsed(bytes(self._bytes[:end]), bytes(self._bytes[length:]))
            if head.status == 101:
                raise NotHttp("it changes the protocol")
            if head.status >= 200:
                return head
            del self._bytes[:length]
            self._skipped += length
            searched = 0


def _parsed(head: bytes, rest: bytes) -> Head:
    match = _HEAD.fullmatch(head)
    if match is None:
        raise NotHttp("one of its first lines is no status line or header")
    found: dict[bytes, str] = {}
    for name, value in _WANTED.findall(head):
        name, told = name.lower(), value.strip(b" \t").decode("latin-1")
        if name not in found:
            found[name] = told
        elif name != b"content-length":
            found[name] += f", {told}"
        elif told != found[name]:
            raise NotHttp("it has two lengths")
    length = found.get(b"content-length")
    if length is not None and _LENGTH.fullmatch(length) is None:
        raise NotHttp("its length is no number")
    coded = b"transfer-encoding" in found
    said = {word.strip() for word in found.get(b"connection", "").lower().split(",")}
    return Head(
        status=int(match[2]),
        length=None if length is None or coded else int(length),
        content_range=found.get(b"content-range", ""),
        etag=found.get(b"etag", ""),
        retry_after=found.get(b"retry-after", ""),
        coded=coded,
        keep=match[1] == b"1" and "close" not in said and "upgrade" not in said,
        rest=rest,
    )
