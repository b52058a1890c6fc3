"""Does the benchmark of servers under load measure what it says? Its numbers mean nothing here, but for counts of tokens."""

import argparse
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from smoke_runs import smoke_run
from ttft_lab import ToyPlace

from benchmarks.results import Lines, read
from benchmarks.served import ServeError, flags
from benchmarks.throughput import PASSES, SYSTEMS, Load, Run, metrics_of, server_kwargs
from benchmarks.throughput_report import write
from benchmarks.ttft_systems import Case, Prompts, Setup

TINY = Load(3, 512, 64, 8, 6, rate=0.0, in_flight=1)
PREFIXES = 3 * 512  # tokens, each prefix once
CHUNKS_BYTES = PREFIXES * 2048  # of KV
HOST_BYTES = 1 << 20
BENCH = {
    **{"request_throughput": 2.0, "output_throughput": 16.0, "total_token_throughput": 1168.0},
    **{"p50_ttft_ms": 100.0, "p99_ttft_ms": 200.0, "p50_tpot_ms": 30.0, "p99_tpot_ms": 40.0},
    **{"duration": 3.0, "completed": 6, "failed": 0, "total_input_tokens": 3456},
}

# ---- real servers


def test_what_the_first_pass_saved_is_hit_by_the_second(tmp_path: Path) -> None:
    out = tmp_path / "throughput-smoke.jsonl"
    options = ("--systems", "objectcache", "--out", str(out), "--folder", str(tmp_path))
    smoke_run("throughput", *options, limit_s=420)
    lines = [line for line in read(out) if line["system"] != "environment"]
    found = {line["case"]["pass"]: line["metrics"] for line in lines}
    assert [line["system"] for line in lines] == ["objectcache"] * 2 and set(found) == set(PASSES)
    for metrics in found.values():
        assert (metrics["requests"], metrics["failed_requests"]) == (6, 0)
        assert metrics["prompt_tokens"] == 6 * (512 + 64)
        assert metrics["gpu_hit_tokens"] == PREFIXES  # the second prompt with each of them
        assert metrics["output_tokens_per_s"] == pytest.approx(8 * metrics["requests_per_s"], 0.01)
        assert metrics["total_tokens_per_s"] == pytest.approx(584 * metrics["requests_per_s"], 0.01)
        assert 0 < metrics["ttft_p50_s"] <= metrics["ttft_p99_s"] < metrics["seconds"]
        assert 0 < metrics["tpot_p50_ms"] <= metrics["tpot_p99_ms"]
    cold, again = found["cold"], found["again"]
    assert (cold["hit_tokens"], cold["objectcache_hit_tokens"], cold["read_bytes"]) == (0, 0, 0)
    assert cold["saved_chunks"] == PREFIXES // 256 and again["saved_chunks"] == 0
    assert (again["hit_tokens"], again["objectcache_hit_tokens"]) == (PREFIXES, PREFIXES)
    assert CHUNKS_BYTES <= again["read_bytes"] < 1.1 * CHUNKS_BYTES  # each chunk once, whole
    assert "nothing is left to measure" in smoke_run("throughput", *options, limit_s=60)


# ---- what happens between the passes


class ToyServed:
    """Says what it was told. Hits all prefixes if its store has them; nothing is kept but there."""

    def __init__(self, told: list[str], breaks_in: int = 0) -> None:
        self.told, self.passes, self.breaks_in = told, 0, breaks_in
        self.hit_tokens = self.saved_chunks = 0

    def __call__(self, kwargs: Mapping[str, Any], env: Any, log: Path, limit_s: float) -> Any:
        transfer = kwargs.get("kv_transfer_config", {})
        self.told.append(f"start {transfer.get('kv_connector', 'nothing')}")
        self.hit_tokens = self.saved_chunks = 0
        return self

    def stop(self) -> None:
        self.told.append("stop")

    def ask(self, prompt: list[int], tokens: int) -> None:
        self.late = self.hit_tokens  # the counters of a step come with a later one

    def forget(self, connector: bool) -> None:
        self.told.append("forget all" if connector else "forget the GPU's")

    def counters(self) -> dict[str, float]:
        return {
            "vllm:external_prefix_cache_hits_total": self.late,
            "vllm:objectcache_saved_chunks_total": self.saved_chunks,
        }

    def bench(self, options: Mapping[str, Any], folder: Path, limit_s: float) -> dict[str, Any]:
        self.passes += 1
        self.told.append("bench")
        if self.passes == self.breaks_in:
            raise ServeError("no /opt/some/where, sorry")
        self.hit_tokens += PREFIXES * (self.passes - 1)
        self.saved_chunks += 6 * (self.passes == 1)
        return BENCH


def measured(tmp_path: Path, name: str, breaks_in: int = 0) -> tuple[list[str], list[Any]]:
    told: list[str] = []
    args = argparse.Namespace(keep_log=None, host_gib=HOST_BYTES / 2**30, smoke=True)
    about = {"benchmark": "throughput", "machine": "toy", "commit": "one"}
    lines, out = Lines(tmp_path / "out"), tmp_path / "out"
    toy: Any = ToyServed(told, breaks_in)
    until = time.monotonic() + 100
    run = Run(args, setup_of(), TINY, lines, about, tmp_path, until, serve=toy, settle_s=0.0)
    run.measure(name, place_of(name))
    return told, read(out)


def setup_of() -> Setup:
    options = {"ring_bytes": HOST_BYTES}
    return Setup(Path("model"), {}, options, Prompts(1024, "words"), 2048, [Case(576, 1.0)])


def place_of(name: str) -> ToyPlace | None:
    return ToyPlace("toy", "bucket", "kv") if SYSTEMS[name].stores else None


@pytest.mark.parametrize(
    "name, between",
    [
        ("none", ["forget the GPU's"]),
        ("vllm-cpu", ["forget the GPU's"]),
        ("vllm-s3", ["forget all"]),
        ("objectcache", ["stop", "start ObjectCacheConnector"]),
    ],
)
def test_between_the_passes_only_what_was_saved_is_left(
    tmp_path: Path, name: str, between: list[str]
) -> None:
    told, lines = measured(tmp_path, name)
    assert told[0].startswith("start") and told[1:] == ["bench", *between, "bench", "stop"]
    hits = {line["case"]["pass"]: line["metrics"]["hit_tokens"] for line in lines}
    assert hits == {"cold": 0, "again": PREFIXES}


@pytest.mark.parametrize("breaks_in, skipped", [(1, ["cold"]), (2, ["again"])])
def test_a_pass_that_broke_is_told_and_the_server_ended(
    tmp_path: Path, breaks_in: int, skipped: list[str]
) -> None:
    told, lines = measured(tmp_path, "objectcache", breaks_in)
    assert told[-1] == "stop" and told.count("bench") == breaks_in
    assert [line["case"]["pass"] for line in lines if "skipped" in line] == skipped
    assert all(one["skipped"] == "no ..., sorry" for one in lines if "skipped" in one)


def test_the_report_shows_each_pass_and_what_was_left_out(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    measured(tmp_path, "none")
    _, lines = measured(tmp_path, "objectcache", breaks_in=2)
    counted = {"gpu_hit_tokens": 7}  # of a real server
    shown = [line | {"metrics": line["metrics"] and line["metrics"] | counted} for line in lines]
    path = tmp_path / "throughput-toy.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in shown))
    write(tmp_path)
    text = (tmp_path / "throughput.md").read_text()
    row = "2 | 16 | 0.1 / 0.2 | 30 / 40 |"
    for name, hits in (("none, cold", 0), ("none, again", 1536), ("objectcache, toy, cold", 0)):
        assert f"| {name} | {row} {hits:,} | 7 |" in text
    assert "| objectcache, toy, again |" not in text and "): no ..., sorry" in text
    assert (tmp_path / "throughput-toy.svg").stat().st_size > 1000


# ---- decisions


def test_systems_that_keep_anything_have_the_same_host_memory() -> None:
    said = {
        name: server_kwargs(SYSTEMS[name], setup_of(), place_of(name), HOST_BYTES)
        for name in SYSTEMS
    }
    assert "kv_transfer_config" not in said.pop("none")
    extras = {name: one["kv_transfer_config"]["kv_connector_extra_config"] for name, one in said.items()}  # fmt: skip
    assert extras["objectcache"]["ring_bytes"] == HOST_BYTES and extras["objectcache"]["save"]
    assert extras["vllm-s3"]["cpu_bytes_to_use"] == extras["vllm-cpu"]["cpu_bytes_to_use"]
    assert extras["vllm-s3"]["cpu_bytes_to_use"] == HOST_BYTES


def test_the_bench_sends_what_the_case_says() -> None:
    sent = dict(zip(*[iter(flags(TINY.options()))] * 2, strict=False))
    assert sent["--prefix-repetition-prefix-len"] == "512" and sent["--num-prompts"] == "6"
    assert (sent["--request-rate"], sent["--max-concurrency"]) == ("inf", "1")
    paced = Load(3, 512, 64, 8, 6, rate=2.5, in_flight=0)
    assert "--max-concurrency" not in list(flags(paced.options()))
    assert paced.options()["request_rate"] == 2.5 and paced.told()["requests_per_s"] == 2.5
    json.dumps(TINY.told(), allow_nan=False)
    assert TINY.options()["request_rate"] == math.inf


def test_chunks_of_a_prefix_are_counted_once() -> None:
    assert TINY.chunks == 6
    assert Load(3, 512, 300, 8, 6, rate=0.0, in_flight=1).chunks == 6 + 6
    assert Load(2, 600, 200, 8, 4, rate=0.0, in_flight=1).chunks == 4 + 4  # 800 tokens: 3 chunks


@pytest.mark.parametrize("prefixes, prompts", [(0, 4), (4, 2), (4, 6)])
def test_prompts_that_the_bench_would_not_send_are_refused(prefixes: int, prompts: int) -> None:
    with pytest.raises(SystemExit, match="multiple of --prefixes"):
        Load(prefixes, 512, 64, 8, prompts, rate=0.0, in_flight=0)


def test_arguments_of_an_engine_become_those_of_a_server() -> None:
    kwargs = {"a_b": 1, "on": True, "off": False, "none": None, "more": {"x": [1]}}
    assert list(flags(kwargs)) == ["--a-b", "1", "--on", "--no-off", "--more", '{"x": [1]}']


def test_counters_are_those_of_the_pass_and_units_those_of_the_names() -> None:
    hits = "vllm:external_prefix_cache_hits_total"
    metrics = metrics_of(BENCH, {hits: 100.0}, {hits: 1636.0})
    assert metrics["hit_tokens"] == 1536 and "saved_chunks" not in metrics
    assert (metrics["ttft_p50_s"], metrics["ttft_p99_s"]) == (0.1, 0.2)
    assert (metrics["tpot_p50_ms"], metrics["requests_per_s"]) == (30.0, 2.0)
