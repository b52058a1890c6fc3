"""What the wire gives, joined over movers and ranks, and whether it is news."""

import math

from hypothesis import given
from hypothesis import strategies as st

from objectcache.flow import StoreModel
from objectcache.wire import NEWS, Wire, is_news, slowest, together

wires = st.builds(
    lambda first_s, rate, wire, connections: Wire(
        StoreModel(first_s, 4 * first_s, rate, wire), connections
    ),
    st.floats(1e-4, 1.0),
    st.floats(1e5, 1e9),
    st.just(math.inf) | st.floats(1e6, 1e11),
    st.integers(1, 512),
)


@given(st.lists(wires, min_size=1, max_size=4))
def test_movers_add_up_and_ranks_wait_for_the_slowest(several: list[Wire]) -> None:
    joined, least = together(several), slowest(several)
    assert joined is not None and least is not None
    assert joined.connections == sum(one.connections for one in several)
    for one in several:
        assert least.bytes_per_s <= one.bytes_per_s * 1.0001
        assert joined.store.first_byte_s >= one.store.first_byte_s
        assert least.store.first_byte_p99_s >= one.store.first_byte_p99_s
    assert joined.store.wire_bytes_per_s == sum(one.store.wire_bytes_per_s for one in several)
    assert least.store.wire_bytes_per_s == min(one.store.wire_bytes_per_s for one in several)


def test_a_mover_that_has_read_nothing_is_taken_to_be_like_the_others() -> None:
    one = Wire(StoreModel(wire_bytes_per_s=2e9), 32)
    joined = together([one, None, None, one])
    assert joined is not None
    assert joined.connections == 128 and joined.store.wire_bytes_per_s == 8e9
    assert together([None, None]) is None and slowest([]) is None


@given(wires, st.floats(1 / NEWS + 0.01, NEWS - 0.01))
def test_what_changed_little_is_no_news(told: Wire, times: float) -> None:
    store = told.store
    now = told._replace(
        store=StoreModel(
            store.first_byte_s * times,
            store.first_byte_p99_s,
            store.connection_bytes_per_s / times,
            store.wire_bytes_per_s,
        )
    )
    assert not is_news(told, now) and not is_news(told, told)


@given(wires)
def test_what_changed_is_news_whichever_number_it_is(told: Wire) -> None:
    store, more = told.store, 1.3
    values = [store.first_byte_s, store.first_byte_p99_s, store.connection_bytes_per_s]
    for at in range(3):
        changed = [value * more if n == at else value for n, value in enumerate(values)]
        model = StoreModel(*changed, wire_bytes_per_s=store.wire_bytes_per_s)
        assert is_news(told, told._replace(store=model))
        assert is_news(told._replace(store=model), told)
    met = StoreModel(
        *values, wire_bytes_per_s=1e6 if math.isinf(store.wire_bytes_per_s) else math.inf
    )
    assert is_news(told, told._replace(store=met))
    assert is_news(told, told._replace(connections=2 * told.connections))
    assert is_news(None, told) and not is_news(told, None) and not is_news(None, None)
