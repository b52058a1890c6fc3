"""What must not be cached is refused, and nothing else is. Not what it is named by: test_identity.py."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace as Fake
from typing import Any

import pytest
from engine_configs import changed, engine_config, kv_cache_config, layer_spec, save_tiny_model

from objectcache.support import layers_call_back, refusal


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return engine_config(save_tiny_model(tmp_path_factory.mktemp("models") / "tiny"))


def test_a_plain_engine_is_not_refused(base: Any) -> None:
    assert refusal(base, kv_cache_config()) is None


@pytest.mark.parametrize("window", [{"sliding_window": 64}, {"attention_chunk_size": 64}])
def test_a_window_on_a_full_cache_is_not_refused(base: Any, window: dict[str, int]) -> None:
    assert refusal(base, kv_cache_config(layer_spec(**window))) is None


def test_mla_is_not_refused(base: Any) -> None:
    assert refusal(base, kv_cache_config(layer_spec("MLAAttentionSpec", num_kv_heads=1))) is None


def test_mla_on_a_backend_that_does_not_read_a_prefix_is_refused(tmp_path: Path) -> None:
    from transformers import DeepseekV2Config

    DeepseekV2Config(architectures=["DeepseekV2ForCausalLM"]).save_pretrained(tmp_path)
    config = engine_config(tmp_path, max_model_len=1024)
    pages = kv_cache_config(layer_spec("MLAAttentionSpec", num_kv_heads=1))
    for chunked, cached in ((True, True), (True, False), (False, True), (False, False)):
        config = changed(config, "scheduler_config.enable_chunked_prefill", chunked)
        config = changed(config, "cache_config.enable_prefix_caching", cached)
        reason = refusal(config, pages)
        assert (reason is None) == (chunked or cached)
        assert reason is None or "does not read a prefix" in reason
    plain = engine_config(save_tiny_model(tmp_path / "tiny"))
    plain = changed(plain, "scheduler_config.enable_chunked_prefill", False)
    plain = changed(plain, "cache_config.enable_prefix_caching", False)
    assert refusal(plain, kv_cache_config()) is None


@pytest.mark.parametrize(
    "path, value, says",
    [
        ("speculative_config", Fake(method="eagle"), "Speculative"),
        ("model_config.runner_type", "pooling", "pooling"),
        ("diffusion_config", Fake(), "diffusion"),
        ("attention_config.use_non_causal", True, "use_non_causal"),
        ("model_config.hf_text_config.is_causal", False, "bidirectional"),
        ("model_config.hf_text_config.use_bidirectional_attention", True, "bidirectional"),
        ("model_config.hf_text_config.dual_chunk_attention_config", {"chunk_size": 1}, "Dual"),
        ("model_config.hf_text_config.num_kv_shared_layers", 2, "share KV"),
        ("cache_config.calculate_kv_scales", True, "calculate_kv_scales"),
        ("cache_config.kv_sharing_fast_prefill", True, "kv_sharing_fast_prefill"),
        ("weight_transfer_config", Fake(), "weight_transfer_config"),
        ("parallel_config.pipeline_parallel_size", 2, "pipeline"),
        ("parallel_config.decode_context_parallel_size", 2, "decode context"),
        ("parallel_config.prefill_context_parallel_size", 2, "prefill context"),
    ],
)
def test_a_config_whose_kv_is_no_function_of_the_prefix_is_refused(
    base: Any, path: str, value: Any, says: str
) -> None:
    reason = refusal(changed(base, path, value), kv_cache_config())
    assert reason is not None
    assert says in reason


def test_a_model_that_vllm_would_not_prefix_cache_is_refused(base: Any) -> None:
    pooler = Fake(seq_pooling_type="MEAN", tok_pooling_type="ALL")
    config = changed(base, "model_config.pooler_config", pooler)
    reason = refusal(config, kv_cache_config())
    assert reason is not None
    assert "prefix caching" in reason


def _with_group(**changes: Any) -> Any:
    kv_config = copy.deepcopy(kv_cache_config())
    for name, value in changes.items():
        setattr(kv_config.kv_cache_groups[0], name, value)
    return kv_config


def _uniform(*specs: Any) -> Any:
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    by_layer = {f"model.layers.{index}": spec for index, spec in enumerate(specs)}
    return kv_cache_config(UniformTypeKVCacheSpecs(block_size=32, kv_cache_specs=by_layer))


def _mla(**changes: Any) -> Any:
    return layer_spec("MLAAttentionSpec", num_kv_heads=1, **changes)


def _indexer() -> Any:
    from vllm.v1.kv_cache_interface import SparseCacheRole

    return _mla(cache_role=SparseCacheRole.INDEXER)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: kv_cache_config(groups=0), "0 KV cache groups"),
        (lambda: kv_cache_config(groups=2), "2 KV cache groups"),
        (
            lambda: kv_cache_config(layer_spec("SlidingWindowSpec", sliding_window=64)),
            "SlidingWindowSpec",
        ),
        (
            lambda: kv_cache_config(
                layer_spec("ChunkedLocalAttentionSpec", attention_chunk_size=64)
            ),
            "Chunked",
        ),
        (lambda: kv_cache_config(layer_spec("CrossAttentionSpec")), "CrossAttentionSpec"),
        (lambda: kv_cache_config(layer_spec("RSWASpec", rswa_window=64)), "RSWASpec"),
        (lambda: kv_cache_config(layer_spec("SinkFullAttentionSpec", sink_len=4)), "SinkFull"),
        (lambda: kv_cache_config(layer_spec("HiddenStateCacheSpec")), "HiddenState"),
        (lambda: kv_cache_config(layer_spec(non_causal=True)), "later tokens"),
        (lambda: kv_cache_config(_mla(non_causal_multi_token_decode=True)), "later tokens"),
        (lambda: kv_cache_config(_mla(tokens_per_state=4)), "one state for several tokens"),
        (lambda: _uniform(_mla(), _indexer()), "index"),
        (lambda: _uniform(layer_spec(), layer_spec("RSWASpec", rswa_window=64)), "RSWASpec"),
        (lambda: _with_group(is_eagle_group=True), "draft"),
        (lambda: _with_group(host_resident=True), "HiSparse"),
        (lambda: _with_group(enable_kv_transfer=False), "HiSparse"),
        (lambda: _with_group(role=Fake(value="hisparse_source")), "HiSparse"),
        (lambda: kv_cache_config(hisparse_host_num_blocks=1), "HiSparse"),
        (lambda: kv_cache_config(kv_cache_layout="LHBNC"), "LHBNC scatters"),
        (lambda: kv_cache_config(kv_cache_layout="BHLNC"), "BHLNC scatters"),
        (lambda: kv_cache_config(kv_cache_layout="XYZ"), "'XYZ' is not known"),
        (lambda: kv_cache_config(kv_cache_layout=None), "has not said"),
    ],
)
def test_a_cache_that_cannot_be_copied_is_refused(
    base: Any, make: Callable[[], Any], says: str
) -> None:
    reason = refusal(base, make())
    assert reason is not None
    assert says in reason


def test_every_layout_of_vllm_is_judged_as_vllm_does(base: Any) -> None:
    from vllm.v1.kv_cache_layout import KVCacheLayout

    for layout in KVCacheLayout:
        reason = refusal(base, kv_cache_config(kv_cache_layout=layout.name))
        assert (reason is None) == layout.is_block_compact, layout.name


def test_a_layer_that_shares_anothers_cache_is_refused(base: Any) -> None:
    config = copy.copy(base)
    layer = Fake(kv_sharing_target_layer_name="model.layers.0")
    config.compilation_config = Fake(static_forward_context={"model.layers.1": layer})
    assert "model.layers.1 shares" in (refusal(config, kv_cache_config()) or "")


# ---- layers that call the connector


def with_layers(layers: dict[str, Any]) -> Fake:
    return Fake(compilation_config=Fake(static_forward_context=layers))


def made(kind: type) -> Any:
    return kind.__new__(kind)


def test_vllms_own_layers_call_back() -> None:
    """By their hooks a load overlaps with the forward pass."""
    from vllm.model_executor.layers.attention import Attention, CrossAttention, MLAAttention

    layers = {"a": made(Attention), "b": made(MLAAttention), "c": made(CrossAttention)}
    assert layers_call_back(with_layers(layers), ["a", "b"])
    assert not layers_call_back(with_layers(layers), ["a", "not there"])
    assert not layers_call_back(with_layers({}), ["a"])


def test_a_models_own_layers_may_not_call_back() -> None:
    from vllm.model_executor.layers.attention import Attention

    class Sparse(Attention):
        def forward(self) -> None: ...

    class Inherits(Attention): ...

    layers = {"a": made(Attention), "b": made(Sparse), "c": made(Inherits), "d": Fake()}
    assert layers_call_back(with_layers(layers), ["a", "c"])
    assert not layers_call_back(with_layers(layers), ["a", "b"])
    assert not layers_call_back(with_layers(layers), ["d"])
