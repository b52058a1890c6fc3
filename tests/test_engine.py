"""Real vLLM engines and a real S3 server: tokens and KV pages equal those of an engine without the connector.

In float32 on the CPU, where vLLM's own tokens do not depend on how a prompt is split; the model's
weights are scaled so that one wrong page shows. Engines of one process group share a process, which
makes a start cost seconds; what must be another process is one.
"""

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engine import run_engines
from benchmarks.servers import seaweedfs
from benchmarks.tiny_model import prompt_tokens, write_model
from objectcache.keys import chunk_hashes, root_hash

CHUNK, BLOCK = 256, 128
BASE = prompt_tokens(2000, seed=1)
GREEDY = {"max_tokens": 12}
SEEDED = {"max_tokens": 12, "temperature": 1.0, "seed": 7}
FORGET = {"do": "forget"}
SETTLE = [
    {"do": "wait", "seconds": 1.5},
    {"do": "generate", "prompts": [{"prompt_token_ids": [9, 8, 7]}], "sampling": {"max_tokens": 1}},
]

Step = dict[str, Any]
Report = dict[str, Any]


def ask(
    *prompts: list[int],
    sampling: Any = GREEDY,
    salt: str | None = None,
    pages: bool = True,
    **more: Any,
) -> Step:
    """One batch of prompts at once."""
    given = [
        {"prompt_token_ids": p} | ({"cache_salt": salt} if salt is not None else {})
        for p in prompts
    ]
    return {"do": "generate", "prompts": given, "sampling": sampling, "pages": pages} | more


def tail(seed: int, count: int = 40) -> list[int]:
    return prompt_tokens(count, seed=1000 + seed)


BOUNDARIES = [n * CHUNK + d for n in (1, 2, 5) for d in (-1, 0, 1)]

# Every situation but those that need an engine of their own. Before each the engine's own prefix
# cache is emptied, so that what hits comes from the bucket.
SITUATIONS: dict[str, Step] = {
    "whole": ask(BASE),
    **{f"shared up to {n}": ask(BASE[:n] + tail(n)) for n in BOUNDARIES},
    **{f"prompt of {n}": ask(BASE[:n]) for n in BOUNDARIES},
    "full prompt": ask(BASE[: 4 * CHUNK]),
    "shorter than a chunk": ask(BASE[: CHUNK - 50]),
    "one token": ask(BASE[:1], pages=False),
    "sharing": ask(BASE[:600] + tail(1), BASE[:600] + tail(2), BASE[:600] + tail(3), BASE),
    "not sharing": ask(BASE[:700], prompt_tokens(700, seed=2), prompt_tokens(300, seed=3)),
    "seeded": ask(BASE[:1500], BASE[:900] + tail(4), sampling=SEEDED),
    "salted": ask(BASE[:700], salt="tenant"),
    "salted otherwise": ask(BASE[:700], salt="other"),
}

# FILL is what the first engine is asked; all else the others meet for the first time.
# vLLM's CPU runner cannot take back a seeded draw of a prefill that goes on ("CPU Generator does not
# use offset"), connector or not.
FILL = ("whole", "not sharing", "salted")
CHUNKED = {name: step for name, step in SITUATIONS.items() if name != "seeded"}


def life(situations: dict[str, Step], *between: Step) -> list[Step]:
    steps: list[Step] = []
    for step in situations.values():
        steps += [FORGET, step, *between]
    return [*steps, *SETTLE, {"do": "metrics"}]


def answers(report: Report) -> list[Step]:
    return [step for step in report["steps"] if step["do"] == "generate"]


def tokens(step: Step) -> list[list[int]]:
    return [request["token_ids"] for request in step["requests"]]


def cached(step: Step) -> list[int]:
    return [request["cached_tokens"] for request in step["requests"]]


def metric(report: Report, name: str) -> float:
    return float(report["steps"][-1]["values"][name])


def by_name(report: Report, names: Iterable[str]) -> dict[str, Step]:
    return dict(zip(names, answers(report), strict=False))  # the last answer is of SETTLE


Bytes = dict[tuple[Any, ...], dict[str, str]]


def written(*lives: tuple[Report, Iterable[str]]) -> Bytes:
    """Of each page that these engines, one after the other, computed and may have saved, by the prompt
    up to its end: a digest for each layer. What was computed first was saved."""
    digests: Bytes = {}
    for report, names in lives:
        for name, step in by_name(report, names).items():
            asked = SITUATIONS[name]["prompts"] if SITUATIONS[name]["pages"] else []
            for request, prompt in zip(step["requests"], asked, strict=False):
                for at in range(len(prompt["prompt_token_ids"]) // BLOCK):
                    page = {layer: pages[at][0] for layer, pages in request["pages"].items()}
                    digests.setdefault(_up_to(prompt, at), page)
    return digests


def _up_to(prompt: Any, page: int) -> tuple[Any, ...]:
    return prompt.get("cache_salt"), *prompt["prompt_token_ids"][: (page + 1) * BLOCK]


def assert_equal_steps(ours: Step, theirs: Step, asked: Step, saved: Bytes) -> None:
    """Tokens are equal; pages that were loaded are byte for byte those that were saved; pages that were
    computed are those of the other engine, but for rounding: a matrix product in float32 may depend
    on how many rows it has, and that on how the prompt was split."""
    assert tokens(ours) == tokens(theirs)
    for mine, other, prompt in zip(
        ours["requests"], theirs["requests"], asked["prompts"], strict=True
    ):
        assert ("pages" in mine) == ("pages" in other) == asked["pages"]
        for layer, pages in mine.get("pages", {}).items():
            assert len(pages) == len(other["pages"][layer])
            for at, ((digest, points, norm), (_, should, _)) in enumerate(
                zip(pages, other["pages"][layer], strict=True)
            ):
                assert abs(points - should) <= 1e-3 * norm, (layer, at)
                if at < mine["cached_tokens"] // BLOCK and saved:
                    assert digest == saved[_up_to(prompt, at)][layer], (layer, at)


def assert_equal(report: Report, baseline: Report, names: Iterable[str], saved: Bytes) -> None:
    """The answers to the situations `names`, of which the baseline has all."""
    wanted = by_name(baseline, SITUATIONS)
    for name, step in by_name(report, names).items():
        assert tokens(step) == tokens(wanted[name]), name
        assert_equal_steps(step, wanted[name], SITUATIONS[name], saved)


def assert_nothing_left(report: Report, stop_limit_s: float = 5.0) -> None:
    left = report["left"]
    assert [t for t in left["threads"] if "objectcache" in t] == []
    assert left["processes"] == [] and left["connections"] == []
    assert report["stop_s"] < stop_limit_s


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


class Bucket:
    """A real S3 server and what an engine needs to use it."""

    def __init__(self, server: Any) -> None:
        self.server = server

    def transfer(self, **extra: Any) -> dict[str, Any]:
        return {
            "kv_connector": "ObjectCacheConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {
                "url": "s3://kvcache/engines",
                "endpoint_url": self.server.endpoint_url,
                "ring_bytes": "64MiB",
            }
            | extra,
        }

    def env(self, hash_seed: int) -> dict[str, str]:
        return dict(self.server.env) | {"PYTHONHASHSEED": str(hash_seed)}


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    with seaweedfs(tmp_path_factory.mktemp("s3"), "kvcache") as server:
        yield Bucket(server)


@pytest.fixture(scope="module")
def baseline(model: Path) -> Report:
    """The engine without a connector: what all others must answer."""
    return run_engines([{"kwargs": {"model": str(model)}, "steps": life(SITUATIONS)}])[0]


@pytest.fixture(scope="module")
def cold(model: Path, bucket: Bucket) -> Report:
    """The first engine with the connector: it computes, and fills the bucket."""
    engine = {
        "kwargs": {"model": str(model), "kv_transfer_config": bucket.transfer()},
        # Chunks are written behind a request: the next one finds them if it comes later.
        "steps": life({name: SITUATIONS[name] for name in FILL}, SETTLE[0]),
    }
    return run_engines([engine], env=bucket.env(hash_seed=1))[0]


@pytest.fixture(scope="module")
def warm(model: Path, bucket: Bucket, cold: Report) -> list[Report]:
    """Another process with another hash seed, after a restart of the S3 server: several engines."""
    bucket.server.stop()
    bucket.server.start()
    kwargs = {"model": str(model), "kv_transfer_config": bucket.transfer()}
    return run_engines(
        [
            {"kwargs": kwargs, "steps": life(SITUATIONS)},
            {"kwargs": kwargs | {"max_num_batched_tokens": 192}, "steps": life(CHUNKED)},
        ],
        env=bucket.env(hash_seed=2),
    )


def test_the_baseline_depends_on_its_kv(baseline: Report) -> None:
    """Different prompts give different tokens: else equality would say nothing."""
    greedy = [
        tuple(t)
        for name, step in zip(SITUATIONS, answers(baseline), strict=False)
        if name.startswith(("shared", "prompt"))
        for t in tokens(step)
    ]
    assert len(set(greedy)) > len(greedy) * 0.9


def test_cold(cold: Report, baseline: Report) -> None:
    assert_equal(cold, baseline, FILL, written((cold, FILL)))
    assert [cached(step) for step in by_name(cold, FILL).values()] == [[0], [512, 0, 0], [0]]
    counted = cold["steps"][-1]["values"]
    assert counted["vllm:objectcache_saved_chunks_total"] == 7 + 2 + 1 + 2, counted
    assert_nothing_left(cold)


def test_warm_in_another_process_with_another_hash_seed(
    warm: list[Report], cold: Report, baseline: Report
) -> None:
    assert_equal(warm[0], baseline, SITUATIONS, written((cold, FILL)))
    seen = {name: cached(step) for name, step in by_name(warm[0], SITUATIONS).items()}
    assert seen["whole"] == [2000 // CHUNK * CHUNK]
    for n in BOUNDARIES:
        assert seen[f"shared up to {n}"] == [n // CHUNK * CHUNK], n
        assert seen[f"prompt of {n}"] == [min(n // CHUNK * CHUNK, (n - 1) // BLOCK * BLOCK)], n
    assert seen["full prompt"] == [4 * CHUNK - BLOCK]
    assert seen["shorter than a chunk"] == [0]
    assert seen["sharing"] == [512, 512, 512, 1792]
    assert seen["not sharing"] == [512, 512, 256]
    assert seen["salted"] == [512]
    assert seen["salted otherwise"] == [0]
    assert metric(warm[0], "vllm:objectcache_missing_chunks_total") == 0
    assert metric(warm[0], "vllm:objectcache_corrupt_chunks_total") == 0
    assert metric(warm[0], "vllm:objectcache_duplicate_chunks_total") == 0
    assert_nothing_left(warm[0])


def test_warm_with_chunked_prefill(warm: list[Report], cold: Report, baseline: Report) -> None:
    saved = written((cold, FILL), (warm[0], SITUATIONS))
    assert_equal(warm[1], baseline, CHUNKED, saved)
    assert cached(by_name(warm[1], CHUNKED)["whole"]) == [1792]
    assert_nothing_left(warm[1])


@pytest.fixture(scope="module")
def others(
    model: Path, bucket: Bucket, warm: list[Report], tmp_path_factory: pytest.TempPathFactory
) -> list[Report]:
    """A third process with a third hash seed: what the next tests look at, in their order."""
    transfer = bucket.transfer()
    on = {"model": str(model), "kv_transfer_config": transfer}
    once = [ask(BASE), *SETTLE, {"do": "metrics"}]
    revised = write_model(tmp_path_factory.mktemp("other"), seed=1)

    # Three requests of 7 blocks that grow to 9, in a cache of 22.
    prompts = [BASE[:890], prompt_tokens(890, seed=21), prompt_tokens(890, seed=22)]
    grow = ask(*prompts, sampling={"max_tokens": 150}, pages=False)
    grows = [FORGET, grow, FORGET, grow, *SETTLE, {"do": "metrics"}]
    tight = {"num_gpu_blocks_override": 23, "max_model_len": 2048}
    preempted = {"kv_transfer_config": bucket.transfer(model_id="preempted")}

    aborts = [
        step
        for after, wait_s in ((0, 0.0), (1, 0.0), (2, 0.0), (3, 0.005), (6, 0.0), (10, 0.01))
        for step in (
            FORGET,
            ask(
                BASE,
                BASE[:600] + tail(1),
                pages=False,
                abort={"request": 0, "steps": after, "wait_s": wait_s},
            ),
        )
    ]
    return run_engines(
        [
            {"kwargs": on | {"block_size": 64}, "steps": once},
            {"kwargs": on | {"model": str(revised)}, "steps": once},
            {"kwargs": on, "steps": once},
            {"kwargs": {"model": str(model)}, "steps": grows},
            {"kwargs": on | tight | preempted, "steps": grows},
            {"kwargs": on | tight, "steps": grows},
            {"kwargs": on, "steps": [*aborts, FORGET, ask(BASE), *SETTLE, {"do": "metrics"}]},
        ],
        env=bucket.env(hash_seed=3),
    )


def test_another_block_size_or_revision_never_hits(others: list[Report]) -> None:
    hits = [metric(report, "vllm:objectcache_hit_tokens_total") for report in others[:3]]
    assert hits == [0, 0, 2000 // CHUNK * CHUNK]


def test_preemption(others: list[Report]) -> None:
    off, first, second = others[3:6]
    for report in (first, second):
        assert [tokens(step) for step in answers(report)] == [tokens(step) for step in answers(off)]
        assert metric(report, "vllm:num_preemptions_total") > 0
        assert metric(report, "vllm:objectcache_hit_tokens_total") > 0
        assert_nothing_left(report)


def test_abort_during_a_load(others: list[Report], cold: Report, baseline: Report) -> None:
    report = others[6]
    whole = dict(zip(SITUATIONS, answers(baseline), strict=False))
    *aborted, last, _ = answers(report)
    for step in aborted:
        assert step["requests"][0]["finish_reason"] == "abort"
        assert tokens(step)[1] == tokens(whole["sharing"])[0]
    assert_equal_steps(last, whole["whole"], SITUATIONS["whole"], written((cold, FILL)))
    assert cached(last) == [1792]
    assert_nothing_left(report)


def test_a_prefix_larger_than_the_ring(model: Path, baseline: Report, tmp_path: Path) -> None:
    """7 chunks through a ring of 4; one is corrupt, or vanishes. The engine goes on, and heals it."""

    def engine(folder: Path, ring: int, steps: list[Step]) -> dict[str, Any]:
        transfer = {
            "kv_connector": "ObjectCacheConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"url": f"file://{folder}", "ring_bytes": ring},
        }
        return {"kwargs": {"model": str(model), "kv_transfer_config": transfer}, "steps": steps}

    whole, corrupt = tmp_path / "whole", tmp_path / "corrupt"
    (first,) = run_engines([engine(whole, 64 << 20, [ask(BASE), *SETTLE])])
    objects = {
        at: next(path for path in whole.rglob("*") if name.hex() in path.name)
        for at, name in enumerate(chunk_hashes(BASE, CHUNK, root_hash()))
    }
    ring = 4 * objects[0].stat().st_size
    shutil.copytree(whole, corrupt)
    spoilt = corrupt / objects[4].relative_to(whole)
    body = spoilt.read_bytes()
    spoilt.unlink()
    spoilt.write_bytes(body[:-1] + bytes([body[-1] ^ 1]))
    vanishes = {"do": "remove", "file": str(objects[3])}  # the engine knows it, and does not ask
    twice = [ask(BASE), *SETTLE, FORGET, ask(BASE), *SETTLE]
    reports = run_engines(
        [
            engine(corrupt, ring, [*twice, {"do": "metrics"}]),
            engine(whole, ring, [ask(BASE), FORGET, vanishes, *twice, {"do": "metrics"}]),
        ]
    )
    wanted = by_name(baseline, SITUATIONS)["whole"]
    pages = answers(first)[0]["requests"][0]["pages"]
    for report, came in zip(reports, ((4, 7), (7, 3, 7)), strict=True):
        asked = [step for step in answers(report) if "pages" in step["requests"][0]]
        for step, chunks in zip(asked, came, strict=True):
            assert_equal_steps(step, wanted, SITUATIONS["whole"], {})
            for layer, loaded in step["requests"][0]["pages"].items():
                assert loaded[: chunks * CHUNK // BLOCK] == pages[layer][: chunks * CHUNK // BLOCK]
        assert metric(report, "vllm:objectcache_hit_tokens_total") == sum(came) * CHUNK
        assert metric(report, "vllm:objectcache_failed_reads_total") == 0
        assert_nothing_left(report)
    assert metric(reports[0], "vllm:objectcache_corrupt_chunks_total") == 1
    assert metric(reports[1], "vllm:objectcache_missing_chunks_total") == 1


def test_under_torch_compile(model: Path, bucket: Bucket) -> None:
    """The layer hooks run as opaque ops inside the compiled model."""
    some = {
        name: SITUATIONS[name]
        for name in ("whole", "shared up to 511", "full prompt", "sharing", "seeded")
    }
    compiled = {"model": str(model), "enforce_eager": False}
    on = compiled | {"kv_transfer_config": bucket.transfer(model_id="compiled")}
    off, first, second = run_engines(
        [{"kwargs": kwargs, "steps": life(some)} for kwargs in (compiled, on, on)],
        env=bucket.env(hash_seed=6),
        timeout_s=600,
    )
    for report in (first, second):
        *ours, _ = answers(report)
        *theirs, _ = answers(off)
        for mine, other, asked in zip(ours, theirs, some.values(), strict=True):
            assert_equal_steps(mine, other, asked, {})
    loaded, computed = (answers(report)[0]["requests"][0]["pages"] for report in (second, first))
    for layer, pages in loaded.items():
        assert pages[:14] == computed[layer][:14]
    assert cached(answers(second)[0]) == [1792]
    assert_nothing_left(second)


def test_three_processes_as_under_serve(
    model: Path, bucket: Bucket, warm: list[Report], baseline: Report
) -> None:
    """Front end, scheduler and worker apart: messages cross processes, and shutdown comes by signal."""
    steps = [ask(BASE, pages=False), *SETTLE, {"do": "metrics"}]
    on = {"model": str(model), "kv_transfer_config": bucket.transfer()}
    off, report = run_engines(
        [{"kwargs": {"model": str(model)}, "steps": steps}, {"kwargs": on, "steps": steps}],
        env=bucket.env(hash_seed=8),
        one_process=False,
    )
    assert tokens(answers(report)[0]) == tokens(answers(baseline)[0])
    assert cached(answers(report)[0]) == [1792]
    # vLLM gives its processes 5 s; on some machines it needs, and takes, more than that itself.
    assert_nothing_left(report, stop_limit_s=max(5.0, off["stop_s"] + 1.0))
