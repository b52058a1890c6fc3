"""What is counted and what it is called: the table behind `/metrics` and docs/METRICS.md. Not where it is counted."""

from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

COUNTERS: dict[str, str] = {
    "lookups": "Prompts whose prefix was looked up in the store or among known chunks.",
    "lookup_failures": "Lookups that ended in an error or a timeout.",
    "found_tokens": "Tokens of prompts that the store was found to have.",
    "hit_tokens": "Tokens whose KV was loaded and not computed.",
    "recomputed_tokens": "Tokens that the store was found to have and that were computed, because that is sooner.",
    "given_up_prompts": "Prompts whose load became so slow that all was computed.",
    "ahead_prompts": "Prompts that waited outside of the batch while their prefix was copied to the GPU.",
    "timely_prompts": "Prompts admitted just in time or at once, before all of their prefix was there.",
    "waited_layers": "Layers for which a step had to wait.",
    "failed_prompts": "Prompts admitted just in time or at once whose prefix then did not come: requests that failed.",
    "late_prompts": "Prompts computed because the store was too slow to answer or to deliver.",
    "staged_chunks": "Chunks brought into host memory and verified, per rank.",
    "missing_chunks": "Reads that found no object where one was expected.",
    "corrupt_chunks": "Reads whose bytes were wrong; the prompt was computed.",
    "failed_reads": "Reads that failed for another reason.",
    "saved_chunks": "Chunks written to the store, per rank.",
    "duplicate_chunks": "Chunks that were found to exist when they were to be uploaded.",
    "dropped_saves": "Chunks not saved at once because there was no room; tried again while the request lives.",
    "failed_saves": "Chunks whose upload failed, or was not tried while the store was sick.",
    "get_requests": "GET requests sent, retries included.",
    "put_requests": "PUT requests sent, retries included.",
    "head_requests": "HEAD requests sent, retries included.",
    "read_bytes": "Body bytes received from the store.",
    "written_bytes": "Body bytes sent to the store.",
    "handed_over": "Requests that a faster way to S3 left to a slower one; the log says why, once for each reason.",
    "hedged_requests": "GET requests sent because another one for the same bytes was late, or its body stalled; among get_requests.",
    "hedges_won": "Second requests that were answered before the late one.",
}
STORE_COUNTERS = (
    *("get_requests", "put_requests", "head_requests"),
    *("read_bytes", "written_bytes", "handed_over"),
    *("hedged_requests", "hedges_won"),
)


def prometheus_name(counter: str) -> str:
    """As Prometheus shows it; its client adds `_total`.

    The prefix is vLLM's: it takes back what bears it when a second engine starts in one process.
    """
    return f"vllm:objectcache_{counter}"


class Counters:
    """Counts since the last `take`. Used from one thread, or under the owner's lock."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def add(self, name: str, count: int = 1) -> None:
        assert name in COUNTERS, name
        if count:
            self._counts[name] = self._counts.get(name, 0) + count

    def take(self) -> "ObjectCacheStats | None":
        """What was counted, for vLLM; None if nothing."""
        if not self._counts:
            return None
        counts, self._counts = self._counts, {}
        return ObjectCacheStats(data=dict(counts))


@dataclass
class ObjectCacheStats(KVConnectorStats):
    """`data` maps names of COUNTERS to increments."""

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> "ObjectCacheStats":
        for name, count in other.data.items():
            self.data[name] = self.data.get(name, 0) + count
        return self

    def reduce(self) -> dict[str, int | float]:
        return {name: self.data[name] for name in COUNTERS if self.data.get(name)}

    def is_empty(self) -> bool:
        return not any(self.data.values())


class ObjectCachePromMetrics(KVConnectorPromMetrics):
    """One Prometheus counter for each row of COUNTERS, with vLLM's labels."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        families: dict[str, Any] = {
            name: self._counter_cls(
                name=prometheus_name(name), documentation=doc, labelnames=labelnames
            )
            for name, doc in COUNTERS.items()
        }
        self._counters = {
            engine: {name: family.labels(*values) for name, family in families.items()}
            for engine, values in per_engine_labelvalues.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, count in transfer_stats_data.items():
            if name in COUNTERS:
                self._counters[engine_idx][name].inc(count)
