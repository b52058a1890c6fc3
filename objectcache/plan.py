"""Which byte ranges of which chunks to GET, in which order, on how many connections. Not how the store is measured: see flow.py.

Pure. A plan cuts all chunks into the same groups of layers and asks for group after group, each for
all chunks in prefix order: the layers come in the order in which they are computed. One group is
the whole object. Which cut is best is computed for each from the model of the store:

    a request is billed and waits for its first byte, so few are better;
    a connection has a rate of its own, so with few chunks more requests than chunks are faster;
    what does not fit on the connections comes later, so with many chunks smaller groups bring
    the first layers of all of them sooner.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import NormalDist
from typing import NamedTuple

from objectcache.flow import StoreModel
from objectcache.format import ObjectLayout

SPARE = 1.25  # connections beyond those that fill the wire: some wait for a first byte
_NORMAL = NormalDist()
_P99 = _NORMAL.inv_cdf(0.99)


class Fetch(NamedTuple):
    """One GET: layers [first, last) of one chunk, the header with layer 0. See ObjectLayout.span."""

    chunk: int
    first: int
    last: int


@dataclass(frozen=True)
class Limits:
    """`requests` bounds what is spent on splitting: one for each chunk there always are."""

    connections: int
    requests: int = 1 << 62
    in_flight_bytes: int | None = None  # for data paths that hold a body outside of its slot


@dataclass(frozen=True)
class Prices:
    """What a second is worth, to weigh it against requests: 3.60 USD for an hour of a GPU."""

    request_usd: float = 0.4e-6  # a GET of S3 Standard
    second_usd: float = 1e-3

    def seconds(self, requests: int) -> float:
        return requests * self.request_usd / self.second_usd


@dataclass(frozen=True)
class Times:
    """When each layer of all chunks should be there, in seconds from the first request."""

    ready_s: tuple[float, ...]

    @property
    def first_layer_s(self) -> float:
        return self.ready_s[0]

    @property
    def done_s(self) -> float:
        return self.ready_s[-1]

    def computed_s(self, layer_s: float) -> float:
        """When the last layer is computed, if none has to wait once the first began."""
        layers = len(self.ready_s)
        return max(ready + (layers - i) * layer_s for i, ready in enumerate(self.ready_s))


@dataclass(frozen=True)
class Plan:
    """`fetches` in the order to issue, at most `connections` of them at once."""

    chunks: int
    groups: tuple[tuple[int, int], ...]  # layers [first, last)
    connections: int
    times: Times

    @property
    def requests(self) -> int:
        return self.chunks * len(self.groups)

    def fetches(self) -> Iterator[Fetch]:
        for first, last in self.groups:
            for chunk in range(self.chunks):
                yield Fetch(chunk, first, last)

    def __str__(self) -> str:
        first, last = self.groups[0]
        return (
            f"{self.chunks} chunks in {self.requests} requests ({len(self.groups)} each, the first "
            f"of {last - first} layers) on {self.connections} connections: first layer after "
            f"{self.times.first_layer_s * 1e3:.0f} ms, all after {self.times.done_s * 1e3:.0f} ms"
        )


def plan(
    chunks: int,
    layout: ObjectLayout,
    store: StoreModel,
    limits: Limits,
    prices: Prices = Prices(),  # noqa: B008 (frozen)
    layer_s: float | None = None,
) -> Plan:
    """The best cut for that many chunks, one at least.

    `layer_s` is the time to compute a layer, 0.0 if computing begins only when all is there. If it
    is not known, computing is taken to be as fast as the wire: then every layer counts alike.
    """
    if layer_s is None:
        ways = min(limits.connections * store.connection_bytes_per_s, store.wire_bytes_per_s)
        layer_s = chunks * layout.object_bytes / ways / len(layout.slice_bytes)
    best: tuple[float, Plan] | None = None
    for groups in _cuts(len(layout.slice_bytes)):
        requests = chunks * len(groups)
        if requests > max(limits.requests, chunks):
            continue
        for connections in _widths(requests, _bytes(layout, groups), store, limits):
            times = modelled(chunks, layout, groups, connections, store)
            cost_s = times.computed_s(layer_s) + prices.seconds(requests)
            if best is None or cost_s < best[0]:
                best = (cost_s, Plan(chunks, groups, connections, times))
    if best is None:
        raise ValueError("not even one layer may be in flight")
    return best[1]


def _cuts(layers: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """Ways to cut: groups that double from one size to another, and go on with that. Fewest first."""
    sizes = [1 << i for i in range(layers.bit_length()) if 1 << i < layers]
    yield ((0, layers),)
    for largest in reversed(sizes):
        for smallest in reversed([size for size in sizes if size <= largest]):
            groups, first, size = [], 0, smallest
            while first < layers:
                groups.append((first, min(first + size, layers)))
                first, size = first + size, min(2 * size, largest)
            yield tuple(groups)


def _bytes(layout: ObjectLayout, groups: Sequence[tuple[int, int]]) -> list[int]:
    spans = (layout.span(first, last) for first, last in groups)
    return [span.stop - span.start for span in spans]


def _widths(
    requests: int, sizes: list[int], store: StoreModel, limits: Limits
) -> Iterator[int]:
    """Numbers of connections to consider: all that may be, and those that the wire has use for.
    More are no faster, and bytes of later groups then take their share of the wire."""
    most = min(limits.connections, requests)
    if limits.in_flight_bytes is not None:
        most = min(most, limits.in_flight_bytes // max(sizes))
    if most < 1:
        return
    yield most
    one_s = _mean_s(store) + min(sizes) / store.connection_bytes_per_s
    use = SPARE * store.wire_bytes_per_s * one_s / min(sizes)
    if use < most:
        yield math.ceil(use)


# -- the model -----------------------------------------------------------------------------------


def modelled(
    chunks: int,
    layout: ObjectLayout,
    groups: Sequence[tuple[int, int]],
    connections: int,
    store: StoreModel,
) -> Times:
    """When each layer of all chunks is there if `groups` are asked for in order.

    Requests go in waves, one for each connection. A wave takes the mean time to the first byte and
    what its bodies take at the rate of their connections, or what the wire takes for all of them.
    The last first byte of a wave comes later than the mean one: so does the layer that it brings.
    """
    sizes = _bytes(layout, groups)
    before = [0, *accumulate(sizes)]  # bytes of a chunk in earlier groups
    requests = chunks * len(groups)
    waves = _Waves(chunks, before, connections, store)
    done_s = 0.0
    ready_s: list[float] = []
    for number, (first, last) in enumerate(groups):
        begins_s, lasts_s, mean_bytes, width = waves.of((number + 1) * chunks - 1)
        late_s = max(_mean_s(store), _latest_s(store, min(chunks, width)))
        flowing_s = lasts_s - _mean_s(store)
        # Whoever is late has the whole wire at the end.
        end_s = begins_s + late_s + sizes[number] / store.connection_bytes_per_s
        done_s = max(done_s, begins_s + lasts_s, end_s)
        for layer in range(first, last):
            share = (layout.span(0, layer + 1).stop - before[number]) / mean_bytes
            ready_s.append(begins_s + late_s + share * flowing_s)
    del requests
    return Times(tuple(min(ready, done_s) for ready in ready_s[:-1]) + (done_s,))
