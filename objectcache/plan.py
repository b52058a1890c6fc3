"""Which byte ranges of which chunks to GET, in which order, on how many connections. Not how the store is measured: see flow.py.

Pure. A plan cuts all chunks into the same groups of layers and asks for group after group, each for
all chunks in prefix order: the layers come in the order in which they are computed. One group is
the whole object. Which cut is best follows from a model of the store:

    a request is billed and waits for its first byte, so few are better;
    a connection has a rate of its own, so with few chunks more requests than chunks are faster;
    what finds no connection comes later, so with many chunks smaller groups bring the first layers
    of all of them sooner.
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

Groups = tuple[tuple[int, int], ...]  # layers [first, last), all of them, in order


class Fetch(NamedTuple):
    """One GET: layers [first, last) of one chunk. Its bytes: ObjectLayout.span."""

    chunk: int
    first: int
    last: int


@dataclass(frozen=True)
class Limits:
    """What a plan may use."""

    connections: int
    requests: int = 1 << 62  # to split objects; one for each chunk is always allowed
    in_flight_bytes: int | None = None  # for a data path that holds bodies outside of their slots
    part_bytes: int | None = (
        None  # of one request, where layers fit: for a data path that has a body only whole
    )


@dataclass(frozen=True)
class Prices:
    """To weigh requests against time."""

    request_usd: float = 0.4e-6  # a GET of S3 Standard
    second_usd: float = 0.01  # a second until the first token, for who waits: 36 an hour
    # The client's own time for each, which no concurrency hides: measured on 16 cores, 256 chunks by
    # 4,096 requests came 1.5 s later than by 256.
    request_s: float = 0.0004

    def seconds(self, requests: int) -> float:
        return requests * (self.request_s + self.request_usd / self.second_usd)


@dataclass(frozen=True)
class Times:
    """When each layer, and all before it, should have come for all chunks, in seconds from the first request."""

    ready_s: tuple[float, ...]

    @property
    def first_layer_s(self) -> float:
        return self.ready_s[0]

    @property
    def done_s(self) -> float:
        return self.ready_s[-1]

    def computed_s(self, layer_s: float) -> float:
        """When the last layer is computed, if computing begins as late as it must to never wait."""
        layers = len(self.ready_s)
        return max(ready + (layers - i) * layer_s for i, ready in enumerate(self.ready_s))


@dataclass(frozen=True)
class Plan:
    """`fetches()` in the order to issue, at most `connections` of them at once."""

    chunks: int
    groups: Groups
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
        sizes = ", ".join(str(last - first) for first, last in self.groups)
        return (
            f"{self.chunks} chunks by {self.requests} requests (layers at a time: {sizes}) on "
            f"{self.connections} connections: first layer in {self.times.first_layer_s * 1e3:.0f} "
            f"ms, all in {self.times.done_s * 1e3:.0f} ms"
        )


def plan(
    chunks: int,
    layout: ObjectLayout,
    store: StoreModel,
    limits: Limits,
    prices: Prices = Prices(),
    layer_s: float | None = None,
) -> Plan:
    """The cut with the least modelled time and price, for one chunk or more.

    `layer_s` is the time to compute a layer; 0.0 if computing begins only when all is there. None:
    as long as the wire takes for one, so that no layer may come much after its turn. Raises
    ValueError if the limits leave no way.
    """
    if layer_s is None:
        rate = min(limits.connections * store.connection_bytes_per_s, store.wire_bytes_per_s)
        layer_s = chunks * layout.object_bytes / rate / len(layout.slice_bytes)
    best: tuple[float, Plan] | None = None
    for groups in _cuts(len(layout.slice_bytes)):
        requests = chunks * len(groups)
        if requests > max(limits.requests, chunks):
            continue
        if best is not None and best[0] <= prices.seconds(requests) + layer_s * len(
            layout.slice_bytes
        ):
            continue  # dearer even if all were there at once: modelling costs the client time, too
        if limits.part_bytes is not None and any(
            last - first > 1 and size > limits.part_bytes
            for (first, last), size in zip(groups, _sizes(layout, groups), strict=True)
        ):
            continue
        for connections in _widths(requests, _sizes(layout, groups), store, limits):
            times = modelled(chunks, layout, groups, connections, store)
            cost_s = times.computed_s(layer_s) + prices.seconds(requests)
            if best is None or cost_s < best[0]:
                best = cost_s, Plan(chunks, groups, connections, times)
    if best is None:
        raise ValueError(
            "the limits of a plan do not allow even one layer, or not as many requests"
        )
    return best[1]


def goes_whole(number: int) -> bool:
    """Whether the read with this number, of those that are better split, from 1, asks for whole objects.

    Only that shows what a connection has among few: else parts that share a full wire look like parts of a
    store with slow connections, and go on being asked for. The first, 4th, 16th, 64th and so on: where parts
    are right each costs its request as much as they gain.
    """
    return number & (number - 1) == 0 and number.bit_length() % 2 == 1


def _cuts(layers: int) -> Iterator[Groups]:
    """Whole objects, then groups that double from a smallest size to a largest one."""
    yield ((0, layers),)
    sizes = [1 << i for i in range(layers.bit_length()) if 1 << i < layers]
    for largest in reversed(sizes):
        for smallest in reversed([size for size in sizes if size <= largest]):
            groups, first, size = [], 0, smallest
            while first < layers:
                groups.append((first, min(first + size, layers)))
                first, size = first + size, min(2 * size, largest)
            yield tuple(groups)


def _sizes(layout: ObjectLayout, groups: Groups) -> list[int]:
    """Bytes of one request of each group."""
    spans = (layout.span(first, last) for first, last in groups)
    return [span.stop - span.start for span in spans]


def _widths(
    requests: int, sizes: Sequence[int], store: StoreModel, limits: Limits
) -> Iterator[int]:
    """Numbers of connections to consider: all, and what fills the wire. More than that are no
    faster, and later groups then take their share of the wire from the first."""
    most = min(limits.connections, requests)
    if limits.in_flight_bytes is not None:
        most = min(most, limits.in_flight_bytes // max(sizes))
    if most < 1:
        return
    yield most
    if len(sizes) > 1:
        small = min(sizes)
        fills = store.wire_bytes_per_s * (_mean_s(store) / small + 1 / store.connection_bytes_per_s)
        if SPARE * fills < most:
            yield math.ceil(SPARE * fills)


# -- the model -----------------------------------------------------------------------------------


def modelled(
    chunks: int, layout: ObjectLayout, groups: Groups, connections: int, store: StoreModel
) -> Times:
    """When each layer has come for all chunks, if `groups` are asked for in order. With one group
    and `connections` without end it is the best that whole objects can do.

    Requests go in waves, one for each connection. A wave takes the mean time to a first byte and
    then what its bodies take on their connections, or what the wire takes for them all. The latest
    first byte of a wave comes after the mean one, and so do the layers behind it.
    """
    sizes = _sizes(layout, groups)
    mean_s, rate = _mean_s(store), store.connection_bytes_per_s
    ready_s: list[float] = []
    done_s = 0.0
    waves = _last_waves(chunks, sizes, connections, store)
    for number, ((first, last), size, wave) in enumerate(zip(groups, sizes, waves, strict=True), 1):
        # Of the requests before it, too: a layer is of use only behind all others.
        late_s = max(mean_s, _latest_s(store, min(number * chunks, wave.width)))
        # Whoever is late has the wire for itself at the end.
        done_s = max(done_s, wave.begins_s + wave.lasts_s, wave.begins_s + late_s + size / rate)
        flows_s = (wave.lasts_s - mean_s) / wave.mean_bytes
        start = layout.span(first, last).start
        ready_s += [
            wave.begins_s + late_s + (layout.span(first, layer + 1).stop - start) * flows_s
            for layer in range(first, last)
        ]
    return Times((*accumulate((min(ready, done_s) for ready in ready_s[:-1]), max), done_s))


@dataclass(frozen=True)
class _Wave:
    begins_s: float
    lasts_s: float
    width: int
    mean_bytes: float


def _last_waves(
    chunks: int, sizes: Sequence[int], connections: int, store: StoreModel
) -> list[_Wave]:
    """For each group the wave in which its last request goes."""
    mean_s, total = _mean_s(store), chunks * len(sizes)
    before = [0, *accumulate(chunks * size for size in sizes)]
    found: list[_Wave] = []
    at, begins_s = 0, 0.0
    while at < total:
        width = min(connections, total - at)
        group, behind = divmod(at + width, chunks)
        end = before[group] + (behind * sizes[group] if behind else 0)
        group, behind = divmod(at, chunks)
        sent = end - before[group] - behind * sizes[group]
        flows_s = sent / width / store.connection_bytes_per_s
        wire_s = sent / store.wire_bytes_per_s
        # Later waves wait for first bytes while others use the wire.
        lasts_s = max(mean_s + flows_s, wire_s if at else mean_s + wire_s)
        lasts_s = max(lasts_s, width / store.requests_per_s)
        alike = max(1, (chunks - behind) // width) if at else 1  # waves within this group
        begins_s += (alike - 1) * lasts_s
        at += alike * width
        while (len(found) + 1) * chunks <= at:
            found.append(_Wave(begins_s, lasts_s, width, sent / width))
        begins_s += lasts_s
    return found


def _sigma(store: StoreModel) -> float:
    """Times to the first byte are taken to be lognormal."""
    return max(0.0, math.log(store.first_byte_p99_s / store.first_byte_s)) / _P99


def _mean_s(store: StoreModel) -> float:
    return store.first_byte_s * math.exp(_sigma(store) ** 2 / 2)


def _latest_s(store: StoreModel, requests: int) -> float:
    """The latest first byte of so many requests sent at once; half of the times it is earlier."""
    return store.first_byte_s * math.exp(_sigma(store) * _NORMAL.inv_cdf(0.5 ** (1 / requests)))
