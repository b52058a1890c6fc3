"""Other kinds of attention on real engines: MLA is cached, what cannot be is left alone with one clear warning."""

import json
from pathlib import Path
from typing import Any

from benchmarks.engine import run_engines
from benchmarks.tiny_model import prompt_tokens, write_model

PROMPT = prompt_tokens(1300, seed=5)  # 5 chunks, 10 blocks and a few tokens
FLUSH = [
    {"do": "wait", "seconds": 0.5},
    {"do": "generate", "prompts": [{"prompt_token_ids": [9, 8]}], "sampling": {"max_tokens": 1}},
    {"do": "metrics"},
]


def ask(prompt: list[int], pages: bool = True) -> dict[str, Any]:
    return {
        "do": "generate",
        "prompts": [{"prompt_token_ids": prompt}],
        "sampling": {"max_tokens": 8},
        "pages": pages,
    }


def transfer(folder: Path) -> dict[str, Any]:
    return {
        "kv_connector": "ObjectCacheConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"url": f"file://{folder}/store", "ring_bytes": "256MiB"},
    }


def answer(step: dict[str, Any]) -> dict[str, Any]:
    request: dict[str, Any] = step["requests"][0]
    return request


def write_mla_model(folder: Path) -> Path:
    import torch
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV2Config(
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_rope_head_dim=64,
        qk_nope_head_dim=64,
        v_head_dim=64,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        first_k_dense_replace=3,
        vocab_size=1024,
        max_position_embeddings=8192,
        n_group=1,
        topk_group=1,
    )
    model = DeepseekV2ForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.mul_(3)  # so that logits are spread
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_mla(tmp_path: Path) -> None:
    """vLLM's MLA kernels for the CPU take no float32, so tokens are compared at the same split: with
    a hit of as many tokens in the engine's own memory. Its kernel for CPUs without AMX does not read
    a prefix at all: there it is left alone."""
    import torch

    kwargs = {"model": str(write_mla_model(tmp_path / "model")), "dtype": "bfloat16"}
    on = kwargs | {"kv_transfer_config": transfer(tmp_path)}
    log = tmp_path / "engine.log"
    off, cold, warm = run_engines(
        [
            {"kwargs": kwargs, "steps": [ask(PROMPT), ask(PROMPT), *FLUSH]},
            {"kwargs": on, "steps": [ask(PROMPT), *FLUSH]},
            {"kwargs": on, "steps": [ask(PROMPT), *FLUSH]},
        ],
        log=log,
    )
    here, computed, loaded = (
        answer(off["steps"][1]),
        answer(cold["steps"][0]),
        answer(warm["steps"][0]),
    )
    hit = 1280 if torch.cpu._is_amx_tile_supported() else 0
    counts = (here["cached_tokens"], computed["cached_tokens"], loaded["cached_tokens"])
    assert counts == (hit, 0, hit)
    assert loaded["token_ids"] == here["token_ids"]
    assert len(computed["pages"]) == 3
    for layer, pages in computed["pages"].items():
        assert loaded["pages"][layer][:10] == pages[:10]
    lines = [line for line in log.read_text().splitlines() if "objectcache stays out" in line]
    assert len(lines) == (0 if hit else 2)
    assert all("does not read a prefix" in line for line in lines)


def test_sliding_window_is_left_alone(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config |= {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": 512,
    }
    (model / "config.json").write_text(json.dumps(config))
    log = tmp_path / "engine.log"
    off, on = run_engines(
        [
            {"kwargs": {"model": str(model)}, "steps": [ask(PROMPT, pages=False), *FLUSH]},
            {
                "kwargs": {"model": str(model), "kv_transfer_config": transfer(tmp_path)},
                "steps": [ask(PROMPT, pages=False), *FLUSH],
            },
        ],
        log=log,
    )
    assert answer(on["steps"][0])["token_ids"] == answer(off["steps"][0])["token_ids"]
    assert not (tmp_path / "store").exists()
    lines = [line for line in log.read_text().splitlines() if "objectcache stays out" in line]
    assert len(lines) == 1 and "SlidingWindowSpec" in lines[0]
