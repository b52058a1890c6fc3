"""Pages computed on bytes that may fail to come: who computes on them, and which are forgotten if they fail. In an engine: test_timely.py."""

from hypothesis import given
from hypothesis import strategies as st

from objectcache.unsure import Unsure

SHARED = [10, 11, 12, 13]  # pages 1 and on of these are loaded, behind one that was there


def test_who_shares_a_page_of_the_load_computes_on_it() -> None:
    unsure = Unsure(ranks=1)
    assert not unsure
    unsure.began(7, 1, SHARED[1:], number=5)
    assert unsure and unsure.computes("r", [*SHARED, 20])
    assert unsure.computes("r", [*SHARED[:2], 30, 31])
    assert not unsure.computes("r", [10])  # only what was there before
    assert not unsure.computes("r", [10, 40, 41])
    assert unsure.ended(7, lost=True) == ({11, 12, 13, 20, 30, 31}, {"r"})
    assert not unsure and not unsure.computes("r", [*SHARED, 20])


def test_all_ranks_have_a_word_and_one_loss_is_enough() -> None:
    unsure = Unsure(ranks=3)
    unsure.began(1, 0, [1, 2], number=1)
    assert unsure.ended(1, lost=False) == (set(), set())
    assert unsure.ended(1, lost=True) == ({1, 2}, set())
    assert unsure.computes("r", [1, 2, 3]), "in a step that was made before anybody knew"
    assert unsure.ended(1, lost=False) == ({1, 2, 3}, {"r"})
    assert not unsure


def test_a_loss_is_known_before_the_load_has_ended() -> None:
    unsure = Unsure(ranks=2)
    unsure.began(1, 0, [1, 2], number=1)
    assert unsure.computes("a", [1, 2, 3]) and unsure.computes("b", [1, 5])
    assert unsure.lost(1) == ({1, 2, 3, 5}, {"a", "b"})
    assert unsure, "what comes before its end is misled as well"
    assert unsure.ended(1, lost=True)[1] == unsure.ended(1, lost=False)[1] == {"a", "b"}


def test_what_came_is_kept() -> None:
    unsure = Unsure(ranks=2)
    unsure.began(1, 0, [1, 2], number=1)
    assert unsure.computes("r", [1, 2, 3])
    assert unsure.ended(1, lost=False) == unsure.ended(1, lost=False) == (set(), set())
    assert not unsure


def test_who_was_admitted_before_the_load_has_no_part_in_it() -> None:
    unsure = Unsure(ranks=1)
    unsure.began(1, 0, [1, 2], number=4)
    assert [unsure.concerns(number) for number in (1, 3, 4, 5)] == [False, False, True, True]
    unsure.began(2, 0, [5, 6], number=6)
    unsure.ended(1, lost=False)
    assert not unsure.concerns(5) and unsure.concerns(6)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4)), max_size=8))
def test_as_a_walk_over_all_pages_says(others: list[tuple[int, int]]) -> None:
    """Requests share the load's first pages, and go on with their own."""
    prefix, place = [100 + n for n in range(6)], 2
    unsure = Unsure(ranks=1)
    unsure.began(1, place, prefix[place:], number=1)
    behind = set(prefix[place:])
    for number, (shared, own) in enumerate(others):
        blocks = prefix[:shared] + [1000 * (number + 1) + n for n in range(own)]
        on_it = any(page in prefix[place:] for page in blocks)
        assert unsure.computes(f"r{number}", blocks) == on_it
        if on_it:
            behind |= set(blocks[place:])
    assert unsure.lost(1)[0] == behind
    assert unsure.ended(1, lost=True)[0] == behind
