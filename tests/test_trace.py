"""The trace of requests: whole, in order, bounded, without a token; and its file, which is bounded too."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scheduling_lab import model_fixture  # noqa: F401 (pytest looks for the fixtures here)
from toy_engine import ToyEngine, prompt

from objectcache.report import log
from objectcache.trace import EVENTS_MAX, KEPT, LIVE_MAX, PassTimes, Record, Trace, tell
from objectcache.tracefile import TraceFile, open_trace


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """What the log was told."""
    heard: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    ear = Ear()
    log.addHandler(ear)
    yield heard
    log.removeHandler(ear)


def told(script: Callable[[Trace, Clock], None]) -> list[Record]:
    records: list[Record] = []
    clock = Clock()
    script(Trace(clock, records.append), clock)
    return records


def names(record: Record) -> list[str]:
    return [event[1] for event in record["events"]]


def test_a_request_is_told_from_its_arrival_to_its_end() -> None:
    def script(trace: Trace, clock: Clock) -> None:
        trace.arrived("a", 1000)
        clock.now += 0.010
        trace.note("a", "found", chunks=3)
        trace.asked("a", None)
        trace.staging("a", 7, 3)
        assert trace.stepping(0, {}) == 1
        clock.now += 0.010
        trace.heard([(7, 1, 0.2), (7, 0, 0.3)], [], [1], [])  # two ranks
        trace.stepping(0, {})
        trace.heard([(7, 0, 0.3), (7, 0, 0.301)], [(7, 3, "NotFound")], [2], [])
        trace.asked("a", 768)
        trace.admitted("a", 768)
        assert trace.stepping(0, {"a": 1000}) == 3
        begin = clock.now
        clock.now += 0.010
        trace.heard([], [], [2], [])  # of the step before: no first token yet
        trace.finished("a", "FINISHED_STOPPED")
        passed = PassTimes(3, [7], begin, begin + 0.008, [(begin + 0.001, begin + 0.003)], [2])
        clock.now += 0.005
        trace.heard([], [], [3], [passed])  # comes with the end

    (record,) = told(script)
    assert record == {
        "request": "a",
        "prompt_tokens": 1000,
        "arrived_s": 100.0,
        "events": [
            [0.0, "arrived"],
            [0.01, "found", {"chunks": 3}],
            [0.01, "staging", {"chunks": 3}],
            [0.02, "progress", {"ready": 0, "share": 0.3}],
            [0.02, "staged", {"chunks": 3, "error": "NotFound"}],
            [0.02, "answered", {"tokens": 768, "asks": 2}],
            [0.02, "admitted", {"loaded": 768, "steps": 2}],
            [0.02, "scheduled", {"step": 3}],
            [0.02, "pass", {"step": 3, "took_ms": 8.0, "waits": [(0.021, 2.0)], "ready": [2]}],
            [0.03, "ended", {"how": "FINISHED_STOPPED"}],
            [0.035, "first token"],
        ],
    }
    assert tell(record) == (
        "a, 1000 tokens: 0.0 arrived, 10.0 found (chunks=3), 10.0 staging (chunks=3), 20.0 staged "
        "(chunks=3 error=NotFound), 20.0 answered (tokens=768 asks=2), 20.0 admitted (loaded=768 "
        "steps=2), 20.0 scheduled (step=3), 20.0 pass (took_ms=8.0 waited_ms=2.0), 30.0 ended "
        "(how=FINISHED_STOPPED), 35.0 first token"
    )


calls = st.lists(
    st.tuples(
        st.sampled_from(["arrive", "note", "ask", "stage", "admit", "step", "hear", "finish"]),
        st.integers(0, 5),
    ),
    max_size=80,
)


@settings(max_examples=200, deadline=None)
@example(script=[("arrive", 0), ("finish", 0), ("arrive", 0)], keeps=True)
@given(calls, st.booleans())
def test_each_request_is_told_once_and_in_order_whatever_comes(
    script: list[tuple[str, int]], keeps: bool
) -> None:
    records: list[Record] = []
    clock = Clock()
    trace = Trace(clock, records.append, keeps)
    arrived, live = 0, set()
    for what, who in script:
        clock.now += 0.001
        name = str(who)
        if what == "arrive" and name not in live:
            trace.arrived(name, 10)
            arrived, live = arrived + 1, live | {name}
        elif what == "note":
            trace.note(name, "seen", request_id=1)
        elif what == "ask":
            trace.asked(name, 3)
        elif what == "stage":
            trace.staging(name, who, 2)
        elif what == "admit":
            trace.admitted(name, 3)
        elif what == "step":
            trace.stepping(0, {name: 10})
        elif what == "hear":
            trace.heard([(who, 1, 0.5)], [(who, 2, "")], [who], [PassTimes(1, [who], clock.now)])
        elif what == "finish":
            trace.finished(name, "done")
            live.discard(name)
    trace.close()
    assert len(records) == (arrived if keeps else 0) and not trace.active
    for record in records:
        times = [event[0] for event in record["events"]]
        assert times == sorted(times) and names(record).count("ended") == 1
        json.dumps(record)


def test_what_is_kept_is_bounded() -> None:
    records: list[Record] = []
    trace = Trace(Clock(), records.append)
    for number in range(LIVE_MAX + 100):
        trace.arrived(str(number), 10)
        trace.staging(str(number), number, 1)
    assert len(trace._live) == LIVE_MAX and len(trace._jobs) == LIVE_MAX
    for _ in range(10 * EVENTS_MAX):
        trace.note(str(LIVE_MAX), "again")
    trace.close()
    assert len(records) == LIVE_MAX + 100 and len(trace.ended) == KEPT
    (long,) = [record for record in records if record["request"] == str(LIVE_MAX)]
    assert len(long["events"]) == EVENTS_MAX and names(long)[-1] == "ended"


def test_a_file_holds_so_much_and_no_more(tmp_path: Path, warnings: list[str]) -> None:
    path = tmp_path / "trace.jsonl"
    file = TraceFile(str(path), most_bytes=1000)
    for number in range(100):
        file.put({"request": str(number), "events": []})
    file.close()
    file.close()
    lines = path.read_text().splitlines()
    assert [json.loads(line)["request"] for line in lines] == [str(n) for n in range(len(lines))]
    assert 900 < path.stat().st_size <= 1000
    assert len(warnings) == 1 and "move it away" in warnings[0]


def test_what_cannot_be_written_harms_nobody(tmp_path: Path, warnings: list[str]) -> None:
    trace, close = open_trace(str(tmp_path / "no" / "such" / "place"))
    for name in ("a", "b"):
        trace.arrived(name, 10)
        trace.finished(name, "done")
    close()
    assert len(warnings) == 1 and "No such file" in warnings[0]


def test_an_engine_leaves_a_line_for_each_prompt(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "trace.jsonl"
    extra = {"url": f"file://{tmp_path}/kv", "chunk_tokens": 64, "ring_bytes": "8MiB"}
    tokens = prompt(400)
    with_trace = extra | {"trace_path": str(path)}
    for _ in range(2):
        engine = ToyEngine(model, with_trace, layers=3)
        engine.generate(tokens)
        engine.settle()
        engine.stop()
    cold, warm = map(json.loads, path.read_text().splitlines())
    assert names(cold)[:2] == ["arrived", "found"] and "staging" not in names(cold)
    wanted = ["arrived", "found", "staging", "staged", "answered", "admitted", "scheduled", "pass"]
    wanted += ["first token", "ended"]
    at = [names(warm).index(name) for name in wanted]
    assert at == sorted(at)
    events = {event[1]: event[2] if len(event) > 2 else {} for event in warm["events"]}
    assert events["found"] == {"chunks": 6} and events["admitted"]["loaded"] == 384
    assert len(events["pass"]["waits"]) == 3 and events["pass"]["ready"] == [3, 3, 3]
    assert events["ended"]["how"] == "FINISHED_LENGTH_CAPPED"
    assert str(tokens[:3])[1:-1].replace(" ", "") not in path.read_text().replace(" ", "")


def test_without_a_path_nothing_is_kept(tmp_path: Path, model: Path) -> None:
    assert not log.isEnabledFor(logging.DEBUG)
    extra = {"url": "memory://untraced", "chunk_tokens": 64, "ring_bytes": "8MiB"}
    engine = ToyEngine(model, extra, layers=3)
    engine.generate(prompt(200))
    engine.settle()
    assert not engine.connector._trace.active and not engine.connector._trace.ended
    engine.stop()
