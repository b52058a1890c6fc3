"""Real vLLM configs as small as they may be, for tests of what is read from them. No engine, no test."""

import copy
from pathlib import Path
from typing import Any

BLOCKS = 4


def save_tiny_model(folder: Path) -> Path:
    """A Llama of 11 layers: a config, and a weight file that no engine could use."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=11,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    save_file({"w": torch.zeros(64)}, folder / "model.safetensors")
    return folder


def engine_config(model: Path, **changes: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    settings: dict[str, Any] = {"dtype": "bfloat16", "skip_tokenizer_init": True, **changes}
    return EngineArgs(model=str(model), **settings).create_engine_config()


def changed(config: Any, path: str, value: Any) -> Any:
    """A copy of a config with one attribute, given by its path, set past vLLM's checks."""
    config = copy.deepcopy(config)
    *owners, name = path.split(".")
    owner = config
    for part in owners:
        owner = getattr(owner, part)
    object.__setattr__(owner, name, value)
    return config


def kv_cache_config(spec: Any = None, groups: int = 1, **changes: Any) -> Any:
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

    names = [f"model.layers.{index}.self_attn.attn" for index in (10, 9, 2, 1, 0)]
    group = KVCacheGroupSpec(layer_names=names, kv_cache_spec=spec or layer_spec())
    return KVCacheConfig(
        num_blocks=BLOCKS,
        kv_cache_tensors=[],
        kv_cache_groups=[group] * groups,
        **{"kv_cache_layout": "LBHNC", **changes},
    )


def layer_spec(kind: str = "FullAttentionSpec", **changes: Any) -> Any:
    import torch
    from vllm.v1 import kv_cache_interface

    settings = {"block_size": 32, "num_kv_heads": 2, "head_size": 32, "dtype": torch.bfloat16}
    return getattr(kv_cache_interface, kind)(**{**settings, **changes})
