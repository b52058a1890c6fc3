"""A small random Llama on disk: its weights, config and tokenizer. Nothing here starts an engine.

The weights are scaled so that a wrong KV page shows in the greedy tokens: queries and keys are
large enough that a head looks at a few tokens instead of averaging thousands, and the output head
is large enough that logits are spread. Needs safetensors and tokenizers, never imports vLLM.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

BOS, EOS, UNKNOWN = 0, 1, 2
FIRST_WORD = 3  # token ids below this one are special


@dataclass(frozen=True)
class ModelShape:
    """Sizes of the model; `head_size` is one that vLLM's CPU attention has (32, 64, 128, ...)."""

    layers: int = 4
    heads: int = 8
    kv_heads: int = 2
    head_size: int = 32
    hidden: int = 128
    intermediate: int = 256
    vocab: int = 1024
    max_positions: int = 16384
    rope_theta: float = 10000.0
    attention_gain: float = 2.5  # standard deviation of a query or key entry
    output_gain: float = 4.0  # weight of attention's output against the rest of the stream
    logit_gain: float = 4.0  # standard deviation of a logit


def write_model(folder: Path, shape: ModelShape | None = None, seed: int = 0) -> Path:
    """Write the model into `folder` (made if missing) and return it.

    The same shape and seed give the same bytes; `seed` stands for a revision of the weights.
    """
    shape = shape or ModelShape()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_weights(shape, seed), folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", _config(shape))
    _write_json(folder / "generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS})
    write_tokenizer(folder, shape)
    return folder


def prompt_tokens(count: int, seed: int = 0, shape: ModelShape | None = None) -> list[int]:
    """Return `count` random token ids without special ones, the same for the same seed."""
    vocab = (shape or ModelShape()).vocab
    return [int(t) for t in np.random.default_rng(seed).integers(FIRST_WORD, vocab, size=count)]


def prompt_text(token_ids: list[int]) -> str:
    """Return the text that the tokenizer of this model turns into exactly these token ids."""
    return " ".join(_word(token) for token in token_ids)


def _word(token: int) -> str:
    return {BOS: "<s>", EOS: "</s>", UNKNOWN: "<unk>"}.get(token, f"w{token}")


def _weights(shape: ModelShape, seed: int) -> dict[str, NDArray[np.float32]]:
    random = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> NDArray[np.float32]:
        # An input with unit entries gives outputs with standard deviation `gain`.
        values = random.standard_normal((rows, columns), dtype=np.float32)
        return values * np.float32(gain / np.sqrt(columns))

    hidden, ones = shape.hidden, np.ones(shape.hidden, dtype=np.float32)
    q_size, kv_size = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    weights: dict[str, NDArray[np.float32]] = {
        "model.embed_tokens.weight": matrix(shape.vocab, hidden, gain=np.sqrt(hidden)),
        "model.norm.weight": ones,
        "lm_head.weight": matrix(shape.vocab, hidden, shape.logit_gain),
    }
    for layer in range(shape.layers):
        at = f"model.layers.{layer}."
        weights |= {
            at + "input_layernorm.weight": ones,
            at + "post_attention_layernorm.weight": ones,
            at + "self_attn.q_proj.weight": matrix(q_size, hidden, shape.attention_gain),
            at + "self_attn.k_proj.weight": matrix(kv_size, hidden, shape.attention_gain),
            at + "self_attn.v_proj.weight": matrix(kv_size, hidden),
            at + "self_attn.o_proj.weight": matrix(hidden, q_size, shape.output_gain),
            at + "mlp.gate_proj.weight": matrix(shape.intermediate, hidden),
            at + "mlp.up_proj.weight": matrix(shape.intermediate, hidden),
            at + "mlp.down_proj.weight": matrix(hidden, shape.intermediate),
        }
    return weights


def _config(shape: ModelShape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_size,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.max_positions,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }


def write_tokenizer(folder: Path, shape: ModelShape) -> None:
    """Only the files of a tokenizer, with a word for each token id below `shape.vocab`."""
    words = {_word(token): token for token in range(shape.vocab)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([_word(BOS), _word(EOS), _word(UNKNOWN)])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": _word(BOS), "eos_token": _word(EOS), "unk_token": _word(UNKNOWN)}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    _write_json(
        folder / "tokenizer_config.json", settings | {"model_max_length": shape.max_positions}
    )
    _write_json(folder / "special_tokens_map.json", names)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def main() -> None:
    """Write a model from the command line."""
    parser = argparse.ArgumentParser(description="Write a small random Llama model.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=ModelShape.layers)
    arguments = parser.parse_args()
    print(write_model(arguments.folder, ModelShape(layers=arguments.layers), arguments.seed))


if __name__ == "__main__":
    main()
