"""Users who ask one engine at once: in bursts, or each sends the next request of a list as soon as theirs is answered. When each token came. What is asked, and why: admission.py."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

IDLE_S = 0.0005  # nothing could run: leave the interpreter to the loaders


@dataclass
class _Asked:
    number: int
    began: float
    tokens: int = 0
    first: float = 0.0
    last: float = 0.0
    cached: int = 0
    how: str = "unanswered"
    gaps_ms: list[float] = field(default_factory=list)

    def take(self, output: Any, now: float) -> None:
        new = len(output.outputs[0].token_ids) - self.tokens
        if new > 0:
            if self.tokens:
                self.gaps_ms += [(now - self.last) * 1e3 / new] * new
            else:
                self.first = now
            self.tokens, self.last = self.tokens + new, now
        self.cached = output.num_cached_tokens or 0
        if output.finished:
            self.how = output.outputs[0].finish_reason or "unknown"

    def told(self) -> dict[str, Any]:
        return {
            **{"number": self.number, "finish_reason": self.how, "cached_tokens": self.cached},
            "ttft_s": self.first - self.began if self.tokens else None,
            "tpot_ms": (
                (self.last - self.first) * 1e3 / (self.tokens - 1) if self.tokens > 1 else None
            ),
            "gaps_ms": self.gaps_ms,
        }


def due(waiting: int, live: int, users: int, bursts: bool) -> int:
    """How many of those who wait ask now."""
    return 0 if bursts and live else max(0, min(waiting, users - live))


def crowd(
    engine: Any,
    requests: Sequence[Mapping[str, Any]],
    users: int,
    tokens: int,
    limit_s: float,
    bursts: bool,
) -> dict[str, Any]:
    """Each request has `prompt_token_ids`, and perhaps `params`, its kv_transfer_params, and `skips_cache`.

    Each is answered with so many tokens. What is not after `limit_s` is aborted. The requests of a burst
    count from the same moment, however long it takes to give them all to vLLM.
    """
    from vllm import SamplingParams

    llm = engine.llm.llm_engine
    waiting, live, all_ = deque(enumerate(requests)), {}, []
    began = time.monotonic()

    def ask(now: float | None) -> None:
        number, request = waiting.popleft()
        params = request.get("params")
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=tokens,
            ignore_eos=True,
            extra_args={"kv_transfer_params": params} if params else None,
            skip_reading_prefix_cache=True if request.get("skips_cache") else None,
        )
        engine.requests_made += 1
        name = f"user{engine.requests_made}"
        one = live[name] = _Asked(number, now or time.monotonic())
        all_.append(one)
        prompt = {"prompt_token_ids": request["prompt_token_ids"]}
        names[name] = llm.add_request(name, prompt, sampling)

    def arrive() -> None:
        now = time.monotonic() if bursts else None
        for _ in range(due(len(waiting), len(live), users, bursts)):
            ask(now)

    names: dict[str, str] = {}
    arrive()
    while live:
        outputs = llm.step()
        now = time.monotonic()
        for output in outputs:
            one = live.get(output.request_id)
            if one is not None:
                one.take(output, now)
                if output.finished:
                    del live[output.request_id]
        if now - began > limit_s:
            llm.abort_request([names[name] for name in live], internal=True)
            break
        arrive()
        if not outputs:
            time.sleep(IDLE_S)
    seconds = time.monotonic() - began
    while llm.has_unfinished_requests():
        llm.step()
    return {"requests": [one.told() for one in all_], "seconds": seconds}
