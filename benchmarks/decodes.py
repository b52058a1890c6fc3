"""A batch of sequences that decode, how long each of its steps takes, and what prompts that come beside cost it. What is done with that: steps.py, ttft.py."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.tiny_model import prompt_tokens

SEQUENCES, PROMPT_TOKENS = 32, 100
SLOW = 1.5  # times the median step alone: a slow one
SETTLE_STEPS = 15  # prefills, and the first decode steps after them


class Decodes:
    """One batch at a time, on vLLM's `LLMEngine`."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self._made = 0

    def begin(self) -> list[str]:
        """A fresh batch, past its prefills."""
        from vllm import SamplingParams

        names = []
        for _ in range(SEQUENCES):
            self._made += 1
            parameters = SamplingParams(temperature=0.0, max_tokens=8000, ignore_eos=True)
            prompt = {"prompt_token_ids": prompt_tokens(PROMPT_TOKENS, seed=self._made)}
            name = f"decode{self._made}"
            names.append(self.engine.add_request(name, prompt, parameters))
        for _ in range(SETTLE_STEPS):
            self.engine.step()
        return names

    def step_times_ms(self, seconds: float) -> list[float]:
        """How long each step took, for so long."""
        times, began = [], time.perf_counter()
        before = began
        while before - began < seconds:
            self.engine.step()
            now = time.perf_counter()
            times.append((now - before) * 1000)
            before = now
        return times

    def end(self, names: list[str]) -> None:
        self.engine.abort_request(names, internal=True)
        while self.engine.has_unfinished_requests():
            self.engine.step()


def beside(
    engine: Any,
    prompts: Sequence[Mapping[str, Any]],
    alone_s: float,
    limit_s: float,
    after_s: float = 0.0,
) -> dict[str, Any]:
    """Steps of one batch, in ms: alone, then while these prompts come one after the other.

    A step that gave a prompt its first token computed it as well: those stand apart, in
    `admitting_ms`. `cached_tokens` is what of each prompt was not computed. `after_ms` are steps in the
    `after_s` behind each prompt: what it computed is written meanwhile, where that is written.
    """
    from vllm import SamplingParams

    decodes = Decodes(engine.llm.llm_engine)
    names = decodes.begin()
    found: dict[str, Any] = {
        **{"alone_ms": decodes.step_times_ms(alone_s), "beside_ms": [], "admitting_ms": []},
        **{"after_ms": [], "cached_tokens": [], "seconds": 0.0},
    }
    began = time.perf_counter()
    for number, prompt in enumerate(prompts):
        one = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
        internal = decodes.engine.add_request(f"beside{number}-{began}", dict(prompt), one)
        decodes.engine.step()  # not timed: it waited for the prompt to be handed over, here
        before, waiting = time.perf_counter(), True
        while waiting:
            outputs = decodes.engine.step()
            now = time.perf_counter()
            ended = [out for out in outputs if out.request_id.startswith(f"beside{number}-")]
            found["admitting_ms" if ended else "beside_ms"].append((now - before) * 1000)
            before, waiting = now, not ended
            found["cached_tokens"] += [out.num_cached_tokens for out in ended]
            if now - began > limit_s:
                decodes.engine.abort_request([internal], internal=True)
                break
        found["after_ms"] += decodes.step_times_ms(after_s)
    found["seconds"] = time.perf_counter() - began
    decodes.end(names)
    return found


_SAID = (
    *(("alone", "alone_ms"), ("beside", "beside_ms")),
    *(("all", "all_ms"), ("after", "after_ms")),
)


def summary(rounds: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Percentiles of the steps of all rounds, in ms, and by how much those beside are worse."""
    steps = {
        name: np.concatenate([np.asarray(one.get(name, ()), dtype=float) for one in rounds])
        for name in ("alone_ms", "beside_ms", "admitting_ms", "after_ms")
    }
    # All steps are what a user sees; those without the ones that compute are what bytes cost.
    steps["all_ms"] = np.concatenate([steps["beside_ms"], steps["admitting_ms"]])
    found: dict[str, float] = {}
    for name, of in _SAID:
        if len(steps[of]):
            p50, p99 = np.percentile(steps[of], (50, 99))
            found |= {f"{name}_step_p50_ms": float(p50), f"{name}_step_p99_ms": float(p99)}
            found[f"{name}_step_mean_ms"] = float(steps[of].mean())
    for quantile in ("p50", "p99"):
        if len(steps["beside_ms"]):
            ratio = found[f"beside_step_{quantile}_ms"] / found[f"alone_step_{quantile}_ms"]
            found[f"{quantile}_worse_percent"] = (ratio - 1) * 100
    if len(steps["beside_ms"]) and len(steps["alone_ms"]):
        slow = steps["all_ms"] > SLOW * found["alone_step_p50_ms"]
        found["slow_steps_per_prefix"] = float(slow.sum() / max(1, len(steps["admitting_ms"])))
    if len(steps["admitting_ms"]):
        found["admitting_step_max_ms"] = float(steps["admitting_ms"].max())
    if len(steps["after_ms"]):
        found["after_step_max_ms"] = float(steps["after_ms"].max())
    return found | {"steps": len(steps["beside_ms"]), "prefixes": len(steps["admitting_ms"])}
