"""The reference pages of docs/, made from the code that they describe. What they say about one option or metric stands there.

`objectcache docs options > docs/OPTIONS.md`; a test holds pages and code together.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from objectcache.config import Options
from objectcache.errors import Misconfigured

_OPTIONS_HEAD = """\
# Options

<!-- Made by `objectcache docs options`; edit the fields of Options in objectcache/config.py. -->

These are the members of `kv_connector_extra_config`, inside vLLM's `--kv-transfer-config`. Only `url` must be set. All are checked when the engine starts: an unknown name, a wrong type or a value out of range is refused, and the message names the nearest option. Credentials are never options; they come from the standard AWS chain.

Numbers of bytes are whole numbers or strings such as `"4GiB"`. The options that say how a store is reached are options of the `objectcache` command too: `endpoint_url` is `--endpoint-url`.

| option | default | allowed | meaning |
|---|---|---|---|
"""

_OPTIONS_FOOT = """
Engines share chunks only if `chunk_tokens` and, where it is set, `model_id` are equal. No other option changes what is shared.

Two settings of vLLM beside this one matter:

| in `--kv-transfer-config` | meaning here |
|---|---|
| `"kv_role": "kv_both"` | load and save; `"kv_consumer"` loads only, `"kv_producer"` saves only |
| `"kv_load_failure_policy": "recompute"` | a prefix that is longer than `ring_bytes` holds streams through it, and vLLM computes what does not come. With vLLM's default, `"fail"`, it would end the request with an error instead: then such a prefix is loaded as far as `ring_bytes` holds it, and the rest is computed. Shorter prefixes are promised only when their bytes are verified in host memory, so for them it has nothing to decide |
"""

_METRICS_HEAD = """\
# Metrics

<!-- Made by `objectcache docs metrics`; edit COUNTERS in objectcache/metrics.py. -->

Counters on vLLM's own `/metrics`, with vLLM's labels (`model_name`, `engine`). All processes of an engine are added up; "per rank" means that a chunk counts once for each tensor-parallel rank. vLLM passes counts on with the steps that it runs, so an idle engine reports its last uploads with its next request. The same counts stand in vLLM's log, after `KV Transfer metrics:`.

| metric | counts |
|---|---|
"""

_METRICS_FOOT = """
## Questions, and what answers them

| question | expression |
|---|---|
| What share of prompt tokens comes from the store? | `rate(vllm:objectcache_hit_tokens_total[5m]) / rate(vllm:prompt_tokens_total[5m])` |
| Is what the store has also used? (the rest was in the GPU already, came late, or did not fit the ring) | `rate(vllm:objectcache_hit_tokens_total[5m]) / rate(vllm:objectcache_found_tokens_total[5m])` |
| Is the store too slow? | `rate(vllm:objectcache_late_prompts_total[5m])`, `rate(vllm:objectcache_lookup_failures_total[5m])` |
| Does anything reach the store? | `rate(vllm:objectcache_saved_chunks_total[5m])`, `rate(vllm:objectcache_failed_saves_total[5m])` |
| Does the ring have room for saves? | `rate(vllm:objectcache_dropped_saves_total[5m])` |
| Are objects damaged? | `increase(vllm:objectcache_corrupt_chunks_total[1d])` |
| What do requests cost? | `vllm:objectcache_get_requests_total`, `vllm:objectcache_head_requests_total`, `vllm:objectcache_put_requests_total`, times your prices |

vLLM itself counts `vllm:external_prefix_cache_queries_total` and `vllm:external_prefix_cache_hits_total`, in tokens, for whatever connector is on; the local prefix cache has `vllm:prefix_cache_queries_total` and `vllm:prefix_cache_hits_total`.

What to do when a number is wrong: [TROUBLESHOOTING.md](TROUBLESHOOTING.md).
"""


def options_page() -> str:
    """docs/OPTIONS.md."""
    rows = (
        f"| `{spec.name}` | {_default(spec)} | {_allowed(spec)} | {spec.metadata['doc']} |\n"
        for spec in dataclasses.fields(Options)
    )
    return _OPTIONS_HEAD + "".join(rows) + _OPTIONS_FOOT


def metrics_page() -> str:
    """docs/METRICS.md. Imports vllm, which metrics.py extends."""
    try:
        from objectcache.metrics import COUNTERS, prometheus_name
    except ModuleNotFoundError as error:
        raise Misconfigured(
            f"the table of metrics needs the module {error.name!r}.", "install vllm and try again."
        ) from error
    rows = (f"| `{prometheus_name(name)}_total` | {doc} |\n" for name, doc in COUNTERS.items())
    return _METRICS_HEAD + "".join(rows) + _METRICS_FOOT


def _default(spec: "dataclasses.Field[Any]") -> str:
    value: Any = spec.default
    if spec.name == "url":
        return "must be set"
    if spec.metadata.get("bytes"):
        return f"`{_byte_text(value)}`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`" if value != "" else "none"


def _allowed(spec: "dataclasses.Field[Any]") -> str:
    rule: Mapping[str, Any] = spec.metadata
    value: Any = spec.default
    if "choices" in rule:
        return ", ".join(f"`{choice}`" for choice in rule["choices"])
    if isinstance(value, bool):
        return "`true`, `false`"
    if not isinstance(value, int):
        return "a string"
    show = _byte_text if rule.get("bytes") else str
    low = show(rule.get("low", 0))
    return f"{low} to {show(rule['high'])}" if "high" in rule else f"{low} or more"


def _byte_text(count: int) -> str:
    for unit, size in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size and count % size == 0:
            return f"{count // size}{unit}"
    return str(count)
