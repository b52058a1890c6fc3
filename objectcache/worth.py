"""How many chunks of a hit are worth loading; the rest is computed again. Not how they are loaded: see plan.py; not when they are used: see moment.py.

Pure. Loading the first k chunks costs until they are there, less what hides behind computing; then
the rest of the prompt is computed; and whoever waits for the wire or for the GPU waits longer. Every k
is priced and the best is taken: that with the least waiting, or with the least price where prices are
given, and of those that keep a deadline if any does. A store that is not worth it is not used; after
a pause one request tries it again.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from objectcache.arrival import latest_first_byte_s
from objectcache.compute import ComputeModel, Estimate, Work, first_pass, prefill
from objectcache.flow import StoreModel

OPTIONS = 64  # numbers of chunks that are priced, evenly; then all that are near the best of them
TRIAL_COSTS = 1.1  # times the time without: what a request pays at most to try the store again
GIVE_UP = 2.0  # times the time without: with more still to come a load is given up
LOSSES = 3  # in a row, until the store is left alone
FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 60.0  # until it is tried again; doubles
SLOW_LEARNS, SLOW_FADES_S = 0.3, 20.0  # from one load; and until what was learned counts half
NOTHING_ELSE = Work()


@dataclass(frozen=True)
class Hit:
    """A prompt, what vLLM has of it itself, and the chunks after that which the store has."""

    prompt_tokens: int
    local_tokens: int
    chunk_tokens: int
    chunks: int
    chunk_bytes: int
    layers: int


@dataclass(frozen=True)
class Now:
    """What the request meets: the store and the wire as measured, and who is before it."""

    store: StoreModel
    connections: int  # that it may use
    bytes_per_s: float  # of the wire, for it; the connections may give less
    wire_busy_s: float = 0.0  # with fetches that go before it
    gpu_busy_s: float = 0.0  # with prefills that begun or could; not with those that wait for bytes
    room_chunks: int = 1 << 62  # in the ring
    pass_tokens: int = 8192  # most tokens in a pass
    beside: Work = NOTHING_ELSE  # what else is in its passes
    wire_line: int = 0  # fetches that wait for the wire behind it, or beside it
    gpu_line: int = 0  # prompts that wait for the GPU behind it, and sequences beside it
    slowness: float = 1.0  # by which loads took longer than expected lately (Usefulness)
    overlaps: bool = True  # computing begins before all bytes are there
    lookup_s: float = 0.0  # still to wait, before anything can be fetched


@dataclass(frozen=True)
class Rates:
    """Prices, to weigh time against money. In USD; a zero `hour_usd` weighs time alone."""

    hour_usd: float = 0.0  # of waiting for the first token
    request_usd: float = 0.4e-6
    gb_usd: float = 0.0  # egress
    gpu_hour_usd: float = 0.0  # of computing the prompt


TIME_ALONE = Rates()


@dataclass(frozen=True)
class Option:
    """What it takes to load so many chunks and to compute the rest. Seconds from now."""

    chunks: int
    tokens: int  # that are loaded
    requests: int
    load_s: float  # until all bytes are there
    admit_s: float
    compute: Estimate
    first_token_s: float
    others_s: float  # that all others together wait for its bytes and for its computing
    usd: float


@dataclass(frozen=True)
class Choice:
    """The best option, beside loading nothing and loading all that there is room for; and what the
    request met."""

    best: Option
    nothing: Option
    everything: Option
    deadline_s: float
    trial: bool
    met: Now

    @property
    def keeps_deadline(self) -> bool:
        return self.best.first_token_s <= self.deadline_s

    def tell(self) -> str:
        """For a person who asks why."""
        met = self.met
        what = f"Load {self.best.chunks} of {self.everything.chunks} chunks"
        if not self.best.chunks:
            what = f"Load none of {self.everything.chunks} chunks"
        tried = ", to see whether the store is worth it again" if self.trial else ""
        late = "" if self.keeps_deadline else ", too late for its deadline"
        return (
            f"{what}{tried}: first token in {_s(self.best.first_token_s)} ({self.best.usd:.2g} USD)"
            f"{late}; with all of them in {_s(self.everything.first_token_s)} "
            f"({self.everything.usd:.2g} USD), with none in {_s(self.nothing.first_token_s)} "
            f"({self.nothing.usd:.2g} USD). Loading takes {_s(self.best.load_s)} by "
            f"{self.best.requests} requests, computing the rest {_s(self.best.compute.mean_s)}. "
            f"The wire is taken for {_s(met.wire_busy_s)} and gives {met.bytes_per_s / 1e9:.3g} GB/s, "
            f"the GPU for {_s(met.gpu_busy_s)}; loads take {met.slowness:.2g} times what models say; "
            f"others wait {_s(self.best.others_s)} for it, {_s(self.nothing.others_s)} with none."
        )


def choose(
    hit: Hit,
    now: Now,
    compute: ComputeModel,
    rates: Rates = TIME_ALONE,
    deadline_s: float = math.inf,
    trial: bool = False,
) -> Choice:
    """How many leading chunks to load, from none to as many as there is room for.

    `deadline_s` is for the first token, from now: of the options that keep it the best is taken, and
    the soonest if none does. A `trial` loads the most that costs the request little more than
    loading nothing; one chunk, if that costs more.
    """
    most = min(hit.chunks, now.room_chunks)
    nothing, everything = (option(hit, chunks, now, compute, rates) for chunks in (0, most))
    price = _price(rates, deadline_s)

    def cost(chunks: int) -> tuple[float, float]:
        return price(option(hit, chunks, now, compute, rates))

    step = max(1, -(-most // OPTIONS))
    best = min((*range(0, most, step), most), key=cost)
    if step > 1:
        best = min(range(max(0, best - step + 1), min(most, best + step - 1) + 1), key=cost)
    tries = trial and not best and most > 0
    if tries:
        bearable_s = TRIAL_COSTS * nothing.first_token_s
        costs = {n: option(hit, n, now, compute, rates) for n in _doubling(most)}
        best = max((n for n in costs if costs[n].first_token_s <= bearable_s), default=1)
    taken = option(hit, best, now, compute, rates)
    return Choice(taken, nothing, everything, deadline_s, tries, now)


def option(hit: Hit, chunks: int, now: Now, compute: ComputeModel, rates: Rates) -> Option:
    """What it takes to load so many chunks and to compute the rest."""
    had = hit.local_tokens % hit.chunk_tokens  # of the first chunk
    most = max(0, hit.prompt_tokens - 1 - hit.local_tokens)
    loaded = min(max(0, chunks * hit.chunk_tokens - had), most)
    context = hit.local_tokens + loaded if chunks else hit.local_tokens
    rest = hit.prompt_tokens - context
    passes = prefill(rest, context, now.pass_tokens)
    takes = compute.seconds(passes.then(_times(now.beside, passes.passes)))
    first = compute.seconds(first_pass(rest, context, now.pass_tokens).beside(now.beside))
    requests, load_s, admit_s, flows_s = 0, 0.0, now.gpu_busy_s, 0.0
    if chunks:
        requests = max(chunks, min(now.connections, chunks * hit.layers))
        rate = min(now.bytes_per_s, requests * now.store.connection_bytes_per_s)
        rate = min(rate, now.connections * now.store.connection_bytes_per_s)
        begins_s = now.lookup_s + now.wire_busy_s
        begins_s += now.slowness * latest_first_byte_s(now.store, min(requests, now.connections))
        flows_s = now.slowness * max(
            chunks * hit.chunk_bytes / max(1.0, rate), requests / now.store.requests_per_s
        )
        load_s = begins_s + flows_s
        # Layers come one after the other: the first or the last one decides (moment.py).
        hides_s = 0.0
        if now.overlaps:
            hides_s = (hit.layers - 1) * min(first.mean_s, flows_s) / hit.layers
        admit_s = max(now.gpu_busy_s, load_s - hides_s)
    first_token_s = admit_s + takes.mean_s
    usd = requests * rates.request_usd + chunks * hit.chunk_bytes / 1e9 * rates.gb_usd
    usd += takes.mean_s / 3600 * rates.gpu_hour_usd + first_token_s / 3600 * rates.hour_usd
    others_s = now.wire_line * flows_s + now.gpu_line * takes.mean_s
    usd += others_s / 3600 * rates.hour_usd
    return Option(chunks, loaded, requests, load_s, admit_s, takes, first_token_s, others_s, usd)


def still_worth(admit_s: float, rest: Estimate, whole: Estimate, gpu_busy_s: float = 0.0) -> bool:
    """Whether a load that is under way is still to be waited for, and not better given up for computing
    all of the prompt from now on.

    `admit_s` is expected until its request can be admitted, from now, without a margin; `rest` and
    `whole` what computing takes after that, and without the load.
    """
    return max(admit_s, gpu_busy_s) + rest.mean_s <= GIVE_UP * (gpu_busy_s + whole.mean_s)


def _price(rates: Rates, deadline_s: float) -> Callable[[Option], tuple[float, float]]:
    def price(option: Option) -> tuple[float, float]:
        late_s = option.first_token_s if option.first_token_s > deadline_s else 0.0
        waits_s = option.first_token_s + option.others_s
        return (late_s, option.usd if rates.hour_usd > 0.0 else waits_s)

    return price


def _doubling(most: int) -> list[int]:
    return [*(1 << n for n in range(most.bit_length()) if 1 << n < most), most]


def _times(work: Work, passes: int) -> Work:
    """Beside each of so many passes, which are counted already."""
    return Work(0, work.tokens * passes, work.pairs * passes, work.read_tokens * passes)


def _s(seconds: float) -> str:
    return f"{seconds:.3g} s"


class Usefulness:
    """How loads keep what was expected of them. If they take longer, more is expected of the next ones
    to take; that fades, so that a store which got better is used again. After some in a row that took
    longer than computing would have, the store is off. A store that is off, or that the models think
    too slow, is tried by one request after a pause in which it was not used; the pause doubles up to a
    minute."""

    def __init__(self) -> None:
        self.off = False
        self._losses = 0
        self._pause_s = FIRST_PAUSE_S
        self._used_at: float | None = None
        self._slower = 0.0  # logarithm of times over expectations
        self._slower_at = 0.0

    def slowness(self, now: float) -> float:
        """By which factor loads take longer than the models say, one at least."""
        return math.exp(self._slower * 0.5 ** (max(0.0, now - self._slower_at) / SLOW_FADES_S))

    def tries(self, now: float) -> bool:
        """Whether a request that would load nothing is to try the store. Says so once for each pause."""
        if self._used_at is None:
            self._used_at = now
        if now - self._used_at < self._pause_s:
            return False
        self._used_at = now
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        return True

    def used(self, now: float) -> None:
        """A load begins that is no trial."""
        self._used_at = now

    def loaded(self, now: float, choice: Choice, took_s: float) -> None:
        """All bytes of this choice were there `took_s` after its first request was sent: waiting for its
        turn on the wire is not the store's doing."""
        best, met = choice.best, choice.met
        expected_s = best.load_s - met.wire_busy_s - met.lookup_s
        before = math.log(self.slowness(now))
        ratio = math.log(max(1e-3, took_s) / max(1e-3, expected_s)) + math.log(met.slowness)
        self._slower = max(0.0, before + SLOW_LEARNS * (ratio - before))
        self._slower_at = now
        hidden_s = max(0.0, best.load_s - best.admit_s)
        if took_s - hidden_s <= choice.nothing.first_token_s - best.compute.mean_s:
            self._losses, self.off, self._pause_s = 0, False, FIRST_PAUSE_S
            return
        self._losses += 1
        self.off = self.off or self._losses >= LOSSES
