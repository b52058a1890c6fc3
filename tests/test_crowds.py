"""Does the benchmark of admission ask and count what it says? Its numbers mean nothing here. The ways themselves: test_timely.py."""

import json
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from smoke_runs import smoke_run
from ttft_lab import ToyPlace, ToyProcess, a_setup

from benchmarks.admission import OPTIONS, Crowded, judged
from benchmarks.admission_plan import (
    ARRIVALS,
    BURSTS,
    MIX,
    NEXT,
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
from benchmarks.admission_report import compared, metrics_of, paired, write
from benchmarks.crowd import crowd, due
from benchmarks.results import read
from benchmarks.ttft_systems import Case
from objectcache.config import parse

LAW = {"p50_ms": 27.0, "p99_ms": 114.0, "bytes_per_s": 85e6}
ADD_S = 0.01
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
    for users, numbers in ((2, [0, 1, 2]), (5, [0, 1, 2, 0, 1])):
        assert asked(cases, Scene(users, 10.0, NEXT)) == numbers
    assert distinct_hit_tokens(cases, asked(cases, Scene(5, 10.0))) == 512 + 1536


@pytest.mark.parametrize(("users", "bursts"), [(1, 24), (4, 6), (5, 5), (16, 2), (24, 1), (64, 1)])
def test_every_burst_is_full_and_no_prefix_comes_in_two(users: int, bursts: int) -> None:
    cases = pool(MIX, RATIOS)
    numbers = asked(cases, Scene(users, 10.0))
    assert len(numbers) == users * bursts and set(numbers) == set(range(24))
    assert numbers == asked(cases, Scene(users, 0.0))  # for those that load nothing, too
    each = [set(numbers[at : at + users]) for at in range(0, len(numbers), users)]
    assert sum(len(burst) for burst in each) == 24


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
    both = list(
        turns([SLOW, replace(SLOW, arrivals=NEXT)], SYSTEMS, 1, lambda system, scene: False)
    )
    assert len(both) == len(set(both)) == 2 * len(SYSTEMS)
    assert {scene.arrivals for _, scene, system in both if system == "hbm"} == set(ARRIVALS)


def test_what_has_a_line_is_not_measured_again() -> None:
    order = list(turns([SLOW], SYSTEMS, 3, lambda system, scene: system != "at-once"))
    assert [system for _, _, system in order] == ["at-once"] * 3
    assert not list(turns([SLOW, FAST], SYSTEMS, 3, lambda system, scene: True))
    scenes = scenes_of("4x10", [], ARRIVALS)
    order = list(turns(scenes, SYSTEMS, 1, lambda system, scene: scene.arrivals == NEXT))
    assert [scene.arrivals for _, scene, _ in order] == [BURSTS] * len(SYSTEMS)


def test_scenes_have_names() -> None:
    assert scenes_of("16x25,4x0.5", [SLOW], [BURSTS]) == [Scene(16, 25.0), Scene(4, 0.5)]
    assert scenes_of("", [SLOW], [BURSTS]) == [SLOW] and FAST.wire_bytes_per_s == 12.5e9
    assert scenes_of("", [SLOW], ARRIVALS) == [SLOW, Scene(4, 10.0, NEXT)]
    assert told(SLOW, LAW)["connection_mb_per_s"] == 85.0
    nothing = {"concurrent": 4, "wire_gbps": 0.0, "store": "none"}
    for kind in ARRIVALS:
        assert told(Scene(4, 0.0, kind), LAW) == nothing | {"arrivals": kind}


class Engine:
    """Answers each request with two tokens: the longer its prompt, the more steps it takes."""

    def __init__(self) -> None:
        self.llm, self.llm_engine, self.requests_made = self, self, 0
        self.live: dict[str, list[Any]] = {}
        self.beside: list[int] = []  # for each request, how many were there when it came

    def add_request(self, name: str, prompt: dict[str, Any], sampling: Any) -> str:
        time.sleep(ADD_S)
        self.beside.append(len(self.live))
        self.live[name] = [len(prompt["prompt_token_ids"]), 0]
        return name

    def step(self) -> list[Any]:
        outputs = []
        for name, one in list(self.live.items()):
            one[0] -= 1
            if one[0] > 1:
                continue
            one[1] += 1
            finished = one[0] <= 0
            if finished:
                del self.live[name]
            answer = SimpleNamespace(token_ids=[7] * one[1], finish_reason="length" * finished)
            said = {"request_id": name, "outputs": [answer], "finished": finished}
            outputs.append(SimpleNamespace(**said, num_cached_tokens=0))
        return outputs

    def has_unfinished_requests(self) -> bool:
        return bool(self.live)

    def abort_request(self, names: Iterable[str], internal: bool) -> None:
        for name in names:
            del self.live[name]


def answered(
    engine: Engine, bursts: bool, counts: Iterable[int] = (2, 5, 9, 2, 3, 4), limit_s: float = 60.0
) -> list[dict[str, Any]]:
    requests = [{"prompt_token_ids": [1] * count} for count in counts]
    done = crowd(engine, requests, 3, 2, limit_s, bursts)
    answers: list[dict[str, Any]] = done["requests"]
    return answers


def test_a_burst_comes_when_all_of_the_one_before_are_answered() -> None:
    engine = Engine()
    answers = answered(engine, bursts=True)
    assert [one["finish_reason"] for one in answers] == ["length"] * 6
    assert engine.beside == [0, 1, 2, 0, 1, 2]
    engine = Engine()
    assert len(answered(engine, bursts=False)) == 6
    assert engine.beside == [0, 1, 2, 2, 2, 2]


def test_all_of_a_burst_count_from_the_same_moment() -> None:
    """Else who is told to vLLM last would seem to have waited less than those before."""
    alike = (2, 2, 2)  # all have their first token in the first step
    one, two, three = (each["ttft_s"] for each in answered(Engine(), True, alike))
    assert one == two == three >= 3 * ADD_S
    one, two, three = (each["ttft_s"] for each in answered(Engine(), False, alike))
    assert one > two > three


def test_after_the_limit_no_burst_comes() -> None:
    engine = Engine()
    answers = answered(engine, bursts=True, limit_s=0.0)
    assert len(answers) == 3 and not engine.live
    assert "unanswered" in {one["finish_reason"] for one in answers}


def test_who_asks_now() -> None:
    assert [due(9, live, 4, False) for live in range(6)] == [4, 3, 2, 1, 0, 0]
    assert [due(9, live, 4, True) for live in range(6)] == [4, 0, 0, 0, 0, 0]
    assert due(2, 0, 4, True) == due(2, 0, 4, False) == 2 and due(0, 0, 4, True) == 0


# ---- what counts


def an_answer(number: int, cached: int, how: str = "length", ttft_s: float = 0.5) -> dict[str, Any]:
    times = {"ttft_s": ttft_s, "tpot_ms": 10.0, "gaps_ms": [10.0, 10.0]}
    return {"number": number, "finish_reason": how, "cached_tokens": cached} | times


def test_a_run_counts_only_with_all_answers_and_their_prefixes() -> None:
    answers = [an_answer(1, 256, ttft_s=0.2), an_answer(0, 512)]  # as they were answered
    run = judged({"requests": answers, "seconds": 2.0}, [512, 256], 3)
    assert (run.wrong, run.hit_tokens, len(run.gaps_ms)) == ("", 768, 4)
    assert run.ttft_s == [0.5, 0.2], "in the order of the list"
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
    assert metrics["ttft_s_runs"] == [[round(0.1 * n + at, 4) for n in range(50)] for at in (0, 1)]
    assert (metrics["tpot_p99_ms"], metrics["itl_max_ms"], metrics["runs"]) == (10.0, 30.0, 2)
    assert (metrics["runs_left_out"], metrics["why_left_out"]) == (1, "no")
    assert metrics["server_gb_per_s"] == 3.0 and metrics["gb_per_s"] == pytest.approx(1.667)
    assert said([Run(wrong="no")], 0.0) == {"metrics": {}, "skipped": "no"}


class ToyCrowd(ToyProcess):
    """Answers many at once, each as the toy answers one."""

    users, bursts = 0, True

    def ask(self, step: dict[str, Any], limit_s: float) -> dict[str, Any]:
        if step["do"] != "crowd":
            return super().ask(step, limit_s)
        self.users, self.bursts, requests = step["users"], step["bursts"], step["requests"]
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
TWO = Scene(2, 10.0, NEXT)


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
        run = session.run(system, CASES, TWO, 0, 3)
        assert (run.wrong, run.hit_tokens, toy.users) == ("", 2048, 2)
        wants = [one["params"]["objectcache.admission"] for one in toy.seen]
        assert wants == [system] * 3
        assert all(one["params"]["objectcache.save"] is False for one in toy.seen)
        assert not toy.bursts
    tails = {tuple(one["prompt_token_ids"][-256:]) for one in toy.seen}
    session.run("recompute", CASES, TWO, 0, 3)
    assert all(one["skips_cache"] for one in toy.seen)
    assert not tails & {tuple(one["prompt_token_ids"][-256:]) for one in toy.seen}


def test_bursts_are_full_and_load_each_prefix_once(toy: ToyCrowd, session: Crowded) -> None:
    run = session.run("just-in-time", CASES, replace(TWO, arrivals=BURSTS), 0, 3)
    assert (run.wrong, run.hit_tokens, toy.users, toy.bursts) == ("", 2048, 2, True)
    assert len(run.ttft_s) == len(toy.seen) == 4


def test_prefixes_in_vllms_own_cache_are_there_before_anybody_asks(
    toy: ToyCrowd, session: Crowded
) -> None:
    run = session.run("hbm", CASES, TWO, 0, 3)
    assert (run.wrong, run.hit_tokens, run.read_bytes) == ("", 2048, 0.0)
    assert all("objectcache.admission" not in one["params"] for one in toy.seen)
    assert session.run("staged", CASES, TWO, 1, 3).wrong == ""  # it left the other set alone


def test_what_lies_in_host_memory_does_not_count(toy: ToyCrowd, session: Crowded) -> None:
    assert session.run("staged", CASES, TWO, 0, 3).wrong == ""
    assert "bytes came from the store, not" in session.run("staged", CASES, TWO, 0, 3).wrong
    assert session.run("staged", CASES, TWO, 1, 3).wrong == ""  # the other set


def test_a_prefix_that_is_gone_does_not_count(toy: ToyCrowd, session: Crowded) -> None:
    toy.store = {chunk for chunk in toy.store if len(chunk) < 1536}
    assert "1280 tokens were cached, not 1536" in session.run("staged", CASES, TWO, 0, 3).wrong
    assert session.run("recompute", CASES, TWO, 0, 3).wrong == ""


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
    options += ("--options", json.dumps({"transport": "aiobotocore"}), "--arrivals", "bursts,next")
    return smoke_run("admission", *options, limit_s=180)


def test_a_real_engine_is_measured_in_every_system(folder: Path) -> None:
    lines = read(folder / "admission-smoke.jsonl")
    assert [one["system"] for one in lines].count("environment") == 1
    assert len(lines) == 1 + 2 * len(SYSTEMS)
    for kind in ARRIVALS:
        found = {one["system"]: one for one in lines if one["case"].get("arrivals") == kind}
        assert set(found) == set(SYSTEMS)
        is_measured(found)


def is_measured(found: dict[str, dict[str, Any]]) -> None:
    for system in SYSTEMS:
        metrics = found[system]["metrics"]
        assert (metrics["runs"], metrics["requests"]) == (2, 8), found[system]
        assert [len(run) for run in metrics["ttft_s_runs"]] == [8, 8]
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
    parts = shown.split("### Arrivals: ")[1:]
    assert [part.split()[0] for part in parts] == list(ARRIVALS)
    for part in parts:
        assert "| recompute |" in part and "| just-in-time, 0.4 |" in part
        assert "| 4 users, 0.4 Gbit/s |" in part
        assert ("| by request |" in part) == part.startswith(BURSTS)
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


def test_each_request_is_compared_with_the_better_of_the_others_for_it() -> None:
    def runs(*each: list[float]) -> dict[str, Any]:
        return {"ttft_s_runs": list(each)}

    staged, at_once = runs([1.0, 4.0, 1.0], [3.0, 4.0, 1.0]), runs([4.0, 1.0, 5.0])
    mine = runs([2.0, 1.0, 4.0], [3.0, 2.0, 4.0])  # 2.5 by 2, 1.5 by 1, 4 by 1
    assert paired(mine, [staged, at_once]) == pytest.approx(50.0)
    assert paired(mine, [staged, {}]) is None, "an older line"
    assert paired(mine, [staged, runs([4.0, 1.0])]) is None, "other requests"


def test_both_ways_of_arrival_have_a_part_and_lines_that_tell_none_are_next(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")

    def line(system: str, ttft_s: float, **more: str) -> dict[str, Any]:
        case = {"concurrent": 4, "wire_gbps": 0.0 if system == "recompute" else 10.0} | more
        names = [f"{name}_{part}" for name in ("ttft", "tpot", "itl") for part in ("p50", "p99")]
        metrics = {
            f"{name}_{'s' if name[0] == 't' and name[1] == 't' else 'ms'}": ttft_s for name in names
        }
        metrics |= {"ttft_mean_s": ttft_s, "seconds": 9.0, "runs": 1, "ttft_s_runs": [[ttft_s]]}
        about = {"benchmark": "admission", "machine": "m", "commit": "c"}
        return about | {"system": system, "case": case, "metrics": metrics}

    loads = ("staged", "at-once", "just-in-time")
    old = [line(system, 2.0) for system in (*loads, "recompute")]
    new = [line(system, 1.0 + at, arrivals=BURSTS) for at, system in enumerate(loads)]
    text = "".join(json.dumps(one) + "\n" for one in [*old, *new])
    (tmp_path / "admission-m.jsonl").write_text(text)
    write(tmp_path)
    bursts, following = (tmp_path / "admission.md").read_text().split("### Arrivals: ")[1:]
    assert bursts.startswith(BURSTS) and following.startswith(NEXT)
    assert "| 4 users, 10 Gbit/s | +200.0 | +200.0 | +200.0 | +200.0 |" in bursts
    assert "| 4 users, 10 Gbit/s | +0.0 | +0.0 | +0.0 |  |  | +0.0 | +0.0 |" in following
    again = line("staged", 3.0, arrivals=NEXT)
    assert metrics_of([*old, again], "staged", 4, 10.0) == again["metrics"], "the newer"
