"""How much of each prefix is loaded, and whether a load is still to be waited for: gathers what worth.py has to know, and keeps what came of it. Not when a load begins: see turns.py.

Events and `now` (seconds, one clock) in, choices out; no I/O.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from objectcache import worth
from objectcache.compute import Work, decodes, prefill
from objectcache.errors import Misconfigured
from objectcache.timely import Timely
from objectcache.wire import Wire

DEADLINE = "objectcache.deadline_ms"  # in a request's kv_transfer_params
DEADLINE_MOST_MS = 86_400_000.0
UNSURE = 0.45  # of what computing takes, as a share: with more nothing is chosen by it
EVIDENCE = 0.25  # times what computing takes, until what a load gave counts alone
LOOK_LEAST_S, LOOK_MOST_S = 0.02, 0.25  # between two looks at a load that is under way


class Other(NamedTuple):
    """A prompt beside the one that is chosen for."""

    tokens: int  # that are known of it
    computed: int  # whose KV is there
    runs: bool
    waits_for_bytes: bool = False


@dataclass(frozen=True)
class Prompt:
    """`local_tokens` of it vLLM has itself; `chunks` after them are in the store."""

    tokens: int
    local_tokens: int
    chunks: int
    deadline_s: float = math.inf  # for its first token, on the clock of `now`
    early: bool = True  # whether it may be admitted before all is there, if any request may


class Choosing:
    """`object_bytes` is the size of one rank's part of a chunk, `room_chunks` the most that one load
    can bring, None for any number."""

    def __init__(
        self,
        timely: Timely,
        chunk_tokens: int,
        object_bytes: int,
        layers: int,
        room_chunks: int | None = None,
    ) -> None:
        self._timely = timely
        self._chunk_tokens = chunk_tokens
        self._object_bytes = object_bytes
        self._layers = layers
        self._room_chunks = room_chunks
        self._use = worth.Usefulness()

    def choose(
        self, prompt: Prompt, others: Iterable[Other], waiting_chunks: list[int], now: float
    ) -> worth.Choice | str:
        """What to load of it; or why nothing can be said, so that all is to be loaded.

        `waiting_chunks` are those of each load that was chosen and has not begun.
        """
        wire = self._timely.wire
        if wire is None:
            return "nothing was read yet that tells what the wire gives"
        hit = worth.Hit(
            prompt.tokens,
            prompt.local_tokens,
            self._chunk_tokens,
            prompt.chunks,
            self._object_bytes,
            self._layers,
        )
        met = self._meets(wire, prompt, others, waiting_chunks, now)
        compute, deadline_s = self._timely.compute, prompt.deadline_s - now
        choice = worth.choose(hit, met, compute, deadline_s=deadline_s)
        alone = choice.nothing.compute
        if alone.sigma_s > UNSURE * alone.mean_s:
            return "too few prompts were computed yet that tell how long it takes"
        if choice.best.chunks and not self._use.off:
            self._use.used(now)
            return choice
        if self._use.tries(now):
            return worth.choose(hit, met, compute, deadline_s=deadline_s, trial=True)
        return replace(choice, best=choice.nothing)

    @property
    def off(self) -> bool:
        """Whether loads took longer than computing lately, so that none begins but to try."""
        return self._use.off

    def gives_up(
        self,
        choice: worth.Choice,
        job: int,
        prompt: Prompt,
        others: Iterable[Other],
        began: float,
        now: float,
    ) -> tuple[str, float]:
        """Why to compute all of a prompt now whose load is under way, "" if it is to be waited for; and
        in how many seconds to look again. `prompt.chunks` are those of the load."""
        end = prompt.local_tokens - prompt.local_tokens % self._chunk_tokens
        end = min(end + prompt.chunks * self._chunk_tokens, prompt.tokens - 1)
        found = self._timely.expected(job, prompt.tokens, end, now, prompt.early)
        if found is None:
            return "", LOOK_MOST_S
        admit_s = max(0.0, found.at_s - found.margin_s - now)
        busy_s, most = self._gpu_busy_s(others, now), self._timely.pass_tokens
        seconds = self._timely.compute.seconds
        rest = seconds(prefill(prompt.tokens - end, end, most))
        local = prompt.local_tokens
        whole = seconds(prefill(prompt.tokens - local, local, most))
        if now - began >= EVIDENCE * whole.mean_s:
            left_s = self._timely.left_s(job, now)
            if self._timely.admits and prompt.early:  # the pass goes along behind the last layers
                left_s -= min(found.pass_s, left_s) * (self._layers - 1) / self._layers
            admit_s = max(admit_s, left_s)
        with_s = max(admit_s, busy_s) + rest.mean_s
        without_s = busy_s + whole.mean_s
        too_late = without_s <= prompt.deadline_s - now < with_s
        if worth.still_worth(admit_s, rest, whole, busy_s) and not too_late:
            return "", min(max(LOOK_LEAST_S, admit_s / 4), LOOK_MOST_S)
        if not too_late:
            self.ended(choice, now + admit_s - began, now)
        why = ", to keep its deadline" if too_late else ""
        return (
            f"Give up its load{why}: first token in {with_s:.3g} s with it, {without_s:.3g} s without",
            LOOK_MOST_S,
        )

    def ended(self, choice: worth.Choice, took_s: float, now: float) -> None:
        """All that was chosen was there so long after its load began, or would have been. What went
        before it on the wire is not the store's doing."""
        self._use.loaded(now, choice, max(0.0, took_s - choice.met.wire_busy_s))

    # ---- what it meets

    def _meets(
        self,
        wire: Wire,
        prompt: Prompt,
        others: Iterable[Other],
        waiting_chunks: list[int],
        now: float,
    ) -> worth.Now:
        others = list(others)
        left = self._timely.left_bytes() + [n * self._object_bytes for n in waiting_chunks]
        decoding = [one for one in others if one.runs and one.tokens - one.computed <= 1]
        queued = sum(not one.runs for one in others)
        beside = decodes(len(decoding), sum(one.computed for one in decoding))
        room = self._room_chunks
        return worth.Now(
            wire.store,
            wire.connections,
            wire.bytes_per_s,
            wire_busy_s=sum(left) / wire.bytes_per_s,
            gpu_busy_s=self._gpu_busy_s(others, now),
            room_chunks=room if room is not None else 1 << 62,
            pass_tokens=self._timely.pass_tokens,
            beside=beside if decoding else worth.NOTHING_ELSE,
            wire_line=len(left),
            gpu_line=queued + len(decoding),
            slowness=self._use.slowness(now),
            overlaps=self._timely.admits and prompt.early,
        )

    def _gpu_busy_s(self, others: Iterable[Other], now: float) -> float:
        """Until what runs, and those that wait for nothing else, is computed. Who waits for bytes takes
        no GPU yet, and is overtaken meanwhile."""
        work, most = Work(), self._timely.pass_tokens
        for one in others:
            left = one.tokens - one.computed
            if not one.waits_for_bytes and left > 1:
                work = work.then(prefill(left, one.computed, most))
        return self._timely.busy_s(now) + self._timely.compute.seconds(work).mean_s


def deadline_s_of(params: Mapping[str, Any] | None) -> float:
    """Seconds for the first token that a request's kv_transfer_params give it, infinite if they do not.

    Raises Misconfigured if that is no number of milliseconds.
    """
    value = (params or {}).get(DEADLINE)
    if value is None:
        return math.inf
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0.0 < value <= DEADLINE_MOST_MS:
        raise Misconfigured(
            f"{DEADLINE} is no number of milliseconds from 0 to {DEADLINE_MOST_MS:.0f}.",
            "send it in kv_transfer_params as a JSON number.",
        )
    return float(value) / 1000
