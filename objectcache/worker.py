"""The worker half: carries out what the scheduler half says, at vLLM's hooks. It decides nothing about requests.

vLLM calls from one thread; what moves bytes (mover.py) runs beside it. Everything the hooks do
is a lookup, a copy or an event: none waits for the store.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from objectcache.admission import STAGE_GRACE_S
from objectcache.ahead import Ahead
from objectcache.config import Options
from objectcache.device import Copies, open_copies
from objectcache.errors import Corrupt, NotFound, ObjectCacheError
from objectcache.format import ObjectLayout
from objectcache.late import Coming as LateLoad
from objectcache.late import Late
from objectcache.messages import (
    Coming,
    Landed,
    LoadCommand,
    SaveCommand,
    Saved,
    Staged,
    StepCommands,
    StepReport,
    Streamed,
)
from objectcache.metrics import STORE_COUNTERS, Counters, ObjectCacheStats
from objectcache.mover import Arrived, Berth, LocalMover, Mover, Placed
from objectcache.mover_process import MoverProcess
from objectcache.movers import Movers, most_chunks
from objectcache.movers import split as split_berth
from objectcache.parked import Parked, split
from objectcache.report import Reporter, log
from objectcache.ring import Ring, shares, slots_in
from objectcache.runs import Run, lying_at
from objectcache.saver import SaveResult
from objectcache.slots import HostSlots
from objectcache.staging import Numbers
from objectcache.streamer import StageResult
from objectcache.trace import PassTimes
from objectcache.tracefile import keeps_traces
from objectcache.wire import Wire, is_news

# Of 16 cores, plain http, 224 chunks of 32 MiB: one process with 8 threads brought 8.7 GB/s, two 13.5;
# with 4 threads one brought 6.7, two 10.7, four 16.0.
CORES = len(os.sched_getaffinity(0))
PROCESSES_MAX = 4
THREADS = min(4, max(1, CORES // 2))  # of each, that receive bodies
STREAM_SHARE = 8  # one load slot in eight is for streams, one at least


class WorkerHalf:
    """`pages[l]` is layer `layer_names[l]` as uint8 [blocks, page_bytes], in the object's order.

    `shard` of `shards` is the part of each chunk that this rank reads; `writes` is whether it also
    writes it (of ranks with equal KV only one does). `streams` is whether vLLM computes what an
    asynchronous load did not bring: only then prefixes stream through the ring, and part of it is theirs.
    `neighbours` is how many workers share this host, itself included. `whole_layers` is whether a layer's
    hook is called once a step, when all of the step's tokens of that layer are computed.
    """

    def __init__(
        self,
        options: Options,
        layer_names: Sequence[str],
        pages: Sequence[torch.Tensor],
        block_tokens: int,
        shard: int,
        shards: int,
        writes: bool,
        streams: bool = False,
        neighbours: int = 1,
        whole_layers: bool = True,
    ) -> None:
        self._options = options
        self._whole_layers = whole_layers
        self._layers = {name: at for at, name in enumerate(layer_names)}
        self._pages = list(pages)
        self._writes = writes
        chunk_blocks = options.chunk_tokens // block_tokens
        self._layout = ObjectLayout(
            namespace_digest=bytes(32),
            chunk_tokens=options.chunk_tokens,
            block_tokens=block_tokens,
            shard=shard,
            shards=shards,
            slice_bytes=tuple(page.shape[1] * chunk_blocks for page in pages),
        )
        loads, saves = shares(slots_in(options.ring_bytes, self._layout.object_bytes))
        self._save_ring = Ring(saves)
        apart = max(1, len(loads) // STREAM_SHARE) if streams else 0
        self._namespace: tuple[str, bytes] = ("", b"")
        self._commands = StepCommands()
        self._staged: dict[int, StageResult] = {}  # by job, reported and not yet released
        self._loading: set[int] = set()  # jobs whose slots are being copied to pages
        self._given_up: set[int] = set()  # jobs released before they reported
        # save -> the namespace's name (it may change meanwhile), hash, slot
        self._saving: dict[int, tuple[str, bytes, int]] = {}
        self._next_save = 0
        self._reports = StepReport()
        self._counters = Counters()
        self._reporter = Reporter()
        self._store_seen = dict.fromkeys(STORE_COUNTERS, 0)
        # All that is slow to make is made now, in a start-up that is slow anyway: not in a step.
        berth = Berth(
            options,
            self._layout,
            loads.stop + len(saves),
            loads,
            apart,
            populate=self._pages[0].is_cuda,
        )
        self._slots, self._mover, self._stage_chunks = _open_mover(berth, neighbours)
        self._copies: Copies = open_copies(self._pages, self._slots, self._layout)
        self._parked = Parked(self._copies, self._mover, chunk_blocks)
        sizes = self._layout.slice_bytes
        limit_s = options.stage_timeout_ms / 1000 + STAGE_GRACE_S
        self._ahead = Ahead(self._copies, self._slots.progress, sizes, chunk_blocks, limit_s)
        self._failed_blocks: set[int] = set()
        self._placed: dict[int, Numbers] = {}  # job -> slots to which its chunks come, or came
        late_s = options.late_timeout_ms / 1000
        self._late = Late(self._slots.progress, len(self._pages), late_s, self._hear)
        self._wire: Wire | None = None  # as it was last looked at
        self._told: Wire | None = None
        self._traced = keeps_traces(options.trace_path)
        self._pass: PassTimes | None = None
        self._closed = False

    # ---- hooks of a step, in their order

    def receive(self, commands: StepCommands) -> None:
        """Start of a step: what can begin before the forward pass does."""
        self._commands = commands
        # A request may have come and gone since the last step: its job never begins.
        never_mind = {stage.job for stage in commands.stages} & set(commands.releases)
        for job in commands.releases:
            if job not in never_mind:
                self._release(job)
        for job in commands.stops:  # of the namespace that they were begun in
            if self._ahead.stop(job):
                self._mover.cancel(job)
        if commands.namespace[0] and commands.namespace != self._namespace:
            self._namespace = commands.namespace
            self._mover.enter(*commands.namespace)
        for stage in commands.stages:
            if stage.job not in never_mind:
                self._mover.stage(stage.job, stage.chunk_hashes, stage.first)
        for stream in commands.streams:
            self._parked.begin(stream)
        for job in commands.stops:
            self._parked.stop(job)
        loads, commands.loads = commands.loads, []
        for load in loads:
            if load.request_id:
                self._begin_ahead(load)
            else:
                commands.loads.append(load)
        saves, commands.saves = commands.saves, []
        if saves and self._writes:
            self._collect()  # slots may be free again
            self._begin_saves(saves)

    def start_loads(self, hooks_fire: bool) -> None:
        """Submit the step's loads. If the layers will not call back, everything is waited for here."""
        loads, self._commands.loads = self._commands.loads, []
        if not loads:
            return
        if self._traced:
            jobs = [load.job for load in loads]
            self._pass = PassTimes(self._commands.step, jobs, time.monotonic())
        runs = [(load.job, self._runs(load)) for load in loads]
        if self._commands.step:  # from now on a layer that is there is copied
            self._reports.needed.append((self._commands.step, time.monotonic()))
        self._copies.submit_loads(runs, self._late if self._late.jobs() else None)
        if not hooks_fire:
            self._copies.wait_all()

    def wait_for_layer(self, layer_name: str) -> None:
        if not self._copies.loading:
            return
        layer = self._layers.get(layer_name)
        if layer is None:
            return  # it shares another's KV and has no pages of its own
        if self._pass is None:
            self._copies.wait_layer(layer)
        else:
            self._pass.ready.append(self._late.layers_ready())
            began_s = time.monotonic()
            self._copies.wait_layer(layer)
            self._pass.waits.append((began_s, time.monotonic()))

    def layer_computed(self, layer_name: str) -> None:
        """Copy out what the step's saves have of a layer, so that the bus is not waited for at the end."""
        if self._whole_layers and self._copies.saving:
            layer = self._layers.get(layer_name)
            if layer is not None:
                self._copies.save_layer(layer)

    def end_forward(self) -> None:
        """After the forward pass: finish the loads and the saves, copy what streams."""
        self._copies.end_step()
        self._copies.end_saves()
        if self._pass is not None:
            self._pass.ended_s = time.monotonic()
            self._reports.passes.append(self._pass)
            self._pass = None
        self._parked.carry()
        self._ahead.carry()
        self._collect()

    def unparked(self) -> set[str]:
        """Parked requests whose prefixes are in their blocks since the last call. What did not come of them
        is in `failed_blocks`, how it went in `report`, in the same step."""
        ended = self._parked.ended() if not self._closed else []
        for request in ended:
            error = request.result.error
            self._counters.add("staged_chunks", request.result.came)
            if error is not None:
                self._counters.add(_READ_COUNTER.get(type(error), "failed_reads"))
            name = "" if request.stopped else _name_of(error)
            self._reports.streamed.append(Streamed(request.result.job, request.chunks, name))
            self._failed_blocks.update(request.failed_blocks)
        landed = self._ahead.over() if not self._closed else []
        for load in landed:
            if load.heard:
                self._mover.release(load.job)
            else:
                self._given_up.add(load.job)
                self._mover.cancel(load.job)
            self._reports.streamed.append(Streamed(load.job, load.chunks, load.error))
            self._counters.add("failed_prompts", int(load.lost))
            self._failed_blocks.update(load.failed_blocks)
        return {one.request_id for one in ended} | {one.request_id for one in landed}

    def failed_blocks(self) -> set[int]:
        """Page numbers that were not loaded, of parked requests and of those that were admitted before
        all was there. Each is named once."""
        failed = self._failed_blocks | self._late.failed_blocks
        self._failed_blocks, self._late.failed_blocks = set(), set()
        return failed

    def report(self) -> StepReport | None:
        """What happened since the last call, for the scheduler half."""
        self._collect()
        report, self._reports = self._reports, StepReport()
        report.lost, self._late.lost_jobs = self._late.lost_jobs, []
        for saved in report.saved:
            self._counters.add(_SAVE_COUNTER[saved.outcome])
        if self._commands.step:
            report.steps.append((self._commands.step, self._late.waited))
            self._late.waited = False
            self._commands.step = 0
            report.coming += self._coming()
        wire = self._mover.wire
        if wire is not self._wire:
            self._wire = wire
            if wire is not None and is_news(self._told, wire):
                report.wires.append((self._layout.shard, wire))
                self._told = wire
        return report if report != StepReport() else None

    def _coming(self) -> list[Coming]:
        """How far the jobs are that wait for nothing but bytes, here or on another rank."""
        layers, found = len(self._pages), []
        for job, slots in self._placed.items():
            short = job in self._staged and len(self._staged[job].slots) < len(slots)
            if not short and job not in self._loading:
                # Each step asks, with numpy's code out of the cache: Python's own is faster for so few.
                progress = self._slots.progress.take(slots).tolist()
                landed = sum(have for have in progress if have > 0)
                found.append(Coming(job, len(slots), min(progress, default=layers), landed))
        return found

    def stats(self) -> ObjectCacheStats | None:
        self._counters.add("waited_layers", self._late.waits)
        self._counters.add("failed_prompts", self._late.lost)
        self._late.waits = self._late.lost = 0
        counters = self._mover.counters
        for name in STORE_COUNTERS:
            now = getattr(counters, name)
            self._counters.add(name, now - self._store_seen[name])
            self._store_seen[name] = now
        return self._counters.take()

    @property
    def stage_chunks(self) -> int:
        """Most chunks that one job can stage."""
        return self._stage_chunks

    @property
    def slice_bytes(self) -> tuple[int, ...]:
        """Of each layer of a chunk."""
        return self._layout.slice_bytes

    @property
    def leased_slots(self) -> int:
        """Ring slots in use; zero when nothing is under way."""
        return self._mover.leased + self._save_ring.leased

    def shutdown(self) -> None:
        """Let uploads end for a while, then stop everything. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._copies.finish()
        self._hand_over_saves()
        self._mover.close(self._options.shutdown_drain_ms / 1000)
        self._hear()
        for _, _, slot in self._saving.values():
            self._save_ring.release([slot])
        self._saving.clear()
        self._slots.close()

    # ---- commands

    def _release(self, job: int) -> None:
        self._placed.pop(job, None)
        if self._staged.pop(job, None) is None:
            self._given_up.add(job)
            self._mover.cancel(job)
            return
        self._mover.release(job)

    def _begin_ahead(self, load: LoadCommand) -> None:
        """Copy a job's blocks beside the steps, while its request is parked."""
        placed, staged = self._placed.pop(load.job, None), self._staged.pop(load.job, None)
        slots: list[int] | None = staged.slots if staged is not None else None
        if load.coming:
            slots = placed.tolist() if placed is not None else None
        assert slots is not None, "a job is loaded that is not there"
        skipped, chunks = self._chunks_of(load)
        self._ahead.begin(load.job, load.request_id, lying_at(slots[skipped:], chunks), skipped)
        if staged is not None:
            self._ahead.ended(load.job, len(staged.slots), _name_of(staged.error))

    def _chunks_of(self, load: LoadCommand) -> tuple[int, list[tuple[int, list[int]]]]:
        """Chunks of the job that are left out, and blocks of the others."""
        per_slot = self._layout.chunk_blocks
        skipped, first = divmod(load.first_block, per_slot)
        return skipped, split(load.block_ids, first, per_slot)

    def _runs(self, load: LoadCommand) -> list[Run]:
        """A job's blocks, slot by slot."""
        skipped, chunks = self._chunks_of(load)
        # A KeyError is a bug: fail the step, not the tokens.
        if load.coming:
            placed, staged = self._placed.pop(load.job), self._staged.pop(load.job, None)
            slots = placed.tolist()
            blocks = [block_ids for _, block_ids in chunks]
            used = placed[skipped : skipped + len(chunks)]
            self._late.begin(LateLoad(load.job, used, blocks, skipped))
            if staged is not None:
                self._late.ended(load.job, len(staged.slots))
        else:
            slots = self._staged.pop(load.job).slots
            self._placed.pop(load.job, None)
        self._loading.add(load.job)
        return lying_at(slots[skipped:], chunks)

    def _begin_saves(self, saves: Sequence[SaveCommand]) -> None:
        runs = []
        for save in saves:
            leased = self._save_ring.lease(1)
            if leased is None:
                self._reports.saved.append(Saved(save.chunk_hash, "dropped"))
                continue
            (slot,) = leased
            number, self._next_save = self._next_save, self._next_save + 1
            self._saving[number] = (self._namespace[0], save.chunk_hash, slot)
            runs.append((number, Run(slot, 0, save.block_ids)))
        self._copies.begin_saves(runs)

    # ---- what came back

    def _collect(self) -> None:
        """Copies that ended: slots of loads go back, slots of saves go out. And what the mover says."""
        if self._closed:
            return
        for job in self._copies.loaded():
            if not self._late.copied(job):
                self._loading.discard(job)
                self._mover.release(job)
        self._hand_over_saves()
        self._hear()
        for load in self._late.over():
            self._loading.discard(load.job)
            self._mover.release(load.job)
            self._reports.landed.append(Landed(load.job, load.lost))

    def _hand_over_saves(self) -> None:
        for number in self._copies.saved():
            namespace, chunk_hash, slot = self._saving.pop(number)
            self._mover.save(slot, namespace, chunk_hash)

    def _hear(self) -> None:
        for event in self._mover.take():
            if isinstance(event, SaveResult):
                self._save_ring.release([event.slot])
                self._reports.saved.append(Saved(event.chunk_hash, event.outcome))
                if event.error is not None:
                    self._reporter.warn("save chunks", event.error)
            elif isinstance(event, Placed):
                if event.job not in self._given_up:
                    self._placed[event.job] = np.array(event.slots, np.int64)
            elif isinstance(event, StageResult):
                self._settle(event)
            else:
                if not isinstance(event, Arrived):
                    self._note(event.error)
                self._parked.heard(event)

    def _settle(self, result: StageResult) -> None:
        """Account for a stage that ended; nobody may want it any more."""
        error = result.error
        self._note(error)
        self._counters.add("staged_chunks", len(result.slots))
        if error is not None:
            self._counters.add(_READ_COUNTER.get(type(error), "failed_reads"))
        name = _name_of(error)
        if self._late.ended(result.job, len(result.slots)):
            return
        if self._ahead.ended(result.job, len(result.slots), name):
            return
        if result.job in self._given_up or self._closed:
            self._placed.pop(result.job, None)
            self._given_up.discard(result.job)
            self._mover.release(result.job)
            return
        self._staged[result.job] = result
        self._reports.staged.append(Staged(result.job, len(result.slots), name))

    def _note(self, error: ObjectCacheError | None) -> None:
        """What a user should hear of a read that failed."""
        if error is not None and not isinstance(error, NotFound):
            self._reporter.warn("read chunks", error)


def _name_of(error: ObjectCacheError | None) -> str:
    return type(error).__name__ if error is not None else ""


_READ_COUNTER: dict[type, str] = {NotFound: "missing_chunks", Corrupt: "corrupt_chunks"}
_SAVE_COUNTER = {
    "written": "saved_chunks",
    "existed": "duplicate_chunks",
    "dropped": "dropped_saves",
    "failed": "failed_saves",
}


def processes_for(neighbours: int, cores: int = CORES) -> int:
    """One for each four cores that are a worker's own, where so many workers share a host."""
    return min(PROCESSES_MAX, max(1, cores // 4 // max(1, neighbours)))


def _open_mover(berth: Berth, neighbours: int) -> tuple[HostSlots, Mover, int]:
    """The memory of the ring, what moves bytes to and from it, and most chunks that a job can stage."""
    options, pinned = berth.options, berth.populate
    in_memory = options.url.startswith("memory:")
    if options.mover == "process" or (options.mover == "auto" and pinned and not in_memory):
        try:
            return _open_processes(berth, options.processes or processes_for(neighbours))
        except OSError as error:
            log.warning(
                "objectcache moves bytes in a thread of the engine, since a process for it cannot "
                "be had: %s",
                error,
            )
    own = HostSlots(berth.slots, berth.layout.object_bytes, pinned)
    return own, LocalMover(berth, own.view, own.progress), most_chunks([berth])


def _open_processes(berth: Berth, count: int) -> tuple[HostSlots, Mover, int]:
    slots = HostSlots(berth.slots, berth.layout.object_bytes, berth.populate, shared=True)
    assert slots.descriptor is not None
    parts = split_berth(replace(berth, threads=THREADS), count)
    each: list[MoverProcess] = []
    try:
        for part in parts:
            each.append(MoverProcess(part, slots.descriptor))
    except OSError:
        for mover in each:
            mover.close(0.0)
        slots.close()
        raise
    return slots, each[0] if len(each) == 1 else Movers(each), most_chunks(parts)
