"""Where receiving a body stops to tell what is there, and how much the kernel gathers meanwhile. Not the receiving: see receiver.py.

Pure.
"""

import functools

PIECE_BYTES = 1 << 20  # most that is received at once; also between two calls of `landed`
LOW_WATER_BYTES = 256 << 10  # what the kernel gathers before it wakes us


@functools.lru_cache(maxsize=64)  # the chunks of an engine have the same marks
def stops_of(marks: tuple[int, ...], size: int) -> tuple[int, ...]:
    """At marks, but for those that follow within LOW_WATER_BYTES of another, and in between so that no piece
    is much larger than PIECE_BYTES. The last is `size`. The first mark counts however little it is: of an
    object it is the header, which mostly comes with the head of the answer."""
    stops: list[int] = []
    last = 0
    for mark in (*marks, size):
        end = min(mark, size)
        gap = end - last
        if gap < LOW_WATER_BYTES and end < size:
            continue
        pieces = max(1, round(gap / PIECE_BYTES))
        stops.extend(last + gap * i // pieces for i in range(1, pieces + 1))
        if end == size:
            break
        last = end
    first = (marks[0],) if marks and marks[0] < stops[0] else ()
    return (*first, *stops)
