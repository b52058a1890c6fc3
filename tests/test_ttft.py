"""Does the benchmark of TTFT measure what it says, and leave out what it cannot show? Its numbers mean nothing here."""

import json
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from smoke_runs import smoke_run
from ttft_lab import (  # noqa: F401 (pytest looks for the fixtures here)
    CHUNK_BYTES,
    LONG,
    SHORT,
    SYSTEMS,
    ToyPlace,
    ToyProcess,
    ToyProcesses,
    begun,
    filled_fixture,
    setup_fixture,
)

from benchmarks.decodes import summary
from benchmarks.live_engine import EngineGone, EngineProcess, root_cause
from benchmarks.nginx import nginx_absent
from benchmarks.results import Lines, read
from benchmarks.timeline import of, records
from benchmarks.ttft import Run, sessions
from benchmarks.ttft_plan import Plan, cases_of, planned, said, told, written
from benchmarks.ttft_report import write
from benchmarks.ttft_stores import Bucket, Move, is_local, local_place
from benchmarks.ttft_systems import (
    CHUNK_TOKENS,
    Case,
    CpuTier,
    Plain,
    Prompts,
    Reading,
    S3Tier,
    Sample,
    Saving,
    Setup,
    ring_bytes,
)
from objectcache.ring import shares

# ---- what counts


def test_only_a_prefix_from_the_store_counts_as_ours(filled: ToyProcess, setup: Setup) -> None:
    reading = begun(Reading, filled, setup)
    first = reading.sample("objectcache", LONG, 0)
    assert (first.wrong, first.cached_tokens) == ("", 1536)
    assert first.counted["read_bytes"] == 6 * CHUNK_BYTES
    assert "0 of 6000 bytes" in reading.sample("objectcache", LONG, 0).wrong  # it lies in the ring


def test_only_a_prefix_from_the_ring_counts_as_local(filled: ToyProcess, setup: Setup) -> None:
    reading = begun(Reading, filled, setup)
    sample = reading.sample("local", LONG, 0)  # read once before, unasked
    assert (sample.wrong, sample.cached_tokens) == ("", 1536)
    filled.ring.clear()
    assert "6000 bytes came from the store" in reading.sample("local", LONG, 0).wrong


def test_part_of_a_prefix_does_not_count(filled: ToyProcess, setup: Setup) -> None:
    prefix = setup.prompts.prefix(LONG, 1)
    filled.store.discard(tuple(prefix))
    sample = begun(Reading, filled, setup).sample("objectcache", LONG, 1)
    assert "1280 tokens were cached, not 1536" in sample.wrong


def test_a_prefix_that_is_not_saved_whole_is_told(setup: Setup) -> None:
    toy = ToyProcess()
    saving = begun(Saving, toy, setup)
    toy.loses = 1
    assert saving.write(LONG, 0) == "5 of 6 chunks were saved"


def test_saving_is_cold_and_measured_with_saves(setup: Setup) -> None:
    toy = ToyProcess()
    saving = begun(Saving, toy, setup)
    sample = saving.sample("saving", Case(1024, 0.0), 0)
    assert (sample.wrong, sample.cached_tokens, sample.counted["saved_chunks"]) == ("", 0, 4)


def test_the_prefix_of_hbm_is_put_there_again_if_it_was_lost(setup: Setup) -> None:
    toy = ToyProcess()
    plain = begun(Plain, toy, setup)
    assert plain.sample("recompute", Case(2048, 0.0), 0).wrong == ""
    assert plain.sample("hbm", LONG, 0).wrong == ""
    toy.hbm.clear()
    assert plain.sample("hbm", LONG, 1).wrong == ""


def test_an_engine_that_holds_blocks_is_asked_again(filled: ToyProcess, setup: Setup) -> None:
    reading = begun(Reading, filled, setup)
    filled.holds_blocks = 3
    assert reading.sample("objectcache", LONG, 1).wrong == ""
    filled.holds_blocks = 1000
    with pytest.raises(RuntimeError, match="let go"):
        reading.sample("objectcache", SHORT, 1)


def test_no_prompt_comes_twice() -> None:
    prompts = Prompts(1000, "n")
    whole = [prompts.prompt(LONG, 0) for _ in range(2)]
    assert whole[0][:1536] == whole[1][:1536] == prompts.prefix(LONG, 0)
    assert whole[0][1536:] != whole[1][1536:] and len(whole[0]) == 2048
    others = [prompts.prefix(LONG, 1), Prompts(1000, "m").prefix(LONG, 0)]
    assert all(whole[0][:CHUNK_TOKENS] != other[:CHUNK_TOKENS] for other in others)


def test_a_prefix_is_whole_chunks_and_leaves_a_token() -> None:
    assert Case(65536, 0.875).hit_tokens == 57344
    assert Case(1000, 0.5).hit_tokens == 256
    assert Case(1024, 1.0).hit_tokens == 768


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("chunks", [1, 3, 14, 56, 224])
def test_the_ring_stages_the_longest_prefix(chunks: int, processes: int) -> None:
    setup = Setup(Path(), {}, {}, Prompts(9, ""), 131072, [Case((chunks + 1) * 256, 1.0)])
    object_bytes = 256 * 131072 + 4096
    loads, _ = shares(ring_bytes(setup) // object_bytes)
    processes = min(processes, len(loads) // 2)
    each = len(loads) // processes  # and one slot in eight is for streams
    assert processes * (each - max(1, each // 8)) >= chunks


def test_vllms_host_tier_holds_the_prefixes_and_nothing_else(setup: Setup) -> None:
    toy = ToyProcess()
    tier = begun(CpuTier, toy, setup)
    for _ in range(3):
        sample = tier.sample("vllm-cpu", LONG, 0)
        assert (sample.wrong, sample.cached_tokens) == ("", 1536)
    assert {len(chunk) for chunk in toy.host} == set(range(256, 1537, 256))
    assert len(toy.host) == 6 + 2
    toy.host.clear()
    assert tier.sample("vllm-cpu", LONG, 0).wrong == ""  # it was kept there again


def test_vllms_s3_tier_is_read_with_an_empty_host_tier(setup: Setup) -> None:
    toy = ToyProcess()
    tier = begun(S3Tier, toy, setup)
    toy.asked.clear()
    sample = tier.sample("vllm-s3", LONG, 0)
    assert (sample.wrong, sample.cached_tokens) == ("", 1536)
    assert toy.asked == ["forget", "and the connector", "generate", "metrics"]


# ---- how engines are started


def test_our_engine_is_told_the_store_and_what_a_user_adds() -> None:
    setup = Setup(
        Path("m"), {"load_format": "dummy", "x": 1}, {"attempts": 1}, Prompts(9, ""), 8, [LONG]
    )
    kwargs = Reading(setup, ToyPlace("s", "b", "p")).kwargs()
    transfer = kwargs["kv_transfer_config"]
    options = transfer["kv_connector_extra_config"]
    assert (kwargs["x"], transfer["kv_load_failure_policy"]) == (1, "recompute")
    assert (options["url"], options["save"], options["attempts"]) == ("memory://s", False, 1)
    assert options["model_id"]  # random weights have no name of their own
    assert "trace_path" not in options
    setup.traces = Path("/traces")
    for session, name in ((Reading, "s-reads"), (Saving, "s-writes")):
        transfer = session(setup, ToyPlace("s", "b", "p")).transfer()
        path = transfer["kv_connector_extra_config"]["trace_path"]
        assert path == f"/traces/{name}.jsonl"


def test_vllms_tiers_are_tuned(setup: Setup) -> None:
    extra = CpuTier(setup).transfer()["kv_connector_extra_config"]
    assert extra["block_size"] == 256 and extra["cpu_bytes_to_use"] >= setup.prefix_bytes
    extra = S3Tier(setup, ToyPlace("s", "b", "p")).transfer()["kv_connector_extra_config"]
    (tier,) = extra["secondary_tiers"]
    assert (extra["block_size"], tier["io_threads"], tier["prefix"]) == (256, 32, "p/vllm")


def test_vllm_knows_the_settings_of_its_tiers(setup: Setup) -> None:
    config = pytest.importorskip("vllm.v1.kv_offload.tiering.obj.config")
    factory = pytest.importorskip("vllm.v1.kv_offload.factory")
    extra = S3Tier(setup, ToyPlace("s", "b", "p")).transfer()["kv_connector_extra_config"]
    config.ObjStoreConfig(**extra["secondary_tiers"][0]["store_config"])
    assert extra["spec_name"] in factory.OffloadingSpecFactory._registry


# ---- what is measured in which order


def never(system: str, case: Case, store: str) -> bool:
    return False


def test_the_most_telling_session_comes_first_and_nothing_twice() -> None:
    plan = planned(SYSTEMS, [LONG, SHORT], ["nginx", "seaweedfs"], never)
    order = [(kind.__name__, store) for (kind, store), wanted in plan.items() if wanted]
    assert order == [
        ("Reading", "nginx"),
        ("Plain", "none"),
        ("Reading", "seaweedfs"),
        ("CpuTier", "none"),
        ("S3Tier", "nginx"),
        ("S3Tier", "seaweedfs"),
    ]
    wanted = plan[Reading, "nginx"]
    assert wanted[:2] == [("objectcache", LONG), ("local", LONG)] and len(wanted) == 4
    plain = [case for system, case in plan[Plain, "none"] if system == "recompute"]
    assert plain == [Case(2048, 0.0), Case(1024, 0.0)]
    assert list(written(plan)) == [LONG, SHORT]


def test_what_stands_in_the_file_is_not_measured_again() -> None:
    done = {("objectcache", SHORT, "nginx"), ("local", SHORT, "nginx")}
    plan = planned(SYSTEMS, [LONG, SHORT], ["nginx"], lambda *what: what in done)
    assert SHORT not in {case for _, case in plan[Reading, "nginx"]}
    assert list(written(plan)) == [LONG]


def test_what_saving_and_decoding_cost_is_measured_if_asked_for() -> None:
    plan = planned(["saving", "decodes"], [SHORT, LONG], ["nginx"], never)
    assert plan[Saving, "nginx"] == [
        *(("saving", Case(1024, 0.0)), ("saving", Case(2048, 0.0))),
        ("decodes-saving", Case(2048, 0.0)),
    ]
    assert plan[Reading, "nginx"] == [("decodes", LONG)]
    assert plan[Plain, "none"] == [("decodes-hbm", LONG), ("decodes-cold", Case(2048, 0.0))]
    assert list(written(plan)) == [LONG]


def test_cases_are_contexts_or_contexts_with_a_ratio() -> None:
    assert cases_of("", (8, 4), (0.5,)) == [Case(8, 0.5), Case(4, 0.5)]
    assert cases_of("8x0.25,4", (9,), (0.5, 0.75)) == [Case(8, 0.25), Case(4, 0.5), Case(4, 0.75)]


def a_run(tmp_path: Path, toy: ToyProcess, setup: Setup, until: float) -> tuple[Run, ToyProcesses]:
    about = {"benchmark": "ttft", "machine": "m", "commit": "c"}
    processes = ToyProcesses(toy)
    lines = Lines(tmp_path / "ttft-m.jsonl")
    return Run(setup, lines, about, 2, until, processes), processes


def test_all_sessions_leave_their_lines(tmp_path: Path, setup: Setup) -> None:
    places = {"a": ToyPlace("a", "b", "p"), "z": ToyPlace("z", "b", "p")}
    systems = ["objectcache", "local", "recompute", "hbm", "saving"]
    plan: Plan = planned(systems, [LONG, SHORT], ["a", "z"], never)
    run, processes = a_run(tmp_path, ToyProcess(), setup, math.inf)
    sessions(run, setup, plan, places, has_nixl=True)
    assert processes.started == 4
    lines = read(tmp_path / "ttft-m.jsonl")
    seen = {(one["system"], one["case"]["store"]): one["metrics"] for one in lines}
    assert set(seen) == {
        *(("objectcache", "a"), ("local", "a"), ("objectcache", "z"), ("local", "z")),
        *(("recompute", "none"), ("hbm", "none"), ("saving", "a")),
    }
    assert all(metrics["ttft_s"] == 0.5 and metrics["runs"] == 2 for metrics in seen.values())
    assert places["z"].cleared == 1  # its memory is vLLM's tiers' from then on


def test_decodes_have_a_line_beside_prompts_of_each_kind(tmp_path: Path, setup: Setup) -> None:
    run, _ = a_run(tmp_path, ToyProcess(), setup, math.inf)
    plan = planned(["decodes"], [LONG], ["a"], never)
    sessions(run, setup, plan, {"a": ToyPlace("a", "b", "p")}, has_nixl=True)
    found = {one["system"]: one["metrics"] for one in read(tmp_path / "ttft-m.jsonl")}
    assert set(found) == {"decodes", "decodes-hbm", "decodes-saving", "decodes-cold"}
    for name in ("decodes-saving", "decodes-cold"):
        assert (found[name]["after_step_p50_ms"], found[name]["rounds"]) == (8.0, 2)
    assert found["decodes-saving"]["gb_per_s"] > 0.0 == found["decodes-cold"]["gb_per_s"]
    assert "after_step_p50_ms" not in found["decodes"]


def test_decodes_beside_prompts_that_are_not_all_saved_do_not_count(
    tmp_path: Path, setup: Setup
) -> None:
    toy = ToyProcess()
    toy.loses = 1
    run, _ = a_run(tmp_path, toy, setup, math.inf)
    plan = planned(["decodes"], [LONG], ["a"], never)
    sessions(run, setup, plan, {"a": ToyPlace("a", "b", "p")}, has_nixl=True)
    assert "decodes-saving" not in {one["system"] for one in read(tmp_path / "ttft-m.jsonl")}


class Full(ToyPlace):
    """A store that takes nothing."""

    def write(self, key: str, body: bytes) -> None:
        raise OSError("no room")


class OneObject(ToyPlace):
    def names(self) -> list[str]:
        return ["kv/one"]

    def read(self, key: str) -> bytes:
        return b"body"

    def clear(self) -> None:
        pass


def test_prefixes_that_do_not_move_are_not_read_and_nothing_else_suffers(
    tmp_path: Path, setup: Setup
) -> None:
    places = {"a": OneObject("a", "b", "p"), "z": Full("z", "b", "p")}
    plan = planned(["objectcache", "recompute"], [LONG], ["a", "z"], never)
    run, _ = a_run(tmp_path, ToyProcess(), setup, 1e9)
    sessions(run, setup, plan, places, has_nixl=True)
    found = {(one["system"], one["case"]["store"]) for one in read(tmp_path / "ttft-m.jsonl")}
    assert found == {("objectcache", "a"), ("recompute", "none")}


def test_nothing_is_begun_when_time_is_up(tmp_path: Path, setup: Setup) -> None:
    run, processes = a_run(tmp_path, ToyProcess(), setup, -math.inf)
    places = {"a": ToyPlace("a", "b", "p")}
    plan = planned(SYSTEMS[:4], [LONG], ["a"], never)
    sessions(run, setup, plan, places, has_nixl=True)
    assert processes.started == 0 and not (tmp_path / "ttft-m.jsonl").exists()


class NoEngine(ToyProcess):
    def start(self, kwargs: dict[str, Any], limit_s: float) -> float:
        raise EngineGone("there is no /opt/some/where/gpu here")


def test_an_engine_that_does_not_start_is_left_out_with_the_reason(
    tmp_path: Path, setup: Setup
) -> None:
    run, _ = a_run(tmp_path, NoEngine(), setup, math.inf)
    run.session(CpuTier(setup), [("vllm-cpu", LONG)])
    (line,) = read(tmp_path / "ttft-m.jsonl")
    assert (line["metrics"], line["skipped"]) == ({}, "there is no ... here")


def test_runs_that_do_not_count_are_no_part_of_the_median() -> None:
    good = [Sample(t, 512, {"read_bytes": 2e9}) for t in (0.2, 0.4, 1.0)]
    found = said([*good, Sample(9.0, 0, {}, "wrong")], SHORT, "objectcache")["metrics"]
    assert (found["ttft_s"], found["ttft_s_runs"], found["hit_tokens"]) == (
        0.4,
        [0.2, 0.4, 1.0],
        512,
    )
    assert (found["gb_per_s"], found["runs"], found["runs_left_out"]) == (5.0, 3, 1)
    assert said([Sample(9.0, 0, {}, "wrong")], SHORT, "hbm") == {"metrics": {}, "skipped": "wrong"}


def test_steps_beside_prefixes_are_compared_with_those_alone() -> None:
    one = {"alone_ms": [10.0] * 99, "beside_ms": [11.0] * 99, "admitting_ms": [50.0]}
    found = summary([one, one])
    assert found["p50_worse_percent"] == pytest.approx(10.0)
    assert (found["admitting_step_max_ms"], found["prefixes"], found["steps"]) == (50.0, 2, 198)
    assert found["beside_step_p99_ms"] == 11.0 and found["all_step_p99_ms"] > 11.0


# ---- stores and processes


def test_stores_of_a_run_have_names() -> None:
    assert all(is_local(name) for name in ("nginx", "seaweedfs", "wire-100"))
    assert not any(is_local(name) for name in ("minio", "wire-", "wire-x", "wire-0", "100"))


def test_all_that_comes_by_a_wire_keeps_its_rate(tmp_path: Path) -> None:
    """Over a second, with as many connections as there are objects."""
    tmp_path.chmod(0o755)
    with local_place("wire-1", tmp_path) as place, ThreadPoolExecutor(8) as threads:
        body = os.urandom(8 << 20)
        for number in range(8):
            place.write(f"kv/{number}", body)
        began = time.monotonic()
        keys = [f"kv/{number}" for number in range(8)] * 2
        read = list(threads.map(partial(Bucket.read, place), keys))
        assert all(one == body for one in read)
        assert time.monotonic() - began > 0.8 * 16 * len(body) / 125e6


@pytest.mark.parametrize("name", ["nginx", "seaweedfs"])
def test_objects_move_from_one_store_to_the_other(name: str, tmp_path: Path) -> None:
    if nginx_absent():
        pytest.skip(nginx_absent())
    other = "seaweedfs" if name == "nginx" else "nginx"
    tmp_path.chmod(0o755)
    with (
        local_place(name, tmp_path / "a") as first,
        local_place(other, tmp_path / "b") as second,
    ):
        keys = [f"kv/space/{number}" for number in range(3)]
        for key in keys:
            first.write(key, key.encode())
        assert sorted(first.names()) == keys
        assert Move(first, second).wait(60.0) == ""
        assert first.names() == [] and sorted(second.names()) == keys
        assert second.read(keys[1]) == keys[1].encode()
        second.give_room()
        assert second.names() == []
        second.write(keys[0], b"again")
        assert second.read(keys[0]) == b"again"


def test_a_process_that_dies_or_hangs_is_gone(tmp_path: Path) -> None:
    process = EngineProcess({}, tmp_path / "log")
    try:
        with pytest.raises(EngineGone, match="no engine was started"):
            process.ask({"do": "stop"}, 60.0)
        with pytest.raises(EngineGone, match="in 0 s"):
            process.ask({"do": "stop"}, 0.0)
    finally:
        process.end()
    with pytest.raises(EngineGone):
        process.ask({"do": "stop"}, 5.0)


def test_the_reason_of_a_failed_start_is_the_workers_own() -> None:
    log = """(EngineCore pid=7) ERROR 11-24 [core.py:1]     raise Exception(
(EngineCore pid=7) ERROR 11-24 [core.py:1] Exception: only on GPUs
RuntimeError: Engine core initialization failed. See root cause above."""
    assert root_cause("told", log) == "Exception: only on GPUs"
    assert root_cause("told", "nothing of the kind") == "told"


# ---- the whole, with real engines


@pytest.fixture(name="folder", scope="module")
def folder_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the results and traces of a whole run."""
    folder = tmp_path_factory.mktemp("results")
    smoke(folder, "--rounds", "2", "--trace", str(folder / "traces"))
    return folder


@pytest.fixture(name="lines")
def lines_fixture(folder: Path) -> list[dict[str, Any]]:
    return read(folder / "ttft-smoke.jsonl")


def smoke(folder: Path, *options: str) -> str:
    out, log = str(folder / "ttft-smoke.jsonl"), str(folder / "engine.log")
    places = ("--out", out, "--folder", str(folder), "--keep-log", log)
    return smoke_run("ttft", *places, *options, limit_s=240)


def test_real_engines_are_measured_in_every_system(lines: list[dict[str, Any]]) -> None:
    case = Case(1536, 0.5)
    expected = {
        ("recompute", "none"): (told(Case(1536, 0.0), "none"), 0),
        ("hbm", "none"): (told(case, "none"), 768),
        ("local", "seaweedfs"): (told(case, "seaweedfs"), 768),
        ("objectcache", "seaweedfs"): (told(case, "seaweedfs"), 768),
    }
    found = {
        (one["system"], one["case"]["store"]): one
        for one in lines
        if one["system"] != "environment"
    }
    assert set(found) == set(expected)
    for key, (case_told, hit_tokens) in expected.items():
        metrics = found[key]["metrics"]
        assert found[key]["case"] == case_told and "skipped" not in found[key]
        assert (metrics["hit_tokens"], metrics["runs"]) == (hit_tokens, 2)
        assert "runs_left_out" not in metrics
        assert 0 < min(metrics["ttft_s_runs"]) <= metrics["ttft_s"] <= max(metrics["ttft_s_runs"])
    assert found["local", "seaweedfs"]["metrics"]["read_bytes"] == 0
    assert found["objectcache", "seaweedfs"]["metrics"]["read_bytes"] >= 3 * 256 * 2048


def test_real_engines_leave_their_traces(folder: Path) -> None:
    (path,) = (folder / "traces").glob("*-reads.jsonl")
    with path.open() as file:
        traces = records(file)
    loaded = [about["loaded"] for record in traces for _, about in of(record, "admitted")]
    assert loaded.count(768) == 4  # two rounds of objectcache and local
    for record in traces:
        assert of(record, "first token") and of(record, "ended")


def test_a_second_run_measures_nothing(lines: list[dict[str, Any]], tmp_path: Path) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "ttft-smoke.jsonl").write_text(text)
    assert "nothing is left to measure" in smoke(tmp_path)


def test_the_report_shows_every_system(lines: list[dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "ttft-smoke.jsonl").write_text(text)
    write(tmp_path)
    shown = (tmp_path / "ttft.md").read_text()
    for row in ("| recompute |", "| hbm |", "| local, seaweedfs |", "| objectcache, seaweedfs |"):
        assert row in shown
    assert "| seaweedfs: local |" in shown and "ms)" in shown
    assert (tmp_path / "ttft-smoke.svg").stat().st_size > 1000
