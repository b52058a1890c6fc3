"""An engine that only counts, for the suite of the TTFT benchmark. No tests here."""

import math
from pathlib import Path
from typing import Any, ClassVar

import pytest

from benchmarks.live_engine import Processes
from benchmarks.ttft_stores import Place
from benchmarks.ttft_systems import (
    CHUNK_TOKENS,
    WARM_UP,
    Case,
    Prompts,
    Saving,
    Setup,
)

LONG, SHORT = Case(2048, 0.75), Case(1024, 0.5)
CHUNK_BYTES = 1000
SYSTEMS = ["recompute", "hbm", "local", "objectcache", "vllm-cpu", "vllm-s3"]


# ---- an engine that only counts


class ToyProcess:
    """Where the chunks of prompts lie; what vLLM, objectcache and vLLM's tiers would say of a prompt. Takes no time."""

    def __init__(self) -> None:
        self.hbm: set[tuple[int, ...]] = set()
        self.ring: set[tuple[int, ...]] = set()
        self.store: set[tuple[int, ...]] = set()
        self.host: set[tuple[int, ...]] = set()  # vLLM's own tiers
        self.bucket: set[tuple[int, ...]] = set()
        self.saves = self.loads = self.offloads = self.has_bucket = False
        self.holds_blocks = 0  # times that it does not let go of them
        self.loses = 0  # chunks of each prefix that the store does not have
        self.counters = dict.fromkeys(("read_bytes", "saved_chunks", "written_bytes"), 0.0)
        self.asked: list[str] = []

    def start(self, kwargs: dict[str, Any], limit_s: float) -> float:
        transfer = kwargs.get("kv_transfer_config", {})
        self.hbm.clear()
        self.ring.clear()
        self.loads = transfer.get("kv_connector") == "ObjectCacheConnector"
        self.offloads = transfer.get("kv_connector") == "OffloadingConnector"
        extra = transfer.get("kv_connector_extra_config", {})
        self.has_bucket = "secondary_tiers" in extra
        self.saves = self.loads and transfer["kv_connector_extra_config"]["save"]
        return 0.0

    def stop(self, limit_s: float) -> None:
        pass

    def end(self) -> None:
        pass

    def ask(self, step: dict[str, Any], limit_s: float) -> dict[str, Any]:
        self.asked.append(step["do"])
        if step["do"] == "metrics":
            named = {f"vllm:objectcache_{name}_total": n for name, n in self.counters.items()}
            return {"values": named}
        if step["do"] == "forget":
            done = self.holds_blocks <= 0
            self.holds_blocks -= 1
            if done:
                self.hbm.clear()
            if done and step["connector"]:
                self.asked.append("and the connector")
                self.host.clear()
            return {"done": done}
        if step["do"] == "wait":
            return {}
        if step["do"] == "decodes":
            each = [self.compute(one["prompt_token_ids"], math.inf) for one in step["prompts"]]
            cached = [one["requests"][0]["cached_tokens"] for one in each]
            steps = {name: [7.0] * 9 for name in ("alone_ms", "beside_ms", "admitting_ms")}
            after = [8.0] * 9 if step["after_s"] else []
            return steps | {"after_ms": after, "cached_tokens": cached, "seconds": 1.0}
        prompt = step["prompt"] if step["do"] == "save" else step["prompts"][0]
        extra = step.get("sampling", {}).get("extra_args", {})
        offload = extra.get("kv_transfer_params", {}).get("max_offload_tokens", math.inf)
        return self.compute(prompt["prompt_token_ids"], offload)

    def compute(self, tokens: list[int], offload: float) -> dict[str, Any]:
        ends = range(CHUNK_TOKENS, len(tokens) + 1, CHUNK_TOKENS)
        chunks = [tuple(tokens[:end]) for end in ends]
        cached = 0
        for chunk in chunks:
            offloaded = self.offloads and chunk in self.host | self.bucket
            if chunk in self.hbm or offloaded or (self.loads and chunk in self.ring):
                pass
            elif self.loads and chunk in self.store:
                self.counters["read_bytes"] += CHUNK_BYTES
                self.ring.add(chunk)
            else:
                break
            cached += CHUNK_TOKENS
        self.hbm.update(chunks)
        if self.offloads:
            kept = [chunk for chunk in chunks if len(chunk) <= offload]
            self.host.update(kept)
            self.bucket.update(kept if self.has_bucket else ())
        if self.saves:
            new = [chunk for chunk in chunks if chunk not in self.store]
            self.store.update(new[: len(new) - self.loses])
            self.counters["saved_chunks"] += len(new) - self.loses
            self.counters["written_bytes"] += CHUNK_BYTES * (len(new) - self.loses)
        request = {"ttft_s": 0.5, "cached_tokens": cached}
        return {"requests": [request], "saved_chunks": len(chunks) - self.loses}


class ToyPlace(Place):
    """Names a place and keeps nothing."""

    env: ClassVar[dict[str, str]] = {}
    cleared = 0

    def options(self) -> dict[str, Any]:
        return {"url": f"memory://{self.name}"}

    def nixl(self) -> dict[str, str]:
        return {"bucket": "b", "endpoint_override": "http://x", "scheme": "http", "region": "r"}

    def names(self) -> list[str]:
        return []

    def read(self, key: str) -> bytes:
        raise AssertionError

    def write(self, key: str, body: bytes) -> None:
        raise AssertionError

    def remove(self, key: str) -> None:
        raise AssertionError

    def clear(self) -> None:
        self.cleared += 1


class ToyProcesses(Processes):
    def __init__(self, toy: ToyProcess) -> None:
        self.toy, self.started = toy, 0

    def start(self, kwargs: Any, limit_s: float) -> Any:
        self.started += 1
        self.toy.start(kwargs, limit_s)
        return self.toy

    def stop(self) -> None:
        pass

    def end(self) -> None:
        pass


def a_setup() -> Setup:
    return Setup(Path("m"), {}, {}, Prompts(1000, "n"), 8, [LONG, SHORT])


def begun(kind: Any, toy: Any, setup: Setup) -> Any:
    session = kind(setup, ToyPlace("s", "b", "p"))
    toy.start(session.kwargs(), 1.0)
    session.begin(toy, [LONG, SHORT], math.inf)
    return session


@pytest.fixture(name="setup")
def setup_fixture() -> Setup:
    return a_setup()


@pytest.fixture(name="filled")
def filled_fixture(setup: Setup) -> ToyProcess:
    """A store with the prefixes of two rounds."""
    toy = ToyProcess()
    saving = begun(Saving, toy, setup)
    for case in (LONG, SHORT):
        assert [saving.write(case, number) for number in (0, 1)] == ["", ""]
    assert saving.write(WARM_UP, 0) == ""
    return toy
