"""The worker half: carries out what the scheduler half says, at vLLM's hooks. It decides nothing about requests.

vLLM calls from one thread; reads and uploads run on a loop of their own. Everything the hooks do
is a lookup, a copy or an event: none waits for the store.
"""

import threading
from collections.abc import Sequence

import torch

from objectcache import keys
from objectcache.config import Options
from objectcache.device import Copies, HostSlots, Run, open_copies
from objectcache.errors import Corrupt, Misconfigured, NotFound, ObjectCacheError
from objectcache.format import ObjectLayout
from objectcache.loop import LoopThread
from objectcache.messages import (
    LoadCommand,
    SaveCommand,
    Saved,
    StageCommand,
    Staged,
    StepCommands,
    StepReport,
    StreamCommand,
    Streamed,
)
from objectcache.metrics import STORE_COUNTERS, Counters, ObjectCacheStats
from objectcache.parked import Parked, split
from objectcache.report import Reporter, log
from objectcache.ring import Ring
from objectcache.saver import Saver
from objectcache.shelf import Shelf
from objectcache.stores import open_store
from objectcache.streamer import StageResult, Streamer
from objectcache.through import StreamResult

CLOSE_TIMEOUT_S = 1.0
STREAM_SHARE = 8  # one load slot in eight is for streams, one at least


class WorkerHalf:
    """`pages[l]` is layer `layer_names[l]` as uint8 [blocks, page_bytes], in the object's order.

    `shard` of `shards` is the part of each chunk that this rank reads; `writes` is whether it also
    writes it (of ranks with equal KV only one does). `streams` is whether vLLM computes what an
    asynchronous load did not bring: only then such loads are made, and part of the ring is theirs.
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
    ) -> None:
        self._options = options
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
        self._ring = _ring_for(options, self._layout.object_bytes)
        apart = max(1, self._ring.load_slots // STREAM_SHARE) if streams else 0
        self._shelf = Shelf(self._ring, apart)
        self._slots = HostSlots(
            self._ring.slots, self._layout.object_bytes, pinned=self._pages[0].is_cuda
        )
        self._namespace: tuple[str, bytes] = ("", b"")
        self._commands = StepCommands()
        self._staged: dict[int, list[int]] = {}  # job -> slots, reported and not yet released
        self._loading: set[int] = set()  # jobs whose slots are being copied to pages
        self._given_up: set[int] = set()  # jobs released before they reported
        # save -> who will upload it, key, hash, slot; the namespace may change meanwhile
        self._saving: dict[int, tuple[Saver, str, bytes, int]] = {}
        self._next_save = 0
        self._dropped: list[Saved] = []
        self._lock = threading.Lock()  # guards what the loop's callbacks leave behind:
        self._results: list[StageResult] = []
        self._saved: list[Saved] = []
        self._counters = Counters()
        self._reporter = Reporter()
        self._store_seen = dict.fromkeys(STORE_COUNTERS, 0)
        # All that is slow to make is made now, in a start-up that is slow anyway: not in a step.
        self._copies: Copies = open_copies(self._pages, self._slots, self._layout)
        self._parked = Parked(self._copies, chunk_blocks)
        self._streamed: list[Streamed] = []
        self._failed_blocks: set[int] = set()
        self._store = open_store(options)
        self._loop: LoopThread | None = LoopThread("objectcache-worker")
        self._enter(self._loop, self._namespace, None)
        self._loop.call(lambda loop: loop.spawn(self._open_store()), self._loop)

    async def _open_store(self) -> None:
        try:
            await self._store.open()
        except ObjectCacheError:
            log.debug("objectcache: the store is not ready yet")  # the scheduler half says why

    # ---- hooks of a step, in their order

    def receive(self, commands: StepCommands) -> None:
        """Start of a step: what can begin before the forward pass does."""
        self._commands = commands
        # A request may have come and gone since the last step: its job never begins.
        never_mind = {stage.job for stage in commands.stages} & set(commands.releases)
        for job in commands.releases:
            if job not in never_mind:
                self._release(job)
        if commands.namespace[0] and commands.namespace != self._namespace:
            assert self._loop is not None, "vLLM steps a worker that was shut down"
            self._enter(self._loop, commands.namespace, self._streamer)
        for stage in commands.stages:
            if stage.job not in never_mind:
                self._stage(stage)
        for stream in commands.streams:
            self._stream(stream)
        for job in commands.stops:
            self._parked.stop(job)

    def start_loads(self, hooks_fire: bool) -> None:
        """Submit the step's loads. If the layers will not call back, everything is waited for here."""
        loads, self._commands.loads = self._commands.loads, []
        if not loads:
            return
        self._copies.submit_loads([(load.job, self._runs(load)) for load in loads])
        if not hooks_fire:
            self._copies.wait_all()

    def wait_for_layer(self, layer_name: str) -> None:
        if not self._copies.loading:
            return
        layer = self._layers.get(layer_name)
        if layer is not None:  # a layer that shares another's KV has no pages of its own
            self._copies.wait_layer(layer)

    def end_forward(self) -> None:
        """After the forward pass: finish the loads, start the step's saves, copy what streams."""
        self._copies.end_step()
        saves, self._commands.saves = self._commands.saves, []
        for save in saves:
            self._save(save)
        self._parked.carry()
        self._collect()

    def unparked(self) -> set[str]:
        """Requests whose streams ended since the last call. What did not come of them is in
        `failed_blocks`, how it went in `report`, in the same step."""
        ended = self._parked.ended()
        for request in ended:
            error = request.result.error
            self._counters.add("staged_chunks", request.result.came)
            if error is not None:
                self._counters.add(_READ_COUNTER.get(type(error), "failed_reads"))
            name = type(error).__name__ if error is not None and not request.stopped else ""
            self._streamed.append(Streamed(request.result.job, request.chunks, name))
            self._failed_blocks.update(request.failed_blocks)
        return {request.request_id for request in ended}

    def failed_blocks(self) -> set[int]:
        """Page numbers of parked requests that were not loaded. Each is named once."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def report(self) -> StepReport | None:
        """What happened since the last call, for the scheduler half."""
        self._collect()
        with self._lock:
            results, self._results = self._results, []
            saved, self._saved = self._saved + self._dropped, []
        self._dropped = []
        staged = [report for result in results if (report := self._settle(result)) is not None]
        for outcome in saved:
            self._counters.add(_SAVE_COUNTER[outcome.outcome])
        streamed, self._streamed = self._streamed, []
        return StepReport(staged, saved, streamed) if staged or saved or streamed else None

    def stats(self) -> ObjectCacheStats | None:
        for name in STORE_COUNTERS:
            now = getattr(self._store.counters, name)
            self._counters.add(name, now - self._store_seen[name])
            self._store_seen[name] = now
        return self._counters.take()

    @property
    def stage_chunks(self) -> int:
        """Most chunks that one job can stage."""
        return self._shelf.most

    @property
    def leased_slots(self) -> int:
        """Ring slots in use; zero when nothing is under way."""
        return self._ring.leased

    def shutdown(self) -> None:
        """Let uploads end for a while, then stop everything. Idempotent."""
        if self._loop is None:
            return
        loop, self._loop = self._loop, None
        self._copies.finish()
        self._hand_over_saves(loop)
        _drain(loop, self._saver, self._options.shutdown_drain_ms / 1000)
        loop.stop(self._store.close(), CLOSE_TIMEOUT_S)
        self._abandon()

    def _abandon(self) -> None:
        """Nothing runs any more: slots that somebody would have asked for go back unused."""
        with self._lock:
            held = {result.job for result in self._results}
            self._results = []
        held |= self._staged.keys() | self._loading
        self._staged, self._loading = {}, set()
        for job in held:
            self._streamer.release(job)
        self._parked.abandon()

    # ---- commands

    def _enter(
        self, loop: LoopThread, namespace: tuple[str, bytes], before: Streamer | None
    ) -> None:
        """The scheduler half named the namespace (again, after a reset): objects from now on bear it."""
        layout = ObjectLayout(
            namespace[1] or bytes(32),
            self._layout.chunk_tokens,
            self._layout.block_tokens,
            self._layout.shard,
            self._layout.shards,
            self._layout.slice_bytes,
        )
        self._layout, self._namespace = layout, namespace
        streamer = Streamer(
            loop,
            self._store,
            layout,
            self._shelf,
            self._slots.view,
            self._options.stage_timeout_ms / 1000,
            self._on_staged,
        )
        if before is not None:
            before.succeeded_by(streamer)
        self._streamer = streamer
        self._saver = Saver(loop, self._store, layout, self._ring, self._slots.view, self._on_saved)

    def _key(self, chunk_hash: bytes) -> str:
        return keys.object_key(
            self._namespace[0], chunk_hash, self._layout.shard, self._layout.shards
        )

    def _stage(self, stage: StageCommand) -> None:
        names = [self._key(chunk_hash) for chunk_hash in stage.chunk_hashes]
        self._streamer.stage(stage.job, names, stage.chunk_hashes)

    def _stream(self, stream: StreamCommand) -> None:
        names = [self._key(chunk_hash) for chunk_hash in stream.chunk_hashes]
        self._parked.begin(stream, names, self._streamer.through, self._on_streamed)

    def _release(self, job: int) -> None:
        slots = self._staged.pop(job, None)
        if slots is None:
            self._given_up.add(job)
            self._streamer.cancel(job)
            return
        self._streamer.release(job)

    def _runs(self, load: LoadCommand) -> list[Run]:
        """A job's blocks, slot by slot."""
        slots = self._staged.pop(load.job)  # a KeyError is a bug: fail the step, not the tokens
        self._loading.add(load.job)
        per_slot = self._layout.chunk_blocks
        skipped, first = divmod(load.first_block, per_slot)
        chunks = split(load.block_ids, first, per_slot)
        return [Run(slots[skipped + at], *chunk) for at, chunk in enumerate(chunks)]

    def _save(self, save: SaveCommand) -> None:
        if not self._writes:
            return
        slot = self._ring.lease_save()
        if slot is None:
            self._dropped.append(Saved(save.chunk_hash, "dropped"))
            return
        number, self._next_save = self._next_save, self._next_save + 1
        key = self._key(save.chunk_hash)
        self._saving[number] = (self._saver, key, save.chunk_hash, slot)
        self._copies.submit_save(number, Run(slot, 0, save.block_ids))

    # ---- what came back

    def _collect(self) -> None:
        """Copies that ended: slots of loads go back, slots of saves go out."""
        if self._loop is None:
            return
        for job in self._copies.loaded():
            self._loading.discard(job)
            self._streamer.release(job)
        self._hand_over_saves(self._loop)

    def _hand_over_saves(self, loop: LoopThread) -> None:
        for number in self._copies.saved():
            saver, key, chunk_hash, slot = self._saving.pop(number)
            saver.save(key, chunk_hash, slot)

    def _settle(self, result: StageResult) -> Staged | None:
        """Account for a stage that ended; None if nobody wants it any more."""
        error = result.error
        self._counters.add("staged_chunks", len(result.slots))
        if error is not None:
            self._counters.add(_READ_COUNTER.get(type(error), "failed_reads"))
        if result.job in self._given_up:
            self._given_up.remove(result.job)
            self._streamer.release(result.job)
            return None
        self._staged[result.job] = result.slots
        return Staged(result.job, len(result.slots), type(error).__name__ if error else "")

    def _on_streamed(self, result: StreamResult) -> None:
        self._note(result.error, result.failed_key)

    def _note(self, error: ObjectCacheError | None, failed_key: str) -> None:
        """What a user should hear of a read that failed, and whoever saves that chunk. On the loop."""
        if error is not None and not isinstance(error, NotFound):
            self._reporter.warn("read chunks", error)
        if isinstance(error, Corrupt):
            self._saver.spoilt(failed_key)

    def _on_staged(self, result: StageResult) -> None:
        self._note(result.error, result.failed_key)
        with self._lock:
            self._results.append(result)

    def _on_saved(self, chunk_hash: bytes, outcome: str, error: ObjectCacheError | None) -> None:
        if error is not None:
            self._reporter.warn("save chunks", error)
        with self._lock:
            self._saved.append(Saved(chunk_hash, outcome))


_READ_COUNTER: dict[type, str] = {NotFound: "missing_chunks", Corrupt: "corrupt_chunks"}
_SAVE_COUNTER = {
    "written": "saved_chunks",
    "existed": "duplicate_chunks",
    "dropped": "dropped_saves",
    "failed": "failed_saves",
}


def _ring_for(options: Options, object_bytes: int) -> Ring:
    slots = options.ring_bytes // object_bytes
    if slots < 2:
        raise Misconfigured(
            f"ring_bytes={options.ring_bytes} holds {slots} chunks of {object_bytes} bytes; it "
            "must hold two at least.",
            f"raise ring_bytes to {2 * object_bytes} or more, or lower chunk_tokens.",
        )
    return Ring(slots)


def _drain(loop: LoopThread, saver: Saver, timeout_s: float) -> None:
    try:
        loop.submit(saver.drain()).result(timeout_s)
    except TimeoutError:
        log.warning("objectcache: some chunks were not uploaded before the engine stopped.")
