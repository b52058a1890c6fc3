"""What a server can give at all: many connections that read one object again and again into memory that nobody looks at. Real clients: clients.py."""

from __future__ import annotations

import socket
import struct
import threading
import time

_BUFFER_BYTES = 256 << 10
_HEAD_END = b"\r\n\r\n"
_PATIENCE_S = 10.0


class _Reader(threading.Thread):
    """One connection. `counted` are body bytes so far."""

    def __init__(self, port: int, path: str) -> None:
        super().__init__(daemon=True)
        self._sock = socket.create_connection(("127.0.0.1", port), _PATIENCE_S)
        # Blocking, so that a whole buffer is received at once, without the interpreter; but not for ever.
        self._sock.settimeout(None)
        limit = struct.pack("@ll", int(_PATIENCE_S), 0)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        self._request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
        self.counted, self.over, self.failed = 0, False, ""

    def run(self) -> None:
        buffer = memoryview(bytearray(_BUFFER_BYTES))
        try:
            while not self.over:
                self._sock.sendall(self._request)
                left = self._begin(buffer)
                while left and not self.over:
                    count = self._sock.recv_into(buffer[:left], 0, socket.MSG_WAITALL)
                    if not count:
                        raise OSError("the connection ended")
                    left -= count
                    self.counted += count
        except OSError as error:
            self.failed = str(error)
        finally:
            self._sock.close()

    def _begin(self, buffer: memoryview) -> int:
        """Read the head; how much of the body is still to come."""
        had = b""
        while _HEAD_END not in had:
            count = self._sock.recv_into(buffer)
            if not count:
                raise OSError("the connection ended")
            had += bytes(buffer[:count])
        head, _, body = had.partition(_HEAD_END)
        lengths = [line for line in head.split(b"\r\n") if line.lower().startswith(b"content-le")]
        if not head.startswith(b"HTTP/1.1 200"):
            raise OSError("the object is not there")
        self.counted += len(body)
        return int(lengths[0].partition(b":")[2]) - len(body)


def rate_bytes_per_s(port: int, path: str, connections: int, seconds: float) -> float:
    """Body bytes per second, of all connections, between a fifth of that time and its end. Raises OSError."""
    readers = [_Reader(port, path) for _ in range(connections)]
    for reader in readers:
        reader.start()
    time.sleep(seconds / 5)
    began, before = time.monotonic(), sum(reader.counted for reader in readers)
    time.sleep(seconds * 4 / 5)
    passed_s, after = time.monotonic() - began, sum(reader.counted for reader in readers)
    for reader in readers:
        reader.over = True
    for reader in readers:
        reader.join(_PATIENCE_S)
    failed = next((reader.failed for reader in readers if reader.failed), "")
    if failed:
        raise OSError(failed)
    return (after - before) / passed_s
