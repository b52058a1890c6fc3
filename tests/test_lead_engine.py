"""The lead, under vLLM's real Scheduler: workers report when they need a first layer, and later requests are admitted by that."""

import json
import time
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
)
from toy_engine import ToyEngine, prompt

from objectcache.lead import FEW

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
    if ranks == 2:
        warm = engine(ranks=2, admission="staged")
        warm.generate(PROMPT)
        warm.settle()
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
