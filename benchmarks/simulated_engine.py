"""An engine as vLLM runs it, on a simulated GPU and wire, with the package's own decisions about each prefix. For simulate.py.

Steps of at most `pass_tokens`: every running sequence gets a token, then prompts get what is left, in the order of
arrival, those whose prefix is not to be used yet left out. A step that loads a prefix computes layer after layer and
waits for those that are not there. Not modelled: preemption, lookups (a fixed time), hedges, timeouts, failures but refusals.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from benchmarks.simulated import S3, Call, Timeline, Wire
from benchmarks.simulated_prompts import (
    CHUNK_TOKENS,
    COPY_BYTES_PER_S,
    LAYERS,
    RECOMPUTE,
    SLICE_BYTES,
    Fetch,
    Request,
    Setting,
    Step,
    Tally,
    plan_for,
)
from objectcache import moment, sharing, worth
from objectcache.arrival import Coming, WireRate
from objectcache.compute import ComputeModel, Work, decodes, first_pass, prefill
from objectcache.flow import Flow, StoreModel
from objectcache.plan import Plan
from objectcache.timely import CHANCE_SIGMAS

RETRY_S = 0.1  # after a refusal; doubles to 2 s, and a random part of it
# Between two questions of an engine that has nothing else to do, and with more time left, at most a quarter of it.
ASK_S, ASK_MOST_S = 0.002, 0.05
RESHARE_S, REFUSED_LATELY_S = 0.005, 5.0
GPU_NOISE = 0.03
BEYOND_BYTES_PER_S = 0.625e9  # 5 Gbps, of the calibrated rule


class Engine:
    """`arrive` for each request; then run the timeline."""

    def __init__(self, line: Timeline, s3: S3, setting: Setting, seed: int) -> None:
        self._line, self._s3, self._setting = line, s3, setting
        self._random = random.Random(seed)
        self._wire = Wire(line, setting.wire_bytes_per_s, setting.connection_bytes_per_s)
        self._flow = Flow(setting.connections)
        self._rate = WireRate()
        self._use = worth.Usefulness()
        self._compute = ComputeModel(setting.prior)
        self._queue: list[Request] = []
        self._prefilling: list[Request] = []
        self._decoding: list[Request] = []
        self._fetches: list[Fetch] = []  # begun and not over
        self._step: Step | None = None
        self._asks_at = math.inf
        self._free_slots, self._free_blocks = setting.ring_slots, setting.gpu_blocks
        self._slots: dict[Fetch, int] = {}
        self._shared_at = self._refused_at = -math.inf
        self._bodies = 0
        self._pending: dict[str, float] = {}
        self.tally = Tally()
        self.finished: Callable[[Request], None] = lambda request: None

    def arrive(self, request: Request) -> None:
        self._line.at(request.arrives_s, lambda: self._arrived(request))

    # ---- deciding about a prefix

    def _arrived(self, request: Request) -> None:
        request.left = request.prompt_tokens
        self._queue.append(request)
        if self._setting.mode == RECOMPUTE or not request.hit_chunks:
            request.decided = True
        else:
            self._line.at(self._line.now + self._setting.lookup_s, lambda: self._found(request))
        self._wake()

    def _found(self, request: Request) -> None:
        chunks = request.hit_chunks
        hit = worth.Hit(
            request.prompt_tokens, 0, CHUNK_TOKENS, chunks, LAYERS * SLICE_BYTES, LAYERS
        )
        if self._setting.split:
            chunks = self._worth(request, hit)
        chunks = min(chunks, self._setting.ring_slots)
        request.decided = True
        if chunks:
            loaded = min(chunks * CHUNK_TOKENS, (request.prompt_tokens - 1) // 16 * 16)
            request.context, request.left = loaded, request.prompt_tokens - loaded
            request.fetch = Fetch(request, self._plan(request, chunks))
            self._begin_fetches()
        self._wake()

    def _worth(self, request: Request, hit: worth.Hit) -> int:
        now = self._line.now
        choice = worth.choose(hit, self._meets(), self._compute)
        if choice.best.chunks and not self._use.off:
            self._use.used(now)
        elif self._use.tries(now):
            choice = worth.choose(hit, self._meets(), self._compute, trial=True)
        else:
            return 0
        request.choice = choice
        return choice.best.chunks

    def _store(self) -> StoreModel:
        """As measured, with what the wire was seen to give."""
        seen = self._flow.model()
        rate = self._rate.bytes_per_s(self._line.now, seen.connection_bytes_per_s)
        return replace(seen, wire_bytes_per_s=min(seen.wire_bytes_per_s, rate))

    def _plan(self, request: Request, chunks: int) -> Plan:
        layer_s = self._first_pass_s(request).mean_s / LAYERS
        if self._setting.mode == moment.STAGED:
            layer_s = 0.0
        return plan_for(chunks, self._flow.limit(self._line.now), self._store(), layer_s)

    def _meets(self) -> worth.Now:
        setting, model = self._setting, self._store()
        wire = min(model.wire_bytes_per_s, setting.connections * model.connection_bytes_per_s)
        served = self._wire.served
        waiting = [r.fetch for r in self._queue if r.fetch is not None]
        left = [f.total_bytes - f.landed(served) for f in waiting]
        return worth.Now(
            model,
            setting.connections,
            wire,
            wire_busy_s=sum(left) / wire,
            gpu_busy_s=self._gpu_busy_s([r for r in self._queue if r.decided and not r.fetch]),
            wire_line=sum(one > 0 for one in left),
            gpu_line=len(self._queue) - 1 + len(self._decoding),
            pass_tokens=setting.pass_tokens,
            beside=self._decode_work(),
            slowness=self._use.slowness(self._line.now),
            overlaps=setting.mode != moment.STAGED,
        )

    def _gpu_busy_s(self, queued: Sequence[Request] = ()) -> float:
        """Until what has begun, and these, is computed. Who waits for bytes takes no GPU yet, and is
        overtaken meanwhile."""
        work = Work()
        for request in (*self._prefilling, *queued):
            work = work.then(prefill(request.left, request.context, self._setting.pass_tokens))
        busy_s = self._compute.seconds(work).mean_s
        if self._step is not None:
            done_s = self._line.now - self._step.began_s
            busy_s += max(0.0, self._compute.seconds(self._step.work).mean_s - done_s)
        return busy_s

    def _decode_work(self) -> Work:
        if not self._decoding:
            return Work()
        return decodes(
            len(self._decoding), sum(r.prompt_tokens + r.decoded for r in self._decoding)
        )

    def _wanted(self, fetch: Fetch, served: float, running_s: float) -> sharing.Wanted:
        request = fetch.request
        layer_s = self._first_pass_s(request).mean_s / LAYERS
        ready = fetch.layers_ready(served)
        ahead_s = running_s
        if fetch.admitted:
            at = fetch.ready_at
            runs_dry = max((a + (len(at) - i) * layer_s for i, a in enumerate(at)), default=0.0)
            ahead_s = max(0.0, runs_dry - self._line.now)
        return sharing.Wanted(
            request.arrives_s,
            fetch.total_bytes - fetch.landed(served),
            fetch.chunks * SLICE_BYTES,
            layer_s,
            ahead_s,
            ready > 0,
            fetch.admitted,
            len(fetch.unsent) + fetch.in_flight,
        )

    def _first_pass_s(self, request: Request) -> moment.Estimate:
        work = first_pass(request.left, request.context, self._setting.pass_tokens)
        return self._compute.seconds(work.beside(self._decode_work()))

    def _due(self, request: Request, next_ask_s: float) -> bool:
        """The admission of a request with a prefix on its way."""
        fetch, now = request.fetch, self._line.now
        assert fetch is not None
        if fetch.coming is None:
            return False
        served = self._wire.served
        ready = fetch.layers_ready(served)
        fetch.coming.seen(now, fetch.landed(served), ready, fetch.waiting() + len(fetch.unsent))
        arrivals = fetch.coming.arrivals(now)
        layer_s = self._first_pass_s(request).over(LAYERS)
        copy_s = fetch.chunks * SLICE_BYTES / COPY_BYTES_PER_S
        found = moment.moment(
            arrivals, now, layer_s, copy_s, self._setting.mode, self._setting.margin
        )
        if ready == LAYERS or found.due(now):
            return True
        if self._gives_up(request, found):
            return True
        wait_s = max(ASK_S / 2, min((found.at_s - now) / 4, ASK_MOST_S))
        self._asks_at = min(self._asks_at, now + wait_s)
        if self._setting.mode != moment.JUST_IN_TIME or not self._setting.early:
            return False
        running = len(self._decoding) + len(self._prefilling)
        come_s = arrivals.later_s(CHANCE_SIGMAS if running else 0.0)
        stall_s = moment.stall_s(now, come_s, layer_s.mean_s, copy_s)
        asks = (next_ask_s, running + len(self._queue) - 1) if running else (0.0, 0)
        missed = not running or found.at_s <= now + next_ask_s  # or there is time to ask again
        return missed and moment.early(found, now, stall_s, *asks)

    def _gives_up(self, request: Request, found: moment.Moment) -> bool:
        """Computes all of it, if that is sooner now; its requests under way end for nothing."""
        fetch, choice, tokens = request.fetch, request.choice, self._setting.pass_tokens
        if choice is None or fetch is None:
            return False
        if fetch.unsent and self._line.now - self._refused_at > REFUSED_LATELY_S:
            return False  # what it waits for is its turn
        admit_s = found.at_s - found.margin_s - self._line.now
        rest = self._compute.seconds(prefill(request.left, request.context, tokens))
        whole = self._compute.seconds(prefill(request.prompt_tokens, 0, tokens))
        if worth.still_worth(admit_s, rest, whole, self._gpu_busy_s()):
            return False
        since_s = min(fetch.sent_s, self._line.now)
        self._use.loaded(self._line.now, choice, self._line.now + admit_s - since_s)
        request.fetch, request.choice = None, None
        request.context, request.left = 0, request.prompt_tokens
        fetch.unsent.clear()
        fetch.given_up = True
        self.tally.given_up += 1
        self._ended(fetch)
        return True

    def _ended(self, fetch: Fetch) -> None:
        """A fetch that was given up gives its slots back when nothing writes to them any more."""
        if fetch.given_up and not fetch.in_flight:
            self._free_slots += fetch.chunks
            self._fetches.remove(fetch)

    # ---- the wire

    def _begin_fetches(self) -> None:
        now = self._line.now
        waiting = [r.fetch for r in self._queue if r.fetch is not None and not r.fetch.started]
        if not waiting:
            return
        served = self._wire.served
        promised = sum(f.request.blocks for f in self._fetches if not (f.admitted or f.given_up))
        chosen = sharing.begin(
            [
                sharing.Waiting(self._wanted(f, served, 0.0), f.chunks, f.request.blocks)
                for f in waiting
            ],
            now,
            self._free_slots,
            self._free_blocks,
            promised,
        )
        for i in chosen:
            fetch = waiting[i]
            fetch.started = True
            self._free_slots -= fetch.chunks
            self._fetches.append(fetch)
            fetch.coming = Coming(
                [fetch.chunks * SLICE_BYTES] * LAYERS,
                fetch.chunks,
                min(len(fetch.unsent), self._flow.limit(now)),
                now,
                self._store(),
                fetch.groups,
            )
        used = self._setting.ring_slots - self._free_slots
        self.tally.ring_most = max(self.tally.ring_most, used)
        if chosen:
            self._shared_at = -math.inf
            self._send()

    def _send(self) -> None:
        """Requests into the slots that are free."""
        now = self._line.now
        limit = self._flow.limit(now)
        open_ = [f for f in self._fetches if f.unsent]
        if not open_ or self._bodies >= limit:
            return
        if self._setting.wire_rule in ("equal", "in-order"):
            while self._bodies < limit and open_:
                fetch = open_[0]
                if self._setting.wire_rule == "equal":
                    fetch = min(open_, key=lambda f: f.in_flight)
                self._ask_s3(fetch, 1)
                open_ = [f for f in open_ if f.unsent]
            return
        fetches = [f for f in self._fetches if (f.unsent or f.in_flight) and not f.given_up]
        served, running_s = self._wire.served, self._gpu_busy_s()
        wanted = [self._wanted(f, served, running_s) for f in fetches]
        if now - self._shared_at >= RESHARE_S:
            model = self._store()
            if self._setting.wire_rule == "ours":
                given = sharing.slots(
                    wanted, now, limit, model.wire_bytes_per_s, model.connection_bytes_per_s
                )
            else:
                wire = min(model.wire_bytes_per_s, limit * model.connection_bytes_per_s)
                rates = sharing.stall_optimal(wanted, wire, BEYOND_BYTES_PER_S)
                given = sharing.requests_for(wanted, rates, range(len(wanted)), limit)
            self._slots, self._shared_at = dict(zip(fetches, given, strict=True)), now
        given = [self._slots.get(f, 0) for f in fetches]
        while self._bodies < limit:
            in_flight, unsent = [f.in_flight for f in fetches], [len(f.unsent) for f in fetches]
            i = sharing.next_request(wanted, now, given, in_flight, unsent)
            if i is None:
                break
            self._ask_s3(fetches[i], 1)
        if self._bodies < limit and any(f.unsent for f in fetches):
            self._later("send", now + RESHARE_S, self._send)

    def _ask_s3(self, fetch: Fetch, attempt: int, group: int | None = None) -> None:
        now = self._line.now
        if group is None:
            group = fetch.unsent.pop()
            fetch.sent_s = min(fetch.sent_s, now)
            fetch.in_flight += 1
            self._bodies += 1
            self._flow.began(now)
        first, last = fetch.groups[group]
        size = (last - first) * SLICE_BYTES
        number = self._s3.requests

        def first_byte() -> None:
            since = self._wire.begin()
            fetch.bodies[number] = (since, size)
            fetch.begun[group] += 1
            fetch.last_from[group] = since
            self._wire.when(since + size, end)
            if fetch.admitted:
                self._watch(fetch)
            begun_s[0], beside[0] = self._line.now, self._wire.bodies

        def end() -> None:
            beside[0] = (beside[0] + self._wire.bodies) / 2
            self._rate.body(self._line.now, size, self._line.now - begun_s[0], beside[0])
            self._wire.end()
            del fetch.bodies[number]
            fetch.done_bytes += size
            fetch.in_flight -= 1
            self._bodies -= 1
            self.tally.loaded_bytes += size
            self._flow.arrived(self._line.now, size, begun_s[0] - now, self._line.now - now)
            self._flow.ended(self._line.now)
            self._ended(fetch)
            self._send()
            if not fetch.given_up and fetch.done_bytes == fetch.total_bytes:
                self._judge(fetch.request)
                self._wake()

        def again() -> None:
            if not fetch.given_up:
                self._ask_s3(fetch, attempt + 1, group)
                return
            fetch.in_flight -= 1
            self._bodies -= 1
            self._flow.ended(self._line.now)
            self._ended(fetch)
            self._send()

        begun_s, beside = [now], [0.0]
        if not self._s3.get(first_byte):
            self._flow.throttled(now)
            self._refused_at = now
            pause_s = self._random.random() * min(2.0, RETRY_S * 2 ** (attempt - 1))
            self._line.at(now + 0.01 + pause_s, again)

    def _later(self, what: str, at: float, call: Call) -> None:
        """Once, however often it is asked for; the earliest time counts."""
        if self._pending.get(what, math.inf) <= at:
            return
        self._pending[what] = at

        def now() -> None:
            if self._pending.get(what) == at:
                del self._pending[what]
                call()

        self._line.at(at, now)

    # ---- steps

    def _wake(self) -> None:
        """Something new: ask again, unless a step is under way."""
        if self._step is None:
            self._begin_step()

    def _begin_step(self) -> None:
        now, setting = self._line.now, self._setting
        self._asks_at = math.inf
        work = self._decode_work()
        budget = setting.pass_tokens - len(self._decoding)
        prompts: list[tuple[Request, int]] = []
        for request in self._prefilling:
            if budget > 0:
                tokens = min(request.left, budget)
                prompts.append((request, tokens))
                work = work.beside(prefill(tokens, request.context, setting.pass_tokens))
                budget -= tokens
        loads: list[Fetch] = []
        next_ask_s = self._compute.seconds(work).mean_s if work.tokens else ASK_S
        for request in list(self._queue):
            if budget <= 0 or not self._may_admit(request, next_ask_s):
                continue
            self._queue.remove(request)
            self._prefilling.append(request)
            self._free_blocks -= request.blocks
            if request.fetch is not None:
                request.fetch.admitted = True
                loads.append(request.fetch)
            tokens = min(request.left, budget)
            prompts.append((request, tokens))
            work = work.beside(prefill(tokens, request.context, setting.pass_tokens))
            budget -= tokens
        if not work.tokens:
            if self._queue:
                self._later("ask", min(self._asks_at, now + ASK_MOST_S), self._wake)
            return
        takes_s = sum(a * b for a, b in zip(work, setting.truth, strict=True))
        takes_s *= math.exp(GPU_NOISE * self._random.gauss(0, 1))
        self._step = Step(now, work, takes_s, loads, prompts)
        for fetch in loads:
            fetch.ready_at = [now] * fetch.layers_ready(self._wire.served)
            self._watch(fetch)
        self._line.at(now + takes_s, self._end_step)
        self._begin_fetches()

    def _judge(self, request: Request) -> None:
        """Whether its load kept what was expected, now that all of it is there."""
        if request.choice is not None:
            took_s = self._line.now - request.fetch.sent_s if request.fetch else 0.0
            self._use.loaded(self._line.now, request.choice, took_s)

    def _may_admit(self, request: Request, next_ask_s: float) -> bool:
        if not request.decided or request.blocks > self._free_blocks:
            return False
        return request.fetch is None or self._due(request, next_ask_s)

    def _watch(self, fetch: Fetch) -> None:
        """Note when each layer comes that a running step still waits for."""
        served = self._wire.served
        ready = fetch.layers_ready(served)
        fetch.ready_at += [self._line.now] * (ready - len(fetch.ready_at))
        for group, (first, last) in enumerate(fetch.groups):
            if first <= ready < last and fetch.begun[group] == fetch.chunks:
                mark = fetch.last_from[group] + (ready + 1 - first) * SLICE_BYTES
                self._wire.when(mark, lambda: self._watch(fetch))

    def _end_step(self) -> None:
        step, now = self._step, self._line.now
        assert step is not None
        if any(len(fetch.ready_at) < LAYERS for fetch in step.loads):
            self._line.at(now + ASK_S / 4, self._end_step)  # a layer is still to come
            return
        copies_s, stalls_s = step.waits_s()
        until = step.began_s + step.takes_s + copies_s + stalls_s
        if until > now + 1e-9:
            self._line.at(until, self._end_step)
            return
        self._step = None
        self.tally.computed_tokens += step.work.tokens
        took_s = now - step.began_s
        self.tally.busy_s += took_s
        self.tally.stalled_s += stalls_s
        if stalls_s == 0.0 and copies_s < GPU_NOISE * step.takes_s:
            self._compute.timed(step.work, took_s)  # else it says nothing about computing
        for fetch in step.loads:
            self._free_slots += fetch.chunks
            self._fetches.remove(fetch)
        self._tokens(step, took_s)
        self._begin_fetches()
        self._begin_step()

    def _tokens(self, step: Step, took_s: float) -> None:
        now = self._line.now
        self.tally.token_s += [took_s] * len(self._decoding)
        for request in self._decoding:
            request.decoded += 1
        for request, tokens in step.prompts:
            request.left -= tokens
            request.context += tokens
            if request.left == 0:
                request.first_token_s = now - request.arrives_s
                request.decoded = 1
                self._prefilling.remove(request)
                self._decoding.append(request)
                self.tally.requests.append(request)
        for request in [r for r in self._decoding if r.decoded >= r.output_tokens]:
            self._decoding.remove(request)
            self._free_blocks += request.blocks
            self.finished(request)
