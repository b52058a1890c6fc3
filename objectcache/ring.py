"""Who holds which slot of host memory: a ledger that must return to zero. Not the memory itself: see device.py.

A slot holds one object. Loads and saves have shares of their own, so that neither can starve the
other. Safe to use from several threads.
"""

import threading
from collections.abc import Iterable

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
        self._free_loads = list(range(self.load_slots - 1, -1, -1))
        self._free_saves = list(range(slots - 1, self.load_slots - 1, -1))
        self._leased: set[int] = set()
        self._lock = threading.Lock()

    @property
    def leased(self) -> int:
        """Slots that somebody holds now; zero when all is quiet."""
        return len(self._leased)

    def lease_loads(self, count: int) -> list[int] | None:
        """`count` slots, or None if there are not so many free now. All or none: nobody waits holding."""
        return self._lease(self._free_loads, count)

    def lease_save(self) -> int | None:
        """One slot, or None if there is none free now."""
        slots = self._lease(self._free_saves, 1)
        return slots[0] if slots else None

    def release(self, slots: Iterable[int]) -> None:
        """Give slots back. Releasing what is not leased is a bug and raises."""
        with self._lock:
            for slot in slots:
                self._leased.remove(slot)
                (self._free_loads if slot < self.load_slots else self._free_saves).append(slot)

    def _lease(self, free: list[int], count: int) -> list[int] | None:
        with self._lock:
            if count > len(free):
                return None
            slots = [free.pop() for _ in range(count)]
            self._leased.update(slots)
            return slots
