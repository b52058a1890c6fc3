"""Is what comes back from the store what was computed? Real vLLM on whatever device is here, over a matrix of settings.

    python -m benchmarks.gpu_check --parallel 4 --seconds 540 --out results.jsonl
    python -m benchmarks.gpu_check --list               the cases, most important first
    python -m benchmarks.gpu_check --case '{"block_size": 32}'

For each case one engine, in a process of its own, computes prompts cold, forgets them, has all its KV
memory poisoned, and answers again from the store. KV pages must be equal byte for byte; tokens must be
equal to those of the same prompts hit in the engine's own memory, because in bfloat16 tokens depend on
how a prompt is split. Then a prompt whose every token but one is in the store joins a batch of decodes
(a full graph is replayed there, which calls no layer), and requests are aborted at every stage of a
load, and all are preempted once. Some cases have a ring that prefixes must stream through, some are admitted
just in time, and what joins the decodes is copied ahead of its step. Writes one JSON
line a case as soon as it is known, passes over cases that a line in --out says are right, and fails if
one is not. The first lines of a failed engine's log are in its line.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import command
from benchmarks.case_processes import Case, run_all
from benchmarks.tiny_model import ModelShape, prompt_tokens, write_model

SHAPE = ModelShape(layers=6, heads=8, kv_heads=4, head_size=128, hidden=512, intermediate=1024)
POISON = 0x7E  # a large number in every KV type; 0x7F is NaN in fp8, which spoils a whole block
CHUNK = 256
FULL_TRIES = 5  # whether its last token meets nothing but decodes is chance
JOIN_TRIES = 6  # of a prompt that is to join the batch in a certain step
SAVES_MOST = 60  # times that prompts are asked so that all is saved
# Most important first.
CASES: list[Case] = [
    {},
    {"v2": False},
    {"graphs": "FULL"},
    {"ring_mib": 16},
    {"ahead": True},
    {"graphs": "FULL", "v2": False},
    {"graphs": "eager"},
    {"kv_cache_dtype": "fp8"},
    {"graphs": "PIECEWISE"},
    {"block_size": 128},
    {"layout": "BLHNC"},
    {"attention_backend": "TRITON_ATTN"},
    {"attention_backend": "FLASHINFER"},
    {"kernel_block": 16, "block_size": 64},
    {"async_scheduling": False},
    {"max_num_batched_tokens": 512},
    {"ahead": True, "v2": False, "kv_cache_dtype": "fp8"},
    {"ahead": True, "async_scheduling": False, "layout": "BLNHC", "graphs": "FULL"},
    {"ring_mib": 16, "v2": False},
    {"graphs": "PIECEWISE", "v2": False},
    {"graphs": "eager", "v2": False},
    {"async_scheduling": False, "v2": False},
    {"block_size": 32},
    {"block_size": 64},
    {"layout": "LBNHC"},
    {"layout": "BLNHC"},
    {"kv_cache_dtype": "fp8", "attention_backend": "TRITON_ATTN", "block_size": 64},
    {"kv_cache_dtype": "fp8", "attention_backend": "FLASHINFER"},
    {"attention_backend": "FLASHINFER", "block_size": 128},
    {"attention_backend": "TRITON_ATTN", "layout": "BLNHC", "v2": False},
    {"kernel_block": 32, "block_size": 128, "layout": "LBNHC", "v2": False},
    *(
        {"graphs": graphs, "v2": v2, "async_scheduling": False}
        for graphs in ("FULL", "PIECEWISE", "eager")
        for v2 in (True, False)
    ),
]
OWN = ("graphs", "v2", "ring_mib", "layout", "kernel_block", "ahead")  # the rest is for vLLM
SLOW_BUS_BYTES_PER_S = 1e6  # so that what joins others is copied ahead of its step


class _Check:
    """An engine in this process with a directory as its store."""

    def __init__(self, case: dict[str, Any], folder: Path) -> None:
        import torch
        from vllm import LLM
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        self.case = case
        self.store = folder / "store"
        self.cuda = torch.cuda.is_available()
        self.llm = LLM(
            model=str(write_model(folder / "model", SHAPE)),
            skip_tokenizer_init=True,
            kv_transfer_config={
                "kv_connector": "ObjectCacheConnector",
                "kv_connector_module_path": "objectcache.connector",  # it need not be installed
                "kv_role": "kv_both",
                "kv_load_failure_policy": "fail" if case.get("ahead") else "recompute",
                "kv_connector_extra_config": {
                    "admission": "just-in-time" if case.get("ahead") else "staged",
                    "url": f"file://{self.store}",
                    "ring_bytes": f"{case.get('ring_mib', 512)}MiB",
                    "lookup_timeout_ms": 1000,  # engines share the machine
                },
            },
            **_options(case, self.cuda),
        )
        core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler = core.scheduler
        self.connector = get_kv_transfer_group()
        self.pages = self.worker_half()._pages
        self.made = 0
        self.full_replays = 0  # loads into steps that call no layer
        self.layered = 0  # loads into steps that do
        self.parked = 0  # loads of parked requests
        if case.get("ahead"):
            self._slow_bus()
        self._listen()

    def worker_half(self) -> Any:
        return self.connector._worker

    @property
    def loads(self) -> int:
        return self.full_replays + self.layered + self.parked

    def _listen(self) -> None:
        """Count what kinds of steps had loads."""
        half = self.worker_half()
        start = half.start_loads

        def start_loads(hooks_fire: bool) -> None:
            if half._commands.loads:
                self.layered += hooks_fire
                self.full_replays += not hooks_fire
            start(hooks_fire)

        half.start_loads = start_loads
        begin = half._begin_ahead

        def begin_ahead(load: Any) -> None:
            self.parked += 1
            begin(load)

        half._begin_ahead = begin_ahead

    def _slow_bus(self) -> None:
        from objectcache.timely import Timely

        loading = self.scheduler.connector._scheduler.loading
        most = self.scheduler.vllm_config.scheduler_config.max_num_batched_tokens
        slices = self.worker_half().slice_bytes
        loading.timely = Timely(slices, most, bus_bytes_per_s=SLOW_BUS_BYTES_PER_S)

    def verdict(self) -> dict[str, Any]:
        prompts = [prompt_tokens(3000, seed=1), prompt_tokens(CHUNK * 4 + 1, seed=2)]
        # Whole chunks first: so what is hit in the engine's memory is what will come from the store,
        # the same bytes and the same split.
        for prompt in prompts:
            self.ask_quietly(prompt[: len(prompt) // CHUNK * CHUNK])
        self._save_the_rest(prompts)
        base = self.ask_each(prompts)
        self.poison()
        warm = self.ask_each(prompts)
        checks = {
            "hit": warm["cached"] == [len(p) // CHUNK * CHUNK for p in prompts],
            "same_split": warm["cached"] == base["cached"],
            "pages_equal": warm["pages"] == base["pages"],
            "tokens_equal": warm["tokens"] == base["tokens"],
        }
        self.poison()
        together = self.ask(prompts)  # in one step, or nearly; how then decides about tokens
        checks["together_hit"] = together["cached"] == base["cached"]
        checks["together_pages"] = together["pages"] == base["pages"]
        checks |= self.beside_decodes(prompts[1], base["pages"][1])
        checks |= self.aborts(prompts, warm)
        if self.case.get("async_scheduling") is False:
            # Else blocks are freed a step later, and vLLM's cache cannot be emptied in between.
            checks |= self.preempted(prompts[0], base["pages"][0])
        self.settle()
        checks["slots_came_back"] = self.worker_half().leased_slots == 0
        if not self.case.get("ring_mib") and self.case.get("graphs") != "FULL":
            checks["layers_waited"] = self.layered > 0
        failed = sorted(name for name, right in checks.items() if not right)
        return {
            "case": self.case,
            "right": not failed,
            "failed": failed,
            "hit_tokens": warm["cached"],
            "full_replays": self.full_replays,
            "layered": self.layered,
            "parked": self.parked,
        }

    def _save_the_rest(self, prompts: list[list[int]]) -> None:
        """A small ring has no room for all saves at once, and what found none is tried again only while
        its request lives: ask until all chunks lie in the store. With a token more than these, or vLLM
        computes the last block anew, which in another split has other low bits."""
        due = sum(len(prompt) // CHUNK for prompt in prompts)
        for _ in range(SAVES_MOST):
            self.settle()
            if len(list(self.store.rglob("*.r0of1"))) >= due:
                return
            for prompt in prompts:
                self.ask_quietly(prompt[: len(prompt) // CHUNK * CHUNK + 1])
        raise RuntimeError(f"not all of {due} chunks came to the store")

    def ask_each(self, prompts: list[list[int]]) -> dict[str, Any]:
        each = [self.ask([prompt]) for prompt in prompts]
        return {name: [one[name][0] for one in each] for name in each[0]}

    def beside_decodes(self, prompt: list[int], pages: list[str]) -> dict[str, bool]:
        """A prompt whose every token but one comes from the store, with these pages, joins a batch of decodes."""
        others = [prompt_tokens(300, seed=s) for s in range(50, 54)]
        before, parked = self.full_replays, self.parked
        for _ in range(FULL_TRIES):
            self.poison()
            warm = self.ask([prompt], beside=others)
            self.settle()
            if self.full_replays > before:
                break
        parked_now, replays = self.parked, self.full_replays
        base = self._joined(prompt, others, warm["first_step"][0])
        full = self.case.get("graphs", "FULL").startswith("FULL") and self.cuda
        # There it is chance whether the prompt's last token meets nothing but decodes.
        full &= self.case.get("async_scheduling") is not False
        full &= "max_num_batched_tokens" not in self.case
        return {
            "decode_batch_hit": warm["cached"][0] == base["cached"][0] == 4 * CHUNK,
            "decode_batch_same_step": warm["first_step"] == base["first_step"],
            "decode_batch_equal": warm["tokens"] == base["tokens"],
            "decode_batch_pages": warm["pages"][0] == pages,
            "decode_batch_full_graph": not full
            or replays > before
            or bool(self.case.get("ring_mib"))
            or bool(self.case.get("ahead")),
            "decode_batch_parked": parked_now > parked or not self.case.get("ahead"),
        }

    def _joined(
        self, prompt: list[int], others: list[list[int]], first_step: int
    ) -> dict[str, Any]:
        """The same, hit in the engine's own memory, in the same step: beside longer sequences the low bits
        of attention may be others, which decides about tokens where a cache is as coarse as fp8."""
        later = 0
        for _ in range(JOIN_TRIES):
            base = self.ask([prompt], beside=others, later=later)
            if base["first_step"][0] == first_step:
                break
            later = max(0, later + first_step - base["first_step"][0])
        return base

    def aborts(self, prompts: list[list[int]], warm: dict[str, Any]) -> dict[str, bool]:
        """Requests that go away one step later each time; then the answer is as before."""
        engine = self.llm.llm_engine
        for steps in range(8):
            self.poison()
            name = self._add(prompts[0], 16)
            for _ in range(steps):
                engine.step()
                time.sleep(0.001 * steps)
            engine.abort_request([name])
            self.ask_quietly([5, 6, 7])
        self.poison()
        last = self.ask_each(prompts)
        return {
            "after_aborts_tokens": last["tokens"] == warm["tokens"],
            "after_aborts_pages": last["pages"] == warm["pages"],
        }

    def preempted(self, prompt: list[int], pages: list[str]) -> dict[str, bool]:
        """All running requests lose their blocks after some tokens, and come again."""
        self.poison()
        engine = self.llm.llm_engine
        for seed in range(60, 64):
            self._add(prompt_tokens(300, seed=seed), 60)
        name, loads, tokens = self._add(prompt, 60), 0, 0
        again: list[str] = []
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.request_id != name:
                    continue
                tokens = len(output.outputs[0].token_ids)
                if loads and not again and not output.finished:
                    again = self.digests(name, len(pages) * self.block)
            if tokens >= 10 and not loads:
                loads = self.loads
                self._preempt()
        return {
            "preempted_answers": tokens == 60,
            "preempted_loads": self.loads > loads > 0 or bool(self.case.get("ring_mib")),
            "preempted_pages": again == pages,
        }

    def _preempt(self) -> None:
        for _ in range(10):
            try:
                self.llm.reset_prefix_cache(reset_running_requests=True)
                break
            except RuntimeError:  # blocks of the step under way are freed after it
                self.llm.llm_engine.step()
        self._spoil()

    # ---- steps

    @property
    def block(self) -> int:
        return int(self.scheduler.block_size)

    def ask(
        self, prompts: list[list[int]], beside: list[list[int]] | None = None, later: int = 0
    ) -> dict[str, Any]:
        """Answers to prompts at once, with the digests of the pages that were hit, at the first token.

        Beside others they come 20 steps after these, or later. `first_step` is in which step since then the
        first of all answers began.
        """
        engine = self.llm.llm_engine
        decodes = [self._add(other, 200) for other in beside or []]
        steps = 20 + later if decodes else 0
        for _ in range(steps):
            engine.step()
        names = [self._add(prompt, 16) for prompt in prompts]
        tokens: dict[str, list[int]] = {}
        cached: dict[str, int] = {}
        pages: dict[str, list[str]] = {}
        waiting = set(names)
        first_step = 0
        while waiting:
            steps += 1
            for output in engine.step():
                name = output.request_id
                if name not in names:
                    continue
                first_step = first_step or steps
                tokens[name] = list(output.outputs[0].token_ids)
                cached[name] = output.num_cached_tokens
                if name not in pages:
                    pages[name] = self.digests(name, output.num_cached_tokens)
                if output.finished:
                    waiting.discard(name)
        engine.abort_request(decodes)
        while engine.has_unfinished_requests():
            engine.step()
        return {
            "tokens": [tokens[n] for n in names],
            "cached": [cached[n] for n in names],
            "pages": [pages.get(n, []) for n in names],
            "first_step": [first_step],
        }

    def _add(self, prompt: list[int], max_tokens: int) -> str:
        from vllm import SamplingParams

        self.made += 1
        name = f"q{self.made}"
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        self.llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params)
        return name

    def _internal(self, name: str) -> Any:
        known = self.scheduler.requests
        return next(known[r] for r in known if r == name or r.startswith(name + "-"))

    def digests(self, name: str, tokens: int) -> list[str]:
        import torch

        request = self._internal(name)
        blocks = self.scheduler.kv_cache_manager.get_block_ids(request.request_id)[0]
        blocks = blocks[: tokens // self.block]
        if self.cuda:
            torch.cuda.synchronize()
        host = [page[torch.tensor(blocks, device=page.device)].cpu() for page in self.pages]
        return [
            hashlib.sha256(b"".join(layer[at].numpy().tobytes() for layer in host)).hexdigest()
            for at in range(len(blocks))
        ]

    def poison(self) -> None:
        """Nothing of what was computed is left in the engine."""
        self.settle()
        for _ in range(20):
            if self.llm.reset_prefix_cache():
                break
            self.ask_quietly([5, 6, 7])  # blocks of aborted requests are freed some steps later
        else:
            raise RuntimeError("the engine does not let go of its blocks")
        self._spoil()

    def _spoil(self) -> None:
        for page in self.pages:
            page.fill_(POISON)

    def ask_quietly(self, prompt: list[int]) -> None:
        self._add(prompt, 1)
        while self.llm.llm_engine.has_unfinished_requests():
            self.llm.llm_engine.step()

    def settle(self) -> None:
        """Let uploads end and slots come back; an idle engine takes a step to hear of it."""
        end = time.monotonic() + 30
        while self.worker_half().leased_slots and time.monotonic() < end:
            time.sleep(0.01)
            self.ask_quietly([5, 6, 7])


def _options(case: dict[str, Any], cuda: bool) -> dict[str, Any]:
    """For vLLM: what the case says, and what makes an engine small and quick to start."""
    options: dict[str, Any] = {
        "max_model_len": 8192,
        "max_num_seqs": 16,
        "kv_cache_memory_bytes": 1 << 30,
        "gpu_memory_utilization": 0.1,  # it must be free when an engine starts, beside others
    }
    if cuda:
        options["dtype"] = "bfloat16"
    options |= {name: value for name, value in case.items() if name not in OWN}
    if "kernel_block" in case:
        options["attention_backend"] = "CUSTOM"
    graphs = case.get("graphs", "FULL_AND_PIECEWISE")
    if graphs == "eager":
        options["enforce_eager"] = True
    else:
        # Also sizes that a prompt's last tokens fit: a full graph of a mixed batch, where there is one.
        sizes = [1, 2, 4, 8, 16, 256, 512]
        options["compilation_config"] = {"cudagraph_mode": graphs, "cudagraph_capture_sizes": sizes}
    return options


def _split_blocks(kernel_block: int) -> None:
    """FlashAttention with kernels that take small blocks only, as FlashInfer's do."""
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    class SmallBlocks(FlashAttentionBackend):
        @staticmethod
        def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
            return [kernel_block]

    SmallBlocks.__qualname__ = "SmallBlocks"  # vLLM imports it by that name
    globals()["SmallBlocks"] = SmallBlocks
    register_backend(AttentionBackendEnum.CUSTOM, f"{__name__}.SmallBlocks")


def run_case(case: Case) -> dict[str, Any]:
    """One engine in this process, one verdict."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": "1" if case.get("v2", True) else "0",
    }
    if "layout" in case:
        os.environ["VLLM_KV_CACHE_LAYOUT"] = case["layout"]
    with tempfile.TemporaryDirectory() as folder:
        if "kernel_block" in case:
            _split_blocks(case["kernel_block"])
        return _Check(case, Path(folder)).verdict()


def main() -> int:
    parser = command.parser(__doc__, "out")
    parser.add_argument("--case", help="one case as JSON")
    parser.add_argument("--cases", help="numbers of the cases to run, such as 0,3,16")
    parser.add_argument("--list", action="store_true", help="the cases and their numbers")
    parser.add_argument("--parallel", type=int, default=1, help="engines side by side")
    parser.add_argument("--seconds", type=float, default=1e6, help="be done by then")
    args = parser.parse_args()
    chosen = [CASES[int(n)] for n in args.cases.split(",")] if args.cases else CASES
    if args.case is not None:
        chosen = [json.loads(args.case)]
    if args.list:
        for number, case in enumerate(CASES):
            print(number, json.dumps(case))
        return 0
    if args.out is not None and args.out.exists():
        known = [json.loads(text) for text in args.out.read_text().splitlines() if text]
        done = [line["case"] for line in known if line["right"]]
        chosen = [case for case in chosen if case not in done]
    import vllm.entrypoints.llm  # noqa: F401  before the forks: it takes longer than all else

    wrong, left = run_all(chosen, run_case, args.parallel, args.seconds, args.out)
    print(f"{len(chosen) - left - wrong} right, {wrong} wrong, {left} not run", flush=True)
    return 1 if wrong or left else 0


if __name__ == "__main__":
    sys.exit(main())
