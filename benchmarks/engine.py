"""Real vLLM engines on the CPU, run from a plan in a process of their own, for tests and benchmarks.

`run_engines` is what callers use; the rest of the file runs in the child (`python -m
benchmarks.engine PLAN REPORT`). No assertions about results and no object store here.

A plan is JSON: `{"engines": [{"kwargs": {LLM arguments}, "steps": [step, ...]}, ...]}`. A step is
one of

* `{"do": "generate", "prompts": [...], "sampling": {...} or [one per prompt]}`: all prompts at
  once. A prompt is `{"prompt_token_ids": [...], "cache_salt": "..."}`. Options: `"pages": true`
  digests every full KV page of each prompt, layer by layer; `"abort": {"request": 0, "steps": 1,
  "wait_s": 0.1}` cancels one request after so many engine steps and that wait.
* `{"do": "save", "prompt": {...}, "chunks": 9, "limit_s": 60}`: compute a prompt and go on with it
  until objectcache has so many chunks more in the store.
* `{"do": "forget"}`: empty the engine's own prefix cache; with `"connector": true` also what the
  connector may empty.
* `{"do": "wait", "seconds": 1}`: leave the engine alone, so that writes behind can finish.
* `{"do": "remove", "file": "/path"}`: delete a file, an object of a `file://` store say.
* `{"do": "metrics"}`: counters since the engine started.
* `{"do": "profile", "name": "..."}`: begin to profile, into a file of that name; without a name, end it.

The report has the same order: `{"engines": [{"start_s", "stop_s", "steps": [...], "left": {...}}]}`.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STOP_LIMIT_S = 6.0  # vLLM gives its own processes 5 s
SAVING_TOKENS = 2000  # most that are generated while chunks are written
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
}
# Float32 and eager: the only way in which vLLM's own tokens do not depend on how a prompt is split.
# A KV cache of known size spares the engine a profiling run and the zeroing of gigabytes.
LLM_DEFAULTS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "disable_log_stats": False,
    "max_model_len": 8192,
    "kv_cache_memory_bytes": 256 << 20,
    "gpu_memory_utilization": 0.05,  # on the CPU: share of RAM that must be free at the start
    "worker_extension_cls": "benchmarks.engine.PageReader",
}
MEASURED = (
    "vllm:objectcache",
    "vllm:external_prefix_cache",
    "vllm:prefix_cache",
    "vllm:num_preemptions",
)


class EngineError(RuntimeError):
    """The engine process failed or ran out of time; the message ends with its log."""


def run_engines(
    engines: Sequence[Mapping[str, Any]],
    *,
    env: Mapping[str, str] | None = None,
    one_process: bool = True,
    log: Path | None = None,
    timeout_s: float = 300.0,
) -> list[dict[str, Any]]:
    """Run engines one after the other in one fresh process and return a report for each.

    With `one_process` the front end, scheduler and worker share the process (a start costs about
    2 s after 5 s of imports); without it they are three, as under `vllm serve` (20 s).
    Raises EngineError. No process outlives the call.
    """
    with tempfile.TemporaryDirectory(prefix="objectcache-engine-") as name:
        folder = Path(name)
        log = log or folder / "engine.log"
        plan, report = folder / "plan.json", folder / "report.json"
        plan.write_text(json.dumps({"one_process": one_process, "engines": list(engines)}))
        settings = SETTINGS | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0" if one_process else "1"}
        child_env = dict(os.environ) | settings | dict(env or {})
        child_env["PYTHONPATH"] = python_path()  # the worker processes import this module too
        command = [sys.executable, "-m", "benchmarks.engine", str(plan), str(report)]
        code = run_to_end(command, child_env, log, timeout_s)
        if code != 0:
            reason = f"within {timeout_s:.0f} s" if code is None else f"(exit status {code})"
            raise EngineError(f"The engine did not finish {reason}. Its log ends:\n{_tail(log)}")
        return list(json.loads(report.read_text())["engines"])


def python_path() -> str:
    """For a child: this repository, and where this process's own modules were found."""
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def run_to_end(
    command: Sequence[str], env: Mapping[str, str], log: Path, timeout_s: float
) -> int | None:
    """Run a command with its output in `log`; return its exit status, None if it took too long.

    It leads a process group. Whatever is left of that group is ended, also on Ctrl-C.
    """
    with log.open("ab") as output:
        child = subprocess.Popen(
            command, env=env, cwd=ROOT, stdout=output, stderr=output, start_new_session=True
        )
        try:
            return child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            end_group(child)


def end_group(child: subprocess.Popen[bytes]) -> None:
    """End a child that leads a process group, and all that it has started."""
    # Asked first: a killed vLLM leaves its shared memory behind.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
        until = time.monotonic() + STOP_LIMIT_S
        while time.monotonic() < until:
            child.poll()  # or its zombie keeps the group alive
            os.killpg(child.pid, 0)
            time.sleep(0.05)
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _tail(log: Path, lines: int = 40) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


# Of one page: a digest of its bytes; where its values point, a number that any displaced, missing or
# foreign value changes; and their norm, by which to judge a difference of the second.
Page = tuple[str, float, float]


def _page(values: Any) -> Page:
    import torch

    digest = hashlib.sha256(values.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
    flat = values.double().flatten()
    direction = torch.arange(len(flat), dtype=torch.float64).add_(1).mul_(0.7).cos_()
    return digest, float(flat @ direction), float(flat.norm())


class PageReader:
    """What vLLM mixes into its worker (`worker_extension_cls`): a look at the KV pages."""

    model_runner: Any

    def page_digests(self, request: str, tokens: int) -> dict[str, list[Page]] | None:
        """Return, by layer, what each full page of a running request holds; None if it is gone."""
        block_tokens = self.model_runner.cache_config.block_size
        for known, state in self.model_runner.requests.items():
            if known == request or known.startswith(request + "-"):
                blocks = list(state.block_ids[0])[: tokens // block_tokens]
                break
        else:
            return None
        layers = self.model_runner.compilation_config.static_forward_context
        pages = {name: layer.kv_cache for name, layer in layers.items()}
        return {
            name: [_page(page[block].contiguous()) for block in blocks]
            for name, page in pages.items()
        }


class Engine:
    """One live engine in this process and the steps it can take."""

    def __init__(self, kwargs: Mapping[str, Any], one_process: bool) -> None:
        from vllm import LLM

        executor = {"distributed_executor_backend": "uni"} if one_process else {}
        self.llm = LLM(**(LLM_DEFAULTS | executor | dict(kwargs)))
        self.requests_made = 0
        self.metrics_at_start = read_metrics()

    def run(self, step: Mapping[str, Any]) -> dict[str, Any]:
        began = time.monotonic()
        options = {name: value for name, value in step.items() if name != "do"}
        result: dict[str, Any] = getattr(self, "_" + step["do"])(**options)
        return {"do": step["do"], "seconds": time.monotonic() - began} | result

    def stop(self) -> float:
        """Stop the engine and forget it, so that another one can start in this process.

        Returns how long the engine took; to look through all of vLLM for garbage takes longer.
        """
        from vllm.distributed import cleanup_dist_env_and_memory

        began = time.monotonic()
        self.llm.llm_engine.engine_core.shutdown()
        stop_s = time.monotonic() - began
        del self.llm
        cleanup_dist_env_and_memory()  # it collects garbage last
        return stop_s

    def _forget(self, connector: bool = False) -> dict[str, Any]:
        return {"done": self.llm.reset_prefix_cache(reset_connector=connector)}

    def _profile(self, name: str = "") -> dict[str, Any]:
        if name:
            self.llm.start_profile(name)
        else:
            self.llm.stop_profile()
        return {}

    def _wait(self, seconds: float) -> dict[str, Any]:
        time.sleep(seconds)
        return {}

    def _remove(self, file: str) -> dict[str, Any]:
        os.unlink(file)
        return {}

    def _metrics(self) -> dict[str, Any]:
        now = read_metrics()
        return {"values": {k: v - self.metrics_at_start.get(k, 0.0) for k, v in now.items()}}

    def _generate(
        self,
        prompts: Sequence[Mapping[str, Any]],
        sampling: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        pages: bool = False,
        abort: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        engine = self.llm.llm_engine
        each = [sampling] * len(prompts) if isinstance(sampling, Mapping) else sampling
        batch = _Batch(self.llm)
        internal = [self._add(batch, *one) for one in zip(prompts, each, strict=True)]
        steps = 0
        while engine.has_unfinished_requests():
            if abort and steps == abort.get("steps", 0):
                time.sleep(abort.get("wait_s", 0.0))
                engine.abort_request([internal[abort["request"]]], internal=True)
                batch.aborted(abort["request"])
                abort = None
                continue
            outputs = engine.step()
            steps += 1
            batch.take(outputs, pages)
            if not outputs:
                time.sleep(0.0005)  # nothing could run: leave the interpreter to the loaders
        return {"requests": batch.results, "engine_steps": steps}

    def _save(self, prompt: Mapping[str, Any], chunks: int, limit_s: float) -> dict[str, Any]:
        """A chunk that found no room is tried again only as long as its request lives."""
        batch, began = _Batch(self.llm), time.monotonic()
        before = _chunks_in_store()
        name = self._add(batch, prompt, {"max_tokens": SAVING_TOKENS})
        engine = self.llm.llm_engine
        while engine.has_unfinished_requests() and time.monotonic() - began < limit_s:
            batch.take(engine.step(), pages=False)
            answered = batch.results[0]["ttft_s"] is not None  # to count takes time
            if answered and _chunks_in_store() - before >= chunks:
                break
        engine.abort_request([name], internal=True)
        while engine.has_unfinished_requests():
            engine.step()
        return {"requests": batch.results, "saved_chunks": _chunks_in_store() - before}

    def _add(self, batch: _Batch, prompt: Mapping[str, Any], sampling: Mapping[str, Any]) -> str:
        """Give a request to vLLM; returns vLLM's name of it."""
        from vllm import SamplingParams

        self.requests_made += 1
        name = f"request{self.requests_made}"
        parameters = SamplingParams(**({"temperature": 0.0, "ignore_eos": True} | dict(sampling)))
        batch.add(name, len(prompt["prompt_token_ids"]))
        internal: str = self.llm.llm_engine.add_request(name, dict(prompt), parameters)
        return internal


class _Batch:
    """Requests in flight and what is known of each."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.by_name: dict[str, dict[str, Any]] = {}
        self.began_s: dict[str, float] = {}

    @property
    def results(self) -> list[dict[str, Any]]:
        return list(self.by_name.values())

    def add(self, name: str, prompt_tokens: int) -> None:
        self.began_s[name] = time.monotonic()
        self.by_name[name] = {
            "prompt_tokens": prompt_tokens,
            "token_ids": [],
            "cached_tokens": None,
            "ttft_s": None,
            "seconds": None,
            "finish_reason": None,
        }

    def aborted(self, index: int) -> None:
        self.results[index]["finish_reason"] = "abort"

    def take(self, outputs: Sequence[Any], pages: bool) -> None:
        now = time.monotonic()
        for output in outputs:
            name, completion = output.request_id, output.outputs[0]
            result, age_s = self.by_name[name], now - self.began_s[name]
            result["token_ids"] = list(completion.token_ids)
            result["cached_tokens"] = output.num_cached_tokens
            if result["ttft_s"] is None and result["token_ids"]:
                result["ttft_s"] = age_s
                if pages:
                    result["pages"] = self._pages(name, result["prompt_tokens"])
            if output.finished:
                result["finish_reason"] = completion.finish_reason
                result["seconds"] = age_s

    def _pages(self, name: str, tokens: int) -> dict[str, list[Page]]:
        found: dict[str, list[Page]] | None = self.llm.collective_rpc(
            "page_digests", args=(name, tokens)
        )[0]
        if found is None:
            raise EngineError(f"{name} ended before its pages were read: ask for more max_tokens.")
        return found


def read_metrics() -> dict[str, float]:
    """Return this process's counters and gauges that matter here, summed over engines."""
    from prometheus_client import REGISTRY

    values: dict[str, float] = {}
    for metric in REGISTRY.collect():
        if not metric.name.startswith(MEASURED):
            continue
        for sample in metric.samples:
            if sample.name.endswith("_created"):
                continue
            labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            label_text = ",".join(f"{k}={v}" for k, v in sorted(labels.items()))
            key = f"{sample.name}{{{label_text}}}" if labels else sample.name
            values[key] = values.get(key, 0.0) + sample.value
    return values


def _chunks_in_store() -> float:
    """Chunks that objectcache has written or found to be there, since this process started."""
    counted = read_metrics()
    return sum(
        counted.get(f"vllm:objectcache_{name}_total", 0.0)
        for name in ("saved_chunks", "duplicate_chunks")
    )


def _left_behind(threads_before: set[str]) -> dict[str, Any]:
    """Return the threads, processes and connections that an ended engine has left."""
    import psutil

    me = psutil.Process()
    children = [
        " ".join(child.cmdline())
        for child in me.children(recursive=True)
        if child.status() != psutil.STATUS_ZOMBIE
    ]
    connections = [c for c in me.net_connections("inet") if c.status == psutil.CONN_ESTABLISHED]
    return {
        "threads": sorted({t.name for t in threading.enumerate()} - threads_before),
        "processes": [c for c in children if "resource_tracker" not in c],
        "connections": [f"{c.raddr.ip}:{c.raddr.port}" for c in connections],
    }


def _run_one(spec: Mapping[str, Any], one_process: bool) -> dict[str, Any]:
    threads = {t.name for t in threading.enumerate()}
    began = time.monotonic()
    engine = Engine(spec["kwargs"], one_process)
    started = time.monotonic()
    steps = [engine.run(step) for step in spec["steps"]]
    stop_s = engine.stop()
    return {
        "start_s": started - began,
        "stop_s": stop_s,
        "steps": steps,
        "left": _left_behind(threads),
    }


def _import_vllm() -> None:
    """What was imported stays: to look through it for garbage would take a fifth of the import's time,
    and again most of the time to stop an engine."""
    gc.disable()
    import vllm.entrypoints.llm  # noqa: F401

    gc.freeze()
    gc.enable()


def main() -> None:
    """Run the plan named on the command line and write its report."""
    plan = json.loads(Path(sys.argv[1]).read_text())
    _import_vllm()
    reports = [_run_one(spec, plan["one_process"]) for spec in plan["engines"]]
    Path(sys.argv[2]).write_text(json.dumps({"engines": reports}))


if __name__ == "__main__":
    main()
