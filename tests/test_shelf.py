"""Places of chunks against a model: who holds what, what is read once, what lies in free slots, and a ledger that returns to zero."""

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from objectcache.ring import Ring
from objectcache.shelf import Place, Shelf, State

KEYS = st.lists(st.sampled_from("abcdefgh"), max_size=6)


def shelf(slots: int = 8) -> tuple[Shelf, Ring]:
    ring = Ring(slots)
    return Shelf(ring), ring


def test_all_or_none() -> None:
    made, ring = shelf()
    assert made.take(1, "abcdefg") is None and ring.leased == 0
    taken = made.take(1, "abcdef")
    assert taken is not None and ring.leased == 6
    assert made.take(2, "ag") is None
    assert made.take(3, "af") is not None  # what is there already needs no room


def test_a_slot_is_not_free_while_its_reader_may_write() -> None:
    made, ring = shelf()
    taken = made.take(1, "ab")
    assert taken is not None
    _, unread = taken
    assert made.give_back(1) == unread and ring.leased == 2
    made.read_ended(unread[0], verified=True)
    made.read_ended(unread[1], verified=False)
    assert ring.leased == 0
    again = made.take(2, "ab")  # nobody wanted it when it came: it was not to be relied on
    assert again is not None and [place.key for place in again[1]] == ["a", "b"]


@given(KEYS)
def test_what_lies_in_free_slots_is_taken_before_it_is_overwritten(keys: list[str]) -> None:
    made, ring = shelf()
    first = made.take(1, keys)
    assert first is not None
    slots = {place.key: place.slot for place in first[0]}
    for place in first[1]:
        made.read_ended(place, verified=True)
    assert made.give_back(1) == [] and ring.leased == 0
    other = made.take(2, [*keys[:2], "z"])
    assert other is not None
    assert all(place.slot == slots[place.key] for place in other[0] if place.key != "z")
    assert [place.key for place in other[1]] == ["z"]


class Many(RuleBasedStateMachine):
    """Jobs in a dict; a read is under way until the rule for its end."""

    def __init__(self) -> None:
        super().__init__()
        self.shelf, self.ring = shelf(9)
        self.jobs: dict[int, list[Place]] = {}
        self.reading: set[Place] = set()
        self.next = 0

    @rule(keys=KEYS)
    def take(self, keys: list[str]) -> None:
        self.next += 1
        taken = self.shelf.take(self.next, keys)
        busy = {place.slot for places in self.jobs.values() for place in places}
        busy |= {place.slot for place in self.reading}
        usable = {p.key for places in self.jobs.values() for p in places if p.state != State.LOST}
        if taken is None:
            assert len(set(keys) - usable) > self.ring.load_slots - len(busy)
            return
        places, unread = taken
        assert [place.key for place in places] == keys
        assert all(place.state is not State.LOST for place in places)
        assert all(place.slot not in busy for place in unread), "somebody else's slot"
        assert not self.reading & set(unread)
        self.reading |= set(unread)
        self.jobs[self.next] = places

    @precondition(lambda self: self.reading)
    @rule(data=st.data(), verified=st.booleans())
    def read_ends(self, data: st.DataObject, verified: bool) -> None:
        place = data.draw(st.sampled_from(sorted(self.reading, key=lambda p: (p.slot, p.key))))
        self.reading.discard(place)
        before = place.state
        self.shelf.read_ended(place, verified)
        assert (place.state is State.THERE) == (verified and before is State.COMING)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(sorted(self.jobs)))
        places = self.jobs.pop(job)
        keep = data.draw(st.integers(0, len(places)))
        unwanted = self.shelf.give_back(job, keep)
        if places[:keep]:
            self.jobs[job] = places[:keep]
        held = {place for others in self.jobs.values() for place in others}
        for place in unwanted:
            assert place in self.reading and place not in held and place.state is State.LOST
        for place in set(places) & self.reading - held:
            assert place.state is State.LOST, "its reader goes on for nobody"

    @invariant()
    def a_slot_is_leased_if_and_only_if_somebody_holds_it(self) -> None:
        held = {place.slot for places in self.jobs.values() for place in places}
        held |= {place.slot for place in self.reading}
        assert self.ring.leased == len(held)

    @invariant()
    def one_key_has_one_place_that_counts(self) -> None:
        places = {place for held in self.jobs.values() for place in held} | self.reading
        keys = [place.key for place in places if place.state is not State.LOST]
        assert len(keys) == len(set(keys))
        slots = [place.slot for place in places]
        assert len(slots) == len(set(slots))

    def teardown(self) -> None:
        for place in list(self.reading):
            self.shelf.read_ended(place, verified=True)
        for job in self.jobs:
            self.shelf.give_back(job)
        assert self.ring.leased == 0


TestMany = Many.TestCase
TestMany.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
