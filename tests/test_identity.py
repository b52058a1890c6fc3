"""Each fact that changes KV bytes changes the name, and nothing else does. Not refusals: test_support.py."""

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace as Fake
from typing import Any

import pytest
from engine_configs import (
    BLOCKS,
    changed,
    engine_config,
    kv_cache_config,
    layer_spec,
    save_tiny_model,
)

from objectcache import identity
from objectcache.errors import Misconfigured
from objectcache.keys import Item, Namespace, root_hash
from objectcache.weights import LoraDigests

VERSION = "0.32.0+cpu"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def base(model_dir: Path) -> Any:
    config = engine_config(model_dir)
    config.cache_config.block_size = 32
    return config


def _worker(
    config: Any, kv_config: Any = None, split: int = 1, isa: str = "vec", backend: str = "CPU_ATTN"
) -> dict[str, Any]:
    """Facts of a worker whose layers and tensors are as small as they may be."""
    import torch

    kv_config = kv_config or kv_cache_config()
    config = copy.copy(config)
    layer = Fake(isa=isa, get_attn_backend=lambda: Fake(get_name=lambda: backend))
    names = kv_config.kv_cache_groups[0].layer_names
    config.compilation_config = Fake(static_forward_context=dict.fromkeys(names, layer))
    caches = {name: torch.empty(BLOCKS * split, 2, 32 // split, 64) for name in names}
    return identity.worker_facts(config, kv_config, caches)


def _namespace(config: Any, worker: dict[str, Any] | None = None, **options: Any) -> Namespace:
    model = identity.model_facts(config, options.get("model_id", ""))
    return identity.engine_namespace(
        model.facts,
        _worker(config) if worker is None else worker,
        options.get("block_tokens", 32),
        options.get("chunk_tokens", 256),
        options.get("version", VERSION),
    )


# ---- what must change the name

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 2.0,
    "original_max_position_embeddings": 2048,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 16,
    "long_factor": [2.0] * 16,
    "original_max_position_embeddings": 1024,
}


@pytest.mark.parametrize(
    "overrides",
    [
        {"rope_parameters": {**ROPE, "rope_theta": 10001.0}},
        {"rope_parameters": YARN},
        {"rope_parameters": {**YARN, "factor": 4.0}},
        {"rms_norm_eps": 1e-5},
        {"quantization_note": "any field of the config"},
    ],
)
def test_the_models_config_is_in_the_name(
    model_dir: Path, base: Any, overrides: dict[str, Any]
) -> None:
    names = {
        _namespace(base).name,
        _namespace(engine_config(model_dir, hf_overrides=overrides)).name,
    }
    assert len(names) == 2
    if overrides == {"rope_parameters": {**YARN, "factor": 4.0}}:
        other = _namespace(engine_config(model_dir, hf_overrides={"rope_parameters": YARN}))
        assert other.name not in names


def test_the_models_dtype_is_in_the_name(model_dir: Path, base: Any) -> None:
    worker = _worker(base)
    names = {
        _namespace(engine_config(model_dir, dtype=dtype, kv_cache_dtype="float16"), worker).name
        for dtype in ("float16", "bfloat16")
    }
    assert len(names) == 2


@pytest.mark.parametrize(
    "path, value",
    [
        ("cache_config.cache_dtype", "fp8_e5m2"),
        ("cache_config.kv_cache_dtype_skip_layers", ["0"]),
        ("model_config.quantization", "fp8"),
        ("model_config.quantization_config", {"linear": {"weight": "fp8"}}),
        ("model_config.model_class_overrides", {"LlamaForCausalLM": "mine:Llama"}),
        ("parallel_config.tensor_parallel_size", 2),
        ("additional_config", {"platform": "other"}),
    ],
)
def test_a_setting_that_changes_kv_is_in_the_name(base: Any, path: str, value: Any) -> None:
    worker = _worker(base)
    assert _namespace(changed(base, path, value), worker) != _namespace(base, worker)


@pytest.mark.parametrize(
    "option",
    [
        {"block_tokens": 64},
        {"chunk_tokens": 512},
        {"version": "0.33.0"},
        {"version": "0.32.1.dev7+g0123abc"},
        {"model_id": "mine-v2"},
    ],
)
def test_an_option_that_changes_chunks_is_in_the_name(base: Any, option: dict[str, Any]) -> None:
    assert _namespace(base, **option) != _namespace(base)


@pytest.mark.parametrize("patch", ["0.32.0", "0.32.1", "0.32.1+cu129", "0.32.0.post1+cpu"])
def test_patch_releases_share_chunks(base: Any, patch: str) -> None:
    assert _namespace(base, version=patch) == _namespace(base)


def _bytes(mode: str) -> Any:
    import torch
    from vllm.v1.kv_cache_interface import KVQuantMode

    return layer_spec(dtype=torch.uint8, kv_quant_mode=KVQuantMode[mode])


def test_the_meaning_of_quantised_bytes_is_in_the_name(base: Any) -> None:
    modes = ("NONE", "FP8_PER_TENSOR", "INT8_PER_TOKEN_HEAD")
    names = {_namespace(base, _worker(base, kv_cache_config(_bytes(mode)))).name for mode in modes}
    assert len({*names, _namespace(base).name}) == 4


@pytest.mark.parametrize(
    "change",
    [
        lambda config: _worker(config, isa="amx"),
        lambda config: _worker(config, backend="TRITON_ATTN"),
        lambda config: _worker(config, split=2),
        lambda config: _worker(config, kv_cache_config(kv_cache_layout="LBNHC")),
        lambda config: _worker(config, kv_cache_config(kv_tp_replicas=2)),
        lambda config: _worker(config, kv_cache_config(layer_spec(num_kv_heads=1))),
        lambda config: _worker(config, kv_cache_config(layer_spec(head_size=64))),
        lambda config: _worker(config, kv_cache_config(layer_spec(sliding_window=128))),
    ],
    ids=[
        "isa",
        "backend",
        "kernel-block",
        "page-order",
        "replicas",
        "heads",
        "head-size",
        "window",
    ],
)
def test_what_a_worker_knows_is_in_the_name(
    base: Any, change: Callable[[Any], dict[str, Any]]
) -> None:
    assert _namespace(base, change(base)) != _namespace(base)


def test_a_length_that_changes_rope_is_in_the_name(model_dir: Path) -> None:
    long = {"rope_parameters": LONGROPE}
    names = {
        _namespace(engine_config(model_dir, hf_overrides=long, max_model_len=length)).name
        for length in (512, 2048)
    }
    assert len(names) == 2


# ---- what must not change the name


@pytest.mark.parametrize(
    "settings",
    [
        {"max_model_len": 512},
        {"max_num_seqs": 7},
        {"gpu_memory_utilization": 0.5},
        {"served_model_name": "other"},
        {"seed": 7},
        {"enforce_eager": True},
        {"enable_prefix_caching": False},
        {"hf_overrides": {"rope_parameters": ROPE}},
        {"load_format": "safetensors"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_leaves_kv_alone_leaves_the_name_alone(
    model_dir: Path, base: Any, settings: dict[str, Any]
) -> None:
    assert _namespace(engine_config(model_dir, **settings)).canonical == _namespace(base).canonical


def test_a_rope_free_of_length_leaves_the_length_out(model_dir: Path) -> None:
    names = {
        _namespace(
            engine_config(model_dir, hf_overrides={"rope_parameters": YARN}, max_model_len=length)
        ).name
        for length in (512, 2048)
    }
    assert len(names) == 1


def test_where_blocks_and_layers_lie_leaves_the_name_alone(base: Any) -> None:
    packed = kv_cache_config(kv_cache_layout="BLHNC")
    legacy = kv_cache_config(kv_cache_layout="HND")
    fewer = kv_cache_config(kv_tp_replicas=1)
    for kv_config in (packed, legacy, fewer):
        assert _worker(base, kv_config) == _worker(base)


def test_a_copy_of_the_model_elsewhere_has_the_same_name(
    model_dir: Path, base: Any, tmp_path: Path
) -> None:
    copied = shutil.copytree(model_dir, tmp_path / "somewhere" / "else")
    assert _namespace(engine_config(copied)).canonical == _namespace(base).canonical


ADDITIONAL = {"b": {"z", "y", "x"}, "a": 1}  # a set: its order differs from run to run
SEEDED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import engine_configs, test_identity
config = engine_configs.engine_config(Path(sys.argv[2]), additional_config=test_identity.ADDITIONAL)
print("NAME", test_identity._namespace(config).name)
"""


def test_the_name_does_not_depend_on_the_hash_seed(model_dir: Path) -> None:
    command = [sys.executable, "-c", SEEDED, str(Path(__file__).parent), str(model_dir)]
    environment = {**os.environ, "PYTHONHASHSEED": "4242"}
    out = subprocess.run(command, env=environment, capture_output=True, check=True, timeout=120)
    here = _namespace(engine_config(model_dir, additional_config=ADDITIONAL)).name
    assert f"NAME {here}" in out.stdout.decode().splitlines()


def test_layers_come_in_natural_order(base: Any) -> None:
    indices = [int(name.split(".")[2]) for name in _worker(base)["layers"]]
    assert indices == [0, 1, 2, 9, 10]


def test_facts_hold_nothing_of_the_host(base: Any, model_dir: Path) -> None:
    document = _namespace(base).to_json().decode()
    assert str(model_dir) not in document
    assert json.loads(document)["facts"]["model"]["config"]["num_hidden_layers"] == 11


def test_a_config_that_is_not_plain_data_is_refused(base: Any) -> None:
    config = changed(base, "additional_config", {"thing": object()})
    with pytest.raises(Misconfigured, match=r"additional_config\.thing"):
        identity.model_facts(config, "m")


# ---- requests


def _request(**changes: Any) -> Any:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request

    settings: dict[str, Any] = {
        "request_id": "r",
        "prompt_token_ids": [1, 2, 3],
        "sampling_params": SamplingParams(max_tokens=1),
        "pooling_params": None,
    }
    return Request(**{**settings, **changes})


def _feature(identifier: Any = "sha:1", offset: int = 0, length: int = 2) -> Any:
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

    place = PlaceholderRange(offset=offset, length=length)
    return MultiModalFeatureSpec(
        data=None, modality="image", identifier=identifier, mm_position=place
    )


def _identity(request: Any, **options: Any) -> identity.RequestIdentity:
    found = identity.request_identity(request, LoraDigests(), **options)
    assert not isinstance(found, str), found
    return found


def test_a_plain_request_begins_at_the_plain_root() -> None:
    assert _identity(_request()) == identity.RequestIdentity(root_hash(), (), True)


def test_a_salt_and_media_are_in_a_requests_identity() -> None:
    found = _identity(_request(cache_salt="s", mm_features=[_feature(offset=1)]))
    assert found.root == root_hash("s")
    assert found.items == (Item("image", "sha:1", 1, 2),)


def test_a_request_that_needs_its_prompts_logits_may_not_load() -> None:
    from vllm.sampling_params import SamplingParams

    params = SamplingParams(max_tokens=1, prompt_logprobs=1)
    assert not _identity(_request(sampling_params=params)).may_load


def _pooling() -> Any:
    from vllm.pooling_params import PoolingParams

    return {"sampling_params": None, "pooling_params": PoolingParams()}


def _embeds() -> Any:
    import torch

    return {"prompt_token_ids": None, "prompt_embeds": torch.zeros(3, 4)}


@pytest.mark.parametrize(
    "changes, says",
    [
        (_pooling, "pooling"),
        (_embeds, "embeddings"),
        (lambda: {"resumable": True}, "streamed"),
        (lambda: {"mm_features": [_feature(identifier=None)]}, "no identifier"),
    ],
)
def test_a_request_without_an_identity_is_not_cached(
    changes: Callable[[], dict[str, Any]], says: str
) -> None:
    reason = identity.request_identity(_request(**changes()), LoraDigests())
    assert isinstance(reason, str)
    assert says in reason


def test_media_in_both_directions_are_not_cached_and_text_is() -> None:
    with_media = _request(mm_features=[_feature()])
    reason = identity.request_identity(with_media, LoraDigests(), bidirectional_media=True)
    assert isinstance(reason, str)
    assert _identity(_request(), bidirectional_media=True).may_load


def test_an_adapter_is_in_a_requests_identity(tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    lora = LoRARequest(lora_name="a", lora_int_id=1, lora_path=str(tmp_path))
    reason = identity.request_identity(_request(lora_request=lora), LoraDigests())
    assert isinstance(reason, str)
    assert "'a'" in reason
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"weights")
    digest = LoraDigests().digest(lora)
    assert isinstance(digest, bytes)
    assert _identity(_request(lora_request=lora)).root == root_hash(None, digest)
