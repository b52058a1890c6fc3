"""The body of a PUT on its way into a file: whole or not at all. The server around it: s3_like.py."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path


def refusal(path: str, headers: Mapping[str, str]) -> int:
    """The status that says no to such an upload, 0 for none."""
    parts = path.strip("/").split("/")
    if not all(parts) or ".." in parts:
        return 405
    plain = "aws-chunked" not in headers.get("content-encoding", "")
    return 0 if plain and headers.get("content-length", "").isdigit() else 411


class Upload:
    """What is there already is never replaced: objects are immutable. `mark` tells uploads of one name apart."""

    def __init__(self, target: Path, headers: Mapping[str, str], mark: str) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        self._target, self._fresh = target, target.with_name(f".{target.name}.{mark}")
        self._fd = os.open(self._fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self.left = int(headers["content-length"])
        self._refused = headers.get("if-none-match") == "*" and target.exists()

    def receive(self, data: bytes) -> bytes:
        """Keep what is of this body; returns what is behind it. Raises OSError if there is no room."""
        mine, rest = data[: self.left], data[self.left :]
        if os.write(self._fd, mine) != len(mine):
            raise OSError("no room")
        self.left -= len(mine)
        return rest

    def end(self) -> int:
        """All of it is there: the status of the answer."""
        os.close(self._fd)
        if self._refused or self._target.exists():
            self._fresh.unlink()
        else:
            self._fresh.rename(self._target)
        return 412 if self._refused else 200

    def drop(self) -> None:
        """The rest will not come."""
        os.close(self._fd)
        with suppress(OSError):
            self._fresh.unlink()
