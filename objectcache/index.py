"""Which chunks of a prefix exist: what to ask in at most two rounds, and what is known without asking. Not the asking: see lookup.py.

Pure: no clock, no network. A prefix's chunks are written in order, so that existence is taken to be
monotone: if chunk k exists, so do those before it. Where that is wrong (a lifecycle rule, a dropped
upload) the read finds a hole and the prefix ends there; it never gives a wrong byte.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence

ALL_AT_ONCE = 16  # up to so many chunks are asked for in one round


def first_round(chunks: int) -> list[int]:
    """Positions to ask for first: all of a short prefix, about sqrt(chunks) of a long one."""
    if chunks <= ALL_AT_ONCE:
        return list(range(chunks))
    steps = math.isqrt(chunks - 1) + 1
    return sorted({0} | {(step + 1) * chunks // steps - 1 for step in range(steps)})


def second_round(chunks: int, answers: Mapping[int, bool]) -> list[int]:
    """Positions between the last one present and the first one absent; empty if the answer is known."""
    present, absent = _bounds(chunks, answers)
    return list(range(present + 1, absent))


def found(chunks: int, answers: Mapping[int, bool]) -> int:
    """How many leading chunks exist, given every answer."""
    return _bounds(chunks, answers)[1]


def _bounds(chunks: int, answers: Mapping[int, bool]) -> tuple[int, int]:
    """(last position present before the first absent one, first absent one)."""
    absent = min((at for at, exists in answers.items() if not exists), default=chunks)
    present = max((at for at, exists in answers.items() if exists and at < absent), default=-1)
    return present, absent


class KnownChunks:
    """Chunks seen to exist, for a while: at most `keys_max`, the longest unused go first."""

    def __init__(self, ttl_s: float, keys_max: int) -> None:
        self._ttl_s = ttl_s
        self._keys_max = keys_max
        self._expiry: OrderedDict[bytes, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._expiry)

    def add(self, chunk_hash: bytes, now: float) -> None:
        self._expiry[chunk_hash] = now + self._ttl_s
        self._expiry.move_to_end(chunk_hash)
        while len(self._expiry) > self._keys_max:
            self._expiry.popitem(last=False)

    def discard(self, chunk_hash: bytes) -> None:
        self._expiry.pop(chunk_hash, None)

    def clear(self) -> None:
        self._expiry.clear()

    def has(self, chunk_hash: bytes, now: float) -> bool:
        expiry = self._expiry.get(chunk_hash)
        if expiry is None:
            return False
        if expiry <= now:
            del self._expiry[chunk_hash]
            return False
        self._expiry.move_to_end(chunk_hash)
        return True

    def prefix(self, chunk_hashes: Sequence[bytes], now: float) -> int:
        """How many leading chunks are known to exist."""
        for count, chunk_hash in enumerate(chunk_hashes):
            if not self.has(chunk_hash, now):
                return count
        return len(chunk_hashes)
