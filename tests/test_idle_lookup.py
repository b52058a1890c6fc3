"""How a prompt is looked up while nothing is computed: the scheduler waits a little and does not ask again and again; beside others it never waits."""

import time

from fault_server import Fault, FaultProxy, Request
from timely_lab import (  # noqa: F401 (pytest looks for the fixtures here)
    PROMPT,
    Engines,
    engine_fixture,
    model_fixture,
    proxy_fixture,
    want_fixture,
)
from toy_engine import prompt

from objectcache.scheduler import IDLE_WAIT_S

ANSWER_S = 0.1


def slow_lookups(request: Request) -> Fault | None:
    return Fault(delay_s=ANSWER_S) if request.method == "HEAD" else None


def test_an_idle_engine_waits_for_the_answer(
    engine: Engines, proxy: FaultProxy, want: list[list[int]]
) -> None:
    one = engine(admission="staged")
    proxy.fault = slow_lookups
    name = one.add(PROMPT)
    steps, began = 0, time.monotonic()
    while name not in one.cached:
        one.step()
        steps += 1
        if one.connector._scheduler._requests[name].found:
            break
    took_s = time.monotonic() - began
    assert took_s >= ANSWER_S
    assert steps <= took_s / IDLE_WAIT_S + 2, "it asks again although nobody has anything to do"
    one.run()
    assert [one.outputs[name]] == want


def test_several_that_are_looked_up_are_not_waited_for_one_after_the_other(
    engine: Engines, proxy: FaultProxy, want: list[list[int]]
) -> None:
    one = engine(admission="staged")
    took_s = []
    for group in range(5):  # a busy machine may take longer for one step, and no less
        proxy.fault = slow_lookups
        for seed in range(8):
            one.add(prompt(200, seed=100 + 8 * group + seed))
        began = time.monotonic()
        one.step()
        took_s.append(time.monotonic() - began)
        proxy.fault = None
        one.run()
    assert min(took_s) < 4 * IDLE_WAIT_S


def test_beside_others_nobody_waits(
    engine: Engines, proxy: FaultProxy, want: list[list[int]]
) -> None:
    one = engine(admission="staged")
    other = one.add(prompt(50, seed=4), max_tokens=2000)
    for _ in range(3):
        one.step()
    proxy.fault = slow_lookups
    name = one.add(PROMPT)
    tokens = len(one.outputs[other])
    while not one.connector._scheduler._requests[name].found:
        one.step()
        tokens += 1
        assert len(one.outputs[other]) == tokens
    assert tokens > 2 * ANSWER_S / IDLE_WAIT_S, "it waited beside who decodes"
    one.abort(other)
    proxy.fault = None
    one.run()
    assert [one.outputs[name]] == want
