"""Which pages are computed on bytes that may still fail to come: not to be saved yet, and to be forgotten if they fail. Not when a request may compute so early: see moment.py.

Pure. A request that was admitted before its prefix was there computes on it in the same step, and so does
every request that shares those pages through vLLM's own prefix cache. If the bytes then do not come, on one
rank only, all ranks have computed wrongly. vLLM fails these requests, but it keeps what of theirs lies
behind pages that they share; and a chunk that was saved would mislead every engine.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class _Load:
    """Whoever has page `page` at `place` among its blocks has a prefix in common with the load."""

    place: int
    page: int
    number: int
    behind: set[int] = field(
        default_factory=set
    )  # pages that were computed or loaded from there on
    requests: set[str] = field(default_factory=set)  # that computed them
    words: int = 0  # of ranks
    lost: bool = False


class Unsure:
    """`ranks` say of each load how it ended. Admissions are numbered: who was admitted before a load
    cannot have its pages."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._loads: dict[int, _Load] = {}

    def __bool__(self) -> bool:
        """Whether there is any such load."""
        return bool(self._loads)

    def began(self, job: int, place: int, block_ids: Sequence[int], number: int) -> None:
        """A request was admitted whose blocks from number `place` on are `block_ids`, and are to be loaded."""
        load = _Load(place, block_ids[0], number)
        load.behind.update(block_ids)
        self._loads[job] = load

    def concerns(self, number: int) -> bool:
        """Whether the request of this admission may have a part in such a load."""
        return any(load.number <= number for load in self._loads.values())

    def computes(self, request_id: str, block_ids: Sequence[int]) -> bool:
        """A request with these blocks computes in the coming step; whether on bytes that may fail to come."""
        found = False
        for load in self._loads.values():
            if len(block_ids) > load.place and block_ids[load.place] == load.page:
                load.behind.update(block_ids[load.place :])
                load.requests.add(request_id)
                found = True
        return found

    def lost(self, job: int) -> tuple[set[int], set[str]]:
        """One rank gave it up: the pages that nobody may use again, and the requests that computed on
        it, of which nothing may be saved any more. Said in the step in which vLLM hears of it too."""
        load = self._loads[job]
        load.lost = True
        return load.behind, load.requests

    def ended(self, job: int, lost: bool) -> tuple[set[int], set[str]]:
        """One rank says that its part of a load came, or is lost, and that nothing writes there any more."""
        load = self._loads[job]
        load.words += 1
        load.lost = load.lost or lost
        if load.words == self._ranks:
            del self._loads[job]
        return (load.behind, load.requests) if load.lost else (set(), set())
