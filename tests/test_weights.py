"""Other weights, other identity; the same weights elsewhere, the same. Not other facts: test_identity.py."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace as Fake
from typing import Any

import pytest

from objectcache.errors import Misconfigured
from objectcache.weights import LoraDigests, identify_weights

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _engine(model: Any, load_format: str = "auto", **changes: Any) -> Any:
    """What identify_weights reads of a VllmConfig."""
    known = {"model": str(model), "revision": None, "model_weights": "", "hf_config": Fake()}
    return Fake(
        model_config=Fake(**{**known, **changes.pop("model_config", {})}),
        load_config=Fake(
            load_format=load_format,
            ignore_patterns=["original/**/*"],
            download_dir=changes.pop("download_dir", None),
        ),
        kv_transfer_config=Fake(engine_id=changes.pop("engine_id", "e")),
        instance_id="i",
    )


@pytest.fixture
def weights_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "weights"
    folder.mkdir()
    for name in ("config.json", "model-1.safetensors", "model-2.safetensors", "quant.json"):
        (folder / name).write_bytes(name.encode() * 100)
    return folder


def _flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: _flip_last_byte(folder / "model-2.safetensors"),
        lambda folder: _flip_last_byte(folder / "quant.json"),
        lambda folder: (folder / "model-2.safetensors").rename(folder / "model-3.safetensors"),
        lambda folder: (folder / "extra.bin").write_bytes(b""),
        lambda folder: (folder / "model-1.safetensors").unlink(),
        lambda folder: (folder / "modeling_mine.py").write_text("x = 1"),
    ],
    ids=["byte", "quantisation", "renamed", "added", "removed", "code"],
)
def test_other_files_are_other_weights(weights_dir: Path, change: Callable[[Path], Any]) -> None:
    before = identify_weights(_engine(weights_dir)).facts
    change(weights_dir)
    assert identify_weights(_engine(weights_dir)).facts != before


def test_what_only_shapes_text_is_no_weight(weights_dir: Path) -> None:
    before = identify_weights(_engine(weights_dir))
    for name in ("tokenizer.json", "generation_config.json", "README.md", ".cache.bin/x.bin"):
        (weights_dir / name).parent.mkdir(exist_ok=True)
        (weights_dir / name).write_text("other")
    _flip_last_byte(weights_dir / "config.json")  # comes in parsed, with the model's facts
    assert identify_weights(_engine(weights_dir)).facts == before.facts
    assert (before.hashed_files, before.hashed_bytes) == (3, 1900 * 2 + 1000)


def test_a_model_may_be_one_file(weights_dir: Path) -> None:
    file = weights_dir / "model-1.safetensors"
    copied = Path(shutil.copy(file, weights_dir / "other.safetensors"))
    facts = identify_weights(_engine(file)).facts
    assert facts == identify_weights(_engine(copied)).facts
    _flip_last_byte(copied)
    assert facts != identify_weights(_engine(copied)).facts


def _hub(folder: Path, commit: str = COMMIT) -> Path:
    refs = folder / "models--org--name" / "refs"
    refs.mkdir(parents=True, exist_ok=True)
    (refs / "main").write_text(commit)
    snapshot = refs.parent / "snapshots" / commit
    snapshot.mkdir(parents=True, exist_ok=True)
    return snapshot


def test_a_hub_model_is_its_commit_however_it_is_named(tmp_path: Path) -> None:
    snapshot = _hub(tmp_path)
    (tmp_path / "link").symlink_to(snapshot)
    ways = [
        _engine("org/name", download_dir=str(tmp_path)),
        _engine("org/name", model_config={"revision": COMMIT}),
        _engine("org/name", model_config={"hf_config": Fake(_commit_hash=COMMIT)}),
        _engine(snapshot),
        _engine(tmp_path / "link"),
    ]
    facts = [identify_weights(engine).facts for engine in ways]
    assert all(each == facts[0] for each in facts)
    assert facts[0]["commit"] == COMMIT


def test_another_revision_is_other_weights(tmp_path: Path) -> None:
    engine = _engine("org/name", download_dir=str(tmp_path))
    _hub(tmp_path)
    before = identify_weights(engine).facts
    _hub(tmp_path, COMMIT[::-1])
    assert identify_weights(engine).facts != before


def test_random_weights_are_never_shared_unless_named() -> None:
    one, two = (_engine("org/name", "dummy", engine_id=engine) for engine in "ab")
    assert identify_weights(one).facts != identify_weights(two).facts
    assert identify_weights(one).facts == identify_weights(one).facts
    assert identify_weights(one, "x").facts == identify_weights(two, "x").facts


@pytest.mark.parametrize(
    "engine",
    [
        _engine("s3://bucket/model", "runai_streamer"),
        _engine("/tmp", "runai_streamer", model_config={"model_weights": "s3://bucket/model"}),
        _engine("org/name", "tensorizer"),
        _engine("org/name", download_dir="/nonexistent"),
        _engine(
            "org/name",
            download_dir="/nonexistent",
            model_config={"hf_config": Fake(_commit_hash=COMMIT), "hf_config_path": "other/name"},
        ),
    ],
    ids=["remote", "pulled", "tensorizer", "uncached", "other-config"],
)
def test_weights_that_nothing_names_ask_for_a_name(engine: Any) -> None:
    with pytest.raises(Misconfigured, match="model_id"):
        identify_weights(engine)
    assert identify_weights(engine, "mine-v1").facts["model_id"] == "mine-v1"


def test_a_directory_without_weights_asks_for_a_name(tmp_path: Path) -> None:
    (tmp_path / "quant.json").write_text("{}")
    with pytest.raises(Misconfigured, match="no weight files"):
        identify_weights(_engine(tmp_path))


# ---- adapters


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"r": 8}')
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return folder


def _lora(path: Path | str, number: int = 1, **changes: Any) -> Any:
    from vllm.lora.request import LoRARequest

    name = changes.pop("name", "a")
    return LoRARequest(lora_name=name, lora_int_id=number, lora_path=str(path), **changes)


def test_an_adapter_is_its_content_not_its_name_or_place(adapter: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(adapter, tmp_path / "copy")
    (copied / "README.md").write_text("notes")
    digest = LoraDigests().digest(_lora(adapter))
    assert isinstance(digest, bytes)
    assert LoraDigests().digest(_lora(copied, 9, name="b")) == digest


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_other_bytes_are_another_adapter(adapter: Path, name: str) -> None:
    before = LoraDigests().digest(_lora(adapter))
    _flip_last_byte(adapter / name)
    after = LoraDigests().digest(_lora(adapter))
    assert isinstance(after, bytes)
    assert after != before


def test_another_dtype_is_another_adapter(adapter: Path) -> None:
    digests = {LoraDigests(dtype).digest(_lora(adapter)) for dtype in ("float16", "bfloat16")}
    assert len(digests) == 2


def test_an_adapter_that_changes_under_its_id_is_not_cached_again(adapter: Path) -> None:
    loras = LoraDigests()
    before = loras.digest(_lora(adapter))
    original = (adapter / "adapter_model.safetensors").read_bytes()
    _flip_last_byte(adapter / "adapter_model.safetensors")
    assert "changed" in str(loras.digest(_lora(adapter)))
    (adapter / "adapter_model.safetensors").write_bytes(original)
    assert "changed" in str(loras.digest(_lora(adapter)))  # vLLM may hold either
    assert loras.digest(_lora(adapter, 2)) == before  # a new id is read anew


@pytest.mark.parametrize("broken", ["missing", "hub", "no weights", "in place"])
def test_an_adapter_that_cannot_be_read_is_not_cached(adapter: Path, broken: str) -> None:
    if broken == "no weights":
        (adapter / "adapter_model.safetensors").unlink()
    path = {"missing": adapter / "nope", "hub": "org/adapter"}.get(broken, adapter)
    lora = _lora(path, load_inplace=broken == "in place")
    reason = LoraDigests().digest(lora)
    assert isinstance(reason, str)
    assert "'a'" in reason


def test_known_adapters_are_bounded(adapter: Path) -> None:
    loras = LoraDigests(capacity=3)
    for number in range(1, 10):
        assert isinstance(loras.digest(_lora(adapter, number)), bytes)
    assert len(loras._known) == 3
