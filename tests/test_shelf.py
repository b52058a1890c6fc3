"""Places of chunks against a model: who holds what, what is read once, what lies in free slots, and a ledger that returns to zero."""

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from objectcache.ring import Ring, shares
from objectcache.shelf import Place, Shelf, State

KEYS = st.lists(st.sampled_from("abcdefgh"), max_size=6)


def shelf(slots: int = 8, apart: int = 0) -> tuple[Shelf, Ring]:
    ring = Ring(shares(slots)[0])
    return Shelf(ring, apart), ring


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


def test_stages_leave_some_slots_to_streams() -> None:
    made, ring = shelf(apart=2)
    assert made.most == 4 and made.take(1, "abcde") is None
    assert made.take(1, "abcd") is not None
    assert made.take(2, "e") is None and ring.leased == 4
    place = made.take_next(3, "e", crowded=True)
    assert place is not None and place[1]
    assert made.take(4, "e") is None, "what a stream holds alone is not theirs either"
    assert made.take(4, "ab") is not None
    assert made.take_next(3, "a", crowded=True) is not None, "what is there needs no slot"
    assert made.take_next(3, "f", crowded=True) is not None
    assert made.take_next(3, "g", crowded=True) is None


def test_streams_take_all_that_nobody_waits_for() -> None:
    made, ring = shelf(apart=1)
    taken = [made.take_next(1, key, crowded=False) for key in "abcdef"]
    assert None not in taken and ring.leased == 6
    assert made.take_next(1, "g", crowded=False) is None
    for place, _ in taken[:3]:
        assert made.take(2, "xyz") is None
        made.read_ended(place, verified=True)
        made.let_go(1, place)
        assert made.take_next(1, "g", crowded=True) is None, "others wait for these slots"
    assert made.take(2, "xyz") is not None


class Many(RuleBasedStateMachine):
    """Jobs in a dict; a read is under way until the rule for its end. Some jobs are streams."""

    APART = 2

    def __init__(self) -> None:
        super().__init__()
        self.shelf, self.ring = shelf(9, self.APART)
        self.jobs: dict[int, list[Place]] = {}
        self.streams: set[int] = set()
        self.reading: set[Place] = set()
        self.next = 0

    def held_by(self, jobs: set[int]) -> set[Place]:
        return {place for job in jobs for place in self.jobs[job]}

    def busy(self) -> set[int]:
        return {place.slot for place in self.held_by(set(self.jobs)) | self.reading}

    def usable(self) -> set[str]:
        held = self.held_by(set(self.jobs))
        return {place.key for place in held if place.state is not State.LOST}

    @rule(keys=KEYS)
    def take(self, keys: list[str]) -> None:
        self.next += 1
        staged = self.held_by(self.jobs.keys() - self.streams)
        usable, busy = self.usable(), self.busy()
        taken = self.shelf.take(self.next, keys)
        if taken is None:
            new = len(set(keys) - usable)
            theirs = {p.key for p in staged if p.state is not State.LOST}
            assert (
                new > self.ring.slots - len(busy)
                or len(staged) + len(set(keys) - theirs) > self.shelf.most
            )
            return
        places, unread = taken
        assert [place.key for place in places] == keys
        assert all(place.state is not State.LOST for place in places)
        assert all(place.slot not in busy for place in unread), "somebody else's slot"
        assert not self.reading & set(unread)
        self.reading |= set(unread)
        self.jobs[self.next] = places

    @rule(key=st.sampled_from("abcdefgh"), crowded=st.booleans(), data=st.data())
    def take_next(self, key: str, crowded: bool, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from([*sorted(self.streams), self.next + 1]))
        self.next = max(self.next, job)
        if key in {place.key for place in self.jobs.get(job, [])}:
            return
        usable, busy = self.usable(), self.busy()
        alone = self.held_by(self.streams) - self.held_by(self.jobs.keys() - self.streams)
        taken = self.shelf.take_next(job, key, crowded)
        if taken is None:
            full = len(busy) == self.ring.slots
            assert key not in usable and (full or (crowded and len(alone) >= self.APART))
            return
        place, unread = taken
        assert place.key == key and place.state is not State.LOST
        if unread:
            assert place.slot not in busy and (not crowded or len(alone) < self.APART)
            self.reading.add(place)
        self.streams.add(job)
        self.jobs.setdefault(job, []).append(place)

    @precondition(lambda self: any(p.state is State.THERE for p in self.held_by(self.streams)))
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        choices = [
            (job, at)
            for job in sorted(self.streams)
            for at, place in enumerate(self.jobs[job])
            if place.state is State.THERE
        ]
        job, at = data.draw(st.sampled_from(choices))
        self.shelf.let_go(job, self.jobs[job].pop(at))
        if not self.jobs[job]:
            del self.jobs[job]
            self.streams.discard(job)

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
        else:
            self.streams.discard(job)
        held = {place for others in self.jobs.values() for place in others}
        for place in unwanted:
            assert place in self.reading and place not in held and place.state is State.LOST
        for place in set(places) & self.reading - held:
            assert place.state is State.LOST, "its reader goes on for nobody"

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def stop(self, data: st.DataObject) -> None:
        """It holds all of them still: the ledger below says so."""
        job = data.draw(st.sampled_from(sorted(self.jobs)))
        places = self.jobs[job]
        keep = data.draw(st.integers(0, len(places)))
        unwanted = self.shelf.stop(job, keep)
        others = self.held_by(self.jobs.keys() - {job}) | set(places[:keep])
        for place in unwanted:
            assert place in self.reading and place not in others and place.state is State.LOST
        for place in set(places) & self.reading - others:
            assert place.state is State.LOST, "its reader goes on for nobody"

    @invariant()
    def a_slot_is_leased_if_and_only_if_somebody_holds_it(self) -> None:
        held = {place.slot for places in self.jobs.values() for place in places}
        held |= {place.slot for place in self.reading}
        assert self.ring.leased == len(held)

    @invariant()
    def stages_never_hold_what_is_set_apart(self) -> None:
        staged = self.held_by(self.jobs.keys() - self.streams)
        assert len(staged) <= self.ring.slots - self.APART

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
