"""The class that vLLM makes, once per role: it picks the half for its role and forwards. No decisions."""

import secrets
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import objectcache.version  # noqa: F401  refuses a vLLM that lacks what is imported below

# isort: split
import torch
import vllm
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

from objectcache import identity, support
from objectcache.choosing import Choosing
from objectcache.config import parse
from objectcache.errors import Misconfigured
from objectcache.keys import Namespace
from objectcache.messages import Coming, StepCommands, StepReport, WorkerPlace
from objectcache.metrics import ObjectCachePromMetrics, ObjectCacheStats
from objectcache.moment import STAGED
from objectcache.pages import layer_pages
from objectcache.report import log
from objectcache.scheduler import SchedulerHalf
from objectcache.timely import Timely
from objectcache.tracefile import open_trace
from objectcache.turns import Turns
from objectcache.weights import LoraDigests, Weights
from objectcache.worker import WorkerHalf

if TYPE_CHECKING:
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


class ObjectCacheConnector(KVConnectorBase_V1, SupportsHMA):
    """Prefix KV in object storage. Options: docs/OPTIONS.md.

    Where the engine's KV cannot be cached (see support.refusal) both halves stay None: vLLM works
    as without a connector, and one warning says why.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        role: KVConnectorRole,
        kv_cache_config: "KVCacheConfig",
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._options = parse(self._kv_transfer_config.kv_connector_extra_config)
        if self._options.admission != STAGED and self._may_stream:
            raise Misconfigured(
                f"option 'admission' is {self._options.admission}, and kv_load_failure_policy is recompute: vLLM does "
                "not recompute rightly what a running request lacks.",
                "set kv_load_failure_policy to fail, or admission to staged.",
            )
        self._scheduler: SchedulerHalf | None = None
        self._worker: WorkerHalf | None = None
        self._place: WorkerPlace | None = None
        self._block_pool: BlockPool | None = None
        path = self._options.trace_path if role is KVConnectorRole.SCHEDULER else ""
        self._trace, self._close_trace = open_trace(path)
        self._layers_call_back = False
        lora = vllm_config.lora_config
        self._loras = LoraDigests(str(lora.lora_dtype) if lora is not None else "auto")
        self._refusal = support.refusal(vllm_config, kv_cache_config)
        if self._refusal is not None:
            if role is KVConnectorRole.SCHEDULER:
                log.warning("objectcache stays out of this engine: %s", self._refusal)
            return
        self._block_tokens = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        _require_whole_blocks(self._options.chunk_tokens, self._block_tokens)
        if role is KVConnectorRole.SCHEDULER:
            self._model = identity.model_facts(vllm_config, self._options.model_id)
            _log_cost(self._model.weights)

    # ---- both roles

    @property
    def _may_stream(self) -> bool:
        """Otherwise vLLM ends a request with an error if any of its blocks is not loaded."""
        return self._kv_transfer_config.kv_load_failure_policy == "recompute"

    def _timely(self, places: list[WorkerPlace]) -> Timely | None:
        in_time = self._options.admission != STAGED
        if not in_time and self._options.load == "always":
            return None
        most = self._vllm_config.scheduler_config.max_num_batched_tokens
        return Timely(places[0].slice_bytes, most, len(places), admits=in_time)

    def _choosing(self, timely: Timely | None, place: WorkerPlace) -> Choosing | None:
        if timely is None or self._options.load == "always":
            return None
        slices = place.slice_bytes
        room = None if self._may_stream else place.stage_chunks
        return Choosing(timely, self._options.chunk_tokens, sum(slices), len(slices), room)

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # a cache: a chunk that is not saved is only a later miss

    def shutdown(self) -> None:
        for half in (self._scheduler, self._worker):
            if half is not None:
                half.shutdown()
        self._close_trace()

    def get_kv_connector_stats(self) -> ObjectCacheStats | None:
        half = self._scheduler or self._worker
        return half.stats() if half is not None else None

    @classmethod
    def build_kv_connector_stats(
        cls, data: dict[str, Any] | None = None
    ) -> ObjectCacheStats | None:
        return ObjectCacheStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> ObjectCachePromMetrics:
        return ObjectCachePromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # ---- scheduler role

    def set_xfer_handshake_metadata(
        self, metadata: dict[int, KVConnectorHandshakeMetadata]
    ) -> None:
        """Workers exist and said what they are (by TP rank): now the engine has a name."""
        places = [place for place in metadata.values() if isinstance(place, WorkerPlace)]
        if self._refusal is not None or not places:
            return
        transfer, cache = self._kv_transfer_config, self._vllm_config.cache_config
        stage_chunks = min(place.stage_chunks for place in places)
        timely = self._timely(places)
        turns = Turns(
            stage_chunks,
            self._kv_cache_config.num_blocks,
            self._vllm_config.scheduler_config.policy == "priority",
        )
        self._scheduler = SchedulerHalf(
            self._options,
            self._name_engine(places, reset=None),
            block_tokens=self._block_tokens,
            ranks=len(places),
            shards=places[0].shards,
            loads=transfer.is_kv_consumer,
            saves=transfer.is_kv_producer,
            local_prefixes=bool(cache.enable_prefix_caching),
            turns=turns,
            stage_chunks=stage_chunks if self._may_stream else None,
            timely=timely,
            choosing=self._choosing(timely, min(places, key=lambda place: place.stage_chunks)),
            evict=self._evict,
            trace=self._trace,
        )
        self._places = places
        self._scheduler.check()

    def bind_gpu_block_pool(self, gpu_block_pool: "BlockPool") -> None:
        self._block_pool = gpu_block_pool

    def _evict(self, block_ids: set[int]) -> None:
        """Whoever comes now computes these pages anew; requests that use them keep them."""
        if block_ids:
            assert self._block_pool is not None, "vLLM has not shown its blocks"
            self._block_pool.evict_blocks(block_ids)

    def _name_engine(self, places: list[WorkerPlace], reset: str | None) -> Namespace:
        if any(place.facts != places[0].facts for place in places):
            raise Misconfigured(
                "the ranks of this engine keep their KV in different ways.",
                "run all ranks on hosts of one kind.",
            )
        model = self._model.facts if reset is None else self._model.facts | {"reset": reset}
        namespace = identity.engine_namespace(
            model,
            places[0].facts,
            self._block_tokens,
            self._options.chunk_tokens,
            vllm.__version__,
        )
        log.info("objectcache keeps this engine's chunks under %s", namespace.name)
        return namespace

    def on_new_request(self, request: "Request") -> None:
        if self._scheduler is None:
            return
        media = support.media_is_bidirectional(self._vllm_config)
        who = identity.request_identity(request, self._loras, media)
        if isinstance(who, str):
            log.debug("objectcache leaves request %s alone: %s", request.request_id, who)
        else:
            self._trace.arrived(request.request_id, request.num_tokens)
            self._scheduler.added(request, who.root, who.items, who.may_load)

    def get_num_new_matched_tokens(
        self, request: "Request", num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        if self._scheduler is None:
            return 0, False
        answer = self._scheduler.matched_tokens(request.request_id, num_computed_tokens)
        self._trace.asked(request.request_id, answer[0])
        return answer

    def update_state_after_alloc(
        self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int
    ) -> None:
        if self._scheduler is not None:
            block_ids = blocks.get_block_ids()[0] if num_external_tokens else []
            self._scheduler.allocated(request.request_id, block_ids, num_external_tokens)
            self._trace.admitted(request.request_id, num_external_tokens)

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> KVConnectorMetadata:
        if self._scheduler is None:
            return StepCommands()
        state = scheduler_output.kv_connector_block_state

        def block_ids(request_id: str) -> list[int]:
            groups = state.get_block_ids(request_id) if state is not None else None
            return groups[0] if groups else []

        commands = self._scheduler.commands(scheduler_output.num_scheduled_tokens, block_ids)
        if self._trace.active:
            commands.step = self._trace.stepping(commands.step, _computed(scheduler_output))
        return commands

    def update_connector_output(self, connector_output: "KVConnectorOutput") -> None:
        report = connector_output.kv_connector_worker_meta
        if self._scheduler is not None and isinstance(report, StepReport):
            if self._trace.active:
                self._trace.heard(
                    [(one.job, one.ready, self._share(one)) for one in report.coming],
                    [(one.job, one.chunks, one.error) for one in report.staged],
                    [step for step, _ in report.steps],
                    report.passes,
                )
            self._scheduler.reported(report)

    def _share(self, coming: Coming) -> float:
        """Of a job's bytes, what is there."""
        return coming.layers / max(1, coming.chunks * len(self._places[0].slice_bytes))

    def request_finished(
        self, request: "Request", block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        if self._scheduler is not None:
            self._scheduler.finished(request.request_id)
            self._trace.finished(request.request_id, request.status.name)
        return False, None  # pages were copied out within their step: blocks are free at once

    def request_finished_all_groups(
        self, request: "Request", block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, [])

    def has_pending_push_work(self) -> bool:
        return self._scheduler is not None and self._scheduler.has_work

    def reset_cache(self) -> bool | None:
        """The store is shared and cannot be emptied from here; this engine takes a new name instead.

        That is also what a change of weights in a running engine needs, and this is its only sign.
        """
        if self._scheduler is not None:
            self._scheduler.forget(self._name_engine(self._places, reset=secrets.token_hex(8)))
        return True

    # ---- worker role

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        if self._refusal is not None:
            return
        facts = identity.worker_facts(self._vllm_config, self._kv_cache_config, kv_caches)
        parallel = self._vllm_config.parallel_config
        world = parallel.tensor_parallel_size
        rank = parallel.rank % world  # there is one pipeline stage
        replicas = self._kv_cache_config.kv_tp_replicas
        names, pages = layer_pages(self._kv_cache_config, kv_caches)
        self._layers_call_back = support.layers_call_back(self._vllm_config, names)
        self._worker = WorkerHalf(
            self._options,
            names,
            pages,
            self._block_tokens,
            rank // replicas,
            world // replicas,
            writes=rank % replicas == 0,
            streams=self._may_stream,
            neighbours=parallel.local_world_size * max(1, parallel.data_parallel_size_local),
            # A step in several parts calls a layer's hook for each of them.
            whole_layers=not parallel.use_ubatching,
        )
        self._place = WorkerPlace(
            facts,
            rank // replicas,
            world // replicas,
            self._worker.stage_chunks,
            self._worker.slice_bytes,
        )

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return self._place

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        if self._worker is not None and isinstance(connector_metadata, StepCommands):
            self._worker.receive(connector_metadata)

    def start_load_kv(self, forward_context: "ForwardContext", **kwargs: Any) -> None:
        if self._worker is None:
            return
        # A replayed full graph calls no layer hook; under the V2 runner it is known by the
        # forward context being empty.
        hooks_fire = (
            self._layers_call_back
            and forward_context.attn_metadata is not None
            and forward_context.cudagraph_runtime_mode != CUDAGraphMode.FULL
        )
        self._worker.start_loads(hooks_fire)

    def wait_for_layer_load(self, layer_name: str) -> None:
        if self._worker is not None:
            self._worker.wait_for_layer(layer_name)

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        if self._worker is not None:
            self._worker.layer_computed(layer_name)

    def wait_for_save(self) -> None:
        if self._worker is not None:
            self._worker.end_forward()

    def get_finished(self, finished_req_ids: Iterable[str]) -> tuple[None, set[str] | None]:
        """No request waits for a save; those return here that were parked until their prefix was in their
        blocks."""
        unparked = self._worker.unparked() if self._worker is not None else None
        return None, unparked or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.failed_blocks() if self._worker is not None else set()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        return self._worker.report() if self._worker is not None else None


def _computed(output: "SchedulerOutput") -> dict[str, int]:
    """Tokens of each request that are computed after this step."""
    cached = output.scheduled_cached_reqs
    before = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    before |= {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
    return {name: before.get(name, 0) + n for name, n in output.num_scheduled_tokens.items()}


def _require_whole_blocks(chunk_tokens: int, block_tokens: int) -> None:
    if chunk_tokens % block_tokens:
        near = max(1, round(chunk_tokens / block_tokens)) * block_tokens
        raise Misconfigured(
            f"option 'chunk_tokens' is {chunk_tokens}, not a multiple of the engine's block size "
            f"{block_tokens}.",
            f"set it to {near}.",
        )


def _log_cost(weights: Weights) -> None:
    if weights.facts["kind"] == "random":
        log.warning(
            "objectcache: the weights are random (load_format=dummy), so nothing is shared with "
            "other engines. hint: set model_id if that is what you want."
        )
    if weights.hashed_files:
        log.info(
            "objectcache identified the weights by their content: %d files, %d bytes, %.1f s",
            weights.hashed_files,
            weights.hashed_bytes,
            weights.hashed_seconds,
        )
