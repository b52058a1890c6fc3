"""Toy engines whose prefixes come slowly from a real server and that compute slowly, as far as they know. No tests here."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fault_server import Fault, FaultProxy, Request
from sick_server_lab import (  # noqa: F401 (pytest looks for the fixtures here)
    model_fixture,
    proxy_fixture,
)
from toy_engine import ToyEngine, prompt

from objectcache.compute import ComputeModel, Costs, Work
from objectcache.flow import StoreModel

CHUNK, LAYERS = 64, 24
PROMPT = prompt(400)  # 6 chunks, each 104 KiB with its header
SLOW = Fault(bytes_per_s=300_000)  # a chunk in 0.35 s
Engines = Callable[..., ToyEngine]


@pytest.fixture(name="engine")
def engine_fixture(model: Path, proxy: FaultProxy) -> Iterator[Engines]:
    made: list[ToyEngine] = []

    def make(**more: object) -> ToyEngine:
        extra = {
            **{"url": "s3://kvcache/warm", "endpoint_url": proxy.url, "chunk_tokens": CHUNK},
            # The library path tells of layers as they come, however small they are.
            **{"ring_bytes": "8MiB", "transport": "aiobotocore", "read_timeout_ms": 1500},
            **{"admission": "just-in-time", "late_timeout_ms": 5000, "attempts": 1},
            **{"lookup_timeout_ms": 5000},  # a busy machine may need it
        }
        options = {name: more.pop(name) for name in ("ranks", "hooks_fire") if name in more}
        kind = more.pop("kind", ToyEngine)
        made.append(
            kind(model, extra | more, layers=LAYERS, failure_policy="fail", **options)  # type: ignore[arg-type]
        )
        # As if a layer took 10 ms to compute: the toy takes none, and nothing could be hidden.
        timely = made[-1].connector._scheduler.loading.timely
        if timely is not None:
            timely.compute = Slow()
            timely.store = StoreModel(0.01, 0.03, 300e3, 1.8e6)
        return made[-1]

    yield make
    proxy.fault = None
    for one in made:
        one.settle()
        assert all(worker.leased_slots == 0 for worker in one.workers)
        assert all(not worker.connector._worker._placed for worker in one.workers)
        one.stop()


class Slow(ComputeModel):
    """A layer takes 10 ms, whatever is timed."""

    def __init__(self) -> None:
        super().__init__(Costs(pass_s=LAYERS * 0.01, token_s=0.0, pair_s=0.0, read_s=0.0))
        for tokens in range(1, 200):  # as in an engine that has run for a while
            super().timed(Work(1, tokens, 200.0 * tokens), LAYERS * 0.01)

    def timed(self, work: Work, seconds: float) -> None:
        pass


@pytest.fixture(name="want", scope="module")
def want_fixture(model: Path, proxy: FaultProxy) -> list[list[int]]:
    """What an engine without a connector says; and the chunks are in the bucket."""
    extra = {"url": "s3://kvcache/warm", "endpoint_url": proxy.url, "chunk_tokens": CHUNK}
    one = ToyEngine(model, extra | {"ring_bytes": "8MiB"}, layers=LAYERS)
    one.generate(PROMPT)
    one.settle()
    one.stop()
    off = ToyEngine(model, None, layers=LAYERS)
    answers = off.generate(PROMPT)
    off.stop()
    return answers


def get_is(fault: Fault) -> Callable[[Request], Fault | None]:
    return lambda request: fault if request.method == "GET" else None


def warm(engine: Engines, ranks: int) -> None:
    """Each rank has a shard of its own: `want` has filled the bucket for one."""
    if ranks > 1:
        one = engine(ranks=ranks, admission="staged")
        one.generate(PROMPT)
        one.settle()
