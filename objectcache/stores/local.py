"""A directory as a store: `file:///path`. What any store must do: see base.py.

An object is a file named by its key. It is written under `.partial/` and then linked to its name,
which is atomic and fails if the name is taken. Nothing is fsynced: after a power cut an object may
hold garbage, which its own checksums find. All file calls run in a small pool of threads, in
pieces, so that the loop never blocks; a cancelled call waits for its present piece, because a
thread may still touch the caller's memory.
"""

import asyncio
import contextlib
import errno
import fcntl
import os
import stat
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from objectcache.errors import (
    Corrupt,
    Denied,
    Misconfigured,
    NotFound,
    ObjectCacheError,
    Unavailable,
)
from objectcache.order import Turns
from objectcache.stores.base import Store, StoreCounters, check_key
from objectcache.stores.outlast import outlast

_T = TypeVar("_T")
_PARTIAL = ".partial"  # no key has a segment with a leading dot
_PIECE_BYTES = 1 << 20  # of one read or write: what a cancelled call may have to wait for
_THREADS_MAX = 8
_STALE_S = 3600  # a partial file this old was left by a process that died
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class LocalStore(Store):
    """Objects as files below `root`. `link` is os.link, or what stands in for it in a test."""

    def __init__(
        self,
        root: Path,
        *,
        max_connections: int = 32,
        write: bool = True,
        link: Callable[[str, str], None] = os.link,
    ) -> None:
        self.name = f"file://{root}"
        self.counters = StoreCounters()
        self._root = str(root)
        self._partial = os.path.join(self._root, _PARTIAL)
        self._write = write
        self._link = link
        self._slots = asyncio.Semaphore(max_connections)  # open files
        self._pool = ThreadPoolExecutor(min(_THREADS_MAX, max_connections), "objectcache-file")
        self._swept = False
        self._closed = False

    async def head(self, key: str) -> int:
        self.counters.head_requests += 1
        path = self._path(key)
        return await self._run(f"HEAD {key}", lambda: _size(path))

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
        self.counters.get_requests += 1
        what, path, first = f"GET {key}", self._path(key), start or 0
        async with self._slots:
            file = _File()
            try:
                size = await self._run(what, lambda: file.open(path))
                if start is None and size != len(into):
                    raise Corrupt(f"{what}: {size} bytes, expected {len(into)}.")
                if first + len(into) > size:
                    raise Corrupt(f"{what}: {size} bytes; {first}+{len(into)} was asked for.")
                if not len(into) and landed is not None:
                    landed(0)
                have = 0
                while have < len(into):
                    piece = into[have : have + _PIECE_BYTES]
                    got = await self._run(what, file.reading(piece, first + have))
                    if not got:
                        raise Corrupt(f"{what}: the file was cut while it was read.")
                    have += got
                    self.counters.read_bytes += got
                    if landed is not None:
                        landed(have)
            finally:
                file.close()

    async def write(self, key: str, body: memoryview) -> bool:
        self.counters.put_requests += 1
        what, path, body = f"PUT {key}", self._path(key), body.cast("B")
        async with self._slots:
            if await self._run(what, lambda: os.path.lexists(path)):
                return False
            file, partial = _File(), os.path.join(self._partial, uuid.uuid4().hex)
            try:
                await self._run(what, self._sweep)
                await self._run(what, lambda: file.create(partial))
                at = 0
                while at < len(body):
                    put = await self._run(what, file.writing(body[at : at + _PIECE_BYTES]))
                    at += put
                    self.counters.written_bytes += put
                return await self._run(what, lambda: self._publish(file, partial, path))
            finally:
                self._discard(file, partial)

    async def delete(self, key: str) -> None:
        self.counters.delete_requests += 1
        path = self._path(key)
        await self._run(f"DELETE {key}", lambda: _remove(path))

    async def list(self, prefix: str) -> AsyncIterator[tuple[str, int]]:
        self.counters.list_requests += 1
        above = prefix.rpartition("/")[0]
        if above:
            check_key(above)
        walk = _walk(self._root, above, prefix)
        while (found := await self._run(f"LIST {prefix}", lambda: next(walk, None))) is not None:
            for entry in found:
                yield entry

    async def check(self) -> None:
        await self._run(f"check of {self.name}", self._try_out)

    async def close(self) -> None:
        self._closed = True
        self._pool.shutdown(wait=False)  # what runs, runs out; idle threads end at once

    # -- on the loop -----------------------------------------------------------------------------

    def _path(self, key: str) -> str:
        check_key(key)  # refuses `..`, an absolute path and our own `.partial`
        return os.path.join(self._root, key)

    async def _run(self, what: str, job: Callable[[], _T]) -> _T:
        """`job` on a thread. Once this returns or raises, the job runs no longer."""
        if self._closed:
            raise Unavailable(f"{self.name} is closed.")
        running = self._pool.submit(job)
        done = asyncio.wrap_future(running)
        try:
            return await asyncio.shield(done)
        except asyncio.CancelledError:
            if not running.cancel():
                await outlast(done)
            raise
        except OSError as exc:
            raise _translated(exc, what, self.name) from exc

    def _discard(self, file: "_File", partial: str) -> None:
        """Clear up behind a write, also a cancelled one, without keeping the loop."""
        try:
            self._pool.submit(file.remove, partial)
        except RuntimeError:  # the pool is shut
            file.remove(partial)

    # -- on a thread -----------------------------------------------------------------------------

    def _publish(self, file: "_File", partial: str, path: str) -> bool:
        file.close()
        for _ in range(2):
            try:
                self._link(partial, path)
                return True
            except FileExistsError:
                return False
            except FileNotFoundError:
                os.makedirs(os.path.dirname(path), exist_ok=True)
            except OSError as exc:
                if exc.errno not in _NO_LINKS:
                    raise
                return self._publish_by_rename(partial, path)
        raise OSError(errno.ESTALE, "the directory of the object vanishes")

    def _publish_by_rename(self, partial: str, path: str) -> bool:
        """For file systems without hard links: a lock keeps other writers of this store away."""
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(os.path.join(self._partial, "lock"), "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if os.path.lexists(path):
                return False
            os.rename(partial, path)
            return True

    def _sweep(self) -> None:
        """Once in a store's life: make the room for partial files, and clear what died there."""
        if self._swept:
            return
        os.makedirs(self._partial, exist_ok=True)
        oldest = time.time() - _STALE_S
        with os.scandir(self._partial) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # another process sweeps as well
                    if entry.name != "lock" and entry.stat().st_mtime < oldest:
                        os.unlink(entry.path)
        self._swept = True

    def _try_out(self) -> None:
        if self._write:
            self._sweep()
            file, partial = _File(), os.path.join(self._partial, uuid.uuid4().hex)
            try:
                file.create(partial)
            finally:
                file.remove(partial)
        with os.scandir(self._root):
            pass


class _File:
    """A file descriptor that is closed once, whoever opened it and whenever."""

    def __init__(self) -> None:
        self.fd = -1

    def open(self, path: str) -> int:
        """Open for reading; the size in bytes."""
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return _file_size(path, os.fstat(self.fd))

    def create(self, path: str) -> None:
        self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def reading(self, into: memoryview, offset: int) -> Callable[[], int]:
        """The job that reads into `into` and returns how many bytes came."""
        return lambda: os.preadv(self.fd, [into], offset)

    def writing(self, body: memoryview) -> Callable[[], int]:
        return lambda: os.write(self.fd, body)

    def remove(self, path: str) -> None:
        self.close()
        _remove(path)

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def _walk(root: str, above: str, prefix: str) -> Iterator[list[tuple[str, int]]]:
    """Directory by directory, in the order of keys; a directory sorts as `name/`."""
    try:
        with os.scandir(os.path.join(root, above)) as entries:
            names = sorted(
                (e.name + "/" if e.is_dir(follow_symlinks=False) else e.name)
                for e in entries
                if not e.name.startswith(".")
            )
    except (FileNotFoundError, NotADirectoryError):
        return
    found: list[tuple[str, int]] = []
    for name in names:
        key = f"{above}/{name}" if above else name
        if name.endswith("/"):
            if key.startswith(prefix) or prefix.startswith(key):
                yield found
                found = []
                yield from _walk(root, key[:-1], prefix)
        elif key.startswith(prefix):
            try:
                found.append((key, os.stat(os.path.join(root, key)).st_size))
            except FileNotFoundError:  # deleted since
                continue
    yield found


def _size(path: str) -> int:
    return _file_size(path, os.stat(path))


def _file_size(path: str, status: os.stat_result) -> int:
    if not stat.S_ISREG(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "no object", path)
    return status.st_size


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
        os.unlink(path)


def _translated(exc: OSError, what: str, name: str) -> ObjectCacheError:
    if isinstance(exc, (FileNotFoundError, IsADirectoryError, NotADirectoryError)):
        if what.startswith(("GET", "HEAD")):
            return NotFound(f"{what}: not in {name}.")
        if isinstance(exc, NotADirectoryError):
            return Misconfigured(
                f"{what}: a part of the path of {name} is a file.", "correct the option 'url'."
            )
    if isinstance(exc, PermissionError) or exc.errno == errno.EROFS:
        return Denied(
            f"{what}: {name} may not be used ({os.strerror(exc.errno or 0)}).",
            "let the user of this process read and write there, or set 'save' to false.",
        )
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return Unavailable(f"{what}: {name} is full.", "free or add space.")
    return Unavailable(f"{what}: {os.strerror(exc.errno or 0)} in {name}.")
