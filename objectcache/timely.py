"""Gathers what it takes to know how far prefixes on their way are and how fast this engine computes. What follows from that: see arrival.py, compute.py and moment.py; choosing.py for what is loaded at all.

Events and `now` (seconds, one clock) in, a moment out; no I/O.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from objectcache.arrival import Arrivals, Coming
from objectcache.compute import ComputeModel, Costs, Estimate, Work, decodes, first_pass, prefill
from objectcache.flow import StoreModel
from objectcache.lead import NO_LEAD, Lead
from objectcache.moment import (
    BUS_BYTES_PER_S,
    JUST_IN_TIME,
    STAGED,
    Moment,
    ahead,
    early,
    moment,
    stall_s,
)
from objectcache.wire import Wire, slowest

STREAMS_MAX = 224  # requests of one prefix that are on their way at once, at most
WIRE_BYTES_PER_S = 25e9  # of a fast card, until a wire was seen to be full
STEPS_KEPT = 64
# Of a step's time in which its loads cross the bus: behind less than that computing hides them. And the least
# time of a step that loads in which its host's work hides: 40 to 50 ms were seen, however little it computed
# (H100, 10 cores, 16 users; 7 ms of one that decodes).
BUS_SHARE, LOADED_LEAST_S = 0.5, 0.15
# Of what is as often late as early, how late it is on the average, if early is as good as in time.
CHANCE_SIGMAS = 0.4
LATELY_S = 1.0  # in which it is seen at which rate a prefix comes


class _Step(NamedTuple):
    """A step that computes: its number, what, when it was scheduled, and for how long its loads have the bus."""

    number: int
    work: Work | None  # None: that is not known
    at_s: float
    copies_s: float


@dataclass
class _Job:
    coming: Coming
    chunks: int
    ready: int = -1
    landed: int = 0  # bytes
    seen: deque[tuple[float, int]] = field(default_factory=deque)  # lately, what had landed then
    reports: list[tuple[int, int, int]] = field(
        default_factory=list
    )  # of ranks; joined when all did

    def note(self, now: float) -> None:
        """Keep what had landed lately; at least since before the last time that something did."""
        if len(self.seen) > 1 and self.seen[-1][1] == self.landed:
            self.seen.pop()
        self.seen.append((now, self.landed))
        while (
            len(self.seen) > 2
            and self.seen[1][0] <= now - LATELY_S
            and self.seen[1][1] < self.landed
        ):
            self.seen.popleft()


class Timely:
    """`slice_bytes` of each layer of a chunk; `pass_tokens` is most that one step computes; `ranks` report.

    `admits` is whether requests are admitted before all is there.
    """

    def __init__(
        self,
        slice_bytes: Sequence[int],
        pass_tokens: int,
        ranks: int = 1,
        costs: Costs | None = None,
        store: StoreModel | None = None,
        admits: bool = True,
        bus_bytes_per_s: float = BUS_BYTES_PER_S,
    ) -> None:
        self._slice_bytes = tuple(slice_bytes)
        self._bus_bytes_per_s = bus_bytes_per_s
        self.pass_tokens = pass_tokens
        self.admits = admits
        self.ranks = ranks
        self.compute = ComputeModel(costs) if costs is not None else ComputeModel()
        self.lead = Lead(ranks)
        self.store = store or StoreModel()  # until anything was read
        self.wire: Wire | None = None  # as the workers measured it; None until they read something
        self._wires: dict[int, Wire] = {}  # by shard
        self._jobs: dict[int, _Job] = {}
        self._steps: deque[_Step] = deque(maxlen=STEPS_KEPT)
        self._copies_s = 0.0  # of what the step that is scheduled next loads
        self._heard_at = 0.0

    def heard(self, shard: int, wire: Wire) -> None:
        """What the ranks with this shard measured."""
        self._wires[shard] = wire
        self.wire = slowest(list(self._wires.values()))

    # ---- prefixes

    def began(self, job: int, chunks: int, now: float) -> None:
        """A job of so many chunks was given to the workers."""
        layer_bytes = [size * chunks for size in self._slice_bytes]
        streams = min(chunks, STREAMS_MAX)
        store = self.store
        if self.wire is not None:
            full = not math.isinf(self.wire.store.wire_bytes_per_s)
            most = self.wire.bytes_per_s if full else min(self.wire.bytes_per_s, WIRE_BYTES_PER_S)
            store = replace(self.wire.store, wire_bytes_per_s=most)
        found = _Job(Coming(layer_bytes, chunks, streams, now, store), chunks)
        found.seen.append((now, 0))
        self._jobs[job] = found

    def seen(self, job: int, chunks: int, ready: int, layers: int, now: float) -> None:
        """One rank has `layers` layers of the job's chunks, all together, and of each the first `ready`;
        less than none if it lacks the header of one."""
        found = self._jobs.get(job)
        if found is None:
            return  # admitted or released meanwhile
        found.reports.append((chunks, ready, layers))
        if len(found.reports) < self.ranks:
            return
        chunks, ready, layers = map(min, zip(*found.reports, strict=True))
        found.reports.clear()
        if chunks < found.chunks:
            self.forget(job)  # there is no room for all of it
            return
        landed = layers * sum(self._slice_bytes) // len(self._slice_bytes)
        if found.ready < 0 <= ready:
            found.coming.begun(now)
        found.ready, found.landed = max(found.ready, ready), max(found.landed, landed)
        found.coming.seen(now, landed, max(0, ready))
        found.note(now)

    def next_reports(self) -> None:
        """What follows is of another step. All ranks that still bring a job report in the same one: two
        words of one rank are not those of two."""
        for job in self._jobs.values():
            job.reports.clear()

    def forget(self, job: int) -> None:
        self._jobs.pop(job, None)

    def when(
        self,
        job: int,
        prompt_tokens: int,
        loaded_tokens: int,
        now: float,
        mode: str = JUST_IN_TIME,
        alone: bool = False,
        beside: int = 0,
        next_ask_s: float = 0.0,
        others: int = 0,
    ) -> Moment | None:
        """When to admit a prompt whose first `loaded_tokens` will then be loaded; None while it is not
        known that all of its chunks are right: by their first layers; or, where a lead is known in which
        those come, by their headers. While it is `alone` on the GPU a short stall is nobody's
        loss: its pass ends no later for having begun too early. Else what it costs the `others`, who wait
        as well, is weighed against what it loses if one can not ask again for `next_ask_s`: beside a long
        prompt that is a long step. With others `beside` it the bus may be a loss as well."""
        found = self._jobs.get(job)
        lead = self.lead.seconds(self._first_tokens(prompt_tokens, loaded_tokens))
        least = 0 if mode == JUST_IN_TIME and lead.mean_s else 1
        if found is None or found.ready < least:
            return None
        behind = self._behind(now)
        if behind.mean_s > lead.mean_s:
            lead = behind
        asks = (0.0, 0) if alone else (next_ask_s, others)
        when = self._moment(found, prompt_tokens, loaded_tokens, now, mode, lead, alone, asks)
        if mode != JUST_IN_TIME or not beside:
            return when
        total_bytes = found.chunks * sum(self._slice_bytes)
        return ahead(when, now, self._copy_s(found.chunks), total_bytes, beside)

    def expected(
        self, job: int, prompt_tokens: int, loaded_tokens: int, now: float, early: bool = True
    ) -> Moment | None:
        """The same, as far as that can be said at any time, and without a lead: when its pass may begin.
        None of a job that is not followed. `early` is whether it may be admitted before all is there, if
        any may."""
        found = self._jobs.get(job)
        if found is None:
            return None
        mode = JUST_IN_TIME if self.admits and early else STAGED
        return self._moment(found, prompt_tokens, loaded_tokens, now, mode)

    def left_s(self, job: int, now: float) -> float:
        """Until all of a job is there if it goes on as lately: without what is expected of a store, which
        says little of one that became slow. While nothing came, twice as long as that has lasted."""
        found = self._jobs.get(job)
        if found is None:
            return 0.0
        at, landed = found.seen[0]
        passed_s, came = now - at, found.landed - landed
        if came == 0:
            return 2 * passed_s
        return (found.chunks * sum(self._slice_bytes) - found.landed) * passed_s / came

    def left_bytes(self) -> list[int]:
        """What is still to come of each job that has not all."""
        left = (job.chunks * sum(self._slice_bytes) - job.landed for job in self._jobs.values())
        return [one for one in left if one > 0]

    def _moment(
        self,
        job: _Job,
        prompt_tokens: int,
        loaded_tokens: int,
        now: float,
        mode: str,
        lead: Estimate = NO_LEAD,
        alone: bool = False,
        asks: tuple[float, int] = (0.0, 0),
    ) -> Moment:
        """`asks` is when one can ask again and how many others a stall costs."""
        layer_s = self._layer_s(prompt_tokens, loaded_tokens)
        copy_s = self._copy_s(job.chunks)
        arrivals = job.coming.arrivals(now)
        found = moment(arrivals, now, layer_s, copy_s, mode, lead=lead)
        if mode == JUST_IN_TIME and not found.due(now):
            begins_s = now + lead.mean_s
            come_s = arrivals.mean_s if alone else arrivals.later_s(CHANCE_SIGMAS)
            stalls_s = stall_s(begins_s, come_s, layer_s.mean_s, copy_s)
            missed = alone or found.at_s <= now + asks[0]  # or there is time to ask again
            if missed and early(found, now, stalls_s, *asks):
                # Sooner than is expected to be in time, so that the margin is below zero.
                expected_s = found.at_s - found.margin_s
                return replace(found, at_s=now, margin_s=now - expected_s)
        return found

    def _layer_s(self, prompt_tokens: int, loaded_tokens: int) -> Estimate:
        """To compute one in the first pass."""
        work = first_pass(prompt_tokens - loaded_tokens, loaded_tokens, self.pass_tokens)
        return self.compute.seconds(work).over(len(self._slice_bytes))

    def _first_tokens(self, prompt_tokens: int, loaded_tokens: int) -> int:
        """That have blocks in the first pass."""
        return min(prompt_tokens, loaded_tokens + self.pass_tokens)

    def _copy_s(self, chunks: int) -> float:
        return max(self._slice_bytes) * chunks / self._bus_bytes_per_s

    def staged(
        self, prompt_tokens: int, loaded_tokens: int, chunks: int, now: float, beside: int
    ) -> Moment:
        """Of a prompt whose first `loaded_tokens`, so many chunks, lie in host memory. See `when`."""
        layers = len(self._slice_bytes)
        there = Arrivals((now,) * layers, (0.0,) * layers)
        copy_s = self._copy_s(chunks)
        found = moment(there, now, self._layer_s(prompt_tokens, loaded_tokens), copy_s)
        return ahead(found, now, copy_s, chunks * sum(self._slice_bytes), beside)

    # ---- steps

    def step_s(self, left: Sequence[tuple[int, int]]) -> float:
        """How long a step is expected to take that computes these requests' next tokens: so many are left,
        behind so many."""
        budget, takes = self.pass_tokens, []
        for tokens, context in left:
            takes.append((min(max(1, tokens), budget), context))
            budget -= takes[-1][0]
        work = self._work(takes)
        return self.compute.seconds(work).mean_s if work.tokens else 0.0

    def _work(self, each: Iterable[tuple[int, int]]) -> Work:
        """Of one pass that computes, of each request, so many tokens behind so many."""
        work, decoding, read_tokens = Work(), 0, 0
        for tokens, context in each:
            if tokens > 1:
                work = work.beside(prefill(tokens, context, self.pass_tokens))
            elif tokens:
                decoding += 1
                read_tokens += context
        if decoding:
            work = work.beside(decodes(decoding, read_tokens))
        return work._replace(passes=1)

    def busy_s(self, now: float) -> float:
        """Until the steps that run now are expected to end."""
        if not self._steps:
            return 0.0
        works = [one.work for one in self._steps if one.work is not None]
        takes_s = sum(self.compute.seconds(work).mean_s for work in works)
        return max(0.0, takes_s - (now - max(self._steps[0].at_s, self._heard_at)))

    def _behind(self, now: float) -> Estimate:
        """Until the step that is put together now can begin: with asynchronous scheduling the GPU still
        computes the one before it. If more are under way, it is longer."""
        before = self._steps[-1] if self._steps else None
        if before is None or before.work is None:
            return NO_LEAD
        takes = self.compute.seconds(before.work)
        ran_s = now - max(before.at_s, self._heard_at)
        return Estimate(max(0.0, takes.mean_s - ran_s), takes.sigma_s)

    def scheduled(
        self, step: int, requests: Mapping[str, tuple[int, int]] | None, now: float
    ) -> None:
        """A step computes, of each request, so many tokens behind so many; None: that is not known."""
        self.lead.scheduled(step, now, self._is_quiet())
        copies_s, self._copies_s = self._copies_s, 0.0
        if requests is None:
            self._steps.append(_Step(step, None, now, copies_s))
            return
        work = self._work(requests.values())
        if work.tokens:
            self._steps.append(_Step(step, work, now, copies_s))

    def loads(self, prompt_tokens: int, loaded_tokens: int, chunks: int, asked_s: float) -> None:
        """The step that is scheduled next loads, in it, so many chunks that were asked for then. Of its
        prompt these are the tokens."""
        self._copies_s += chunks * sum(self._slice_bytes) / self._bus_bytes_per_s
        self.lead.asked(self._first_tokens(prompt_tokens, loaded_tokens), asked_s)

    def _is_quiet(self) -> bool:
        """Whether nothing runs but decodes. Behind a step that loads, or computes a prompt, a worker's host
        may be held up: the longer the more late layers it waits for."""
        if self._steps and self._steps[0].number <= self.lead.last_step:
            return False
        return all(one.work is not None and not one.work.pairs for one in self._steps)

    def stepped(self, step: int, waited: bool, now: float) -> None:
        """The results of a step are there. One that `waited` for layers, on any rank, is not timed, nor one
        that may have waited for the bus or for its host to begin copies: of a prefix that is nearly the whole
        prompt that takes several times as long as computing the rest, and all passes would seem as unsure.

        A step that computes nothing says nothing of when the next one began: with asynchronous scheduling
        its results are taken only when that one was given to the GPU.
        """
        computed = False
        while self._steps and self._steps[0].number <= step:
            one = self._steps.popleft()
            computed = True
            took_s = now - max(one.at_s, self._heard_at)
            if one.number == step and not waited and one.work is not None and self._hides(one):
                self.compute.timed(one.work, took_s)
        if computed:
            self._heard_at = now

    def _hides(self, step: _Step) -> bool:
        """Whether what a step loads is expected to hide behind what it computes. By what it took, the loads
        that were held up would be chosen."""
        if not step.copies_s or step.work is None:
            return True
        computes_s = self.compute.seconds(step.work).mean_s
        return computes_s >= LOADED_LEAST_S and step.copies_s <= BUS_SHARE * computes_s
