"""What the wire gives, in the few numbers that cross from who moves bytes to who decides: joined over movers and ranks, and told only when they are news. Not how it is measured: see flow.py.

Pure. A Wire exists once something was read; before that nothing is known.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from objectcache.flow import StoreModel

NEWS = 1.15  # times what was told before, or less by as much


class Wire(NamedTuple):
    """What one client measured of its store, and how many of its requests may have bodies on their way."""

    store: StoreModel
    connections: int

    @property
    def bytes_per_s(self) -> float:
        """With all connections in use."""
        store = self.store
        return min(store.wire_bytes_per_s, self.connections * store.connection_bytes_per_s)


def together(parts: Sequence[Wire | None]) -> Wire | None:
    """Movers that each bring a part of every prefix: they add up, and the slowest first byte counts.
    One that has read nothing yet is taken to be like the others."""
    known = [part for part in parts if part is not None]
    if not known:
        return None
    more = len(parts) / len(known)
    store = _worst(known)
    wire_bytes_per_s = more * sum(part.store.wire_bytes_per_s for part in known)
    return Wire(
        replace(store, wire_bytes_per_s=wire_bytes_per_s),
        round(more * sum(part.connections for part in known)),
    )


def slowest(ranks: Sequence[Wire]) -> Wire | None:
    """Ranks that each bring their own part of every chunk: all wait for the slowest."""
    if not ranks:
        return None
    store = _worst(ranks)
    least = min(rank.store.wire_bytes_per_s for rank in ranks)
    return Wire(replace(store, wire_bytes_per_s=least), min(rank.connections for rank in ranks))


def is_news(told: Wire | None, now: Wire | None) -> bool:
    """Whether `now` differs noticeably from what was told last."""
    if now is None or told is None:
        return now is not None
    pairs = zip(_numbers(told), _numbers(now), strict=True)
    return any(not _alike(before, after) for before, after in pairs)


def _numbers(wire: Wire) -> tuple[float, ...]:
    return (*vars(wire.store).values(), wire.connections)


def _alike(before: float, after: float) -> bool:
    if math.isinf(before) or math.isinf(after) or before <= 0.0 or after <= 0.0:
        return before == after
    return 1 / NEWS <= after / before <= NEWS


def _worst(wires: Sequence[Wire]) -> StoreModel:
    """Of each of a connection's numbers the worst."""
    stores = [wire.store for wire in wires]
    return StoreModel(
        first_byte_s=max(store.first_byte_s for store in stores),
        first_byte_p99_s=max(store.first_byte_p99_s for store in stores),
        connection_bytes_per_s=min(store.connection_bytes_per_s for store in stores),
        requests_per_s=min(store.requests_per_s for store in stores),
    )
