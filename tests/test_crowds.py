"""Does the benchmark of admission ask and count what it says? Its numbers mean nothing here. The ways themselves: test_timely.py."""

import json
from pathlib import Path
from typing import Any

import pytest
from smoke_runs import smoke_run
from ttft_lab import ToyPlace, ToyProcess, a_setup

from benchmarks.admission import OPTIONS, Crowded, judged
from benchmarks.admission_plan import (
    MIX,
    RATIOS,
    SETS,
    SYSTEMS,
    Run,
    Scene,
    asked,
    distinct_hit_tokens,
    pool,
    said,
    scenes_of,
    told,
    turns,
)
from benchmarks.admission_report import compared, write
from benchmarks.results import read
from benchmarks.ttft_systems import Case
from objectcache.config import parse

LAW = {"p50_ms": 27.0, "p99_ms": 114.0, "bytes_per_s": 85e6}
SLOW, FAST = Scene(4, 10.0), Scene(16, 100.0)


# ---- what is asked


def test_the_list_is_mixed_and_the_same_for_the_same_seed() -> None:
    cases = pool(MIX, RATIOS)
    assert cases == pool(MIX, RATIOS) != pool(MIX, RATIOS, seed=1)
    contexts = [case.context_tokens for case in cases]
    assert {context: contexts.count(context) for context in MIX} == MIX
    assert {case.hit_ratio for case in cases} >= {0.0, 0.25, 0.5, 0.75, 0.875, 1.0}
    for seed in range(20):  # both sets fit a machine, and the longest prefix a ring
        cases = pool(MIX, RATIOS, seed)
        assert SETS * sum(case.hit_tokens for case in cases) * (128 << 10) < 50 << 30
        assert max(case.hit_tokens for case in cases) <= 49152


def test_more_users_than_prompts_share_prefixes() -> None:
    cases = [Case(1024, 0.5), Case(2048, 0.75), Case(512, 0.0)]
    assert asked(cases, 2) == [0, 1, 2] and asked(cases, 5) == [0, 1, 2, 0, 1]
    assert distinct_hit_tokens(cases, asked(cases, 5)) == 512 + 1536


def test_a_round_has_all_systems_of_a_scene_one_after_the_other() -> None:
    order = list(turns([SLOW, FAST], SYSTEMS, 2, lambda system, scene: False))
    first, second = ([one for one in order if one[0] == number] for number in (0, 1))
    assert [system for _, scene, system in first if scene.users == 4] == list(SYSTEMS)
    assert next(system for _, scene, system in second if scene.users == 4) == "at-once"
    assert {(scene, system) for _, scene, system in first} == {
        (scene, system) for _, scene, system in second
    }
    two = list(turns([SLOW, Scene(4, 25.0)], SYSTEMS, 1, lambda system, scene: False))
    for name in ("recompute", "hbm"):  # the wire is nothing to them
        assert [scene for _, scene, system in two if system == name] == [Scene(4, 0.0)]


def test_what_has_a_line_is_not_measured_again() -> None:
    order = list(turns([SLOW], SYSTEMS, 3, lambda system, scene: system != "at-once"))
    assert [system for _, _, system in order] == ["at-once"] * 3
    assert not list(turns([SLOW, FAST], SYSTEMS, 3, lambda system, scene: True))


def test_scenes_have_names() -> None:
    assert scenes_of("16x25,4x0.5", [SLOW]) == [Scene(16, 25.0), Scene(4, 0.5)]
    assert scenes_of("", [SLOW]) == [SLOW] and FAST.wire_bytes_per_s == 12.5e9
    assert told(SLOW, LAW)["connection_mb_per_s"] == 85.0
    assert told(Scene(4, 0.0), LAW) == {"concurrent": 4, "wire_gbps": 0.0, "store": "none"}


# ---- what counts


def an_answer(number: int, cached: int, how: str = "length", ttft_s: float = 0.5) -> dict[str, Any]:
    times = {"ttft_s": ttft_s, "tpot_ms": 10.0, "gaps_ms": [10.0, 10.0]}
    return {"number": number, "finish_reason": how, "cached_tokens": cached} | times


def test_a_run_counts_only_with_all_answers_and_their_prefixes() -> None:
    answers = [an_answer(1, 256), an_answer(0, 512)]  # as they were answered
    run = judged({"requests": answers, "seconds": 2.0}, [512, 256], 3)
    assert (run.wrong, run.hit_tokens, len(run.gaps_ms)) == ("", 768, 4)
    assert (
        "512 tokens were cached, not 0"
        in judged({"requests": answers, "seconds": 2.0}, [0, 256], 3).wrong
    )
    lost = [an_answer(0, 512), an_answer(1, 256, "error")]
    assert (
        "request 1 of 2 was not answered: error"
        in judged({"requests": lost, "seconds": 2.0}, [512, 256], 3).wrong
    )
    assert "never asked" in judged({"requests": answers, "seconds": 2.0}, [512, 256, 0], 3).wrong


def test_percentiles_are_over_the_requests_of_all_runs_that_count() -> None:
    good = [
        Run([0.1 * n + at for n in range(50)], [10.0] * 50, [9.0, 30.0], 2.0 + at, 512, 4e9)
        for at in (0, 1)
    ]
    metrics = said([*good, Run(wrong="no")], 3e9)["metrics"]
    assert metrics["ttft_p50_s"] == pytest.approx(2.95) and metrics["ttft_p99_s"] > 5.7
    assert (metrics["tpot_p99_ms"], metrics["itl_max_ms"], metrics["runs"]) == (10.0, 30.0, 2)
    assert (metrics["runs_left_out"], metrics["why_left_out"]) == (1, "no")
    assert metrics["server_gb_per_s"] == 3.0 and metrics["gb_per_s"] == pytest.approx(1.667)
    assert said([Run(wrong="no")], 0.0) == {"metrics": {}, "skipped": "no"}


class ToyCrowd(ToyProcess):
    """Answers many at once, each as the toy answers one."""

    users = 0

    def ask(self, step: dict[str, Any], limit_s: float) -> dict[str, Any]:
        if step["do"] != "crowd":
            return super().ask(step, limit_s)
        self.users, requests = step["users"], step["requests"]
        self.seen = requests
        answers = []
        for number, request in enumerate(requests):
            if request.get("skips_cache"):
                answers.append(an_answer(number, 0))
                continue
            saves, self.saves = self.saves, request["params"].get("objectcache.save", True)
            done = self.compute(request["prompt_token_ids"], 0)["requests"][0]
            self.saves = saves
            answers.append(an_answer(number, done["cached_tokens"]))
        return {"requests": answers, "seconds": 1.0}


CASES = [Case(1024, 0.5), Case(2048, 0.75), Case(512, 0.0)]


@pytest.fixture(name="toy")
def toy_fixture() -> ToyCrowd:
    return ToyCrowd()


@pytest.fixture(name="session")
def session_fixture(toy: ToyCrowd) -> Crowded:
    setup = a_setup()
    session = Crowded(setup, ToyPlace("s", "b", "p"))
    toy.start(session.kwargs(), 1.0)
    session.begin(toy, CASES, 1e12)  # type: ignore[arg-type]
    for which in range(SETS):
        for number, case in enumerate(CASES[:2]):
            assert session.write(case, which * 1000 + number) == ""
    toy.ring.clear()
    return session


def test_each_request_asks_for_its_system_and_is_not_saved(toy: ToyCrowd, session: Crowded) -> None:
    for system in SYSTEMS[:3]:
        toy.ring.clear()
        run = session.run(system, CASES, 2, 0, 3)
        assert (run.wrong, run.hit_tokens, toy.users) == ("", 2048, 2)
        wants = [one["params"]["objectcache.admission"] for one in toy.seen]
        assert wants == [system] * 3
        assert all(one["params"]["objectcache.save"] is False for one in toy.seen)
    tails = {tuple(one["prompt_token_ids"][-256:]) for one in toy.seen}
    session.run("recompute", CASES, 2, 0, 3)
    assert all(one["skips_cache"] for one in toy.seen)
    assert not tails & {tuple(one["prompt_token_ids"][-256:]) for one in toy.seen}


def test_prefixes_in_vllms_own_cache_are_there_before_anybody_asks(
    toy: ToyCrowd, session: Crowded
) -> None:
    run = session.run("hbm", CASES, 2, 0, 3)
    assert (run.wrong, run.hit_tokens, run.read_bytes) == ("", 2048, 0.0)
    assert all("objectcache.admission" not in one["params"] for one in toy.seen)
    assert session.run("staged", CASES, 2, 1, 3).wrong == ""  # it left the other set alone


def test_what_lies_in_host_memory_does_not_count(toy: ToyCrowd, session: Crowded) -> None:
    assert session.run("staged", CASES, 2, 0, 3).wrong == ""
    assert "bytes came from the store, not" in session.run("staged", CASES, 2, 0, 3).wrong
    assert session.run("staged", CASES, 2, 1, 3).wrong == ""  # the other set


def test_a_prefix_that_is_gone_does_not_count(toy: ToyCrowd, session: Crowded) -> None:
    toy.store = {chunk for chunk in toy.store if len(chunk) < 1536}
    assert "1280 tokens were cached, not 1536" in session.run("staged", CASES, 2, 0, 3).wrong
    assert session.run("recompute", CASES, 2, 0, 3).wrong == ""


def test_the_engine_admits_early_and_its_timeouts_are_long(session: Crowded) -> None:
    session.setup.options = OPTIONS
    transfer = session.kwargs()["kv_transfer_config"]
    options = transfer["kv_connector_extra_config"]
    assert transfer["kv_load_failure_policy"] == "fail" and options["admission"] == "at-once"
    assert options["save"] and options["known_ttl_s"] == 0
    parse({"url": "memory://x", **OPTIONS})  # the real engine knows them


# ---- the whole, with a real engine


@pytest.fixture(name="folder", scope="module")
def folder_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    smoke(folder)
    return folder


def smoke(folder: Path) -> str:
    out, log = str(folder / "admission-smoke.jsonl"), str(folder / "engine.log")
    options = ("--rounds", "2", "--out", out, "--folder", str(folder), "--keep-log", log)
    # The library path tells of each layer, however small it is: so that some are waited for.
    options += ("--options", json.dumps({"transport": "aiobotocore"}))
    return smoke_run("admission", *options, limit_s=180)


def test_a_real_engine_is_measured_in_every_system(folder: Path) -> None:
    lines = read(folder / "admission-smoke.jsonl")
    found = {one["system"]: one for one in lines}
    assert set(found) == {"environment", *SYSTEMS}
    for system in SYSTEMS:
        metrics = found[system]["metrics"]
        assert (metrics["runs"], metrics["requests"]) == (2, 8), found[system]
        assert 0 < metrics["ttft_p50_s"] <= metrics["ttft_p99_s"]
        assert 0 < metrics["itl_p50_ms"] <= metrics["itl_p99_ms"] <= metrics["itl_max_ms"]
        loads = system not in ("recompute", "hbm")
        assert (metrics["hit_tokens"] > 0) == (system != "recompute")
        assert (metrics["read_bytes"] > 0) == loads
        assert ("server_gb_per_s" in metrics) == loads
    assert found["staged"]["metrics"]["timely_prompts"] == 0
    assert found["at-once"]["metrics"]["timely_prompts"] > 0


def test_a_finished_run_has_nothing_left_and_is_shown(folder: Path, tmp_path: Path) -> None:
    assert "nothing is left to measure" in smoke(folder)
    pytest.importorskip("matplotlib")
    lines = read(folder / "admission-smoke.jsonl")
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "admission-smoke.jsonl").write_text(text)
    write(tmp_path)
    shown = (tmp_path / "admission.md").read_text()
    assert "| recompute |" in shown and "| just-in-time, 0.4 |" in shown
    assert (tmp_path / "admission-smoke.svg").stat().st_size > 1000


def test_just_in_time_is_compared_with_the_better_of_the_others() -> None:
    def line(system: str, wire: float, ttft_s: float, tpot_ms: float) -> dict[str, Any]:
        metrics = dict.fromkeys(("ttft_p50_s", "ttft_p99_s", "ttft_mean_s"), ttft_s)
        metrics |= dict.fromkeys(("tpot_p50_ms", "tpot_p99_ms"), tpot_ms)
        return {"system": system, "case": {"concurrent": 4, "wire_gbps": wire}, "metrics": metrics}

    lines = [line("staged", 10.0, 2.0, 1.0), line("at-once", 10.0, 4.0, 1.0)]
    lines += [line("just-in-time", 10.0, 2.2, 9.0), line("recompute", 0.0, 9.0, 10.0)]
    found = compared(lines, 4, 10.0)
    assert found["ttft_p50_s"] == pytest.approx(10.0) and found[
        "tpot_p99_ms recompute"
    ] == pytest.approx(-10)
    assert "ttft_p50_s" not in compared(lines[1:], 4, 10.0)
