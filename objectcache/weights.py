"""Which weights an engine or an adapter has, by commit or by content. Not other facts: identity.py."""

import os
import re
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blake3

from objectcache.errors import Misconfigured
from objectcache.keys import canonical_json

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SNAPSHOT = re.compile(r"models--([^/\\]+)[/\\]snapshots[/\\]([0-9a-f]{40})(?:[/\\]|$)")
# Formats that read the files of the model's directory, and which of them they prefer.
_FILE_FORMATS = {
    **dict.fromkeys(("auto", "hf", "safetensors", "fastsafetensors"), "safetensors"),
    **dict.fromkeys(("instanttensor", "runai_streamer"), "safetensors"),
    **dict.fromkeys(("sharded_state", "runai_streamer_sharded"), "sharded_state"),
    **{name: name for name in ("pt", "npcache", "mistral", "gguf")},
}
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
# .json: which shards are read, how they are quantised, how media are prepared. .py: remote code.
_SIDE_SUFFIXES = (".json", ".py")
# `config.json` comes in by the parsed config; the others shape text, sampling or training only.
_NOT_IDENTITY = frozenset(
    {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.json",
        "trainer_state.json",
        "training_args.bin",
        "optimizer.pt",
        "optimizer.bin",
        "scheduler.pt",
    }
)


@dataclass(frozen=True)
class Weights:
    """Identity of an engine's weights, and what it cost to learn (for the log)."""

    facts: dict[str, Any]
    """`kind` is `model_id`, `hub`, `files` or `random`; the rest depends on it."""
    hashed_files: int = 0
    hashed_bytes: int = 0
    hashed_seconds: float = 0.0


def identify_weights(vllm_config: Any, model_id: str = "") -> Weights:
    """Name the weights. Reads all files of a local model once, with all cores.

    Raises Misconfigured, asking for `model_id`, if nothing at hand names them.
    """
    if model_id:
        return Weights({"kind": "model_id", "model_id": model_id})
    model, load = vllm_config.model_config, vllm_config.load_config
    load_format = str(getattr(load.load_format, "value", load.load_format)).lower()
    if load_format == "dummy":
        # Random weights: nobody else has them, so nobody else may have this name.
        transfer = getattr(vllm_config, "kv_transfer_config", None)
        engine = f"{getattr(transfer, 'engine_id', None)}/{vllm_config.instance_id}"
        return Weights({"kind": "random", "engine": engine})
    remote = "://" in str(model.model) or bool(getattr(model, "model_weights", ""))
    if remote or load_format not in _FILE_FORMATS:
        raise _unnamed(f"load_format {load_format!r} reads weights that objectcache cannot see")
    ignores = getattr(load, "ignore_patterns", None) or []
    facts: dict[str, Any] = {
        "loads": _FILE_FORMATS[load_format],
        "ignores": [ignores] if isinstance(ignores, str) else [str(item) for item in ignores],
    }
    path = Path(model.model)
    if match := _SNAPSHOT.search(os.path.realpath(path)):
        repo = match[1].replace("--", "/")
        return Weights({"kind": "hub", "repo": repo, "commit": match[2], **facts})
    if path.exists():
        started = time.monotonic()
        files = _weight_files(path)
        digest, size = digest_files(files)
        if not any(name.endswith(_WEIGHT_SUFFIXES) for name, _ in files):
            raise _unnamed("the model's directory holds no weight files")
        named = {"kind": "files", "blake3": digest.hex(), **facts}
        return Weights(named, len(files), size, time.monotonic() - started)
    commit = _hub_commit(model, getattr(load, "download_dir", None))
    if commit is None:
        raise _unnamed("the revision of the model on the Hub is not known")
    return Weights({"kind": "hub", "repo": str(model.model), "commit": commit, **facts})


def _unnamed(why: str) -> Misconfigured:
    # Not a random name instead: it would fill the bucket with chunks that no restart can read.
    return Misconfigured(
        f"objectcache cannot tell which weights this engine has: {why}.",
        "set 'model_id' in kv_connector_extra_config to a name of the weights and their version.",
    )


def _hub_commit(model: Any, download_dir: str | None) -> str | None:
    """Commit of the model on the Hub: pinned, or what the Hub cache resolved its revision to."""
    revision = str(model.revision or "main")
    if _COMMIT.fullmatch(revision):
        return revision
    if download_dir is None:
        from huggingface_hub.constants import HF_HUB_CACHE  # comes with vllm

        download_dir = HF_HUB_CACHE
    cache = Path(download_dir, "models--" + str(model.model).replace("/", "--"))
    try:
        commit = (cache / "refs" / revision).read_text().strip()
    except OSError:
        # Older versions of transformers say it themselves.
        commit = str(getattr(model.hf_config, "_commit_hash", None))
        if getattr(model, "hf_config_path", None) not in (None, model.model):
            return None  # that is the commit of another repository
    return commit if _COMMIT.fullmatch(commit) else None


def _weight_files(path: Path) -> list[tuple[str, Path]]:
    """(name relative to the model, path) of the files that make the model, sorted by name."""
    if path.is_file():
        return [("model" + path.suffix, path)]
    found: list[tuple[str, Path]] = []
    for folder, folders, names in os.walk(path):
        # vLLM does not load `original/` (a second copy of Llama's weights) or hidden folders.
        folders[:] = [name for name in folders if name[0] != "." and name != "original"]
        for name in names:
            if name.endswith(_WEIGHT_SUFFIXES + _SIDE_SUFFIXES) and name not in _NOT_IDENTITY:
                full = Path(folder, name)
                found.append((full.relative_to(path).as_posix(), full))
    return sorted(found)


def digest_files(files: Iterable[tuple[str, Path]]) -> tuple[bytes, int]:
    """BLAKE3 (32 bytes) over names, sizes and contents, and the bytes read. Raises OSError."""
    entries: list[list[Any]] = []
    total = 0
    for name, path in files:
        hasher = blake3.blake3(max_threads=blake3.blake3.AUTO)
        hasher.update_mmap(path)
        size = path.stat().st_size
        total += size
        entries.append([name, size, hasher.hexdigest()])
    return blake3.blake3(canonical_json(entries)).digest(), total


# ---- adapters

_ADAPTER_FILES = tuple(
    f"adapter_{name}" for name in ("config.json", "model.safetensors", "model.bin", "model.pt")
)
_Signature = tuple[str, tuple[tuple[str, int, int, int], ...]]


class LoraDigests:
    """Digests of the adapters that requests name, by content. One per engine, one thread.

    vLLM keeps an adapter in memory under its `lora_int_id` and may read its files again at any
    later time, so an adapter whose files change under the same id is never cached again.
    """

    def __init__(self, dtype: Any = "auto", capacity: int = 4096) -> None:
        """`dtype` is lora_config.lora_dtype; `capacity` must exceed vLLM's own cache of adapters."""
        self._dtype = str(dtype).removeprefix("torch.")
        self._capacity = capacity
        self._known: OrderedDict[int, tuple[_Signature, bytes | str]] = OrderedDict()

    def digest(self, lora: Any) -> bytes | str:
        """32 bytes for a vLLM LoRARequest, or why its KV cannot be cached. Reads new files once."""
        if getattr(lora, "load_inplace", False):
            return f"LoRA adapter {lora.lora_name!r} is reloaded in place"
        try:
            folder = Path(os.path.expanduser(lora.lora_path)).absolute()
            files = [(name, folder / name) for name in _ADAPTER_FILES if (folder / name).is_file()]
            if len(files) < 2 or files[0][0] != _ADAPTER_FILES[0]:
                return f"LoRA adapter {lora.lora_name!r} has no files on this host"
            return self._digest(lora, folder, files)
        except OSError as error:
            return f"LoRA adapter {lora.lora_name!r} cannot be read: {type(error).__name__}"

    def _digest(self, lora: Any, folder: Path, files: list[tuple[str, Path]]) -> bytes | str:
        signature = _signature(folder, files)
        known = self._known.get(lora.lora_int_id)
        if known is not None:
            self._known.move_to_end(lora.lora_int_id)
            if known[0] == signature or isinstance(known[1], str):
                return known[1]
        answer: bytes | str = f"LoRA adapter {lora.lora_name!r} changed while the engine ran"
        if known is None:
            content, _ = digest_files(files)
            if _signature(folder, files) == signature:
                facts = [
                    content.hex(),
                    self._dtype,
                    bool(getattr(lora, "is_3d_lora_weight", False)),
                ]
                answer = blake3.blake3(canonical_json(facts)).digest()
        self._known[lora.lora_int_id] = (signature, answer)
        while len(self._known) > self._capacity:
            self._known.popitem(last=False)
        return answer


def _signature(folder: Path, files: Iterable[tuple[str, Path]]) -> _Signature:
    stats = ((name, path.stat()) for name, path in files)
    return str(folder), tuple((n, s.st_size, s.st_mtime_ns, s.st_ino) for n, s in stats)
