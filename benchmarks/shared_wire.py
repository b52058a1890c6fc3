"""A wire of one rate that several processes share, each by the bodies it sends at that time; the rate may change while they send. Who sends what: s3_like.py.

What a process may send is a bucket of bytes that fills at its part of the rate. The processes see each
other's numbers of bodies, and the rate, in memory that they share.
"""

import mmap
import struct
import time
from collections.abc import Callable
from pathlib import Path

PIECE_BYTES = 256 << 10  # at most this for one body, then the others have their turn
BURST_S = 0.004  # how much of a process's part may be sent at once
_LOOK_S = 0.001  # between two looks at the others
_LONGEST_WAIT_S = 0.05  # before one asks again: the rate may have changed
_RATE, _BODIES = struct.Struct("<d"), struct.Struct("<Q")


class Wire:
    """The rate, in bytes per second, 0 for no limit, and the bodies of each process. In a file that all of them map."""

    def __init__(self, path: Path, processes: int) -> None:
        """Of a file that `make` made."""
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _RATE.size + processes * _BODIES.size)
        self._processes = processes

    @staticmethod
    def make(path: Path, processes: int, bytes_per_s: float) -> None:
        path.write_bytes(_RATE.pack(bytes_per_s) + bytes(processes * _BODIES.size))

    @property
    def bytes_per_s(self) -> float:
        rate: float = _RATE.unpack_from(self._memory, 0)[0]
        return rate

    @bytes_per_s.setter
    def bytes_per_s(self, rate: float) -> None:
        _RATE.pack_into(self._memory, 0, rate)

    def bodies(self, process: int, count: int) -> None:
        """A process sends so many now."""
        _BODIES.pack_into(self._memory, _RATE.size + process * _BODIES.size, count)

    def all_bodies(self) -> int:
        found = (
            _BODIES.unpack_from(self._memory, _RATE.size + one * _BODIES.size)[0]
            for one in range(self._processes)
        )
        return sum(found)


class Share:
    """What one process may send of it."""

    def __init__(
        self, wire: Wire, process: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._wire, self._process, self._clock = wire, process, clock
        self._bodies = 0
        self._bytes, self._filled_at, self._looked_at = 0.0, clock(), -1.0
        self._rate = 0.0

    @property
    def limits(self) -> bool:
        """Whether there is a limit."""
        return self._wire.bytes_per_s > 0

    def begins(self) -> None:
        self._bodies += 1
        self._wire.bodies(self._process, self._bodies)

    def ends(self) -> None:
        self._bodies -= 1
        self._wire.bodies(self._process, self._bodies)

    def take(self, most: int) -> int:
        """Bytes of a body that may be sent now, `most` at most; 0: none yet. What is not sent is given back."""
        self._fill()
        count = min(most, PIECE_BYTES)
        if self._bytes < count:
            return 0
        self._bytes -= count
        return count

    def give_back(self, count: int) -> None:
        self._bytes += count

    def wait_s(self) -> float:
        """Until a piece may be sent, or it is to be asked again."""
        if not self.limits:
            return 0.0
        self._fill()
        if not self._rate:
            return BURST_S
        return min(_LONGEST_WAIT_S, max(0.0, (PIECE_BYTES - self._bytes) / self._rate))

    def _fill(self) -> None:
        now = self._clock()
        self._bytes += self._rate * (now - self._filled_at)
        self._filled_at = now
        if now - self._looked_at >= _LOOK_S:
            self._looked_at = now
            part = self._bodies / max(1, self._wire.all_bodies())
            self._rate = self._wire.bytes_per_s * part
        self._bytes = min(self._bytes, PIECE_BYTES + self._rate * BURST_S)
