"""A proxy that breaks S3 on demand, in front of any real server. The servers: benchmarks/servers.py.

    with FaultProxy(server.endpoint_url) as proxy:
        proxy.fault = Fault(status=503, code="SlowDown")  # every request from now on
        proxy.script.extend([None, cut(1000)])  # or: the next is fine, the one after is cut

It runs on a thread of its own. Requests go on as the client signed them (its Host header too), so
signatures stay valid with path-style addressing. Bodies are buffered: for tests, not for rates.
"""

import asyncio
import socket
import ssl
import struct
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

_HEAD_BYTES_MAX = 64 << 10
_UPSTREAM_S = 20.0


@dataclass(frozen=True)
class Request:
    """What a client asked. `path` has the query; header names are lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Fault:
    """What to do to one answer. The fields apply in this order; none set changes nothing."""

    delay_s: float = 0.0  # before anything is answered
    reset: bool = False  # TCP reset in place of an answer
    raw: bytes | None = None  # these bytes in place of an answer, then close
    status: int = 0  # this answer in place of the upstream's
    code: str = ""  # its S3 error code; "" for no body
    headers: Mapping[str, str] = field(default_factory=dict)  # set on the answer, "" removes
    text: str = ""  # inside <Error>, beside the code
    ignore_range: bool = False  # a 206 becomes a 200 with the whole object, zeros elsewhere
    flip: int | None = None  # invert the byte of the body at this offset
    keep: int | None = None  # only so many bytes of the body, with a Content-Length that fits
    extra: bytes = b""  # bytes behind the body
    count_extra: bool = True  # whether Content-Length knows of them
    chunked: bool = False  # chunked coding in place of Content-Length
    stop_after: int | None = None  # send so many bytes of the body, then do `stop`
    stop: str = "close"  # close, reset or stall
    bytes_per_s: int = 0  # send the body no faster


def cut(after: int, stop: str = "close") -> Fault:
    """The connection ends (`close`, `reset`) or falls silent (`stall`) inside the body."""
    return Fault(stop_after=after, stop=stop)


@dataclass
class _Answer:
    status: int
    reason: str
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str:
        return next((v for k, v in self.headers if k.lower() == name.lower()), "")

    def set(self, name: str, value: str) -> None:
        """Replace the header; "" removes it."""
        self.headers = [(k, v) for k, v in self.headers if k.lower() != name.lower()]
        if value:
            self.headers.append((name, value))


class FaultProxy:
    """`url` in front of `upstream_url`; with `tls` it speaks https."""

    def __init__(self, upstream_url: str, tls: ssl.SSLContext | None = None) -> None:
        upstream = urlsplit(upstream_url)
        self._upstream = (upstream.hostname or "127.0.0.1", upstream.port or 80)
        self._tls = tls
        self.fault: Fault | Callable[[Request], Fault | None] | None = None
        self.script: deque[Fault | None] = deque()  # for the next requests; then `fault` applies
        self.requests: list[Request] = []
        self.connections = 0
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy")
        self._server: asyncio.Server | None = None
        self._serving: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    def count(self, method: str = "") -> int:
        return sum(1 for request in self.requests if method in ("", request.method))

    def __enter__(self) -> "FaultProxy":
        self._thread.start()
        self.up()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.down()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def up(self) -> None:
        """Listen (again)."""
        self._call(self._listen())

    def down(self) -> None:
        """Refuse connections, and reset those there are, until `up`."""
        self._call(self._hang_up())

    def _call(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(
            self._serve, "127.0.0.1", self.port, ssl=self._tls, limit=_HEAD_BYTES_MAX
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def _hang_up(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        while self._serving:  # a cancellation may get lost between two exchanges
            for task in list(self._serving):
                task.cancel()
            await asyncio.wait(list(self._serving), timeout=0.1)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        try:
            while await self._exchange(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # the client went away
        except asyncio.CancelledError:
            _reset(writer)
        finally:
            self._serving.discard(task)
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request; whether the connection may go on."""
        head = await reader.readuntil(b"\r\n\r\n")
        line, *lines = head[:-4].decode("latin-1").split("\r\n")
        method, path, _ = line.split(" ", 2)
        headers = {k.strip().lower(): v.strip() for k, _, v in (x.partition(":") for x in lines)}
        if headers.get("expect", "").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        request = Request(method, path, headers, body)
        self.requests.append(request)
        fault = self.script.popleft() if self.script else self.fault
        if callable(fault):
            fault = fault(request)
        fault = fault or Fault()
        await asyncio.sleep(fault.delay_s)
        if fault.reset:
            _reset(writer)
            return False
        if fault.raw is not None:
            writer.write(fault.raw)
            await writer.drain()
            return False
        answer = (
            _made(fault)
            if fault.status
            else await asyncio.wait_for(_forwarded(self._upstream, head, body), _UPSTREAM_S)
        )
        _bend(answer, fault)
        return await _send(writer, answer, fault, method)


async def _forwarded(upstream: tuple[str, int], head: bytes, body: bytes) -> _Answer:
    line, *lines = head[:-4].split(b"\r\n")
    hop = (b"connection:", b"expect:")
    kept = [x for x in lines if not x.lower().startswith(hop)]
    reader, writer = await asyncio.open_connection(*upstream, limit=_HEAD_BYTES_MAX)
    try:
        writer.write(b"\r\n".join([line, *kept, b"Connection: close", b"", b""]) + body)
        await writer.drain()
        status_line, *rest = (
            (await reader.readuntil(b"\r\n\r\n"))[:-4].decode("latin-1").split("\r\n")
        )
        _, status, reason = (status_line + " ").split(" ", 2)
        pairs = [(k, v.strip()) for k, _, v in (x.partition(":") for x in rest)]
        headers = [(k, v) for k, v in pairs if k.lower() not in ("connection", "keep-alive")]
        answer = _Answer(int(status), reason.strip(), headers, b"")
        if line.startswith(b"HEAD ") or answer.status in (204, 304):
            return answer
        if answer.header("transfer-encoding").lower() == "chunked":
            answer.body = await _unchunked(reader)
            answer.set("Transfer-Encoding", "")
            answer.set("Content-Length", str(len(answer.body)))
        else:
            answer.body = await reader.readexactly(int(answer.header("content-length") or 0))
        return answer
    finally:
        writer.close()


async def _unchunked(reader: asyncio.StreamReader) -> bytes:
    body = b""
    while size := int((await reader.readline()).split(b";")[0], 16):
        body += await reader.readexactly(size)
        await reader.readline()
    return body


def _made(fault: Fault) -> _Answer:
    body = b""
    if fault.code:
        body = (
            '<?xml version="1.0" encoding="UTF-8"?><Error>'
            f"<Code>{fault.code}</Code><Message>scripted</Message>{fault.text}</Error>"
        ).encode()
    headers = [("Content-Length", str(len(body))), ("Content-Type", "application/xml")]
    return _Answer(fault.status, "Scripted", headers, body)


def _bend(answer: _Answer, fault: Fault) -> None:
    if fault.ignore_range and answer.status == 206:
        span, _, total = answer.header("content-range").removeprefix("bytes ").partition("/")
        first = int(span.split("-")[0])
        before = bytes(first)
        after = bytes(int(total) - first - len(answer.body))
        answer.status, answer.body = 200, before + answer.body + after
        answer.set("Content-Range", "")
        answer.set("Content-Length", str(len(answer.body)))
    if fault.flip is not None and len(answer.body) > fault.flip:
        bent = bytearray(answer.body)
        bent[fault.flip] ^= 0xFF
        answer.body = bytes(bent)
    if fault.keep is not None:
        answer.body = answer.body[: fault.keep]
        answer.set("Content-Length", str(len(answer.body)))
    if fault.extra:
        answer.body += fault.extra
        if fault.count_extra:
            answer.set("Content-Length", str(len(answer.body)))
    if fault.chunked:
        answer.set("Content-Length", "")
        answer.set("Transfer-Encoding", "chunked")
    for name, value in fault.headers.items():
        answer.set(name, value)


async def _send(writer: asyncio.StreamWriter, answer: _Answer, fault: Fault, method: str) -> bool:
    lines = [f"HTTP/1.1 {answer.status} {answer.reason}", *(f"{k}: {v}" for k, v in answer.headers)]
    writer.write(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
    body = answer.body if method != "HEAD" else b""
    if fault.chunked:
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    stopped = fault.stop_after is not None and len(body) > fault.stop_after
    if stopped:
        body = body[: fault.stop_after]
    if fault.bytes_per_s:
        piece = max(1, fault.bytes_per_s // 20)
        for at in range(0, len(body), piece):
            writer.write(body[at : at + piece])
            await writer.drain()
            await asyncio.sleep(piece / fault.bytes_per_s)
    else:
        writer.write(body)
    await writer.drain()
    if not stopped:
        return True
    if fault.stop == "stall":
        await asyncio.sleep(3600)  # until the client gives up: its close or `down` ends this
    await asyncio.sleep(0.05)  # let what was sent arrive: a reset may overtake it
    if fault.stop == "reset":
        _reset(writer)
    return False


def _reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    if sock is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
