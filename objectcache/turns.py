"""Whose load begins: keeps who waits for that and what those that began hold of the ring and of the GPU's blocks. Which of them is next: see sharing.py. What is loaded: see choosing.py.

Events and `now` (seconds, one clock) in, answers out; no I/O. vLLM asks for every waiting request at
each step, in the order of its queue; what is asked first must not begin only for that. So all that
are known to wait are judged together, at the first question after something changed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from objectcache import sharing
from objectcache.sharing import Waiting, Wanted

AGAIN_S = 0.1  # after which those that wait are judged again, for their patience
ROUNDS_KEPT = 8  # steps with questions, after which who was not asked for does not count


@dataclass
class _Waits:
    waiting: Waiting
    priority: int
    since: float
    round: int


class Turns:
    """`slots` of the ring are there for stages; `blocks` on the GPU. With `by_priority` a lower number
    goes first, as vLLM orders its queue then. Who waits too long for
    its turn is the caller's business."""

    def __init__(self, slots: int, blocks: int, by_priority: bool) -> None:
        self._slots = slots
        self._blocks = blocks
        self._by_priority = by_priority
        self._waits: dict[str, _Waits] = {}
        self._begun: dict[str, tuple[int, int]] = {}  # slots and blocks
        self._chosen: set[str] | None = None
        self._judged_at = -math.inf
        self._round, self._asked = 0, False

    def stepped(self) -> None:
        """vLLM has asked for all that it wants to."""
        self._round += self._asked
        self._asked = False

    def want(
        self,
        name: str,
        arrived_s: float,
        ring_slots: int,
        gpu_blocks: int,
        priority: int,
        now: float,
    ) -> None:
        """It would begin now. Said again each time that it is asked for."""
        slots = min(ring_slots, self._slots)  # a stage of more ends with as many as there are
        # All chunks are of one size: they stand for bytes.
        waiting = Waiting(Wanted(arrived_s, ring_slots, 0, 0.0), slots, gpu_blocks)
        before = self._waits.get(name)
        if before is None or before.waiting != waiting or before.priority != priority:
            since = before.since if before is not None else now
            self._waits[name] = _Waits(waiting, priority, since, self._round)
            self._chosen = None
        else:
            if before.round < self._oldest:
                self._chosen = None  # it counts again
            before.round = self._round

    def wants_still(self, name: str) -> bool:
        """The same as when it was last said, if it stands in line."""
        waits = self._waits.get(name)
        if waits is None:
            return False
        if waits.round < self._oldest:
            self._chosen = None  # it counts again
        waits.round = self._round
        return True

    def may(self, name: str, held_blocks: Callable[[], int], now: float) -> bool:
        """Whether it begins; `held_blocks()` are those that running requests have."""
        self._asked = True
        if self._chosen is None or now - self._judged_at >= AGAIN_S:
            self._chosen = self._judge(held_blocks(), now)
            self._judged_at = now
        return name in self._chosen

    def waited_s(self, name: str, now: float) -> float:
        """How long it has stood in line."""
        waits = self._waits.get(name)
        return now - waits.since if waits is not None else 0.0

    def begins(self, name: str, now: float) -> None:
        """It holds what it wanted, until it is over."""
        waits = self._waits.pop(name, None)
        if waits is not None:
            self._begun[name] = (waits.waiting.ring_slots, waits.waiting.gpu_blocks)
            if self._chosen is None or name not in self._chosen:
                self._chosen = None
            else:
                self._chosen.remove(name)  # what it takes was reckoned with

    def parks(self, name: str) -> None:
        """It has the blocks that it wanted, and holds its slots until it is over."""
        begun = self._begun.get(name)
        if begun is not None:
            self._begun[name] = (begun[0], 0)
            self._chosen = None

    def over(self, name: str, now: float) -> None:
        """It was admitted, or nobody waits for it any more. Idempotent."""
        if self._begun.pop(name, None) is not None:
            self._chosen = None
        if self._waits.pop(name, None) is not None:
            self._chosen = None

    def chunks_waiting(self) -> list[int]:
        """Of each load that has not begun."""
        return [one.waiting.ring_slots for one in self._waits.values()]

    @property
    def idle(self) -> bool:
        return not self._waits and not self._begun

    @property
    def _oldest(self) -> int:
        return self._round - ROUNDS_KEPT

    def _judge(self, held_blocks: int, now: float) -> set[str]:
        waits = {name: one for name, one in self._waits.items() if one.round >= self._oldest}
        slots = self._slots - sum(slots for slots, _ in self._begun.values())
        promised = sum(blocks for _, blocks in self._begun.values())
        chosen: set[str] = set()
        levels = {one.priority if self._by_priority else 0 for one in waits.values()}
        for level in sorted(levels):
            names = [
                name
                for name, one in waits.items()
                if not self._by_priority or one.priority == level
            ]
            free = self._blocks - held_blocks
            group = [waits[name].waiting for name in names]
            begin = sharing.begin(group, now, slots, free, promised)
            chosen.update(names[i] for i in begin)
            if len(begin) < len(group):
                break  # nobody behind takes what they wait for
            slots -= sum(one.ring_slots for one in group)
            promised += sum(one.gpu_blocks for one in group)
        return chosen
