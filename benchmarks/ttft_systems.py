"""The systems of ttft.py: with what vLLM is started for each, what must lie where before a prompt is asked, and what shows that it came from there.

A session is one engine that serves for one or more systems. Nothing here knows of time limits over
all or of files of results: ttft.py does.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.decodes import summary
from benchmarks.live_engine import EngineProcess
from benchmarks.tiny_model import ModelShape, prompt_tokens, write_model
from benchmarks.ttft_stores import Place

CHUNK_TOKENS = 256
ANSWER_TOKENS = 4  # the counters of a step come with a later one
IO_THREADS = 32  # of vLLM's S3 tier
WARM_UP_TOKENS = 20_000
STEP_LIMIT_S, SAVE_LIMIT_S = 120.0, 60.0
ALONE_S = 1.5  # of decode steps with nothing beside
AFTER_S = 1.0  # behind a prompt that is saved
_RING_SHARE = 1.6  # of the ring 3/4 serve loads, 7/8 of these stages
_TRIES = 20


@dataclass(frozen=True)
class Case:
    """A prompt's tokens and how many of them are a prefix that comes from somewhere."""

    context_tokens: int
    hit_ratio: float

    @property
    def hit_tokens(self) -> int:
        """Whole chunks; at least one token is left to compute."""
        chunks = int(self.context_tokens * self.hit_ratio) // CHUNK_TOKENS
        return min(chunks, (self.context_tokens - 1) // CHUNK_TOKENS) * CHUNK_TOKENS


WARM_UP = Case(1280, 0.8)


class Prompts:
    """Random tokens: the same for the same words, never the same for others."""

    def __init__(self, vocab: int, nonce: str) -> None:
        self._shape, self._nonce, self._made = ModelShape(vocab=vocab), nonce, 0

    def prefix(self, case: Case, number: int) -> list[int]:
        return self._tokens(case.hit_tokens, "prefix", case, number)

    def fresh(self, count: int) -> list[int]:
        self._made += 1
        return self._tokens(count, "fresh", self._made)

    def prompt(self, case: Case, number: int) -> list[int]:
        """A prefix and tokens that nobody has seen before."""
        return self.prefix(case, number) + self.fresh(case.context_tokens - case.hit_tokens)

    def _tokens(self, count: int, *what: object) -> list[int]:
        digest = hashlib.sha256(repr((self._nonce, what)).encode()).digest()
        return prompt_tokens(count, int.from_bytes(digest[:8], "little"), self._shape)


@dataclass
class Setup:
    """What all engines have in common. `chunk_bytes` is learned when chunks are written."""

    model: Path
    engine: Mapping[str, Any]  # LLM arguments
    options: Mapping[str, Any]  # of objectcache
    prompts: Prompts
    token_bytes: int  # of KV
    cases: Sequence[Case] = ()  # that the run has at most; memory is taken for these
    chunk_bytes: float = 0.0
    traces: Path | None = None  # a folder for objectcache's traces
    profiles: Path | None = None  # a folder for torch's profiles of what the GPU does

    @property
    def longest(self) -> Case:
        return max(self.cases, key=lambda case: case.hit_tokens)

    @property
    def prefix_bytes(self) -> int:
        """Of one prefix for each case."""
        return sum(case.hit_tokens for case in self.cases) * self.token_bytes


def make_setup(
    smoke: bool,
    engine_changes: Mapping[str, Any],
    options: Mapping[str, Any],
    folder: Path,
    cases: Sequence[Case],
) -> Setup:
    """A model in `folder`: a tiny one that is written, or the geometry of one with random weights."""
    nonce = secrets.token_hex(8)
    if smoke:
        shape = ModelShape()
        model = write_model(folder / "model", shape)
        token_bytes = 2 * shape.layers * shape.kv_heads * shape.head_size * 4
        return Setup(
            model, engine_changes, options, Prompts(shape.vocab, nonce), token_bytes, cases
        )
    from benchmarks.steps import GEOMETRY

    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(GEOMETRY))
    values = 2 * GEOMETRY["num_hidden_layers"] * GEOMETRY["num_key_value_heads"]
    engine: dict[str, Any] = {
        **{"load_format": "dummy", "dtype": "auto", "enforce_eager": False},
        **{"kv_cache_memory_bytes": None, "gpu_memory_utilization": 0.85},
        **{"worker_extension_cls": "", "skip_tokenizer_init": True},
        "max_model_len": max(case.context_tokens for case in cases) + 4096,
    }
    prompts = Prompts(GEOMETRY["vocab_size"], nonce)
    token_bytes = values * GEOMETRY["head_dim"] * 2
    return Setup(model, engine | engine_changes, options, prompts, token_bytes, cases)


@dataclass
class Sample:
    """One run. `wrong` says why it does not count."""

    ttft_s: float
    cached_tokens: int
    counted: dict[str, float] = field(default_factory=dict)  # by objectcache, for this run
    wrong: str = ""

    def check(self, right: bool, otherwise: str) -> Sample:
        if not right and not self.wrong:
            self.wrong = otherwise
        return self


class Session(ABC):
    """One engine. `systems` in the order in which they are asked for each case."""

    systems: ClassVar[tuple[str, ...]]

    def __init__(self, setup: Setup, place: Place | None = None) -> None:
        self.setup, self.place = setup, place
        self._process: EngineProcess | None = None
        self._counted: dict[str, float] = {}
        self._until = 0.0

    def kwargs(self) -> dict[str, Any]:
        """LLM arguments."""
        transfer = self.transfer()
        more = {"kv_transfer_config": transfer} if transfer else {}
        return {"model": str(self.setup.model), **more, **self.setup.engine}

    def transfer(self) -> dict[str, Any]:
        """vLLM's kv_transfer_config, empty for none."""
        return {}

    def begin(self, process: EngineProcess, cases: Sequence[Case], until: float) -> None:
        """Warm the engine up and put in place what these cases need. No step ends after `until`."""
        self._process, self._counted, self._until = process, {}, until
        tokens = min(WARM_UP_TOKENS, self.setup.longest.context_tokens)
        for count in (300, tokens, tokens):
            self.warm_up(self.setup.prompts.fresh(count))
        self.prepare(cases)

    def warm_up(self, prompt: list[int]) -> None:
        self.answer(prompt)

    def prepare(self, cases: Sequence[Case]) -> None:  # noqa: B027  most need nothing
        """What these cases need before the first run."""

    @abstractmethod
    def sample(self, system: str, case: Case, number: int) -> Sample:
        """The run with this number of one system in one case."""

    def decodes(self, case: Case, numbers: Sequence[int]) -> tuple[dict[str, Any], str]:
        """Steps of a batch alone and beside these prefixes; and why that does not count, or ""."""
        prefixes = [self.setup.prompts.prefix(case, number) for number in numbers]
        prompts = [prefix + self.setup.prompts.fresh(16) for prefix in prefixes]
        return self._beside(prompts, len(prompts) * case.hit_tokens)

    def decodes_cold(self, case: Case, count: int) -> tuple[dict[str, Any], str]:
        """The same beside so many prompts of which nothing is cached, and for a while behind each."""
        prompts = [self.setup.prompts.fresh(case.context_tokens) for _ in range(count)]
        return self._beside(prompts, 0, AFTER_S)

    def _beside(
        self, prompts: Sequence[list[int]], cached_tokens: int, after_s: float = 0.0
    ) -> tuple[dict[str, Any], str]:
        each = [{"prompt_token_ids": prompt} for prompt in prompts]
        times = {"alone_s": ALONE_S, "after_s": after_s, "limit_s": SAVE_LIMIT_S}
        found = self.do({"do": "decodes", "prompts": each} | times, STEP_LIMIT_S)
        cached = sum(found["cached_tokens"])
        wrong = f"{cached} tokens were cached, not {cached_tokens}"
        return found | {"gb_per_s": 0.0}, "" if cached == cached_tokens else wrong

    # ---- steps

    def do(self, step: Mapping[str, Any], limit_s: float = STEP_LIMIT_S) -> dict[str, Any]:
        assert self._process is not None
        return self._process.ask(step, max(1.0, min(limit_s, self._until - time.monotonic())))

    def answer(self, prompt: list[int], expected: int | None = None, **params: Any) -> Sample:
        """Ask; `expected` tokens must be cached; `params` are vLLM's kv_transfer_params."""
        sampling: dict[str, Any] = {"max_tokens": ANSWER_TOKENS}
        if params:
            sampling["extra_args"] = {"kv_transfer_params": params}
        prompts = [{"prompt_token_ids": prompt}]
        done = self.do({"do": "generate", "prompts": prompts, "sampling": sampling})
        return self._sampled(done, expected)

    def forget(self, connector: bool = False) -> None:
        """Empty the engine's own cache; blocks may be held for some steps more."""
        for _ in range(_TRIES):
            if self.do({"do": "forget", "connector": connector})["done"]:
                return
            self.do({"do": "wait", "seconds": 0.05})
            self.warm_up(self.setup.prompts.fresh(16))
        raise RuntimeError("the engine does not let go of its blocks")

    def settle(self) -> None:
        """Let what runs behind go on for some steps."""
        for _ in range(2):
            self.do({"do": "wait", "seconds": 0.5})
            self.warm_up(self.setup.prompts.fresh(16))

    def _sampled(self, done: Mapping[str, Any], expected: int | None) -> Sample:
        answer = done["requests"][0]
        before, now = self._counted, self.do({"do": "metrics"})["values"]
        self._counted = now
        short = {n.removeprefix("vllm:objectcache_").removesuffix("_total"): n for n in now}
        counted = {name: now[full] - before.get(full, 0.0) for name, full in short.items()}
        sample = Sample(answer["ttft_s"] or 0.0, answer["cached_tokens"] or 0, counted)
        sample.check(answer["ttft_s"] is not None, "there was no answer")
        there = f"{sample.cached_tokens} tokens were cached, not {expected}"
        return sample.check(expected in (None, sample.cached_tokens), there)


class Plain(Session):
    """vLLM alone: computes a prompt, or has its prefix in its own cache."""

    systems = ("recompute", "hbm")

    def __init__(self, setup: Setup, place: Place | None = None) -> None:
        super().__init__(setup, place)
        self._primed: set[Case] = set()

    def decodes(self, case: Case, numbers: Sequence[int]) -> tuple[dict[str, Any], str]:
        """The same with prefixes that lie in its own cache: what such prompts cost others without us."""
        for number in numbers:
            self.answer(self.setup.prompts.prefix(case, number))
        return super().decodes(case, numbers)

    def sample(self, system: str, case: Case, number: int) -> Sample:
        if system == "recompute":
            return self.answer(self.setup.prompts.fresh(case.context_tokens), 0)
        if case not in self._primed:
            self._primed.add(case)
            self.answer(self.setup.prompts.prefix(case, 0))
        sample = self.answer(self.setup.prompts.prompt(case, 0), case.hit_tokens)
        if sample.wrong:  # others took its blocks; now it is there again
            sample = self.answer(self.setup.prompts.prompt(case, 0), case.hit_tokens)
        return sample


class CpuTier(Session):
    """vLLM's own tier in host memory."""

    systems = ("vllm-cpu",)
    empties_tier = False

    def transfer(self) -> dict[str, Any]:
        extra = {"block_size": CHUNK_TOKENS, "cpu_bytes_to_use": self._host_bytes()} | self._tiers()
        return {
            **{"kv_connector": "OffloadingConnector", "kv_role": "kv_both"},
            "kv_connector_extra_config": extra,
        }

    def warm_up(self, prompt: list[int]) -> None:
        self.answer(prompt, max_offload_tokens=0)

    def prepare(self, cases: Sequence[Case]) -> None:
        for case in cases:
            self._keep(case)

    def sample(self, system: str, case: Case, number: int) -> Sample:
        """Only the prefix is in the tier: what is computed anew of a prompt stays out of it."""
        for _ in range(2):
            self.forget(connector=self.empties_tier)
            prompt, hit = self.setup.prompts.prompt(case, 0), case.hit_tokens
            sample = self.answer(prompt, hit, max_offload_tokens=hit)
            if not sample.wrong:
                break
            self._keep(case)
        return sample

    def _keep(self, case: Case) -> None:
        self.answer(self.setup.prompts.prefix(case, 0))
        self.settle()
        self.forget(connector=self.empties_tier)  # waits for writes that were begun

    def _host_bytes(self) -> int:
        return self.setup.prefix_bytes * 11 // 10 + (64 << 20)

    def _tiers(self) -> dict[str, Any]:
        return {}


class S3Tier(CpuTier):
    """vLLM's own tier in S3, through NIXL; its host memory is emptied before each run."""

    systems = ("vllm-s3",)
    empties_tier = True

    def _host_bytes(self) -> int:
        return self.setup.longest.hit_tokens * self.setup.token_bytes * 5 // 4 + (64 << 20)

    def _tiers(self) -> dict[str, Any]:
        assert self.place is not None
        tier = {
            **{"type": "obj", "store_config": self.place.nixl(), "io_threads": IO_THREADS},
            "prefix": f"{self.place.prefix}/vllm",
        }
        return {"spec_name": "TieringOffloadingSpec", "secondary_tiers": [tier]}


class Ours(Session):
    """objectcache, whose host memory holds the longest prefix of the run."""

    save: ClassVar[bool]

    def transfer(self) -> dict[str, Any]:
        assert self.place is not None
        options = self.place.options() | {"ring_bytes": ring_bytes(self.setup), "save": self.save}
        if self.setup.engine.get("load_format") == "dummy":
            options["model_id"] = "random-weights-of-a-benchmark"
        if self.setup.traces is not None:
            name = f"{self.place.name}-{'writes' if self.save else 'reads'}.jsonl"
            options["trace_path"] = str(self.setup.traces / name)
        return {
            **{"kv_connector": "ObjectCacheConnector", "kv_role": "kv_both"},
            "kv_connector_module_path": "objectcache.connector",
            # vLLM does not recompute rightly what a running request lacks.
            "kv_load_failure_policy": (
                "recompute" if self.setup.options.get("admission", "staged") == "staged" else "fail"
            ),
            "kv_connector_extra_config": options | dict(self.setup.options),
        }


class Saving(Ours):
    """Computes prompts and saves them: how much later is the first token? It also writes what others read."""

    systems = ("saving",)
    save = True

    def warm_up(self, prompt: list[int]) -> None:
        self._save(prompt)  # nothing of it is on its way when a run begins

    def prepare(self, cases: Sequence[Case]) -> None:
        self._discard()

    def sample(self, system: str, case: Case, number: int) -> Sample:
        """A run begins when all chunks of the one before are written, and removed."""
        sample = self._save(self.setup.prompts.fresh(case.context_tokens))
        self._discard()
        return sample

    def decodes_cold(self, case: Case, count: int) -> tuple[dict[str, Any], str]:
        """The same, and all of them are saved."""
        self.settle()
        before = self._counted
        found, wrong = super().decodes_cold(case, count)
        self.settle()
        names = [f"vllm:objectcache_{name}_total" for name in ("saved_chunks", "written_bytes")]
        saved, written = (self._counted[name] - before.get(name, 0.0) for name in names)
        chunks = count * (case.context_tokens // CHUNK_TOKENS)
        if not wrong and saved < chunks:
            wrong = f"{saved:.0f} of {chunks} chunks were saved"
        self._discard()
        return found | {"gb_per_s": written / found["seconds"] / 1e9}, wrong

    def write(self, case: Case, number: int) -> str:
        """Leave a prefix in the store; why not, or ""."""
        sample = self._save(self.setup.prompts.prefix(case, number))
        if sample.counted.get("saved_chunks"):
            written, chunks = sample.counted["written_bytes"], sample.counted["saved_chunks"]
            self.setup.chunk_bytes = written / chunks
        return sample.wrong

    def _discard(self) -> None:
        """Make room: nobody reads what was saved so far."""
        assert self.place is not None
        self.place.clear()

    def _save(self, prompt: list[int]) -> Sample:
        chunks = len(prompt) // CHUNK_TOKENS
        step = {"do": "save", "prompt": {"prompt_token_ids": prompt}, "chunks": chunks}
        done = self.do(step | {"limit_s": SAVE_LIMIT_S}, STEP_LIMIT_S)
        saved = done["saved_chunks"]
        sample = self._sampled(done, 0)
        return sample.check(saved >= chunks, f"{saved:.0f} of {chunks} chunks were saved")


class Reading(Ours):
    """Reads each prefix once, from the store; and once more, from host memory."""

    systems = ("objectcache", "local")
    save = False

    def __init__(self, setup: Setup, place: Place | None = None) -> None:
        super().__init__(setup, place)
        self._read: set[tuple[Case, int]] = set()

    def kwargs(self) -> dict[str, Any]:
        if self.setup.profiles is None:
            return super().kwargs()
        profiler = {
            **{"profiler": "torch", "torch_profiler_dir": str(self.setup.profiles)},
            **{"torch_profiler_activities": ["CUDA"], "torch_profiler_with_stack": False},
        }
        return super().kwargs() | {"profiler_config": profiler}

    def prepare(self, cases: Sequence[Case]) -> None:
        for _ in range(2):
            self._ask(WARM_UP, 0)  # the first time from the store

    def profile(self, case: Case, number: int) -> Sample:
        """One more run, with a profile of what the GPU does. See gpu_timeline.py."""
        assert self.place is not None
        self.forget()
        name = f"{case.context_tokens}x{case.hit_ratio}-{self.place.name}"
        self.do({"do": "profile", "name": name})
        sample = self._ask(case, number)
        self.do({"do": "profile"})
        return self._came(sample, sample.counted.get("read_bytes", 0.0), case.hit_tokens)

    def sample(self, system: str, case: Case, number: int) -> Sample:
        if system == "local" and (case, number) not in self._read:
            self._ask(case, number)
        sample = self._ask(case, number)
        read = sample.counted.get("read_bytes", 0.0)
        if system == "local":
            return sample.check(read == 0, f"{read:.0f} bytes came from the store")
        return self._came(sample, read, case.hit_tokens)

    def decodes(self, case: Case, numbers: Sequence[int]) -> tuple[dict[str, Any], str]:
        """The same, and all of it from the store."""
        self.forget()
        found, wrong = super().decodes(case, numbers)
        sample = Sample(0.0, 0, wrong=wrong)
        sample.counted = self.answer(self.setup.prompts.fresh(16)).counted
        read = sample.counted.get("read_bytes", 0.0)
        self._came(sample, read, len(numbers) * case.hit_tokens)
        return found | {"gb_per_s": read / found["seconds"] / 1e9}, sample.wrong

    def profile_decodes(self, case: Case, numbers: Sequence[int]) -> str:
        """As `profile`, of steps beside a prefix; why that says nothing, or ""."""
        assert self.place is not None
        self.do({"do": "profile", "name": f"decodes-{case.context_tokens}-{self.place.name}"})
        _, wrong = self.decodes(case, numbers)
        self.do({"do": "profile"})
        return wrong

    def _ask(self, case: Case, number: int) -> Sample:
        self.forget()
        self._read.add((case, number))
        return self.answer(self.setup.prompts.prompt(case, number), case.hit_tokens)

    def _came(self, sample: Sample, read_bytes: float, tokens: int) -> Sample:
        """Whether all of it came from the store just now."""
        due = tokens // CHUNK_TOKENS * self.setup.chunk_bytes
        told = f"{read_bytes:.0f} of {due:.0f} bytes came from the store"
        return sample.check(read_bytes > 0.99 * due, told)


def ring_bytes(setup: Setup) -> int:
    """Host memory that can stage the longest prefix."""
    chunks = max(8, int(setup.longest.hit_tokens // CHUNK_TOKENS * _RING_SHARE) + 4)
    return chunks * (CHUNK_TOKENS * setup.token_bytes + (8 << 10))


def beside(rounds: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What the decode steps of all rounds say."""
    rates = sorted(one["gb_per_s"] for one in rounds)
    return summary(rounds) | {"gb_per_s": rates[len(rates) // 2]}
