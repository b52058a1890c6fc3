"""What makes an engine's or a request's KV bytes what they are. Not how facts become names: keys.py.

Everything here reads vLLM's objects by attribute and imports neither vllm nor torch at load time.

What belongs in the facts: whatever changes the function from tokens to KV, or the meaning of the
stored bytes. What does not: whatever changes only rounding (batch shape, CUDA graphs, expert or data
parallelism), as vLLM itself shares blocks across those; and places, ports and sizes of memory.
A fact too many costs a miss. A fact too few gives a wrong token.
"""

import dataclasses
import enum
import importlib.metadata
import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from objectcache.errors import Misconfigured
from objectcache.keys import Item, Namespace, canonical_json, root_hash
from objectcache.support import (
    forward_layers,
    layer_specs,
    layout_name,
    media_is_bidirectional,
    refusal,
)
from objectcache.weights import LoraDigests, Weights, identify_weights

__all__ = [
    "LoraDigests",
    "ModelFacts",
    "RequestIdentity",
    "canonical_layers",
    "engine_namespace",
    "media_is_bidirectional",
    "model_facts",
    "refusal",
    "request_identity",
    "worker_facts",
]

# ---- facts of the model


@dataclass(frozen=True)
class ModelFacts:
    """Facts for a namespace, and which weights they name at what cost (for the log)."""

    facts: dict[str, Any]
    weights: Weights


# Where a config came from, who wrote it, and what only the front end or a loaded model adds.
_CONFIG_NOISE = frozenset(
    {
        "_name_or_path",
        "name_or_path",
        "_commit_hash",
        "transformers_version",
        "id2label",
        "label2id",
        "max_model_len",
        "output_attentions",
        "output_hidden_states",
        "problem_type",
        "return_dict",
        "use_cache",
    }
)
# RoPE kinds whose cos/sin at a position does not depend on the longest length served. Any other
# brings max_model_len into the facts: longrope picks its factors by it, and so may dynamic and ntk.
_ROPE_FREE_OF_LENGTH = frozenset(
    {
        "default",
        "linear",
        "llama3",
        "yarn",
        "deepseek_yarn",
        "deepseek_llama_scaling",
        "proportional",
        "mllama4",
        "bailing_mrope",
    }
)
# Llama 4 turns on temperature tuning by itself when max_model_len > 32K.
_MODELS_BOUND_TO_LENGTH = frozenset({"llama4", "llama4_text"})
_MEDIA_FACTS = (
    "language_model_only",
    "mm_processor_kwargs",
    "mm_device_do_normalize",
    "mm_encoder_attn_dtype",
    "mm_encoder_fp8_scale_path",
    "video_pruning_rate",
    "video_pruning_method",
)


def model_facts(vllm_config: Any, model_id: str = "") -> ModelFacts:
    """What the engine computes, from its config. See identify_weights for the cost.

    Call it in one process and send the result: loading a model may change its config object.
    Raises Misconfigured if the weights cannot be identified or a config is not plain data.
    """
    model = vllm_config.model_config
    weights = identify_weights(vllm_config, model_id)
    try:
        config = _plain(model.hf_config, "hf_config", _CONFIG_NOISE)
        text = _plain(model.hf_text_config, "hf_text_config", _CONFIG_NOISE)
        facts = {
            "label": model_id
            or weights.facts.get("repo")
            or str(config.get("model_type") or "model"),
            "weights": weights.facts,
            "architecture": str(model.architecture),
            "config": config,
            "dtype": _dtype(model.dtype),
            "quantization": _plain(model.quantization, "quantization"),
            "quantization_config": _plain(model.quantization_config, "quantization_config"),
            "model_class_overrides": _plain(
                getattr(model, "model_class_overrides", None) or {}, "model_class_overrides"
            ),
            "kv_cache_dtype": _kv_cache_dtype(vllm_config),
            "kv_cache_dtype_skip_layers": sorted(
                getattr(vllm_config.cache_config, "kv_cache_dtype_skip_layers", None) or []
            ),
            "tensor_parallel_size": vllm_config.parallel_config.tensor_parallel_size,
            "additional_config": _additional(getattr(vllm_config, "additional_config", None)),
            "media": _media_facts(getattr(model, "multimodal_config", None)),
        }
        canonical_json(facts)
    except TypeError as error:
        raise Misconfigured(
            f"the model's config holds what is not plain data: {error}",
            "objectcache cannot name this model's KV; report it with the model's config.json.",
        ) from error
    if text not in (config, config.get("text_config")):
        facts["text_config"] = text
    if _bound_to_length(config) or _bound_to_length(text):
        facts["max_model_len"] = model.max_model_len
    if str(model.architecture).startswith("Transformers"):
        # Then the model's code is not vLLM's but that of transformers, or the repository's own.
        facts["transformers"] = importlib.metadata.version("transformers")
    if getattr(model, "trust_remote_code", False):
        facts["code_revision"] = getattr(model, "code_revision", None)
    return ModelFacts(facts, weights)


def _dtype(value: Any) -> str:
    return str(value).removeprefix("torch.")


def _kv_cache_dtype(vllm_config: Any) -> str:
    # "auto" is the model's own, unless the checkpoint says otherwise: that is in `config`, and what
    # came of it is in the worker's facts.
    name = str(vllm_config.cache_config.cache_dtype)
    return _dtype(vllm_config.model_config.dtype) if name == "auto" else name


def _additional(config: Any) -> Any:
    # Out-of-tree platforms keep their settings here, plain or as an object that can hash itself.
    if callable(getattr(config, "compute_hash", None)):
        return {"hash": str(config.compute_hash())}
    return _plain(config or {}, "additional_config")


def _media_facts(multimodal: Any) -> dict[str, Any] | None:
    if multimodal is None:
        return None
    return {name: _plain(getattr(multimodal, name, None), name) for name in _MEDIA_FACTS}


def _bound_to_length(config: Mapping[str, Any]) -> bool:
    if config.get("model_type") in _MODELS_BOUND_TO_LENGTH:
        return True
    return any(
        kind not in _ROPE_FREE_OF_LENGTH or rope.get("use_fope") for kind, rope in _ropes(config)
    )


def _ropes(value: Any, inside: bool = False) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each RoPE kind named anywhere below, with the settings beside it."""
    if isinstance(value, list):
        for item in value:
            yield from _ropes(item, inside)
    if not isinstance(value, dict):
        return
    kind = value.get("rope_type", value.get("type") if inside else None)
    if isinstance(kind, str):
        yield kind, value
    for name, item in value.items():
        yield from _ropes(item, inside or name in ("rope_scaling", "rope_parameters"))


def _plain(value: Any, where: str, without: frozenset[str] = frozenset()) -> Any:
    """`value` as JSON, less the keys in `without` at every depth. TypeError names what is not."""
    if isinstance(value, enum.Enum):
        return value.name
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)  # of a subclass, such as numpy's floats, the plain value
    if isinstance(value, Mapping):
        return {
            _key(key, where): _plain(item, f"{where}.{key}", without)
            for key, item in value.items()
            if key not in without
        }
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{i}]", without) for i, item in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(item, where, without) for item in value), key=canonical_json)
    if callable(getattr(value, "to_dict", None)):
        return _plain(value.to_dict(), where, without)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: _plain(getattr(value, field.name), f"{where}.{field.name}", without)
            for field in dataclasses.fields(value)
        }
    if type(value).__name__ == "dtype":
        return _dtype(value)
    raise TypeError(f"{where} is of type {type(value).__name__}.")


def _key(key: Any, where: str) -> str:
    if isinstance(key, bool) or not isinstance(key, (str, int)):
        raise TypeError(f"{where} has a key of type {type(key).__name__}.")
    return str(key)


# ---- facts that only a worker knows


def worker_facts(
    vllm_config: Any, kv_cache_config: Any, kv_caches: Mapping[str, Any]
) -> dict[str, Any]:
    """What the stored bytes of this worker's pages mean. Equal on equal hosts and on all ranks.

    `kv_caches` are the tensors that vLLM registered, by layer. Call it after `refusal`.
    """
    group = kv_cache_config.kv_cache_groups[0]
    specs = layer_specs(group.kv_cache_spec, group.layer_names)
    names = canonical_layers(name for name in group.layer_names if name in kv_caches)
    layers = forward_layers(vllm_config)
    device = next(iter(kv_caches.values())).device.type if kv_caches else "none"
    kinds: dict[bytes, dict[str, Any]] = {}
    for index, name in enumerate(names):
        views = kv_caches[name].shape[0] // kv_cache_config.num_blocks
        kind = _layer_kind(vllm_config, layers.get(name), specs[name], max(views, 1), device)
        kinds.setdefault(canonical_json(kind), {**kind, "layers": []})["layers"].append(index)
    layout = layout_name(vllm_config, kv_cache_config) or ""
    return {
        "device": device,
        "cpu": _cpu_facts() if device == "cpu" else None,
        # Where layers and blocks lie is no matter of a page's bytes: LBHNC and BLHNC are one.
        "page_order": "".join(axis for axis in layout if axis not in "LB"),
        "kv_tp_replicas": getattr(kv_cache_config, "kv_tp_replicas", 1),
        "layers": names,
        "pages": list(kinds.values()),
    }


def canonical_layers(names: Iterable[str]) -> list[str]:
    """Layer names in natural order: layer 2 before layer 10."""
    return sorted(
        names,
        key=lambda name: [
            (0, int(part), "") if part.isdigit() else (1, 0, part)
            for part in re.split(r"(\d+)", name)
        ],
    )


def _layer_kind(vllm_config: Any, layer: Any, spec: Any, views: int, device: str) -> dict[str, Any]:
    head_size = getattr(spec, "head_size", None)
    get_backend = getattr(layer, "get_attn_backend", None)
    isa = getattr(layer, "isa", None)
    if device == "cpu" and isa is None and type(spec).__name__ == "FullAttentionSpec":
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        dtype, cache_dtype = vllm_config.model_config.dtype, vllm_config.cache_config.cache_dtype
        isa = _get_attn_isa(dtype, spec.block_size // views, head_size, cache_dtype)
    return {
        "backend": str(get_backend().get_name()) if get_backend else None,
        "spec": type(spec).__name__,
        # The CPU backend packs K and V in tiles that differ by instruction set.
        "isa": isa,
        "dtype": _dtype(spec.dtype),
        "quant_mode": getattr(getattr(spec, "kv_quant_mode", None), "name", None),
        "cache_dtype": getattr(spec, "cache_dtype_str", None),
        "kv_heads": spec.num_heads,
        "head_size": head_size,
        "head_size_v": getattr(spec, "head_size_v", None),
        "page_bytes": getattr(spec, "unpadded_page_size_bytes", spec.page_size_bytes),
        "block_tokens": spec.block_size,
        # A kernel may split a block into smaller pages, each in the page order on its own.
        "kernel_block_tokens": spec.block_size // views,
        "window": getattr(spec, "sliding_window", None),
        "attention_chunk": getattr(spec, "attention_chunk_size", None),
    }


def _cpu_facts() -> dict[str, Any]:
    """What compiled kernels a CPU host picks: the same ISA name may pack differently by it."""
    import torch

    machine = platform.machine()
    facts: dict[str, Any] = {
        "machine": machine,
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    if machine not in ("x86_64", "AMD64") and hasattr(torch.cpu, "get_capabilities"):
        # Arm's "neon" kernels pack for BFMMLA where the CPU has it; there is no other name for it.
        flags = torch.cpu.get_capabilities()
        facts["flags"] = sorted(name for name, value in flags.items() if value is True)
    return facts


def engine_namespace(
    model: Mapping[str, Any],
    worker: Mapping[str, Any],
    block_tokens: int,
    chunk_tokens: int,
    vllm_version: str,
) -> Namespace:
    """The namespace of an engine.

    vLLM's major.minor is in it: what a page means (packing, scales, head order) has changed between
    minor versions without any name for it changing; patch releases carry fixes, not layouts. Builds
    that are no release are known by their whole version.
    """
    release = re.fullmatch(r"(\d+\.\d+)\.\d+(\.post\d+)?(\+(cpu|cu\d+|rocm[\d.]*))?", vllm_version)
    return Namespace(
        {
            "label": model.get("label"),
            "model": dict(model),
            "worker": dict(worker),
            "block_tokens": block_tokens,
            "chunk_tokens": chunk_tokens,
            "vllm": release[1] if release else vllm_version,
        }
    )


# ---- identity of a request


@dataclass(frozen=True)
class RequestIdentity:
    """Where a request's chain of chunks begins, and what it holds besides tokens."""

    root: bytes
    items: tuple[Item, ...]
    may_load: bool
    """False for a request that must compute its whole prompt; what it computes may be saved."""


def request_identity(
    request: Any, loras: LoraDigests, bidirectional_media: bool = False
) -> RequestIdentity | str:
    """Identity of a vLLM Request, or why its KV cannot be cached."""
    if getattr(request, "pooling_params", None) is not None:
        return "it is a pooling request"
    if getattr(request, "prompt_embeds", None) is not None:
        return "its prompt is embeddings, not tokens"
    if getattr(request, "resumable", False):
        return "its input is streamed: tokens already hashed may be replaced"
    features = getattr(request, "mm_features", None) or ()
    if features and bidirectional_media:
        return "its media are attended to in both directions"
    if any(feature.identifier is None for feature in features):
        return "a media item has no identifier"
    lora: bytes | None = None
    if getattr(request, "lora_request", None) is not None:
        digest = loras.digest(request.lora_request)
        if isinstance(digest, str):
            return digest
        lora = digest
    items = tuple(
        Item(str(f.modality), f.identifier, f.mm_position.offset, f.mm_position.length)
        for f in features
    )
    may_load = not getattr(request, "skip_reading_prefix_cache", False)
    return RequestIdentity(root_hash(request.cache_salt, lora), items, may_load)
