"""Other kinds of attention on real engines: MLA is cached, what cannot be is left alone with one clear warning."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

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


def write_sliding_model(folder: Path) -> Path:
    model = write_model(folder)
    config = json.loads((model / "config.json").read_text())
    config |= {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": 512,
    }
    (model / "config.json").write_text(json.dumps(config))
    return model


@dataclass
class Lives:
    """What the engines of both models said, in one process: importing vLLM takes longest."""

    mla: list[dict[str, Any]]
    sliding: list[dict[str, Any]]
    mla_said: list[str]  # that objectcache stays out
    sliding_said: list[str]
    sliding_store: Path


@pytest.fixture(scope="module", name="lives")
def lives_fixture(tmp_path_factory: pytest.TempPathFactory) -> Lives:
    folder = tmp_path_factory.mktemp("models")
    mla = {"model": str(write_mla_model(folder / "mla")), "dtype": "bfloat16"}
    mla_on = mla | {"kv_transfer_config": transfer(folder / "of-mla")}
    sliding = {"model": str(write_sliding_model(folder / "sliding"))}
    sliding_on = sliding | {"kv_transfer_config": transfer(folder / "of-sliding")}
    without_pages = [ask(PROMPT, pages=False), *FLUSH]
    log = folder / "engine.log"

    reports = run_engines(
        [
            {"kwargs": mla, "steps": [ask(PROMPT), ask(PROMPT), *FLUSH]},
            {"kwargs": mla_on, "steps": [ask(PROMPT), *FLUSH]},
            {"kwargs": mla_on, "steps": [ask(PROMPT), *FLUSH]},
            {"kwargs": sliding, "steps": without_pages},
            {"kwargs": sliding_on, "steps": without_pages},
        ],
        log=log,
    )
    lines = [line for line in log.read_text().splitlines() if "objectcache stays out" in line]
    return Lives(reports[:3], reports[3:], lines[:-1], lines[-1:], folder / "of-sliding" / "store")


def test_mla(lives: Lives) -> None:
    """vLLM's MLA kernels for the CPU take no float32, so tokens are compared at the same split: with
    a hit of as many tokens in the engine's own memory. Its kernel for CPUs without AMX does not read
    a prefix at all: there it is left alone."""
    import torch

    off, cold, warm = lives.mla
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
    assert len(lives.mla_said) == (0 if hit else 2)
    assert all("does not read a prefix" in line for line in lives.mla_said)


def test_sliding_window_is_left_alone(lives: Lives) -> None:
    off, on = lives.sliding
    assert answer(on["steps"][0])["token_ids"] == answer(off["steps"][0])["token_ids"]
    assert not lives.sliding_store.exists()
    (line,) = lives.sliding_said
    assert "SlidingWindowSpec" in line
