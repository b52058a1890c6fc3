"""From "it is in the store" to "it is there": has the load of each request chosen, begun in its turn, watched and judged. What follows from what: see choosing.py, turns.py and timely.py. Not the answers to vLLM: see admission.py.

Events and `now` (seconds, one clock) in; it says nothing to workers, but what was decided to the log.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from objectcache.admission import Admission, Phase
from objectcache.choosing import Choosing, Other, Prompt
from objectcache.index import KnownChunks
from objectcache.messages import StepReport
from objectcache.metrics import Counters
from objectcache.moment import AT_ONCE, STAGED
from objectcache.report import log
from objectcache.timely import Timely
from objectcache.trace import Trace
from objectcache.tracked import Tracked
from objectcache.turns import Turns
from objectcache.worth import Choice

DOUBT, DOUBT_S = 4.0, 0.25  # times what is expected to be left of a load, and seconds
MOMENT_LEAST_S, MOMENT_MOST_S = 0.002, 0.05  # between two looks at when a request may be admitted
DOUBTED_S, DOUBTED_MAX = 60.0, 10_000  # chunks of loads that were lost
CHOICES = 8  # in a step: each takes a millisecond


@dataclass
class _Landing:
    """A load that a request computes on before it is known when all of it is there."""

    hashes: list[bytes]
    choice: Choice | None
    began_s: float
    ranks: int  # that have not said how it ended
    lost: bool = False


class Loading:
    """`requests` are all live ones, by name. `timely` is there if requests are admitted in time or
    `choosing` what is loaded. For the others see SchedulerHalf."""

    def __init__(
        self,
        chunk_tokens: int,
        block_tokens: int,
        requests: Mapping[str, Tracked],
        counters: Counters,
        turns: Turns,
        timely: Timely | None,
        choosing: Choosing | None,
        local_prefixes: bool,
        stage_chunks: int | None,
        trace: Trace,
        store_is_off: Callable[[float], bool],
        line_s: float,
    ) -> None:
        self._chunk_tokens = chunk_tokens
        self._block_tokens = block_tokens
        self._requests = requests
        self._counters = counters
        self.turns = turns
        self.timely = timely
        self.choosing = choosing
        self._local_prefixes = local_prefixes
        self._stage_chunks = stage_chunks
        self._trace = trace
        self._store_is_off = store_is_off
        self._line_s = line_s
        self._walked = False  # over those for which nothing was chosen, in this step
        self._held: int | None = None  # blocks of running requests, in this step
        self._alone: bool | None = None  # whether nothing runs, in this step
        self._asks_s: float | None = None  # how long it is expected to take
        self._runs: list[Tracked] | None = None  # whom it computes, but for who is new
        self._known = True  # what the last step computed
        self._beside = 0  # requests that it computed, and that were admitted since
        self._news = 0  # counts changes of what is being brought
        self._bringing: dict[bytes, Tracked] = {}  # chunk -> the request whose job brings it
        self._found: list[Tracked] = []  # for which nothing was chosen yet
        self._landing: dict[int, _Landing] = {}  # by job
        self._doubted = KnownChunks(DOUBTED_S, DOUBTED_MAX)
        self._choices = CHOICES
        self._step = 0

    # ---- before it begins

    def found(self, tracked: Tracked, now: float) -> None:
        """Its prefix is in the store."""
        if len(self._doubted):
            hashes = tracked.chain.hashes[: tracked.found]
            if any(self._doubted.has(chunk_hash, now) for chunk_hash in hashes):
                tracked.mode = STAGED
        self._found.append(tracked)

    def may_stage(self, tracked: Tracked) -> bool:
        """Whether nobody else is bringing the first chunk that this request needs."""
        if not self._local_prefixes:
            return True
        first = tracked.local_tokens // self._chunk_tokens
        if first >= len(tracked.chain.hashes):
            return True
        return self._bringing.get(tracked.chain.hashes[first]) in (None, tracked)

    def begins(self, tracked: Tracked, admission: Admission, now: float) -> bool:
        """Whether a prefix that was found is fetched now, as much of it as is chosen. True as well if the
        admission has its own answer: nothing to fetch, another brings it, or it streams."""
        name = tracked.request.request_id
        if self._store_is_off(now) or self.turns.waited_s(name, now) >= self._line_s:
            admission.leave()
            self.gone(tracked, now)
            return True
        if not self.may_stage(tracked) and not admission.overdue(now):
            self.turns.over(name, now)
            return True
        self._choose(tracked, now)
        if not self._walked:
            self._walked = True
            for one in self._found:
                self._choose(one, now)
            self._found = [one for one in self._found if not one.chosen]
        if not tracked.chosen:
            return False
        if not self._want(tracked, admission, now):
            self.turns.over(name, now)
            return True
        return self.turns.may(name, self._held_blocks, now)

    def _held_blocks(self) -> int:
        if self._held is None:
            self._held = sum(one.own_blocks(self._block_tokens) for one in self._running())
        return self._held

    def _choose(self, tracked: Tracked, now: float) -> None:
        """How much of it is loaded, once; then it stands in line."""
        admission = tracked.admission
        if tracked.chosen or admission is None or admission.phase is not Phase.FOUND:
            tracked.chosen = True
            return
        if not self.may_stage(tracked) and not admission.overdue(now):
            return
        if self.choosing is not None:
            if not self._choices:
                return
            self._choices -= 1
            self._limit(self.choosing, tracked, admission, now)
        tracked.chosen = True
        self._want(tracked, admission, now)

    def _limit(
        self, choosing: Choosing, tracked: Tracked, admission: Admission, now: float
    ) -> None:
        name, local_tokens = tracked.request.request_id, tracked.local_tokens
        chunks = admission.wanted(local_tokens)
        if not chunks:
            return
        prompt = _prompt(tracked, local_tokens, chunks)
        waiting = self.turns.chunks_waiting()
        choice = choosing.choose(prompt, self._others(tracked), waiting, now)
        if isinstance(choice, str):
            log.debug("objectcache: request %s: Load all %d chunks: %s.", name, chunks, choice)
            self._trace.note(name, "chosen", chunks=chunks, of=chunks, why=choice)
            return
        off = " The store is off: loads took longer than computing." if choosing.off else ""
        log.debug("objectcache: request %s: %s%s", name, choice.tell(), off)
        tracked.choice = choice
        self._trace.note(name, "chosen", of=chunks, **choice.numbers())
        admission.limit(choice.best.chunks, local_tokens)
        left_out = chunks - choice.best.chunks
        self._counters.add("recomputed_tokens", left_out * self._chunk_tokens)

    def _want(self, tracked: Tracked, admission: Admission, now: float) -> bool:
        """Stand in line; False if there is nothing to stand in line for."""
        name, asked = tracked.request.request_id, (self._news, tracked.local_tokens)
        if tracked.wanted == asked and self.turns.wants_still(name):
            return True
        tracked.wanted = asked
        count = admission.wanted(tracked.local_tokens)
        if count == 0 or (self._stage_chunks is not None and count > self._stage_chunks):
            return False
        first = tracked.local_tokens // self._chunk_tokens
        new = sum(h not in self._bringing for h in tracked.chain.hashes[first : first + count])
        tokens = tracked.request.num_tokens - tracked.local_tokens
        priority, blocks = tracked.request.priority, -(-tokens // self._block_tokens)
        self.turns.want(name, tracked.arrived_s, new, blocks, priority, now)
        return True

    def _others(self, tracked: Tracked) -> list[Other]:
        return [one.other for one in self._requests.values() if one is not tracked]

    # ---- while it is under way

    def brings(self, tracked: Tracked) -> None:
        """Its job is to bring its chunks, as far as no other does."""
        self._news += 1
        for chunk_hash in tracked.job_hashes:
            self._bringing.setdefault(chunk_hash, tracked)

    def began(self, tracked: Tracked, now: float) -> None:
        """Its stage was given to the workers."""
        assert tracked.job is not None
        self.turns.begins(tracked.request.request_id, now)
        tracked.began_s = tracked.next_look_s = tracked.next_moment_s = now
        if self.timely is not None:
            self.timely.began(tracked.job, len(tracked.job_hashes), now)

    def watch(self, tracked: Tracked, admission: Admission, now: float) -> None:
        """Let a request go whose prefix will be there when it is needed, or not for too long."""
        timely = self.timely
        if timely is None:
            return
        assert tracked.job is not None
        name = tracked.request.request_id
        if timely.admits and tracked.mode != STAGED and now >= tracked.next_moment_s:
            end = admission.end_of(len(tracked.job_hashes))
            tokens = tracked.request.num_tokens
            moment = timely.when(
                *(tracked.job, tokens, end, now, tracked.mode, self._is_alone(), self._beside),
                *(self._next_ask_s(timely), len(self._requests) - 1),
            )
            # A model of arrivals says too much of a store that became slow: it must not be far off.
            most_s = DOUBT * ((moment.staged_s if moment is not None else now) - now) + DOUBT_S
            believed = tracked.mode == AT_ONCE or timely.left_s(tracked.job, now) <= most_s
            if moment is not None and self._trace.weighed(name, moment, now) and believed:
                log.debug("objectcache: request %s: %s", name, moment.tell(now))
                if tracked.mode != AT_ONCE:  # it asked for no estimate, and none was doubted
                    self._judge(tracked, moment.staged_s, now)
                tracked.ahead = moment.ahead
                admission.due()
                return
            # To look costs a fraction of a millisecond, and many may be on their way.
            waits_s = moment.at_s - now if moment is not None else 0.0
            tracked.next_moment_s = now + min(MOMENT_MOST_S, max(MOMENT_LEAST_S, waits_s / 8))
        if self.choosing is not None and tracked.choice is not None and now >= tracked.next_look_s:
            self._give_up(self.choosing, tracked, admission, now)

    def goes_ahead(self, tracked: Tracked, admission: Admission, now: float) -> bool:
        """Whether what is there of a prefix, or comes, is copied while others compute, and not in the step
        that computes on it."""
        if self.timely is None or admission.phase is not Phase.READY:
            return False
        if admission.coming:
            return tracked.ahead
        if tracked.mode == AT_ONCE or not self._beside:
            return False
        end = tracked.local_tokens + admission.claim(tracked.local_tokens)
        chunks = self._chunks(tracked, end)
        found = self.timely.staged(tracked.request.num_tokens, end, chunks, now, self._beside)
        return found.ahead

    def _chunks(self, tracked: Tracked, end_tokens: int) -> int:
        """That are loaded of a prefix up to there."""
        return -(-end_tokens // self._chunk_tokens) - tracked.local_tokens // self._chunk_tokens

    @property
    def idle(self) -> bool:
        """Whether the last step computed nothing, and nobody was admitted since."""
        return not self._beside

    def _is_alone(self) -> bool:
        """Whether, as far as is known, nobody is on the GPU."""
        if self._alone is None:
            self._alone = self._known and not self._running()
        return self._alone

    def _next_ask_s(self, timely: Timely) -> float:
        """How long the step that vLLM puts together is expected to take: who is not in it is asked for
        behind it. 0.0 if there is work of which nothing is known."""
        if self._asks_s is None:
            # Of those that are admitted who has a job waits until it has ended.
            each = [one.request for one in self._running() if self._known and one.job is None]
            left = [(r.num_tokens - r.num_computed_tokens, r.num_computed_tokens) for r in each]
            self._asks_s = timely.step_s(left)
        return self._asks_s

    def _running(self) -> list[Tracked]:
        """Requests that are on the GPU, looked up once a step."""
        if self._runs is None:
            self._runs = [one for one in self._requests.values() if one.admitted]
        return self._runs

    def admitted(self) -> None:
        """Some request was, with a prefix or without."""
        self._asks_s = self._runs = None
        self._alone = False
        self._beside += 1

    def parks(self, tracked: Tracked) -> None:
        """It was admitted to wait until it is copied: there is nothing to decide any more."""
        assert tracked.job is not None
        self._counters.add("ahead_prompts")
        self.turns.parks(tracked.request.request_id)
        if self.timely is not None:
            self.timely.forget(tracked.job)

    def loads(self, tracked: Tracked, end_tokens: int) -> None:
        """It was admitted, and its prefix up to there is loaded in the step that computes on it."""
        if self.timely is not None:
            chunks = self._chunks(tracked, end_tokens)
            self.timely.loads(tracked.request.num_tokens, end_tokens, chunks, tracked.asked_s)

    def lands(self, tracked: Tracked) -> None:
        """It was admitted on its job before all of it was there; `reported` hears how that ends."""
        assert tracked.job is not None
        self._counters.add("timely_prompts")
        choice, tracked.choice = tracked.choice, None
        if self.timely is not None:
            ranks, hashes = self.timely.ranks, tracked.job_hashes
            self._landing[tracked.job] = _Landing(hashes, choice, tracked.began_s, ranks)

    def _landed(self, job: int, lost: bool, now: float) -> None:
        """One rank says how its part of such a load ended. A lost one is not judged: why is not known."""
        landing = self._landing.get(job)
        if landing is None:
            return
        landing.ranks -= 1
        landing.lost = landing.lost or lost
        if lost:
            self.doubt(landing.hashes, now)
        if landing.ranks:
            return
        del self._landing[job]
        if self.choosing is not None and landing.choice is not None and not landing.lost:
            self.choosing.ended(landing.choice, now - landing.began_s, now)

    def doubt(self, hashes: Sequence[bytes], now: float) -> None:
        """Of a load that was lost after its request was admitted. Whoever wants these chunks next waits until
        they are there: before that a failure is only a recompute, which replaces what is wrong."""
        for chunk_hash in hashes:
            self._doubted.add(chunk_hash, now)

    def _give_up(
        self, choosing: Choosing, tracked: Tracked, admission: Admission, now: float
    ) -> None:
        """Have it computed, if its load became so slow."""
        assert tracked.job is not None and tracked.choice is not None
        request, chunks = tracked.request, len(tracked.job_hashes)
        prompt = _prompt(tracked, tracked.local_tokens, chunks)
        others = self._others(tracked)
        why, again_s = choosing.gives_up(
            tracked.choice, tracked.job, prompt, others, tracked.began_s, now
        )
        tracked.next_look_s = now + again_s
        if why:
            log.debug("objectcache: request %s: %s.", request.request_id, why)
            self._counters.add("given_up_prompts")
            self._trace.note(request.request_id, "gives up")
            admission.give_up()

    def falls_short(self, job: int, tracked: Tracked) -> None:
        """Some rank does not get all of a job: it is not admitted before the others have said how much."""
        if self.timely is not None:
            self.timely.forget(job)
        if tracked.admission is not None and tracked.job == job:
            tracked.admission.falls_short()

    def staged(self, tracked: Tracked, chunks: int, now: float) -> None:
        """So many chunks of its job are there, and no more will come."""
        assert tracked.job is not None
        if chunks == len(tracked.job_hashes):
            self._judge(tracked, now, now)
        if self.timely is not None:
            self.timely.forget(tracked.job)

    def _judge(self, tracked: Tracked, there_at: float, now: float) -> None:
        choice, tracked.choice = tracked.choice, None  # once
        if self.choosing is not None and choice is not None:
            self.choosing.ended(choice, there_at - tracked.began_s, now)

    def over(self, tracked: Tracked, now: float) -> None:
        """Its job is the workers' business alone, or nobody's."""
        assert tracked.job is not None
        self._news += 1
        if self.timely is not None:
            self.timely.forget(tracked.job)
        for chunk_hash in tracked.job_hashes:
            if self._bringing.get(chunk_hash) is tracked:
                del self._bringing[chunk_hash]
        self.turns.over(tracked.request.request_id, now)

    def gone(self, tracked: Tracked, now: float) -> None:
        """The request ended. Of its job `over` is said as well."""
        self.turns.over(tracked.request.request_id, now)
        self._found = [one for one in self._found if one is not tracked]

    # ---- steps

    def scheduled(self, scheduled: Mapping[str, int], now: float) -> int:
        """A step computes so many tokens of each request. Its number, for the workers to report it;
        0 if that is of no use."""
        self.turns.stepped()
        self._beside = len(scheduled)
        self._choices, self._walked = CHOICES, False
        self._held = self._alone = self._asks_s = self._runs = None
        if self.timely is None:
            return 0
        self._step += 1
        contexts = {
            name: (tokens, self._requests[name].request.num_computed_tokens)
            for name, tokens in scheduled.items()
            if name in self._requests
        }
        self._known = len(contexts) == len(
            scheduled
        )  # else there is work of which nothing is known
        self.timely.scheduled(self._step, contexts if self._known else None, now)
        return self._step

    def reported(self, report: StepReport, now: float) -> None:
        """What workers saw of steps, of prefixes on their way and of the wire."""
        if self.timely is None:
            return
        for job in report.lost:  # at once: who comes next may come before other ranks have ended
            if job in self._landing:
                self.doubt(self._landing[job].hashes, now)
        for landed in report.landed:
            self._landed(landed.job, landed.lost, now)
        needs: dict[int, list[float]] = {}
        for step, at_s in report.needed:
            needs.setdefault(step, []).append(at_s)
        for step, times in needs.items():
            self.timely.lead.needed(step, times, now)
        waits: dict[int, bool] = {}  # a step that waited on one rank held up all
        for step, waited in report.steps:
            waits[step] = waits.get(step, False) or waited
        for step in sorted(waits):
            self.timely.stepped(step, waits[step], now)
        self.timely.next_reports()
        for coming in report.coming:
            self.timely.seen(coming.job, coming.chunks, coming.ready, coming.layers, now)
        for shard, wire in report.wires:
            self.timely.heard(shard, wire)


def _prompt(tracked: Tracked, local_tokens: int, chunks: int) -> Prompt:
    """What is priced of a request."""
    early, tokens = tracked.mode != STAGED, tracked.request.num_tokens
    return Prompt(tokens, local_tokens, chunks, tracked.deadline_s, early)
