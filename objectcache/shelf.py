"""Which chunks lie in host memory or are on their way there, and who wants them. Not the memory: see slots.py; not the reading: see streamer.py.

A chunk that several jobs want has one place and is read once. A place is held by its jobs, and by
its reader as long as that may write to it; when nobody holds it, its slot is free again. What lies
in a free slot stays of use until the slot is needed for something else. Safe to use from several
threads.

A stage job takes all its places at once and keeps them until vLLM has blocks for its request; a stream
takes one at a time, and its request has its blocks already. So that the two never wait for each
other, stage jobs leave some slots to streams.
"""

import enum
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from objectcache.ring import Ring


class State(enum.Enum):
    COMING = "coming"
    THERE = "there"  # whole and verified
    LOST = "lost"  # its read failed, or nobody wanted it any more: who wants it now reads anew


@dataclass(eq=False)
class Place:
    """One chunk's slot."""

    key: str
    slot: int
    state: State
    reading: bool  # somebody may write to the slot
    jobs: set[int] = field(default_factory=set)


class Shelf:
    """Places of chunks in the slots of a ring. It is the only one who leases those.

    `apart` slots are out of reach of stage jobs; `most` is what is left to them.
    """

    def __init__(self, ring: Ring, apart: int = 0) -> None:
        assert 0 <= apart <= ring.slots
        self._ring = ring
        self._apart = apart
        self.most = ring.slots - apart
        self._places: dict[str, Place] = {}
        self._held: dict[int, list[Place]] = {}
        self._streams: set[int] = set()  # those of the jobs that are streams
        self._lying: dict[str, int] = {}  # in slots that are free
        self._lies_in: dict[int, str] = {}
        self._lock = threading.Lock()

    def take(self, job: int, keys: Sequence[str]) -> tuple[list[Place], list[Place]] | None:
        """Hold a place for each key: (all, in the order of the keys; those that the caller has to read).

        None, and nothing is held, if there is no room for all of them now.
        """
        with self._lock:
            new = [key for key in dict.fromkeys(keys) if key not in self._places]
            there = {self._places[key] for key in keys if key in self._places}
            if len(self._held_by_stages() | there) + len(new) > self.most:
                return None
            unread = self._lay(new)
            if unread is None:
                return None
            places = [self._places[key] for key in keys]
            for place in places:
                place.jobs.add(job)
            self._held[job] = places
            return places, unread

    def take_next(self, job: int, key: str, crowded: bool) -> tuple[Place, bool] | None:
        """A stream holds one place more: (the place, whether the caller has to read it).

        None if there is no room now. With `crowded` others wait for all free slots but those that
        are set apart.
        """
        with self._lock:
            unread: list[Place] | None = []
            if key not in self._places:
                if crowded and self._held_by_streams_alone() >= self._apart:
                    return None
                unread = self._lay([key])
                if unread is None:
                    return None
            place = self._places[key]
            place.jobs.add(job)
            self._held.setdefault(job, []).append(place)
            self._streams.add(job)
            return place, bool(unread)

    def let_go(self, job: int, place: Place) -> None:
        """A stream is done with one of its places, which is there."""
        with self._lock:
            assert place.state is State.THERE
            self._held[job].remove(place)
            if not self._held[job]:
                del self._held[job]
                self._streams.discard(job)
            place.jobs.discard(job)
            self._vacate(place)

    def read_ended(self, place: Place, verified: bool) -> None:
        """The reader of a place writes to it no more."""
        with self._lock:
            place.reading = False
            if verified and place.state is State.COMING:
                place.state = State.THERE
            else:
                self._lose(place)
            self._vacate(place)

    def give_back(self, job: int, keep: int = 0) -> list[Place]:
        """A job lets go of all but its first `keep` places: those whose reading may stop.

        A job that holds nothing gives nothing back.
        """
        with self._lock:
            places = self._held.pop(job, [])
            if keep:
                self._held[job] = places[:keep]
            else:
                self._streams.discard(job)
            unwanted = []
            kept = {id(place) for place in places[:keep]}
            for place in dict.fromkeys(places[keep:]):
                if id(place) in kept:
                    continue
                place.jobs.discard(job)
                if not place.jobs and place.reading and place.state is State.COMING:
                    self._lose(place)
                    unwanted.append(place)
                self._vacate(place)
            return unwanted

    def stop(self, job: int, keep: int) -> list[Place]:
        """A job wants no more of its places than the first `keep`: those whose reading may stop. It keeps all
        until `give_back`: who looks at how far they are must not see another chunk there."""
        with self._lock:
            places = self._held.get(job, [])
            kept, unwanted = {id(place) for place in places[:keep]}, []
            for place in dict.fromkeys(places[keep:]):
                alone = place.jobs == {job} and id(place) not in kept
                if alone and place.reading and place.state is State.COMING:
                    self._lose(place)
                    unwanted.append(place)
            return unwanted

    def _lay(self, keys: Sequence[str]) -> list[Place] | None:
        """Lease slots for keys that have no place: those of them that are to be read. All or none."""
        lying = [key for key in keys if key in self._lying]
        unread = [key for key in keys if key not in self._lying]
        slots = self._ring.lease(len(unread), [self._lying[key] for key in lying])
        if slots is None:
            return None
        for key, slot in zip([*lying, *unread], slots, strict=True):
            there = self._lying.get(key) == slot
            self._forget(slot)
            state = State.THERE if there else State.COMING
            self._places[key] = Place(key, slot, state, reading=not there)
        return [self._places[key] for key in unread]

    def _held_by_stages(self) -> set[Place]:
        held = (places for job, places in self._held.items() if job not in self._streams)
        return {place for places in held for place in places}

    def _held_by_streams_alone(self) -> int:
        held = {place for job in self._streams for place in self._held[job]}
        return len(held - self._held_by_stages())

    def _lose(self, place: Place) -> None:
        place.state = State.LOST
        if self._places.get(place.key) is place:
            del self._places[place.key]

    def _vacate(self, place: Place) -> None:
        if place.jobs or place.reading:
            return
        if place.state is State.THERE:
            del self._places[place.key]
            self._lying[place.key], self._lies_in[place.slot] = place.slot, place.key
        self._ring.release([place.slot])

    def _forget(self, slot: int) -> None:
        """What lay in a slot is there no longer, or it is not free any more."""
        key = self._lies_in.pop(slot, None)
        if key is not None:
            del self._lying[key]
