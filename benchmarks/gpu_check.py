"""Is what comes back from the store what was computed? Real vLLM on whatever device is here, over a matrix of settings.

    python -m benchmarks.gpu_check                      every case, each in a process of its own
    python -m benchmarks.gpu_check --case '{"block_size": 16}'   one, in this process

For each case one engine computes prompts cold, forgets them, has all its KV memory poisoned, and
answers again from the store. KV pages must be equal byte for byte; tokens must be equal to those of
the same prompts hit in the engine's own memory, because in bfloat16 tokens depend on how a prompt is
split. Prints one JSON line a case and fails if one is not right.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.tiny_model import ModelShape, prompt_tokens, write_model

ROOT = Path(__file__).resolve().parent.parent
SHAPE = ModelShape(layers=6, heads=8, kv_heads=4, head_size=128, hidden=512, intermediate=1024)
POISON = 0x7F
CHUNK = 256
CASES: list[dict[str, Any]] = [
    {"graphs": graphs, "v2": v2, "async_scheduling": asynchronous}
    for graphs in ("FULL_AND_PIECEWISE", "FULL", "PIECEWISE", "eager")
    for v2 in (True, False)
    for asynchronous in (True, False)
] + [
    {"block_size": 32},
    {"block_size": 64},
    {"block_size": 128},
    {"kv_cache_dtype": "fp8"},
    {"attention_backend": "TRITON_ATTN"},
    {"attention_backend": "FLASHINFER"},
    {"max_num_batched_tokens": 512},
]


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """One engine, one verdict."""
    with tempfile.TemporaryDirectory() as folder:
        return _Check(case, Path(folder)).verdict()


class _Check:
    """An engine in this process with a directory as its store."""

    def __init__(self, case: dict[str, Any], folder: Path) -> None:
        from vllm import LLM

        model = write_model(folder / "model", SHAPE)
        options = {name: value for name, value in case.items() if name not in ("graphs", "v2")}
        graphs = case.get("graphs", "FULL_AND_PIECEWISE")
        if graphs == "eager":
            options["enforce_eager"] = True
        else:
            options["compilation_config"] = {"cudagraph_mode": graphs}
        self.case = case
        self.llm = LLM(
            model=str(model),
            skip_tokenizer_init=True,
            max_model_len=8192,
            kv_cache_memory_bytes=1 << 30,
            kv_transfer_config={
                "kv_connector": "ObjectCacheConnector",
                "kv_role": "kv_both",
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": {
                    "url": f"file://{folder}/store",
                    "ring_bytes": "512MiB",
                },
            },
            **options,
        )
        core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler = core.scheduler
        self.worker = core.model_executor.driver_worker.worker
        self.pages = self.worker_half()._pages
        self.made = 0

    def worker_half(self) -> Any:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group()._worker

    def verdict(self) -> dict[str, Any]:
        prompts = [prompt_tokens(3000, seed=1), prompt_tokens(CHUNK * 4 + 1, seed=2)]
        cold = self.ask(prompts)
        self.settle()
        again = self.ask(prompts)  # hit in the engine's own memory, as far as that goes
        results = {"case": self.case, "cold_tokens": cold["cached"], "hbm_tokens": again["cached"]}
        self.poison()
        warm = self.ask(prompts)
        self.settle()
        results["hit_tokens"] = warm["cached"]
        results["pages_equal"] = all(
            ours[: n // self.block] == theirs[: n // self.block]
            for ours, theirs, n in zip(warm["pages"], cold["pages"], warm["cached"], strict=True)
        )
        # The same split: as much in the engine's memory as came from the store.
        self.trim(prompts, warm["cached"])
        same = self.ask(prompts)
        self.scheduler.connector._scheduler._loads = True
        results["tokens_equal"] = (
            warm["tokens"] == same["tokens"] and warm["cached"] == same["cached"]
        )
        results |= self.beside_decodes(prompts[1])
        results["leased_slots"] = self.worker_half().leased_slots
        results["right"] = (
            results["pages_equal"]
            and results["tokens_equal"]
            and results["decode_batch_equal"]
            and min(results["hit_tokens"]) > 0
            and results["leased_slots"] == 0
        )
        return results

    def beside_decodes(self, prompt: list[int]) -> dict[str, Any]:
        """A prompt whose every token but one comes from the store joins a batch of decodes."""
        others = [prompt_tokens(300, seed=s) for s in range(50, 54)]
        base = self.ask([prompt], beside=others)  # hit in the engine's own memory
        self.settle()
        self.poison()
        warm = self.ask([prompt], beside=others)
        self.settle()
        return {
            "decode_batch_hit_tokens": warm["cached"],
            "decode_batch_equal": warm["tokens"] == base["tokens"]
            and warm["cached"][0] == 4 * CHUNK,
        }

    # ---- steps

    @property
    def block(self) -> int:
        return int(self.scheduler.block_size)

    def ask(
        self, prompts: list[list[int]], beside: list[list[int]] | None = None
    ) -> dict[str, Any]:
        """Answers to prompts at once, with their full pages' digests at the first token."""
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        decodes = []
        for other in beside or []:
            decodes.append(self._add(other, 200))
        for _ in range(20 if decodes else 0):
            engine.step()
        greedy = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
        names = [self._add(prompt, greedy.max_tokens) for prompt in prompts]
        tokens: dict[str, list[int]] = {}
        cached: dict[str, int] = {}
        pages: dict[str, list[str]] = {}
        waiting = set(names)
        while waiting:
            for output in engine.step():
                name = output.request_id
                if name not in names:
                    continue
                tokens[name] = list(output.outputs[0].token_ids)
                cached[name] = output.num_cached_tokens
                if name not in pages and not beside:
                    pages[name] = self.digests(name, len(output.prompt_token_ids))
                if output.finished:
                    waiting.discard(name)
        engine.abort_request(decodes)
        while engine.has_unfinished_requests():
            engine.step()
        return {
            "tokens": [tokens[n] for n in names],
            "cached": [cached[n] for n in names],
            "pages": [pages.get(n, []) for n in names],
        }

    def _add(self, prompt: list[int], max_tokens: int) -> str:
        from vllm import SamplingParams

        self.made += 1
        name = f"q{self.made}"
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        self.llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params)
        return name

    def digests(self, name: str, tokens: int) -> list[str]:
        import torch

        internal = next(r for r in self.scheduler.requests if r == name or r.startswith(name + "-"))
        blocks = self.scheduler.kv_cache_manager.get_block_ids(internal)[0][: tokens // self.block]
        if self.pages[0].is_cuda:
            torch.cuda.synchronize()
        host = [page[torch.tensor(blocks, device=page.device)].cpu() for page in self.pages]
        return [
            hashlib.sha256(b"".join(layer[at].numpy().tobytes() for layer in host)).hexdigest()
            for at in range(len(blocks))
        ]

    def poison(self) -> None:
        """Nothing of what was computed is left in the engine."""
        for _ in range(20):
            if self.llm.reset_prefix_cache():
                break
            self.ask_quietly([5, 6, 7])  # blocks of aborted requests are freed some steps later
        else:
            raise RuntimeError("the engine does not let go of its blocks")
        for page in self.pages:
            page.fill_(POISON)

    def trim(self, prompts: list[list[int]], tokens: list[int]) -> None:
        """Compute just so many tokens of each prompt anew, and leave them in the engine's memory."""
        assert self.llm.reset_prefix_cache()
        self.scheduler.connector._scheduler._loads = False
        for prompt, count in zip(prompts, tokens, strict=True):
            self.ask_quietly(prompt[:count])

    def ask_quietly(self, prompt: list[int]) -> None:
        self._add(prompt, 1)
        while self.llm.llm_engine.has_unfinished_requests():
            self.llm.llm_engine.step()

    def settle(self) -> None:
        """Let uploads end and slots come back; an idle engine takes a step to hear of it."""
        end = time.monotonic() + 30
        while self.worker_half().leased_slots and time.monotonic() < end:
            time.sleep(0.05)
            self.ask_quietly([5, 6, 7])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--case", help="one case as JSON, in this process")
    parser.add_argument("--out", type=Path, help="where the JSON lines go as well")
    parser.add_argument("--cases", help="numbers of the cases to run, such as 0,3,16")
    args = parser.parse_args()
    if args.case is not None:
        print("VERDICT " + json.dumps(run_case(json.loads(args.case))), flush=True)
        return 0
    wrong = 0
    chosen = [CASES[int(n)] for n in args.cases.split(",")] if args.cases else CASES
    for case in chosen:
        line = _in_a_process(case)
        wrong += not line.get("right")
        print(json.dumps(line), flush=True)
        if args.out is not None:
            with args.out.open("a") as out:
                out.write(json.dumps(line) + "\n")
    return 1 if wrong else 0


def _in_a_process(case: dict[str, Any]) -> dict[str, Any]:
    env = dict(os.environ) | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": "1" if case.get("v2", True) else "0",
    }
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--case", json.dumps(case)]
    began = time.monotonic()
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=280)
    for line in done.stdout.splitlines():
        if line.startswith("VERDICT "):
            return json.loads(line[8:]) | {"seconds": round(time.monotonic() - began, 1)}
    return {"case": case, "right": False, "error": (done.stdout + done.stderr)[-1500:]}


if __name__ == "__main__":
    sys.exit(main())
