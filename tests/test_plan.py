"""Plans against what they promise: every byte once, layers in order, within limits, and times that a simulation confirms."""

import itertools
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_sim import SimulatedStore, Timeline, client, fetch_all

from objectcache.flow import START, Flow, StoreModel
from objectcache.format import ObjectLayout
from objectcache.plan import Limits, Plan, Prices, modelled, plan

MIB = 1 << 20
FREE = Prices(0.0, request_s=0.0)
S3 = StoreModel(wire_bytes_per_s=10e9)
NEAR = StoreModel(0.001, 0.005, 80e6, 10e9, 1e9)  # a server in the next rack


def layout(slices: "list[int] | tuple[int, ...]") -> ObjectLayout:
    return ObjectLayout(bytes(32), 256, 16, 0, 1, tuple(slices))


CHUNK = layout([MIB] * 32)

layouts = st.lists(st.integers(1, 3 * MIB), min_size=1, max_size=40).map(layout)
stores = st.builds(
    lambda first_s, tail, rate, wire, requests: StoreModel(
        first_s, first_s * tail, rate, rate * wire, requests
    ),
    st.floats(1e-4, 1.0),
    st.floats(1.0, 20.0),
    st.floats(1e6, 1e9),
    st.floats(1.0, 1e4),
    st.floats(10.0, 1e6),
)
limits = st.builds(
    Limits, st.integers(1, 4096), st.integers(0, 4000), st.none() | st.integers(4 * MIB, 1 << 32)
)
prices = st.builds(Prices, st.floats(0.0, 1e-3))
layer_times = st.none() | st.floats(0.0, 0.1)


# ---- what any plan keeps


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 120), layouts, stores, limits, prices, layer_times)
def test_any_plan(
    chunks: int,
    shape: ObjectLayout,
    store: StoreModel,
    allowed: Limits,
    price: Prices,
    layer_s: float | None,
) -> None:
    layers = len(shape.slice_bytes)
    held = allowed.in_flight_bytes or shape.object_bytes
    if held < shape.object_bytes and allowed.requests < chunks * layers:
        allowed = Limits(allowed.connections, chunks * layers, held)  # else there may be no way
    best = plan(chunks, shape, store, allowed, price, layer_s)
    assert best == plan(chunks, shape, store, allowed, price, layer_s)
    fetches = list(best.fetches())
    # Every byte of every chunk once, and in order.
    for chunk in range(chunks):
        at = 0
        for fetch in fetches:
            if fetch.chunk == chunk:
                span = shape.span(fetch.first, fetch.last)
                assert span.start == at < span.stop
                at = span.stop
        assert at == shape.object_bytes
    # A later group never before an earlier one; within a group the prefix in its order.
    assert [(f.first, f.chunk) for f in fetches] == sorted((f.first, f.chunk) for f in fetches)
    # Limits.
    assert len(fetches) == best.requests <= min(max(allowed.requests, chunks), chunks * layers)
    assert 1 <= best.connections <= min(allowed.connections, len(fetches))
    sizes = [span.stop - span.start for span in (shape.span(f.first, f.last) for f in fetches)]
    if allowed.in_flight_bytes is not None:
        assert best.connections * max(sizes) <= allowed.in_flight_bytes
    # No better than physics.
    ready = best.times.ready_s
    assert len(ready) == layers and list(ready) == sorted(ready)
    assert best.times.first_layer_s >= store.first_byte_s
    rate = min(store.wire_bytes_per_s, best.connections * store.connection_bytes_per_s)
    least_s = max(
        sum(sizes) / rate,
        store.first_byte_s + max(sizes) / store.connection_bytes_per_s,
        len(fetches) / store.requests_per_s,
    )
    assert best.times.done_s >= least_s * (1 - 1e-9)
    assert str(best.requests) in str(best)


def test_limits_that_allow_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="one layer"):
        plan(3, CHUNK, S3, Limits(8, in_flight_bytes=MIB - 1))
    with pytest.raises(ValueError, match="one layer"):  # whole objects do not fit, and no more
        plan(3, CHUNK, S3, Limits(8, requests=3, in_flight_bytes=8 * MIB))
    # The header makes the first a little larger.
    assert plan(3, CHUNK, S3, Limits(8, in_flight_bytes=MIB + 4096)).connections == 1


# ---- which plan


@pytest.mark.parametrize(
    ("chunks", "connections"), [(224, 224), (160, 224), (64, 64), (4000, 4000)]
)
def test_as_many_chunks_as_the_wire_has_use_for_go_whole_and_all_at_once(
    chunks: int, connections: int
) -> None:
    best = plan(chunks, CHUNK, S3, Limits(connections))
    assert (best.requests, best.connections) == (chunks, chunks)


def test_few_chunks_are_split_until_the_wire_is_full() -> None:
    whole = modelled(14, CHUNK, ((0, 32),), 14, S3)
    best = plan(14, CHUNK, S3, Limits(224))
    assert best.times.done_s < 0.6 * whole.done_s
    wire_s = 14 * CHUNK.object_bytes / S3.wire_bytes_per_s
    assert plan(14, CHUNK, NEAR, Limits(224), FREE).times.done_s < 1.2 * wire_s
    # But not where one connection fills the wire already.
    alone = StoreModel(0.03, 0.2, 1e9, 1e9)
    assert plan(14, CHUNK, alone, Limits(224), layer_s=0.0).requests == 14


def test_many_chunks_come_in_groups_where_requests_are_cheap() -> None:
    best = plan(1000, CHUNK, NEAR, Limits(224), FREE)
    assert best.times.first_layer_s < best.times.done_s / 16
    whole = modelled(1000, CHUNK, ((0, 32),), 224, NEAR)
    assert whole.first_layer_s > whole.done_s / 2
    assert best.times.done_s < 1.1 * whole.done_s
    # More connections than the wire has use for would mix the layers.
    assert best.connections < 224


def test_who_waits_for_all_bytes_anyway_does_not_pay_for_their_order() -> None:
    bill = Prices(request_s=0.0)
    eager = plan(1000, CHUNK, S3, Limits(224), bill)
    patient = plan(1000, CHUNK, S3, Limits(224), bill, layer_s=0.0)
    assert patient.requests < eager.requests
    assert patient.times.done_s < eager.times.done_s


def test_a_request_costs_the_client_time_too() -> None:
    """On a store that is near and fast, requests are all that many small groups would add."""
    free, real = (plan(256, CHUNK, NEAR, Limits(224), price) for price in (FREE, Prices(0.0)))
    assert real.requests <= free.requests / 2


@pytest.mark.parametrize("chunks", [1, 14, 60, 500, 2000])
def test_dearer_requests_are_never_more(chunks: int) -> None:
    usd = (0.0, 1e-8, 1e-7, 4e-7, 1e-6, 1e-5, 1e-3, 1.0)
    counts = [plan(chunks, CHUNK, S3, Limits(224), Prices(each)).requests for each in usd]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == chunks
    assert plan(chunks, CHUNK, S3, Limits(224, requests=0)).requests == chunks


def test_the_rate_of_requests_is_a_bound() -> None:
    slow = StoreModel(0.001, 0.005, 80e6, 10e9, requests_per_s=200.0)
    assert plan(1000, CHUNK, slow, Limits(224), FREE).requests <= 2000


@pytest.mark.parametrize(("wire_bytes_per_s", "gain"), [(10e9, 0.7), (2e9, 0.85)])
def test_small_reads_find_their_connections(wire_bytes_per_s: float, gain: float) -> None:
    """Plan and flow together: fewer chunks than START never fill it, unless plans split them."""
    flow = Flow(224)
    reader = client(flow, wire_bytes_per_s=wire_bytes_per_s)
    took_s = []
    for _ in range(40):
        best = plan(14, CHUNK, flow.model(), Limits(flow.limit(reader.line.now)))
        reader.body_bytes = 14 * CHUNK.object_bytes // best.requests
        began = reader.line.now
        reader.read(best.requests)
        reader.line.run()
        took_s.append(reader.line.now - began)
        reader.line.run(reader.line.now + 2.0)
    assert flow.limit(reader.line.now) >= 2 * START
    whole = modelled(14, CHUNK, ((0, 32),), 14, StoreModel(wire_bytes_per_s=wire_bytes_per_s))
    assert statistics.median(took_s[20:]) < gain * whole.done_s


# ---- the model against the simulation


def simulated(best: Plan, shape: ObjectLayout, store: StoreModel, seed: int) -> list[float]:
    """When each layer and all before it had come."""
    server = SimulatedStore(
        Timeline(),
        connection_bytes_per_s=store.connection_bytes_per_s,
        wire_bytes_per_s=store.wire_bytes_per_s,
        first_byte_s=store.first_byte_s,
        first_byte_p99_s=store.first_byte_p99_s,
        seed=seed,
    )

    def marks(first: int, last: int) -> list[tuple[int, int]]:
        start = shape.span(first, last).start
        return [(shape.span(first, i + 1).stop - start, i) for i in range(first, last)]

    met = fetch_all(server, (marks(f.first, f.last) for f in best.fetches()), best.connections)
    return list(itertools.accumulate((met[i] for i in range(len(shape.slice_bytes))), max))


def medians(best: Plan, shape: ObjectLayout, store: StoreModel) -> tuple[float, float]:
    seeds = range(5 if best.requests > 60 else 25)  # a few requests are a matter of luck
    runs = [simulated(best, shape, store, seed) for seed in seeds]
    return statistics.median(run[0] for run in runs), statistics.median(run[-1] for run in runs)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.integers(1, 60),
    st.lists(st.integers(16 << 10, 2 * MIB), min_size=1, max_size=16).map(layout),
    st.floats(1e-3, 0.1),
    st.floats(1.0, 6.0),
    st.floats(10e6, 600e6),
    st.floats(1.0, 300.0),
    st.integers(1, 100),
    st.integers(1, 16),
)
def test_modelled_times_are_near_the_simulation(
    chunks: int,
    shape: ObjectLayout,
    first_s: float,
    tail: float,
    rate: float,
    wire: float,
    connections: int,
    size: int,
) -> None:
    store = StoreModel(first_s, first_s * tail, rate, rate * wire, 1e9)
    layers = len(shape.slice_bytes)
    groups = tuple((i, min(i + size, layers)) for i in range(0, layers, size))
    connections = min(connections, chunks * len(groups))
    times = modelled(chunks, shape, groups, connections, store)
    first, done = medians(Plan(chunks, groups, connections, times), shape, store)
    assert 0.6 < times.done_s / done < 1.7
    assert 0.4 < times.first_layer_s / first < 2.5


@pytest.mark.parametrize("store", [S3, NEAR, StoreModel(0.1, 1.0, 20e6, 1e9)])
@pytest.mark.parametrize(("chunks", "connections"), [(14, 224), (60, 64), (100, 32)])
def test_modelled_times_of_common_reads(chunks: int, connections: int, store: StoreModel) -> None:
    best = plan(chunks, CHUNK, store, Limits(connections))
    first, done = medians(best, CHUNK, store)
    assert 0.75 < best.times.first_layer_s / first < 1.33
    assert 0.75 < best.times.done_s / done < 1.33


@pytest.mark.parametrize("store", [S3, NEAR, StoreModel(0.1, 1.0, 20e6, 1e9)])
@pytest.mark.parametrize(("chunks", "connections"), [(3, 64), (14, 64), (50, 20)])
def test_no_other_cut_is_much_faster_in_the_simulation(
    chunks: int, connections: int, store: StoreModel
) -> None:
    best = plan(chunks, CHUNK, store, Limits(connections), FREE, layer_s=0.0)
    _, done = medians(best, CHUNK, store)
    for size in (1, 4, 16, 32):
        groups = tuple((i, i + size) for i in range(0, 32, size))
        width = min(connections, chunks * len(groups))
        _, other = medians(Plan(chunks, groups, width, best.times), CHUNK, store)
        assert done < 1.35 * other
