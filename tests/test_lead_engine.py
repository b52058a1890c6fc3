"""The lead, under vLLM's real Scheduler: workers report when they need a first layer, and later requests are admitted by that."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fault_server import FaultProxy
from timely_lab import (  # noqa: F401 (pytest looks for the fixtures here)
    PROMPT,
    SLOW,
    Engines,
    engine_fixture,
    get_is,
    model_fixture,
    proxy_fixture,
    want_fixture,
    warm,
)
from toy_engine import ToyEngine, prompt

from objectcache.compute import Estimate
from objectcache.lead import FEW, Lead
from objectcache.timely import Timely

PREPARES_S = 0.04


class Prepares(ToyEngine):
    """Takes as long between its scheduler and its workers when a request begins."""

    def _execute(self, output: Any) -> None:
        if output.scheduled_new_reqs:
            time.sleep(PREPARES_S)
        super()._execute(output)


@pytest.mark.parametrize("ranks", [1, 2])
def test_workers_report_when_they_need_a_first_layer_and_it_is_counted_on(
    engine: Engines, proxy: FaultProxy, tmp_path: Path, ranks: int, want: list[list[int]]
) -> None:
    warm(engine, ranks)
    one = engine(kind=Prepares, ranks=ranks)
    one.generate(prompt(400, seed=8))  # computed: it tells nothing
    lead = one.connector._scheduler.loading.timely.lead
    assert not lead._seen and not lead._under_way
    for _ in range(FEW):  # then from host memory
        assert lead.seconds(400).mean_s == 0.0
        one.forget()
        assert one.generate(PROMPT) == want
        one.settle()
    assert PREPARES_S <= lead.seconds(400).mean_s <= 0.1
    path = tmp_path / "trace.jsonl"
    two = engine(kind=Prepares, ranks=ranks, trace_path=str(path))
    two.connector._scheduler.loading.timely.lead = lead  # as if it had run for a while
    proxy.fault = get_is(SLOW)
    assert two.generate(PROMPT) == want
    assert two.totals["timely_prompts"] == 1 and two.totals.get("failed_prompts", 0) == 0
    two.settle()
    two.stop()
    (record,) = map(json.loads, path.read_text().splitlines())
    *_, due = [event[2] for event in record["events"] if event[1] == "due"]
    assert due["lead_ms"] >= PREPARES_S * 1e3


class Knows(Lead):
    """Of any request as much."""

    def seconds(self, tokens: int) -> Estimate:
        return Estimate(2.0, 0.0)


class Hears(Timely):
    """Keeps of how many leading layers it heard, and of how many in all."""

    def __init__(self, like: Timely, *what: Any) -> None:
        super().__init__(*what)
        self.compute, self.store, self.lead = like.compute, like.store, Knows(self.ranks)
        self.heard_of: list[tuple[int, int]] = []

    def seen(self, job: int, chunks: int, ready: int, layers: int, now: float) -> None:
        self.heard_of.append((ready, layers))
        super().seen(job, chunks, ready, layers, now)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_request_may_be_let_go_when_all_headers_are_there_and_no_layer(
    engine: Engines, proxy: FaultProxy, tmp_path: Path, ranks: int, want: list[list[int]]
) -> None:
    """The toy raises on a wrong row: it waits for the first layer as for any other."""
    warm(engine, ranks)
    path = tmp_path / "trace.jsonl"
    one = engine(ranks=ranks, trace_path=str(path))
    loading, slices = one.connector._scheduler.loading, one.workers[0].connector._worker.slice_bytes
    loading.timely = timely = Hears(loading.timely, slices, 4096, ranks)
    proxy.fault = get_is(replace(SLOW, bytes_per_s=60_000))  # a layer in 70 ms
    assert one.generate(PROMPT) == want
    assert one.totals["timely_prompts"] == 1 and one.totals["waited_layers"] >= 1
    assert one.totals.get("failed_prompts", 0) == 0
    assert (-1, 0) in timely.heard_of and min(layers for _, layers in timely.heard_of) == 0
    one.settle()
    one.stop()
    (record,) = map(json.loads, path.read_text().splitlines())
    events = [(event[1], event[2] if len(event) > 2 else {}) for event in record["events"]]
    before = [about for what, about in events[: [what for what, _ in events].index("due")]]
    assert max(about.get("ready", -1) for about in before) == 0
