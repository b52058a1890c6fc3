"""May this engine's KV be kept at all: the one list of refusals. Not what names it: identity.py.

A prefix's KV may be kept if it is a function of the prefix's tokens and of what identity.py and a
request's chain cover, and if it lies in pages that can be copied. vLLM's objects are read by
attribute; vllm and torch are not imported.
"""

from collections.abc import Iterable, Mapping
from typing import Any

# Physical order of one layer's page of one block; True where the page is one contiguous run
# (vllm.v1.kv_cache_layout.KVCacheLayout.is_block_compact).
_LAYOUTS = {
    "LBHNC": True,
    "LBNHC": True,
    "BLHNC": True,
    "BLNHC": True,
    "LHBNC": False,
    "BHLNC": False,
}
_LAYOUT_ALIASES = {"NHD": "LBNHC", "HND": "LBHNC"}
_CALLING_BACK = (
    "vllm.model_executor.layers.attention.attention.Attention.forward",
    "vllm.model_executor.layers.attention.mla_attention.MLAAttention.forward",
)
_SPECS = ("FullAttentionSpec", "MLAAttentionSpec")


def refusal(vllm_config: Any, kv_cache_config: Any) -> str | None:
    """Why this engine's KV must not be cached, one sentence, or None.

    Ask on both sides: the scheduler's copy of a group may hide that its layers differ, and only a
    worker knows its layers.
    """
    return (
        _model_refusal(vllm_config)
        or _parallel_refusal(vllm_config.parallel_config)
        or _groups_refusal(kv_cache_config)
        or _layout_refusal(layout_name(vllm_config, kv_cache_config))
        or _layers_refusal(vllm_config)
    )


def _model_refusal(vllm_config: Any) -> str | None:
    model, cache = vllm_config.model_config, vllm_config.cache_config
    text = model.hf_text_config
    # A draft model's KV lies in the same blocks, and its row i depends on token i + 1; a chunk's
    # last row would then depend on a token its hash does not cover. n-gram drafting has no such
    # layers, but no test shows yet that only accepted tokens are saved.
    if getattr(vllm_config, "speculative_config", None) is not None:
        return "Speculative decoding is on: a draft's KV depends on tokens after the prefix."
    if model.runner_type != "generate":
        return f"The runner is {model.runner_type!r}: only generating models are cached."
    if model.is_encoder_decoder:
        return "The model is an encoder-decoder: its KV depends on the encoder's input."
    if getattr(model, "is_diffusion", False) or getattr(vllm_config, "diffusion_config", None):
        return "The model generates by diffusion: its KV depends on tokens after the prefix."
    if not getattr(model, "is_prefix_caching_supported", True):
        return "vLLM says that this model does not support prefix caching."
    if not getattr(text, "is_causal", True) or _bidirectional_text(text):
        return "The model's attention is bidirectional: KV depends on tokens after the prefix."
    if getattr(getattr(vllm_config, "attention_config", None), "use_non_causal", False):
        return "attention_config.use_non_causal is set: KV depends on tokens after the prefix."
    if _ignores_prefixes(vllm_config):
        return (
            "Chunked prefill and prefix caching are both off for this MLA model, as vLLM sets them "
            "where the attention backend does not read a prefix: a hit would give wrong tokens."
        )
    if getattr(text, "dual_chunk_attention_config", None):
        return "Dual chunk attention is not supported: its positions depend on the sequence length."
    if getattr(cache, "calculate_kv_scales", False):
        return "calculate_kv_scales is on: KV scales depend on the first batch an engine sees."
    if getattr(cache, "kv_sharing_fast_prefill", False):
        return "kv_sharing_fast_prefill is on: it leaves the KV of prefill tokens incomplete."
    if getattr(text, "num_kv_shared_layers", 0):
        return "The model's layers share KV caches, which is not supported yet."
    if getattr(vllm_config, "weight_transfer_config", None) is not None:
        return "weight_transfer_config is set: the weights change while the engine runs."
    return None


def _ignores_prefixes(vllm_config: Any) -> bool:
    """MLA without AMX on a CPU: its prefill attends only to the tokens of the step. Seen in 0.32: with
    a hit the KV of the tokens after it was wrong."""
    return (
        bool(getattr(vllm_config.model_config, "use_mla", False))
        and not getattr(vllm_config.scheduler_config, "enable_chunked_prefill", True)
        and not vllm_config.cache_config.enable_prefix_caching
    )


def _bidirectional_text(text_config: Any) -> bool:
    # "vision" (Gemma 4) means bidirectional within images only: a matter of requests.
    return getattr(text_config, "use_bidirectional_attention", None) not in (None, False, "vision")


def _parallel_refusal(parallel: Any) -> str | None:
    for name, what in (
        ("pipeline_parallel_size", "pipeline parallelism"),
        ("decode_context_parallel_size", "decode context parallelism"),
        ("prefill_context_parallel_size", "prefill context parallelism"),
    ):
        if getattr(parallel, name, 1) > 1:
            return f"{name} is {getattr(parallel, name)}: {what} is not supported yet."
    return None


def _groups_refusal(kv_cache_config: Any) -> str | None:
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        kinds = ", ".join(sorted({type(group.kv_cache_spec).__name__ for group in groups}))
        return f"The engine has {len(groups)} KV cache groups ({kinds or 'none'}), not one."
    group = groups[0]
    if getattr(group, "is_eagle_group", False):
        return "The KV cache holds a draft model's layers: they depend on tokens after the prefix."
    role = getattr(group, "role", "default")
    if (
        getattr(group, "host_resident", False)
        or not getattr(group, "enable_kv_transfer", True)
        or getattr(role, "value", role) != "default"
        or getattr(kv_cache_config, "hisparse_host_num_blocks", None) is not None
    ):
        return "HiSparse is on: the KV on the device is not the whole KV."
    for spec in layer_specs(group.kv_cache_spec, group.layer_names).values():
        if reason := _spec_refusal(spec):
            return reason
    return None


def _spec_refusal(spec: Any) -> str | None:
    # By exact name: every subclass exists because something differs (sinks, R-SWA, hidden states).
    name = type(spec).__name__
    if name not in _SPECS:
        return f"A layer's KV is of kind {name}; only {' and '.join(_SPECS)} are supported."
    if getattr(spec, "non_causal", False) or getattr(spec, "non_causal_multi_token_decode", False):
        return "A layer attends to later tokens: its KV is not a function of the prefix."
    role = getattr(spec, "cache_role", "sparse")
    if getattr(role, "value", role) != "sparse" or getattr(spec, "model_version", None):
        return "The model keeps an index or compressed states beside its KV: not supported yet."
    if getattr(spec, "tokens_per_state", 1) != 1:
        return "The model keeps one state for several tokens, which is not supported."
    # `sliding_window` and `attention_chunk_size` are fine here: on a FullAttentionSpec they say what
    # a causal layer reads; all blocks are kept, and each row is a function of the prefix.
    return None


def _layout_refusal(layout: str | None) -> str | None:
    if layout is None:
        return "vLLM has not said which KV cache layout it uses."
    if layout not in _LAYOUTS:
        return f"The KV cache layout {layout!r} is not known to this version of objectcache."
    if not _LAYOUTS[layout]:
        return f"The KV cache layout {layout} scatters a block of a layer: use LBNHC or LBHNC."
    return None


def _layers_refusal(vllm_config: Any) -> str | None:
    for name, layer in forward_layers(vllm_config).items():
        if getattr(layer, "kv_sharing_target_layer_name", None):
            return f"Layer {name} shares another layer's KV cache, which is not supported yet."
    return None


def layout_name(vllm_config: Any, kv_cache_config: Any) -> str | None:
    """Resolved KV cache layout, legacy names translated; None if vLLM has not resolved it."""
    name = getattr(kv_cache_config, "kv_cache_layout", None) or getattr(
        vllm_config.cache_config, "kv_cache_layout", None
    )
    name = getattr(name, "name", name)
    return None if name is None else _LAYOUT_ALIASES.get(str(name), str(name))


def layer_specs(spec: Any, layer_names: Iterable[str]) -> dict[str, Any]:
    """Spec of each layer of a group; a UniformTypeKVCacheSpecs holds one for each."""
    if type(spec).__name__ == "UniformTypeKVCacheSpecs":
        return dict(spec.kv_cache_specs)
    return dict.fromkeys(layer_names, spec)


def forward_layers(vllm_config: Any) -> Mapping[str, Any]:
    """vLLM's layer objects by name; empty in a process that holds no model."""
    compilation = getattr(vllm_config, "compilation_config", None)
    return getattr(compilation, "static_forward_context", None) or {}


def layers_call_back(vllm_config: Any, layer_names: Iterable[str]) -> bool:
    """Whether each of these layers calls the connector before and after it is computed on.

    vLLM's own two kinds of layers do. Models bring others that do not (Kimi K3's MLA and MiniMax M3's
    sparse attention in 0.32): all their KV must be there before the forward pass.
    """
    layers = forward_layers(vllm_config)
    return all(_forward_of(layers.get(name)) in _CALLING_BACK for name in layer_names)


def _forward_of(layer: Any) -> str:
    forward = getattr(type(layer), "forward", None)
    return f"{getattr(forward, '__module__', '')}.{getattr(forward, '__qualname__', '')}"


def media_is_bidirectional(vllm_config: Any) -> bool:
    """Whether tokens of an image attend to later ones, so that a chunk may end inside a span."""
    return bool(getattr(vllm_config.model_config, "is_mm_prefix_lm", False))
