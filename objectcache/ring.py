"""Who holds which slot of host memory: a ledger that must return to zero. Not the memory itself: see slots.py; not what lies in it: see shelf.py.

A slot holds one object. Loads and saves have shares of their own, each with its ledger, so that neither
can starve the other. Safe to use from several threads.
"""

import threading
from collections.abc import Iterable, Sequence

from objectcache.errors import Misconfigured

PROGRESS_BYTES = 2  # of a slot
NOT_BEGUN = -1  # progress, until the header is verified: 0 layers, but the object exists and comes
FAILED = -2  # progress, of a chunk that does not come
SAVE_SHARE = (
    4  # one slot in four is for saves: a lost save is only a later miss, a load is waited for
)


def slots_in(ring_bytes: int, object_bytes: int) -> int:
    """How many objects such a ring has room for. Raises Misconfigured."""
    slots = ring_bytes // object_bytes
    if slots < 2:
        raise Misconfigured(
            f"ring_bytes={ring_bytes} holds {slots} chunks of {object_bytes} bytes; it must hold "
            "two at least.",
            f"raise ring_bytes to {2 * object_bytes} or more, or lower chunk_tokens.",
        )
    return slots


def shares(slots: int) -> tuple[range, range]:
    """Of so many slots: those for loads, and the rest, for saves."""
    if slots < 2:
        raise Misconfigured("the ring has no room for two objects.", "raise ring_bytes.")
    loads = slots - max(1, slots // SAVE_SHARE)
    return range(loads), range(loads, slots)


def progress_offset(slots: int, slot_bytes: int) -> int:
    """Where, behind the slots, the table of their progress begins: an int16 for each."""
    return -(-slots * slot_bytes // PROGRESS_BYTES) * PROGRESS_BYTES


class Ring:
    """The ledger of one share."""

    def __init__(self, slots: range) -> None:
        self.slots = len(slots)
        # In the order in which they became free: what lies in them is overwritten oldest first.
        self._free = dict.fromkeys(slots)
        self._leased: set[int] = set()
        self._lock = threading.Lock()

    @property
    def leased(self) -> int:
        """Slots that somebody holds now; zero when all is quiet."""
        return len(self._leased)

    def lease(self, count: int, these: Sequence[int] = ()) -> list[int] | None:
        """These slots, which must be free, and the `count` of the others that are free longest.

        None if there are not so many free now. All or none: nobody waits holding.
        """
        with self._lock:
            if count + len(these) > len(self._free):
                return None
            for slot in these:
                del self._free[slot]
            oldest = [slot for slot, _ in zip(self._free, range(count), strict=False)]
            for slot in oldest:
                del self._free[slot]
            slots = [*these, *oldest]
            self._leased.update(slots)
            return slots

    def release(self, slots: Iterable[int]) -> None:
        """Give slots back. Releasing what is not leased is a bug and raises."""
        with self._lock:
            for slot in slots:
                self._leased.remove(slot)
                self._free[slot] = None
