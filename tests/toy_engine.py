"""vLLM's real Scheduler and the real connector around a toy model, in one process and without a forward pass.

The toy model's KV is a function of the layer and of all tokens up to a position. It writes and
"reads" pages in vLLM's order (new KV first, then `wait_for_layer_load`, then attention), and raises
if any row that attention would read is not exactly right: a wrong, late or missing load cannot hide.
What a request computes on wrong rows is wrong in all later layers, on all ranks.
Nothing here knows how the connector works.
"""

import copy
import hashlib
import pickle
import random
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
)
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

ROW_BYTES = 64
VOCAB = 1000
POISON = 0xEE


class WrongKV(AssertionError):
    """Attention would have read a row that is not the KV of its tokens."""


class ToyEngine:
    """One engine. `extra` is kv_connector_extra_config, None for no connector at all."""

    def __init__(
        self,
        model: Path,
        extra: dict[str, Any] | None,
        *,
        blocks: int = 256,
        block_tokens: int = 16,
        layers: int = 3,
        ranks: int = 1,
        max_batched_tokens: int = 4096,
        max_seqs: int = 16,
        kv_role: str = "kv_both",
        prefix_caching: bool = True,
        policy: str = "fcfs",
        seed: int = 0,
        hooks_fire: bool = True,
        failure_policy: str = "recompute",
    ) -> None:
        config = _config(
            model,
            extra,
            block_tokens,
            ranks,
            max_batched_tokens,
            max_seqs,
            kv_role,
            prefix_caching,
            policy,
            failure_policy,
        )
        cache = _kv_cache_config(blocks, block_tokens, layers)
        config.cache_config.num_gpu_blocks = blocks
        config.cache_config.kv_cache_layout = "LBHNC"
        self.block_tokens, self.layers = block_tokens, layers
        self.hooks_fire = hooks_fire
        self.failure_policy = failure_policy
        self.seed = seed  # "weights": another seed gives other KV and other tokens
        self.scheduler = Scheduler(
            vllm_config=config,
            kv_cache_config=cache,
            structured_output_manager=StructuredOutputManager(config),
            block_size=block_tokens,
            hash_block_size=block_tokens,
            log_stats=True,
        )
        self.connector = self.scheduler.connector
        self.workers = [_Worker(config, cache, rank, self) for rank in range(ranks)]
        if self.connector is not None:
            places = {(0, w.rank): pickle.loads(pickle.dumps(w.place)) for w in self.workers}
            self.connector.set_xfer_handshake_metadata_pp_aware(places)
        hash_fn = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
        init_none_hash(hash_fn)
        self._hasher = get_request_block_hasher(block_tokens, hash_fn)
        self._aggregator = KVOutputAggregator(ranks)
        self._made = 0
        self.outputs: dict[str, list[int]] = {}
        self.cached: dict[str, int] = {}  # request -> tokens it did not have to compute at first
        self.stats: dict[str, int] = {}  # of the workers
        self.totals: dict[str, int] = {}  # as on /metrics: of both halves
        self.steps = 0
        self.misled: set[str] = set()  # requests that read wrong rows in this step

    # ---- what a user does

    def add(
        self,
        tokens: list[int],
        max_tokens: int = 4,
        *,
        salt: str | None = None,
        priority: int = 0,
        transfer: dict[str, Any] | None = None,
        **more: Any,
    ) -> str:
        """Queue a request and return its id; `transfer` is what a user sends as kv_transfer_params."""
        self._made += 1
        name = f"r{self._made}"
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0.0)
        params.update_from_generation_config({}, None)
        if transfer is not None:
            params.extra_args = {"kv_transfer_params": transfer}
        request = Request(
            request_id=name,
            prompt_token_ids=list(tokens),
            sampling_params=params,
            pooling_params=None,
            cache_salt=salt,
            priority=priority,
            block_hasher=self._hasher,
            arrival_time=float(self._made),
            **more,
        )
        self.outputs[name] = []
        self.scheduler.add_request(request)
        return name

    def abort(self, name: str) -> None:
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def step(self) -> bool:
        """One engine step; whether there was anything to do."""
        if not self.scheduler.has_requests():
            return False
        self.steps += 1
        self.misled.clear()
        output = self.scheduler.schedule()
        for new in output.scheduled_new_reqs:
            self.cached[new.req_id] = new.num_computed_tokens
        self._execute(output)
        if not output.total_num_scheduled_tokens:
            time.sleep(0.0005)  # as the engine core does when nobody can run
        return True

    def run(self, timeout_s: float = 30.0) -> None:
        """Step until nothing is left to do."""
        end = time.monotonic() + timeout_s
        while self.step():
            if time.monotonic() > end:
                raise TimeoutError(f"requests never ended: {list(self.scheduler.requests)}")

    def generate(self, *prompts: list[int], max_tokens: int = 4, **more: Any) -> list[list[int]]:
        names = [self.add(prompt, max_tokens, **more) for prompt in prompts]
        self.run()
        return [self.outputs[name] for name in names]

    def forget(self) -> None:
        """Empty vLLM's own prefix cache."""
        assert self.scheduler.reset_prefix_cache()

    def settle(self, timeout_s: float = 10.0) -> None:
        """Step idly until no ring slot is in use: uploads ended, releases arrived."""
        end = time.monotonic() + timeout_s
        while any(worker.leased_slots for worker in self.workers):
            self.idle_step()
            time.sleep(0.002)
            if time.monotonic() > end:
                raise TimeoutError("ring slots never came back")
        self.idle_step()

    def idle_step(self) -> None:
        self._execute(self.scheduler.schedule())

    def _execute(self, output: Any) -> None:
        reports = [worker.run(output) for worker in self.workers]
        self._see_what_was_wrong(reports)
        outputs = self.scheduler.update_from_output(output, self._sampled(output, reports))
        for client in outputs.values():
            if client.scheduler_stats is not None:
                _add(self.totals, client.scheduler_stats.kv_connector_stats)

    def _see_what_was_wrong(self, reports: list[KVConnectorOutput | None]) -> None:
        """Raise, unless a block that the request read wrongly is named by some rank: with policy "fail" it
        ends in this step. What it then read wrongly of itself follows from that."""
        named = set().union(*(report.invalid_block_ids for report in reports if report is not None))
        wrong = [one for worker in self.workers for one in worker.wrong]
        fails = {name for name, bad, _ in wrong if bad & named and self.failure_policy == "fail"}
        for name, _, where in wrong:
            if name not in fails:
                raise WrongKV(where)
        for worker in self.workers:
            worker.wrong.clear()

    def stop(self) -> None:
        for worker in self.workers:
            worker.stop()
        self.scheduler.shutdown()

    # ---- the toy model

    def next_token(self, tokens: list[int]) -> int:
        digest = hashlib.blake2b(repr((self.seed, tokens)).encode(), digest_size=4).digest()
        return int.from_bytes(digest, "little") % VOCAB

    def _sampled(self, output: Any, reports: list[KVConnectorOutput | None]) -> ModelRunnerOutput:
        names = list(output.num_scheduled_tokens)
        sampled = []
        for name in names:
            request = self.scheduler.requests[name]
            # num_computed_tokens counts this step already.
            if request.num_computed_tokens < request.num_tokens:
                sampled.append([])
                continue
            token = self.next_token(list(request.all_token_ids))
            self.outputs[name].append(token)
            sampled.append([token])
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: at for at, name in enumerate(names)},
            sampled_token_ids=sampled,
            kv_connector_output=self._joined(reports),
        )

    def _joined(self, reports: list[KVConnectorOutput | None]) -> KVConnectorOutput | None:
        """What vLLM makes of several ranks' outputs; a request is parked until all ranks named it."""
        if self.connector is None:
            return None
        outputs = [ModelRunnerOutput([], {}, kv_connector_output=report) for report in reports]
        joined = self._aggregator.aggregate(outputs).kv_connector_output
        if joined.kv_connector_stats is not None:
            _add(self.stats, joined.kv_connector_stats.data)
        return joined


class _Worker:
    """One rank: pages in memory, and the connector's worker half."""

    def __init__(
        self, config: VllmConfig, cache: KVCacheConfig, rank: int, engine: ToyEngine
    ) -> None:
        self.rank, self.engine = rank, engine
        config = copy.copy(config)
        config.parallel_config = copy.copy(config.parallel_config)
        config.parallel_config.rank = rank
        shape = (cache.num_blocks, 1, engine.block_tokens, ROW_BYTES // 4)
        self.kv = {
            f"model.layers.{layer}.attn": torch.zeros(shape) for layer in range(engine.layers)
        }
        self.pages = [
            kv.numpy().view(np.uint8).reshape(cache.num_blocks, engine.block_tokens, ROW_BYTES)
            for kv in self.kv.values()
        ]
        # request -> tokens, the hash of them, and what it was after each
        self._digests: dict[str, tuple[list[int], Any, bytearray]] = {}
        self.connector, self.place = None, None
        self.wrong: list[
            tuple[str, set[int], str]
        ] = []  # who read wrong rows in this step, and which blocks
        if config.kv_transfer_config is not None:
            self.connector = KVConnectorFactory.create_connector(
                config, KVConnectorRole.WORKER, cache
            )
            self.connector.register_kv_caches(self.kv)
            self.place = self.connector.get_handshake_metadata()

    @property
    def leased_slots(self) -> int:
        half = getattr(self.connector, "_worker", None)
        return half.leased_slots if half is not None else 0

    def run(self, output: Any) -> KVConnectorOutput | None:
        """A step in the order of vLLM's V1 runner."""
        if self.connector is None:
            self._forward(output, lambda name: None, lambda name: None)
            return None
        connector = self.connector
        meta = pickle.loads(pickle.dumps(output.kv_connector_metadata))
        for load in [*getattr(meta, "loads", []), *getattr(meta, "streams", [])]:
            for page in self.pages:
                page[load.block_ids] = POISON
        connector.handle_preemptions(meta)
        connector.bind_connector_metadata(meta)
        fires = self.engine.hooks_fire
        forward_context = SimpleNamespace(
            attn_metadata={} if output.num_scheduled_tokens and fires else None,
            cudagraph_runtime_mode=CUDAGraphMode.NONE,
        )
        if output.has_sync_kv_loads:
            connector.start_load_kv(forward_context)
        self._forward(
            output,
            connector.wait_for_layer_load if fires else lambda name: None,
            (lambda name: connector.save_kv_layer(name, None, None))
            if fires
            else lambda name: None,
        )
        if not output.has_sync_kv_loads:
            connector.start_load_kv(forward_context)
        connector.wait_for_save()
        result = KVConnectorOutput()
        result.finished_sending, result.finished_recving = connector.get_finished(
            output.finished_req_ids
        )
        result.invalid_block_ids = connector.get_block_ids_with_load_errors()
        result.kv_connector_stats = connector.get_kv_connector_stats()
        result.kv_connector_worker_meta = pickle.loads(
            pickle.dumps(connector.build_connector_worker_meta())
        )
        connector.clear_connector_metadata()
        return result

    def _forward(self, output: Any, wait_for_layer: Any, save_layer: Any) -> None:
        batch = []
        for name, count in output.num_scheduled_tokens.items():
            request = self.engine.scheduler.requests[name]
            blocks = self.engine.scheduler.kv_cache_manager.get_block_ids(name)[0]
            # num_computed_tokens was advanced when the step was scheduled.
            end = request.num_computed_tokens
            rows = self._rows_of(request, end)
            batch.append((name, np.array(blocks), end - count, end, rows))
        size = self.engine.block_tokens
        for layer, layer_name in enumerate(self.kv):
            page = self.pages[layer]
            for name, blocks, start, end, rows in batch:
                at = np.arange(start, end)
                computed = rows[start:] ^ (layer + 1)
                computed = ~computed if name in self.engine.misled else computed
                page[blocks[at // size], at % size] = computed
            wait_for_layer(layer_name)
            for name, blocks, _, end, rows in batch:
                seen = page[blocks[: -(-end // size)]].reshape(-1, ROW_BYTES)[:end]
                right = rows ^ (layer + 1)
                if not np.array_equal(seen, right):
                    wrong = (seen != right).any(axis=1).nonzero()[0].tolist()
                    self.engine.misled.add(name)
                    where = f"request {name}, layer {layer}, positions {wrong[:8]} of {end}"
                    bad = {int(blocks[position // size]) for position in wrong}
                    self.wrong.append((name, bad, where))
            save_layer(layer_name)

    def _rows_of(self, request: Request, end: int) -> np.ndarray:
        """The right KV of the first `end` tokens, uint8 [end, ROW_BYTES]; each layer's is this ^ (layer + 1)."""
        tokens = list(request.all_token_ids)[:end]
        known, state, digests = self._digests.get(request.request_id, ([], None, bytearray()))
        if state is None or known[:end] != tokens[: len(known)]:
            lora = request.lora_request and request.lora_request.lora_name
            state = hashlib.blake2b(repr((self.engine.seed, self.rank, lora)).encode())
            known, digests = [], bytearray()
        for token in tokens[len(known) :]:
            state.update(token.to_bytes(4, "little"))
            digests += state.digest()
        longer = max(known, tokens, key=len)
        self._digests[request.request_id] = (longer, state, digests)
        return np.frombuffer(bytes(digests[: end * ROW_BYTES]), np.uint8).reshape(-1, ROW_BYTES)

    def stop(self) -> None:
        if self.connector is not None:
            self.connector.shutdown()


def _add(counts: dict[str, int], more: dict[str, int] | None) -> None:
    for name, count in (more or {}).items():
        counts[name] = counts.get(name, 0) + count


def _config(
    model: Path,
    extra: dict[str, Any] | None,
    block_tokens: int,
    ranks: int,
    max_batched_tokens: int,
    max_seqs: int,
    kv_role: str,
    prefix_caching: bool,
    policy: str,
    failure_policy: str,
) -> VllmConfig:
    transfer = (
        None
        if extra is None
        else {
            "kv_connector": "ObjectCacheConnector",
            "kv_connector_module_path": "objectcache.connector",
            "kv_role": kv_role,
            "kv_load_failure_policy": failure_policy,
            "kv_connector_extra_config": extra,
        }
    )
    args = EngineArgs(
        model=str(model),
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        block_size=block_tokens,
        max_num_batched_tokens=max_batched_tokens,
        max_num_seqs=max_seqs,
        max_model_len=4096,
        kv_transfer_config=transfer,
        enable_prefix_caching=prefix_caching,
        scheduling_policy=policy,
    )
    config = args.create_engine_config()
    config.cache_config.block_size = block_tokens
    config.parallel_config.tensor_parallel_size = ranks
    return config


def _kv_cache_config(blocks: int, block_tokens: int, layers: int) -> KVCacheConfig:
    spec = FullAttentionSpec(
        block_size=block_tokens, num_kv_heads=1, head_size=ROW_BYTES // 8, dtype=torch.float32
    )
    names = [f"model.layers.{layer}.attn" for layer in range(layers)]
    page = block_tokens * ROW_BYTES
    assert spec.page_size_bytes == page
    return KVCacheConfig(
        num_blocks=blocks,
        kv_cache_tensors=[KVCacheTensor(blocks * page * layers, names, blocks * page, page)],
        kv_cache_groups=[KVCacheGroupSpec(names, spec)],
        kv_cache_layout="LBHNC",
    )


def prompt(count: int, seed: int = 0) -> list[int]:
    """Random tokens, the same for the same seed."""
    rng = random.Random(seed)
    return [rng.randrange(VOCAB) for _ in range(count)]
