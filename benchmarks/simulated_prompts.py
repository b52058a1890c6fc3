"""A prompt of the simulation, its prefix on its way, and how a machine is set. For simulated_engine.py."""

import functools
import math
from dataclasses import dataclass, field

from objectcache import moment, worth
from objectcache.arrival import Coming
from objectcache.compute import H100_8B, Costs, Work
from objectcache.flow import StoreModel
from objectcache.format import ObjectLayout
from objectcache.plan import Limits, Plan, plan

CHUNK_TOKENS, LAYERS, SLICE_BYTES = 256, 32, 1 << 20
LAYOUT = ObjectLayout(bytes(32), CHUNK_TOKENS, 16, 0, 1, (SLICE_BYTES,) * LAYERS)
RECOMPUTE = "recompute"
COPY_BYTES_PER_S = 50e9  # to the GPU


@dataclass(frozen=True)
class Setting:
    """One machine and how it decides. `wire_rule` is "ours", "equal" (all fetches the
    same), "calibrated" (the paper's) or "in-order" (requests in the order of their prompts)."""

    mode: str = moment.JUST_IN_TIME
    wire_rule: str = "ours"
    wire_bytes_per_s: float = 12.5e9
    connection_bytes_per_s: float = 85e6
    connections: int = 256
    ring_slots: int = 1024  # 32 GiB
    gpu_blocks: int = 23000
    pass_tokens: int = 8192
    lookup_s: float = 0.05
    truth: Costs = H100_8B
    prior: Costs = H100_8B
    split: bool = True  # load or recompute is decided; else all that is found is loaded
    margin: moment.Margin = moment.USUAL
    early: bool = True  # admitted before its time where that costs nobody more


@dataclass
class Request:
    number: int
    arrives_s: float
    prompt_tokens: int
    hit_chunks: int
    output_tokens: int = 1
    first_token_s: float = math.nan
    # while it lives
    choice: "worth.Choice | None" = None
    fetch: "Fetch | None" = None
    left: int = 0  # tokens of its prompt to compute
    context: int = 0
    decoded: int = 0
    decided: bool = False

    @property
    def blocks(self) -> int:
        return -(-(self.prompt_tokens + self.output_tokens) // 16)


class Fetch:
    """A prefix on its way: which of its requests were sent, began and ended."""

    def __init__(self, request: Request, plan: Plan) -> None:
        self.request, self.chunks, self.groups = request, plan.chunks, plan.groups
        chunks, groups = plan.chunks, plan.groups
        self.unsent = [at for at in range(len(groups)) for _ in range(chunks)][::-1]
        self.begun = [0] * len(groups)
        self.last_from = [0.0] * len(groups)  # the service from which the latest body counts
        self.in_flight = 0
        self.bodies: dict[int, tuple[float, int]] = {}  # under way: service from which, bytes
        self.done_bytes = 0
        self.sent_s = math.inf  # its first request
        self.started = self.admitted = self.given_up = False
        self.ready_at: list[float] = []  # of the layers of an admitted one
        self.coming: Coming | None = None

    @property
    def total_bytes(self) -> int:
        return self.chunks * LAYERS * SLICE_BYTES

    def landed(self, served: float) -> int:
        return self.done_bytes + int(sum(served - since for since, _ in self.bodies.values()))

    def waiting(self) -> int:
        return self.in_flight - len(self.bodies)

    def layers_ready(self, served: float) -> int:
        for at, (first, last) in enumerate(self.groups):
            if self.begun[at] < self.chunks:
                return first
            layers = int((served - self.last_from[at]) / SLICE_BYTES + 1e-6)
            if layers < last - first:
                return first + layers
        return LAYERS


def plan_for(chunks: int, connections: int, seen: StoreModel, layer_s: float) -> Plan:
    """The package's plan. What it is made from is rounded, so that it is found again."""
    store = StoreModel(
        _rounded(seen.first_byte_s),
        _rounded(max(seen.first_byte_p99_s, 1.5 * seen.first_byte_s)),
        _rounded(seen.connection_bytes_per_s),
        _rounded(seen.wire_bytes_per_s),
    )
    return _plan(chunks, connections, store, _rounded(layer_s))


@functools.cache
def _plan(chunks: int, connections: int, store: StoreModel, layer_s: float) -> Plan:
    return plan(chunks, LAYOUT, store, Limits(connections), layer_s=layer_s)


def _rounded(value: float) -> float:
    return float(f"{value:.1g}") if value < math.inf else value


@dataclass
class Step:
    began_s: float
    work: Work
    takes_s: float
    loads: list[Fetch]
    prompts: list[tuple[Request, int]] = field(default_factory=list)

    def waits_s(self) -> tuple[float, float]:
        """By how much copies to the GPU and late layers make it longer."""
        copies_s = stalls_s = 0.0
        layer_s = self.takes_s / LAYERS
        for fetch in self.loads:
            copy_s = fetch.chunks * SLICE_BYTES / COPY_BYTES_PER_S
            copies_s = max(copies_s, moment.pass_s(LAYERS, layer_s, copy_s) - self.takes_s)
            stall_s = moment.stall_s(self.began_s, fetch.ready_at, layer_s, copy_s)
            stalls_s = max(stalls_s, stall_s)
        return copies_s, stalls_s


@dataclass
class Tally:
    """What an engine's users saw."""

    requests: list[Request] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)  # between two tokens of a sequence
    stalled_s: float = 0.0  # steps that waited for a layer
    busy_s: float = 0.0  # of the GPU, in all steps
    computed_tokens: int = 0
    loaded_bytes: int = 0
    ring_most: int = 0
    given_up: int = 0  # loads
