"""A server as slow as S3: its first byte, its rate for each connection, its SlowDown. Fast ones: nginx.py, servers.py.

    python -m benchmarks.s3_like --objects DIR --port 9008     (or the class S3Like)

GET and HEAD of the files DIR/<bucket>/<key>, with ranges, If-Match and keep-alive; signatures are
ignored. With --writable also PUT, at once and with If-None-Match. Each answer waits for a time drawn from a lognormal law with the
given median and 99th percentile; the body then comes at the given rate, which the kernel keeps
(SO_MAX_PACING_RATE). Above `requests_per_s` an answer is 503 SlowDown at once. The listening port
is shared by several processes; so is the wire, whose rate all bodies together keep, and which
may be changed while it serves (shared_wire.py); the limit on requests is shared out among them, so it is exact only
for clients with many connections.
"""

import argparse
import email.utils
import heapq
import itertools
import math
import mmap
import os
import random
import resource
import selectors
import signal
import socket
import struct
import sys
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.servers import Process, Server, ServerError, die_with_parent, free_ports
from benchmarks.shared_wire import Share, Wire
from benchmarks.upload import Upload, refusal

FIRST_BYTE_P50_MS, FIRST_BYTE_P99_MS = 27.0, 114.0
BYTES_PER_S = 85_000_000  # of one connection
_SIGMAS_OF_P99 = 2.3263
_SO_MAX_PACING_RATE = 47  # Linux; Python has no name for it
_HEAD_BYTES_MAX = 64 << 10
_PIECE_BYTES = 1 << 20  # at most this for one connection, then the others have their turn
_BURST_S = 0.25  # how much of `requests_per_s` may come at once
_COUNTS = struct.Struct("<QQQ")
_START_LIMIT_S = 10.0
_SLOW_DOWN = (
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
_NO_KEY = b"<Error><Code>NoSuchKey</Code><Message>The key does not exist.</Message></Error>"


@dataclass(frozen=True)
class Counts:
    """Since the start: requests with an answer, body bytes, and how many requests got SlowDown."""

    requests: int
    sent_bytes: int
    throttled: int


def sigma(p50_ms: float, p99_ms: float) -> float:
    """The lognormal law's, from its median and 99th percentile."""
    return math.log(p99_ms / p50_ms) / _SIGMAS_OF_P99


class S3Like(Server):
    """The server in processes of its own."""

    def __init__(
        self, root: Path, bucket: str, objects: Path, processes: int, **law: float
    ) -> None:
        super().__init__(root, bucket)
        self._objects, self._processes, self._law = objects, processes, law
        self._process: Process | None = None

    def start(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        self.port = self.port or free_ports(1)[0]
        options = {
            "objects": self._objects,
            "port": self.port,
            "processes": self._processes,
            "counts": self._counts,
            "wire": self._wire_file,
            **self._law,
        }
        command = [sys.executable, "-m", "benchmarks.s3_like"]
        for name, value in options.items():
            flag = f"--{name.replace('_', '-')}"
            command += [flag] * bool(value) if isinstance(value, bool) else [flag, str(value)]
        package = str(Path(__file__).resolve().parent.parent)
        env = {"PATH": os.environ.get("PATH", ""), "PYTHONPATH": package}
        self._process = Process(command, self.root / "s3-like.log", env)
        until = time.monotonic() + _START_LIMIT_S
        while True:
            self._process.check()
            try:
                socket.create_connection(("127.0.0.1", self.port), 1.0).close()
                return
            except OSError as exc:
                if time.monotonic() > until:
                    raise ServerError(f"the S3-like server does not listen: {exc}") from exc
                time.sleep(0.05)

    def stop(self) -> None:
        if self._process is not None:
            self._process.stop(signal.SIGTERM)
            self._process = None

    @property
    def pid(self) -> int:
        """Of the parent of all its processes, which serves as well."""
        if self._process is None:
            raise ServerError("the S3-like server does not run.")
        return self._process.pid

    def counts(self) -> Counts:
        data = self._counts.read_bytes()
        rows = [_COUNTS.unpack_from(data, at) for at in range(0, len(data), _COUNTS.size)]
        return Counts(*(sum(column) for column in zip(*rows, strict=True)))

    def set_wire(self, bytes_per_s: float) -> None:
        """All bodies together come at this rate from now on; 0: no limit."""
        Wire(self._wire_file, self._processes).bytes_per_s = bytes_per_s

    @property
    def _wire_file(self) -> Path:
        return self.root / "wire"

    @property
    def _counts(self) -> Path:
        return self.root / "counts"


@dataclass(frozen=True)
class _Settings:
    objects: Path
    port: int
    p50_ms: float
    p99_ms: float
    bytes_per_s: int
    requests_per_s: float  # of one process; 0 for no limit
    writable: bool = False


@dataclass(frozen=True)
class _File:
    fd: int
    size: int
    etag: str
    modified: str


@dataclass
class _Connection:
    sock: socket.socket
    received: bytearray = field(default_factory=bytearray)
    busy: bool = False
    head: bytes = b""
    file: _File | None = None
    at: int = 0
    left: int = 0
    writing: bool = False
    sends: bool = False  # a body, in the sight of the wire
    upload: Upload | None = None


class _Worker:
    """One process: a loop over its connections. Answers of one connection never overlap."""

    def __init__(self, settings: _Settings, number: int, counts: memoryview, share: Share) -> None:
        self._settings, self._counts, self._share = settings, counts, share
        self._number, self._uploads = number, itertools.count()
        self._held: deque[_Connection] = deque()  # whose turn on the wire is to come
        self._requests = self._sent = self._throttled = 0
        self._chance = random.Random(number)
        self._sigma = sigma(settings.p50_ms, settings.p99_ms) if settings.p50_ms else 0.0
        self._selector = selectors.EpollSelector()
        self._due: list[tuple[float, int, _Connection]] = []
        self._order = 0
        self._files: dict[str, _File | None] = {}
        self._allowed, self._allowed_at = settings.requests_per_s * _BURST_S, time.monotonic()

    def run(self, listener: socket.socket) -> None:
        self._selector.register(listener, selectors.EVENT_READ, None)
        while True:
            now = time.monotonic()
            wait_s = max(0.0, self._due[0][0] - now) if self._due else None
            if self._held:
                wait_s = min(self._share.wait_s(), wait_s if wait_s is not None else math.inf)
            for key, events in self._selector.select(wait_s):
                connection: Any = key.data
                if connection is None:
                    self._accept(listener)
                    continue
                try:
                    if events & selectors.EVENT_WRITE:
                        self._write(connection)
                    if events & selectors.EVENT_READ:
                        self._read(connection)
                except OSError:
                    self._close(connection)
            now = time.monotonic()
            while self._due and self._due[0][0] <= now:
                self._go_on(heapq.heappop(self._due)[2])
            for _ in range(len(self._held)):
                if self._held and self._share.wait_s() == 0.0:
                    self._go_on(self._held.popleft())

    def _go_on(self, connection: _Connection) -> None:
        if connection.sock.fileno() >= 0:
            try:
                self._write(connection)
            except OSError:
                self._close(connection)

    def _accept(self, listener: socket.socket) -> None:
        with suppress(BlockingIOError):
            while True:
                sock, _ = listener.accept()
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self._settings.bytes_per_s:
                    rate = self._settings.bytes_per_s
                    sock.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, rate)
                self._selector.register(sock, selectors.EVENT_READ, _Connection(sock))

    def _close(self, connection: _Connection) -> None:
        with suppress(KeyError, ValueError):
            self._selector.unregister(connection.sock)
        connection.sock.close()
        self._sends(connection, False)
        if connection.upload is not None:
            connection.upload.drop()
            connection.upload = None

    def _sends(self, connection: _Connection, sends: bool) -> None:
        if sends != connection.sends:
            connection.sends = sends
            (self._share.begins if sends else self._share.ends)()

    def _read(self, connection: _Connection) -> None:
        if connection.sock.fileno() < 0:
            return
        try:
            most = _HEAD_BYTES_MAX if connection.upload is None else _PIECE_BYTES
            data = connection.sock.recv(most)
        except BlockingIOError:
            return
        if data and connection.upload is not None:
            self._receive(connection, connection.upload, data)
            return
        connection.received += data
        if not data or len(connection.received) > _HEAD_BYTES_MAX:
            self._close(connection)
            return
        self._next(connection)

    def _receive(self, connection: _Connection, upload: Upload, data: bytes) -> None:
        """Part of a body, and perhaps more behind."""
        connection.received += upload.receive(data)
        if not upload.left:
            connection.upload = None
            connection.head = _head(upload.end(), b"", 'ETag: "put"\r\n')
            self._count(1, 0)
            self._write(connection)

    def _begin_upload(self, connection: _Connection, path: str, headers: dict[str, str]) -> None:
        status = refusal(path, headers)
        if status:
            connection.head = _head(status, b"")
            self._write(connection)
            return
        target = self._settings.objects.joinpath(*path.strip("/").split("/"))
        mark = f"{self._number}-{next(self._uploads)}"
        connection.upload = Upload(target, headers, mark)
        if "100-continue" in headers.get("expect", "").lower():
            connection.sock.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        had, connection.received = bytes(connection.received), bytearray()
        self._receive(connection, connection.upload, had)

    def _next(self, connection: _Connection) -> None:
        """Begin to answer the request that was received, if it is whole."""
        end = connection.received.find(b"\r\n\r\n")
        if connection.busy or end < 0:
            return
        text = bytes(connection.received[:end]).decode("latin-1")
        del connection.received[: end + 4]
        connection.busy = True
        first, *lines = text.split("\r\n")
        method, _, rest = first.partition(" ")
        path = rest.split(" ")[0].split("?")[0]
        headers = {n.lower(): v.strip() for n, _, v in (line.partition(":") for line in lines)}
        if method == "PUT" and self._settings.writable:
            self._begin_upload(connection, path, headers)
            return
        delay_s = self._answer(connection, method, path, headers)
        self._count(1, 0)
        self._order += 1
        heapq.heappush(self._due, (time.monotonic() + delay_s, self._order, connection))

    def _answer(
        self, connection: _Connection, method: str, path: str, headers: dict[str, str]
    ) -> float:
        """Prepare the answer; after how many seconds it begins."""
        connection.file, connection.left = None, 0
        if not self._may():
            self._throttled += 1
            connection.head = _head(503, _SLOW_DOWN, "Retry-After: 1\r\n")
            return 0.0
        if method not in ("GET", "HEAD"):
            connection.head = _head(405, b"")
            return 0.0
        file = self._file(path)
        if file is None:
            connection.head = _head(404, b"" if method == "HEAD" else _NO_KEY)
        elif headers.get("if-match", file.etag) not in (file.etag, "*"):
            connection.head = _head(412, b"")
        else:
            self._body(connection, file, method, headers.get("range"))
        if not self._settings.p50_ms:
            return 0.0
        return self._settings.p50_ms / 1000 * math.exp(self._sigma * self._chance.gauss(0.0, 1.0))

    def _body(self, connection: _Connection, file: _File, method: str, asked: str | None) -> None:
        first, last, status, extra = 0, file.size - 1, 200, ""
        if asked is not None:
            begin, _, end = asked.removeprefix("bytes=").partition("-")
            first = int(begin) if begin else max(0, file.size - int(end))
            last = min(int(end), last) if begin and end else last
            if first > last:
                connection.head = _head(416, b"", f"Content-Range: bytes */{file.size}\r\n")
                return
            status, extra = 206, f"Content-Range: bytes {first}-{last}/{file.size}\r\n"
        extra += f"ETag: {file.etag}\r\nLast-Modified: {file.modified}\r\nAccept-Ranges: bytes\r\n"
        connection.head = _head(status, b"", extra, length=last - first + 1)
        if method == "GET":
            connection.file, connection.at, connection.left = file, first, last - first + 1

    def _write(self, connection: _Connection) -> None:
        if connection.sock.fileno() < 0:
            return
        if connection.head:
            more = socket.MSG_MORE if connection.left else 0
            try:
                sent = connection.sock.send(connection.head, more)
            except BlockingIOError:
                sent = 0
            connection.head = connection.head[sent:]
        waits = bool(connection.head)  # for the socket, not for the wire
        if not connection.head and connection.left:
            self._sends(connection, True)
            waits = self._send(connection)
        if waits != connection.writing:
            connection.writing = waits
            events = selectors.EVENT_WRITE if waits else selectors.EVENT_READ
            self._selector.modify(connection.sock, events, connection)
        if not connection.head and not connection.left:
            self._sends(connection, False)
            connection.busy = False
            self._next(connection)

    def _send(self, connection: _Connection) -> bool:
        """A piece of the body, or its turn on the wire is still to come; whether the socket has no room for more."""
        assert connection.file is not None
        limited = self._share.limits
        size = min(connection.left, _PIECE_BYTES)
        if limited:
            size = self._share.take(size)
        sent, full = 0, False
        if size:
            try:
                sent = os.sendfile(
                    connection.sock.fileno(), connection.file.fd, connection.at, size
                )
            except BlockingIOError:
                full = True
            connection.at += sent
            connection.left -= sent
            self._count(0, sent)
        if limited:
            self._share.give_back(size - sent)
            if connection.left and not full:
                self._held.append(connection)
            return full
        return connection.left > 0

    def _may(self) -> bool:
        """Whether a request more is within the limit."""
        rate = self._settings.requests_per_s
        if not rate:
            return True
        now = time.monotonic()
        self._allowed = min(
            max(1.0, rate * _BURST_S), self._allowed + (now - self._allowed_at) * rate
        )
        self._allowed_at = now
        if self._allowed < 1.0:
            return False
        self._allowed -= 1.0
        return True

    def _file(self, path: str) -> _File | None:
        if path not in self._files:
            found = self._opened(path)
            if found is None and self._settings.writable:
                return None  # it may come
            self._files[path] = found
        return self._files[path]

    def _opened(self, path: str) -> _File | None:
        parts = path.strip("/").split("/")
        if not all(parts) or ".." in parts:
            return None
        try:
            fd = os.open(self._settings.objects.joinpath(*parts), os.O_RDONLY)
        except OSError:
            return None
        found = os.fstat(fd)
        modified = email.utils.formatdate(found.st_mtime, usegmt=True)
        return _File(fd, found.st_size, f'"{found.st_mtime_ns:x}-{found.st_size:x}"', modified)

    def _count(self, requests: int, sent_bytes: int) -> None:
        self._requests += requests
        self._sent += sent_bytes
        _COUNTS.pack_into(self._counts, 0, self._requests, self._sent, self._throttled)


def _head(status: int, body: bytes, extra: str = "", length: int | None = None) -> bytes:
    reasons = {200: "OK", 206: "Partial Content", 404: "Not Found", 405: "Method Not Allowed"}
    reason = reasons.get(status, "Slow Down" if status == 503 else "Error")
    size = len(body) if length is None else length
    text = f"HTTP/1.1 {status} {reason}\r\nContent-Length: {size}\r\n{extra}"
    return f"{text}Connection: keep-alive\r\n\r\n".encode() + body


def _listener(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(4096)
    listener.setblocking(False)
    return listener


def main() -> None:
    """Serve until it is ended."""
    parser = argparse.ArgumentParser(description="A server as slow as S3.")
    parser.add_argument("--objects", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--counts", type=Path, required=True, help="file for the counters")
    parser.add_argument("--p50-ms", type=float, default=FIRST_BYTE_P50_MS, help="0: no delay")
    parser.add_argument("--p99-ms", type=float, default=FIRST_BYTE_P99_MS)
    parser.add_argument("--bytes-per-s", type=float, default=BYTES_PER_S, help="0: no limit")
    parser.add_argument("--requests-per-s", type=float, default=0.0, help="0: no limit")
    parser.add_argument("--wire", type=Path, required=True, help="file for the wire's rate")
    parser.add_argument("--wire-bytes-per-s", type=float, default=0.0, help="0: no limit")
    parser.add_argument("--writable", action="store_true", help="PUT is allowed")
    args = parser.parse_args()
    Wire.make(args.wire, args.processes, args.wire_bytes_per_s)
    args.counts.write_bytes(bytes(_COUNTS.size * args.processes))
    with args.counts.open("r+b") as file:
        counts = memoryview(mmap.mmap(file.fileno(), 0))
    listeners = [_listener(args.port) for _ in range(args.processes)]
    settings = _Settings(
        objects=args.objects,
        port=args.port,
        p50_ms=args.p50_ms,
        p99_ms=args.p99_ms,
        bytes_per_s=int(args.bytes_per_s),
        requests_per_s=args.requests_per_s / args.processes,
        writable=args.writable,
    )
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # one for each connection
    number = 0
    for number in range(1, args.processes):  # noqa: B007  the last one is this process
        if os.fork() == 0:
            die_with_parent()
            break
    else:
        number = 0
    for other, listener in enumerate(listeners):
        if other != number:
            listener.close()
    mine = counts[number * _COUNTS.size : (number + 1) * _COUNTS.size]
    share = Share(Wire(args.wire, args.processes), number)
    _Worker(settings, number, mine, share).run(listeners[number])


if __name__ == "__main__":
    main()
