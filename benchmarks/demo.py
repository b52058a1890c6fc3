"""`make demo`: one long prompt, served by three engines; the second finds the first one's KV in S3.

Progress and a table go to stderr. Stdout gets one line of JSON. The exit status is 0 only if all
three gave the same tokens and the second engine took KV from the bucket. Each TTFT is one sample:
it shows that loading happens, and is no benchmark. What an engine is and how it is run stands in
engine.py; what the connector must do in every other case, in tests/.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.command import say
from benchmarks.engine import ROOT, EngineError, run_engines
from benchmarks.servers import ServerError, seaweedfs
from benchmarks.tiny_model import ModelShape, prompt_tokens, write_model

FOLDER = ROOT / ".demo"
BUCKET = "objectcache"
PROMPT_TOKENS, ANSWER_TOKENS = 4000, 16
WARM_UP_TOKENS = 200  # below one chunk: nothing of it is looked up or saved
SETTLE_S = 2.0  # uploads are written behind the answer
# Large enough for a prefill of seconds on a laptop, small enough to start at once.
SHAPE = ModelShape(layers=8, hidden=512, heads=8, kv_heads=2, head_size=64, intermediate=1536)


@dataclass(frozen=True)
class Serving:
    """What one engine did with the prompt."""

    title: str
    token_ids: list[int]
    ttft_s: float
    hit_tokens: int
    metrics: Mapping[str, float]

    def counted(self, name: str) -> int:
        return int(self.metrics.get(f"vllm:objectcache_{name}_total", 0))


def main() -> int:
    """Run the demo; return the exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began = time.monotonic()
    try:
        servings = serve_three_times()
    except (EngineError, ServerError) as error:
        say(f"\nThe demo failed. {error}\nLogs: {FOLDER}/*.log and {FOLDER}/s3/*.log")
        return 1
    except KeyboardInterrupt:
        say("\nInterrupted.")
        return 130
    computed, found, without = servings
    equal = computed.token_ids == found.token_ids == without.token_ids
    say("\n" + table(servings))
    say(f"\n{time.monotonic() - began:.0f} s in all. Logs: {FOLDER}")
    for remark in [*complaints(equal, found), *caveats(servings)]:
        say(remark)
    result = {
        "tokens_equal": equal,
        "cold_ttft_s": round(computed.ttft_s, 4),
        "warm_ttft_s": round(found.ttft_s, 4),
        "hit_tokens": found.hit_tokens,
        "prompt_tokens": PROMPT_TOKENS,
    }
    print(json.dumps(result), flush=True)
    return 0 if equal and found.hit_tokens > 0 else 1


def serve_three_times() -> list[Serving]:
    """Start the store and serve the prompt from three engines, one after the other."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    say("Making a small random model")
    model = write_model(FOLDER / "model", SHAPE)
    say("Starting SeaweedFS, an S3 server, on this machine only")
    with seaweedfs(FOLDER / "s3", BUCKET) as server:
        connector = {
            "kv_connector": "ObjectCacheConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {
                "url": f"s3://{BUCKET}/demo",
                "endpoint_url": server.endpoint_url,
            },
        }
        with_connector = {"kv_transfer_config": connector}
        return [
            serve("first engine, computes", model, with_connector, server.env, 1),
            serve("second engine, finds it", model, with_connector, server.env, 2),
            serve("third engine, connector off", model, {}, {}, 3),
        ]


def serve(
    title: str, model: Path, kwargs: Mapping[str, Any], env: Mapping[str, str], number: int
) -> Serving:
    """Serve the prompt from a fresh engine in processes of its own."""
    say(f"Starting the {title} (about 20 s)")
    prompt = prompt_tokens(PROMPT_TOKENS, seed=1, shape=SHAPE)
    # The first step of an engine pays for its memory: not part of the comparison.
    warm_up = prompt_tokens(WARM_UP_TOKENS, seed=100 + number, shape=SHAPE)
    steps = [
        _generate(warm_up, 2),
        _generate(prompt, ANSWER_TOKENS),
        {"do": "wait", "seconds": SETTLE_S},
        _generate(warm_up, 2),  # vLLM reports what was counted with its next step
        {"do": "metrics"},
    ]
    report = run_engines(
        [{"kwargs": {"model": str(model), **kwargs}, "steps": steps}],
        env=env,
        one_process=False,
        log=FOLDER / f"engine-{number}.log",
    )[0]
    answer, metrics = report["steps"][1]["requests"][0], report["steps"][4]["values"]
    hit_tokens = int(metrics.get("vllm:objectcache_hit_tokens_total", 0))
    say(f"    first token after {answer['ttft_s']:.2f} s, {hit_tokens} tokens from the bucket")
    return Serving(title, answer["token_ids"], answer["ttft_s"], hit_tokens, metrics)


def _generate(prompt: list[int], max_tokens: int) -> dict[str, Any]:
    prompts = [{"prompt_token_ids": prompt}]
    return {"do": "generate", "prompts": prompts, "sampling": {"max_tokens": max_tokens}}


def table(servings: list[Serving]) -> str:
    """Return the table that the README shows."""
    head = ("", "tokens", "TTFT", "hit rate", "read", "written", "GET", "HEAD", "PUT")
    rows = [head]
    for serving in servings:
        same = "equal" if serving.token_ids == servings[-1].token_ids else "DIFFERENT"
        rows.append(
            (
                serving.title,
                same,
                f"{serving.ttft_s:.2f} s",
                f"{serving.hit_tokens / PROMPT_TOKENS:.0%}",
                f"{serving.counted('read_bytes') / 2**20:.1f} MiB",
                f"{serving.counted('written_bytes') / 2**20:.1f} MiB",
                *(str(serving.counted(f"{verb}_requests")) for verb in ("get", "head", "put")),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = []
    for row in rows:
        title, *cells = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([title, *cells]))
    return "\n".join(lines)


def complaints(equal: bool, found: Serving) -> list[str]:
    """Return what is wrong, and where to look."""
    wrong = []
    if not equal:
        wrong.append("WRONG: the engines gave different tokens. Please report it with the logs.")
    if found.hit_tokens == 0:
        wrong.append(
            "WRONG: the second engine found nothing in the bucket. Look for warnings of "
            f"objectcache in {FOLDER}/engine-1.log (saving) and engine-2.log (loading)."
        )
    return wrong


def caveats(servings: list[Serving]) -> list[str]:
    """Return what makes a TTFT of the table something else than loading or computing."""
    return [
        f"NOTE: the {serving.title}, waited for the store in vain: its TTFT is no measure of "
        "computing. Run the demo again on a quiet machine; see its log for the warning."
        for serving in servings
        if serving.counted("late_prompts") or serving.counted("lookup_failures")
    ]


if __name__ == "__main__":
    sys.exit(main())
