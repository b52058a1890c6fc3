"""Who holds which slot of host memory: a ledger that must return to zero. Not the memory itself: see device.py; not what lies in it: see shelf.py.

A slot holds one object. Loads and saves have shares of their own, so that neither can starve the
other. Safe to use from several threads.
"""

import threading
from collections.abc import Iterable, Sequence

from objectcache.errors import Misconfigured

SAVE_SHARE = (
    4  # one slot in four is for saves: a lost save is only a later miss, a load is waited for
)


class Ring:
    """`slots` numbered slots; the first are for loads, the rest for saves."""

    def __init__(self, slots: int) -> None:
        if slots < 2:
            raise Misconfigured("the ring has no room for two objects.", "raise ring_bytes.")
        self.slots = slots
        self.save_slots = max(1, slots // SAVE_SHARE)
        self.load_slots = slots - self.save_slots
        # In the order in which they became free: what lies in them is overwritten oldest first.
        self._free_loads = dict.fromkeys(range(self.load_slots))
        self._free_saves = dict.fromkeys(range(self.load_slots, slots))
        self._leased: set[int] = set()
        self._lock = threading.Lock()

    @property
    def leased(self) -> int:
        """Slots that somebody holds now; zero when all is quiet."""
        return len(self._leased)

    def lease_loads(self, count: int, these: Sequence[int] = ()) -> list[int] | None:
        """These slots, which must be free, and the `count` of the others that are free longest.

        None if there are not so many free now. All or none: nobody waits holding.
        """
        with self._lock:
            if count + len(these) > len(self._free_loads):
                return None
            for slot in these:
                del self._free_loads[slot]
            return self._leave(self._free_loads, count, these)

    def lease_save(self) -> int | None:
        """One slot, or None if there is none free now."""
        with self._lock:
            return self._leave(self._free_saves, 1)[0] if self._free_saves else None

    def release(self, slots: Iterable[int]) -> None:
        """Give slots back. Releasing what is not leased is a bug and raises."""
        with self._lock:
            for slot in slots:
                self._leased.remove(slot)
                (self._free_loads if slot < self.load_slots else self._free_saves)[slot] = None

    def _leave(self, free: dict[int, None], count: int, these: Sequence[int] = ()) -> list[int]:
        oldest = [slot for slot, _ in zip(free, range(count), strict=False)]
        for slot in oldest:
            del free[slot]
        slots = [*these, *oldest]
        self._leased.update(slots)
        return slots
