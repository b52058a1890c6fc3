"""The scheduler half: names prefixes, asks which exist, answers vLLM's scheduler, and says what workers do. No bytes, no waiting.

vLLM calls from one thread and must not be held up while anything computes: lookups run on a loop of their
own and are polled. What to answer about one request is decided in admission.py; here its events are gathered.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from objectcache import keys
from objectcache.admission import Admission, Load, Phase, Stream, asks, loadable
from objectcache.asked import asked
from objectcache.breaker import Breaker
from objectcache.choosing import Choosing
from objectcache.config import Options
from objectcache.errors import Misconfigured, ObjectCacheError
from objectcache.index import KnownChunks
from objectcache.keys import ChunkChain, Namespace
from objectcache.loading import Loading
from objectcache.lookup import Lookup, LookupResult, check
from objectcache.loop import LoopThread
from objectcache.messages import (
    LoadCommand,
    StageCommand,
    StepCommands,
    StepReport,
    StreamCommand,
)
from objectcache.metrics import STORE_COUNTERS, Counters, ObjectCacheStats
from objectcache.report import Reporter
from objectcache.saves import Saves
from objectcache.stores import open_store
from objectcache.timely import Timely
from objectcache.trace import Trace
from objectcache.tracked import Streaming, Tracked
from objectcache.turns import Turns
from objectcache.unsure import Unsure

CHECK_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 1.0
IDLE_WAIT_S = 0.005  # for a lookup while nothing is computed: to ask again takes the GIL from it
LOOK_AGAIN_S = 0.1  # for a request that is to be computed and waits for blocks
MISSES = ("", "NotFound", "Corrupt")  # the store answered, if not with what was hoped for


class SchedulerHalf:
    """`ranks` workers report each stage; `shards` of them each save.

    `local_prefixes` is whether vLLM itself caches prefixes: then a request may wait for another
    that is bringing the same chunks, and find them there. A prefix of more than `stage_chunks` chunks is
    streamed; None if vLLM would not compute what a stream fails to bring. `timely` is there if requests
    are admitted in time or `choosing` what to load; `evict` takes pages out of vLLM's own prefix cache.
    """

    def __init__(
        self,
        options: Options,
        namespace: Namespace,
        block_tokens: int,
        ranks: int,
        shards: int,
        loads: bool,
        saves: bool,
        local_prefixes: bool,
        turns: Turns,
        stage_chunks: int | None = None,
        timely: Timely | None = None,
        evict: Callable[[set[int]], None] = lambda block_ids: None,
        choosing: Choosing | None = None,
        trace: Trace | None = None,
    ) -> None:
        self._options = options
        self._namespace = namespace
        self._block_tokens = block_tokens
        self._ranks = ranks
        self._shards = shards
        self._loads = loads
        self._saves = saves and options.save
        self._stage_chunks = stage_chunks
        self._unsure, self._admissions, self._evict = Unsure(ranks), 0, evict
        self._trace = trace or Trace(time.monotonic, keeps=False)
        self._requests: dict[str, Tracked] = {}
        self._counters = Counters()
        self._breaker = Breaker()
        self.loading = Loading(
            options.chunk_tokens,
            block_tokens,
            self._requests,
            self._counters,
            turns,
            timely,
            choosing,
            local_prefixes,
            stage_chunks,
            self._trace,
            self._breaker.is_open,
            options.stage_timeout_ms / 1000,
        )
        self._known = KnownChunks(options.known_ttl_s, options.known_keys_max)
        self._lookups: dict[int, tuple[Tracked, int]] = {}  # with chunks known beforehand
        self._jobs: dict[int, Tracked] = {}
        self._stage_reports: dict[int, list[tuple[int, str]]] = {}
        self._streams: dict[int, Streaming] = {}
        self._saving = Saves(options.chunk_tokens, block_tokens, shards, self._known)
        self._next_ticket = 0
        self._idled = False  # in this step
        self._commands = StepCommands()
        self._reporter = Reporter()
        self._store_seen = dict.fromkeys(STORE_COUNTERS, 0)
        self._loop = LoopThread("objectcache-scheduler")
        self._store = open_store(options)
        self._lookup = Lookup(self._loop, self._store, options.lookup_timeout_ms / 1000)

    def check(self) -> None:
        """Ask the store once whether it can be used. Raises Misconfigured if that is required, else warns."""
        try:
            self._loop.submit(check(self._store, CHECK_TIMEOUT_S)).result(CHECK_TIMEOUT_S + 1)
        except ObjectCacheError as error:
            if self._options.startup_check == "require":
                raise Misconfigured(
                    f"objectcache cannot use {self._store.name}: {error.message}", error.hint
                ) from error
            self._reporter.warn(f"use {self._store.name}", error)
        else:
            if self._saves:
                document = self._namespace.to_json()
                key = f"{self._namespace.name}/{keys.NAMESPACE_FILE}"
                self._loop.call(lambda: self._loop.spawn(self._describe(key, document)))

    async def _describe(self, key: str, document: bytes) -> None:
        """Leave beside the chunks a document that says what they were computed with."""
        try:
            await self._store.write(key, memoryview(document))
        except ObjectCacheError as error:
            self._reporter.warn("describe the namespace", error)

    # ---- a request's life, as vLLM tells it

    def added(
        self, request: Any, root: bytes, items: Sequence[keys.Item], may_load: bool = True
    ) -> None:
        """A request came whose KV may be cached under this root, and perhaps loaded."""
        now = time.monotonic()
        chain = ChunkChain(root, self._options.chunk_tokens, items)
        tracked = Tracked(request, chain, now, may_load=may_load)
        wants = asked(request.kv_transfer_params, self._options.admission, self._reporter.ignore)
        tracked.deadline_s = now + wants.deadline_s
        tracked.mode, tracked.saves = wants.mode, wants.saves
        self._requests[request.request_id] = tracked
        self._look_up(tracked, now)

    def matched_tokens(self, request_id: str, local_tokens: int) -> tuple[int | None, bool]:
        """Tokens to load after the `local_tokens` that vLLM has, None for "ask again"; and whether vLLM
        has to park the request until they came."""
        tracked = self._requests.get(request_id)
        if tracked is None:
            return 0, False
        now = time.monotonic()
        self._take_lookups()
        if tracked.admitted or self._knows_more(tracked, now):
            self._look_up(tracked, now)
        admission = tracked.admission
        if admission is None:
            return 0, False
        if admission.phase is Phase.LOOKUP and not self._idled and self.loading.idle:
            self._idled = True  # once a step, however many are looked up
            self._lookup.wait(IDLE_WAIT_S)
            self._take_lookups()
        tracked.local_tokens, tracked.asked_s = local_tokens, now
        if admission.may_fetch and not self.loading.begins(tracked, admission, now):
            return None, False
        if admission.staging:
            self.loading.watch(tracked, admission, now)
        ahead = self.loading.goes_ahead(tracked, admission, now)
        answer = admission.ask(local_tokens, now, self.loading.may_stage(tracked), ahead)
        if answer.stage is not None:
            self._stage(tracked, answer.stage.first, answer.stage.count)
        if answer.release:
            self._release(tracked)
        if admission.timed_out:
            admission.timed_out = False
            self._counters.add("late_prompts")
        return answer.tokens, answer.asynchronous

    def allocated(self, request_id: str, block_ids: Sequence[int], tokens: int) -> None:
        """vLLM admitted the request, `tokens` of it on our word; these are all its blocks."""
        self.loading.admitted()
        tracked = self._requests.get(request_id)
        if tracked is None:
            return
        self._admissions += 1
        tracked.admitted, tracked.admission_number = True, self._admissions
        if tracked.admission is None:
            return
        load, unused = tracked.admission.allocated(tokens, tracked.local_tokens)
        if unused:
            self._release(tracked)
        if load is None:
            self.loading.gone(tracked, time.monotonic())
        first = tracked.local_tokens // self._block_tokens
        ids = list(block_ids[first : first + load.blocks]) if load is not None else []
        if isinstance(load, Stream):
            self._stream(tracked, load, request_id, ids)
        elif isinstance(load, Load):
            self._load(tracked, load, ids, ahead=tracked.admission.ahead)

    def finished(self, request_id: str) -> None:
        tracked = self._requests.pop(request_id, None)
        if tracked is None:
            return
        self.loading.gone(tracked, time.monotonic())
        if tracked.admission is not None and tracked.admission.gone():
            self._release(tracked)

    # ---- steps

    def commands(self, scheduled: Mapping[str, int], block_ids: "Any") -> StepCommands:
        """What workers do in this step. `scheduled` maps requests to the tokens they compute now;
        `block_ids(request_id)` gives all blocks of one."""
        now = time.monotonic()
        self._take_lookups()
        self._idled = False
        commands, self._commands = self._commands, StepCommands()
        commands.namespace = (self._namespace.name, self._namespace.digest)
        commands.step = self.loading.scheduled(scheduled, now)
        misled = self._on_unsure(scheduled, block_ids) if self._unsure else set()
        if self._saves:
            for request_id, tokens in scheduled.items():
                tracked = self._requests.get(request_id)
                if tracked is None or not tracked.saves or tracked.misled:
                    continue
                if request_id not in misled:
                    commands.saves += self._saving.of(tracked, tokens, block_ids, now)
        return commands

    def reported(self, report: StepReport) -> None:
        """What workers did; each rank reports for itself."""
        now = time.monotonic()
        self.loading.reported(report, now)
        for job in report.lost:
            self._misled(*self._unsure.lost(job))
        for landed in report.landed:
            self._misled(*self._unsure.ended(landed.job, landed.lost))
        for job in {coming.job for coming in report.coming if coming.failed} & self._jobs.keys():
            self.loading.falls_short(job, self._jobs[job])
        for staged in report.staged:
            if staged.job not in self._jobs:
                continue  # released meanwhile
            if staged.chunks < len(self._jobs[staged.job].job_hashes):
                self.loading.falls_short(staged.job, self._jobs[staged.job])
            reports = self._stage_reports.setdefault(staged.job, [])
            reports.append((staged.chunks, staged.error))
            if len(reports) == self._ranks:
                del self._stage_reports[staged.job]
                self._staged(staged.job, *min(reports), now=now)
        for streamed in report.streamed:
            streaming = self._streams[streamed.job]
            streaming.reports.append((streamed.chunks, streamed.error))
            if len(streaming.reports) == self._ranks:
                del self._streams[streamed.job]
                self._streamed(streaming, *min(streaming.reports), now=now)
        for saved in report.saved:
            self._saving.saved(saved.chunk_hash, saved.outcome, now)

    @property
    def has_work(self) -> bool:
        """Whether workers must hear something although no request needs a step."""
        return bool(self._commands.releases or self._commands.stops)

    def forget(self, namespace: Namespace) -> None:
        """Nothing in the store is of use any more: the weights changed, or somebody asked."""
        for tracked in self._requests.values():
            if tracked.admission is not None and tracked.admission.gone():
                self._release(tracked)
            tracked.admission = None
            self.loading.gone(tracked, time.monotonic())
        self._requests.clear()
        self._known.clear()
        self._saving.clear()
        self._namespace = namespace

    def stats(self) -> ObjectCacheStats | None:
        for name in STORE_COUNTERS:
            now = getattr(self._store.counters, name)
            self._counters.add(name, now - self._store_seen[name])
            self._store_seen[name] = now
        return self._counters.take()

    def shutdown(self) -> None:
        self._loop.stop(self._store.close(), CLOSE_TIMEOUT_S)

    # ---- lookups

    def _look_up(self, tracked: Tracked, now: float) -> None:
        """Ask what of it is in the store, at first and when it comes again: it was preempted, or the
        answer was that there is nothing."""
        tracked.admission, tracked.admitted = None, False
        tracked.chosen, tracked.choice = False, None
        tracked.found, tracked.looked_at = 0, now
        self.loading.gone(tracked, now)
        request = tracked.request
        claimable = loadable(request.num_tokens, self._block_tokens)
        whole = tracked.extended(self._options.chunk_tokens)
        chunks = min(-(-claimable // self._options.chunk_tokens), whole)
        if not self._loads or not tracked.may_load or chunks == 0:
            return
        hashes = tracked.chain.hashes[:chunks]
        known = tracked.found = self._known.prefix(hashes, now)
        if not self._breaker.allows(now):
            return
        self._counters.add("lookups")
        tracked.admission = Admission(
            self._options.chunk_tokens,
            self._block_tokens,
            claimable,
            now + self._options.lookup_timeout_ms / 1000,
            self._options.stage_timeout_ms / 1000,
            self._stage_chunks,
        )
        chunk_tokens = self._options.chunk_tokens
        if not asks(known, chunk_tokens, min(claimable, chunks * chunk_tokens)):
            self._found(tracked, known)
        if known == chunks:
            return  # and nothing is asked
        self._next_ticket += 1
        self._lookups[self._next_ticket] = (tracked, known)
        # One rank's objects stand for all: if another rank's are missing, its stage says so.
        names = [keys.object_key(self._namespace.name, h, 0, self._shards) for h in hashes[known:]]
        self._lookup.submit(self._next_ticket, names)

    def _take_lookups(self) -> None:
        for result in self._lookup.poll():
            self._looked_up(*self._lookups.pop(result.ticket), result)

    def _looked_up(self, tracked: Tracked, known: int, result: LookupResult) -> None:
        now = time.monotonic()
        if result.error is not None:
            self._breaker.failed(now)
            self._counters.add("lookup_failures")
            self._reporter.warn("look up chunks", result.error)
        else:
            self._breaker.succeeded()
        if self._requests.get(tracked.request.request_id) is not tracked:
            return
        chunks = known + result.chunks
        for chunk_hash in tracked.chain.hashes[:chunks]:
            self._known.add(chunk_hash, now)
        if tracked.admission is not None and tracked.admission.phase is Phase.LOOKUP:
            self._found(tracked, chunks)

    def _found(self, tracked: Tracked, chunks: int) -> None:
        assert tracked.admission is not None
        tracked.admission.looked_up(chunks)
        tracked.found = chunks
        tracked.save_from = max(tracked.save_from, chunks)
        self.loading.found(tracked, time.monotonic())
        self._trace.note(tracked.request.request_id, "found", chunks=chunks)
        self._counters.add("found_tokens", chunks * self._options.chunk_tokens)

    def _knows_more(self, tracked: Tracked, now: float) -> bool:
        """Whether a request that was to be computed, but has no blocks yet, would find more now: that of
        a preempted one is often still being written when it is asked for first."""
        admission, found = tracked.admission, tracked.found
        if (
            admission is None
            or admission.phase is not Phase.OVER
            or found >= len(tracked.chain.hashes)
        ):
            return False
        return now >= tracked.looked_at + LOOK_AGAIN_S and self._known.has(
            tracked.chain.hashes[found], now
        )

    def _on_unsure(self, scheduled: Mapping[str, int], block_ids: Any) -> set[str]:
        """Requests that compute in this step on bytes which may still fail to come."""
        found = set()
        for request_id in scheduled:
            tracked = self._requests.get(request_id)
            may = tracked is None or self._unsure.concerns(tracked.admission_number)
            if may and self._unsure.computes(request_id, block_ids(request_id)):
                found.add(request_id)
        return found

    def _misled(self, pages: set[int], request_ids: set[str]) -> None:
        self._evict(pages)
        for request_id in request_ids & self._requests.keys():
            self._requests[request_id].misled = True

    # ---- stages and streams

    def _stage(self, tracked: Tracked, first: int, count: int) -> None:
        job = self._new_job(tracked, first, count)
        self._jobs[job] = tracked
        self.loading.began(tracked, time.monotonic())
        self._trace.staging(tracked.request.request_id, job, len(tracked.job_hashes))
        self._commands.stages.append(StageCommand(job, tracked.job_hashes, first))

    def _stream(self, tracked: Tracked, load: Stream, request_id: str, ids: list[int]) -> None:
        job = self._new_job(tracked, load.first, load.count)
        self._expect(job, tracked, load.blocks * self._block_tokens)
        hashes = tracked.job_hashes
        self._commands.streams.append(StreamCommand(job, request_id, hashes, load.first_block, ids))

    def _load(self, tracked: Tracked, load: Load, ids: list[int], ahead: bool) -> None:
        job, local = tracked.job, tracked.local_tokens
        assert job is not None and tracked.admission is not None
        coming, tokens = tracked.admission.coming, load.blocks * self._block_tokens
        name = tracked.request.request_id if ahead else ""
        self._commands.loads.append(LoadCommand(job, load.first_block, ids, coming, name))
        if ahead:
            self.loading.parks(tracked)
            self._expect(job, tracked, tokens)
            return
        self.loading.loads(tracked, local + tokens)
        if coming:
            self.loading.lands(tracked)
            self._unsure.began(job, local // self._block_tokens, ids, self._admissions)
        self._counters.add("hit_tokens", tokens)
        self._forget_job(tracked)

    def _expect(self, job: int, tracked: Tracked, tokens: int) -> None:
        """Workers will say how so many tokens of a parked request came."""
        local, chunk_tokens = tracked.local_tokens, self._options.chunk_tokens
        first, end = local // chunk_tokens, -(-(local + tokens) // chunk_tokens)
        self._forget_stage(job)
        hashes = tracked.chain.hashes[first:end]
        self._streams[job] = Streaming(tracked, hashes, range(local, local + tokens))

    def _new_job(self, tracked: Tracked, first: int, count: int) -> int:
        self._next_ticket += 1
        tracked.job = self._next_ticket
        tracked.job_first = first
        tracked.job_hashes = tracked.chain.hashes[first : first + count]
        self.loading.brings(tracked)
        return tracked.job

    def _staged(self, job: int, chunks: int, error: str, now: float) -> None:
        tracked = self._jobs[job]
        assert tracked.admission is not None
        missing = tracked.job_hashes[chunks:]
        self._judge(tracked, error, missing, tracked.job_first + chunks, now)
        self.loading.staged(tracked, chunks, now)
        tracked.admission.staged(chunks)

    def _streamed(self, streaming: Streaming, chunks: int, error: str, now: float) -> None:
        tracked, tokens = streaming.tracked, streaming.tokens
        chunk_tokens = self._options.chunk_tokens
        first = tokens.start // chunk_tokens
        if streaming.stopped:
            # One with an error is why vLLM has ended the request; then other ranks were stopped.
            for came, why in [one for one in streaming.reports if one[1]]:
                self._judge(tracked, why, streaming.chunk_hashes[came:], first + came, now)
                self.loading.doubt(streaming.chunk_hashes[came:], now)
            return
        assert tracked.admission is not None
        self._judge(tracked, error, streaming.chunk_hashes[chunks:], first + chunks, now)
        tracked.admission.ended()
        came = min((first + chunks) * chunk_tokens, tokens.stop) - tokens.start
        self._counters.add("hit_tokens", max(0, came))
        if chunks < len(streaming.chunk_hashes):
            tracked.may_load = False  # it would meet the same object again, and again
        self._forget_job(tracked)

    def _judge(
        self, tracked: Tracked, error: str, missing: Sequence[bytes], failed: int, now: float
    ) -> None:
        """What the end of a job says about the store, and about those of its chunks that did not come: the
        first of them is chunk `failed` of the prefix."""
        if error in MISSES:
            self._breaker.succeeded()
        else:
            self._breaker.failed(now)
        if error in ("NotFound", "Corrupt"):
            for chunk_hash in missing:
                self._known.discard(chunk_hash)
            tracked.save_from = min(tracked.save_from, failed)

    def _release(self, tracked: Tracked) -> None:
        """The job's chunks are not wanted any more."""
        assert tracked.job is not None
        streaming = self._streams.get(tracked.job)
        if streaming is not None:
            streaming.stopped = True
            self._commands.stops.append(tracked.job)
        else:
            self._commands.releases.append(tracked.job)
        self._forget_job(tracked)

    def _forget_job(self, tracked: Tracked) -> None:
        assert tracked.job is not None
        self._forget_stage(tracked.job)
        self.loading.over(tracked, time.monotonic())
        tracked.job, tracked.job_hashes = None, []

    def _forget_stage(self, job: int) -> None:
        self._jobs.pop(job, None)
        self._stage_reports.pop(job, None)
