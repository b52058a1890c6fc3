"""The moment at which a request is admitted just in time: as early as its forward pass will not wait for a layer. Not what is estimated: see arrival.py and compute.py.

Pure. Layer l computes once it is on the GPU and layer l - 1 is computed; it is copied to the GPU once
it is in host memory and layer l - 1 is copied. With a layer's time to compute c and to copy h, a pass
over L layers that waits for nothing ends h + c + (L - 1) * max(c, h) after its start. The arrival of
layer l is followed by h + c + (L - 1 - l) * max(c, h) at least. So the end is held up unless it starts

    at max over l of (arrival(l) - l * max(c, h)), or later

A request is admitted the lead before its pass starts: what vLLM takes until then does not need the
first layer, and runs while that is on its way.

It is the first pass that counts: with chunked prefill, `layer_s` is that of the first chunk, with
all else that is in its batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from objectcache.arrival import Arrivals
from objectcache.compute import Estimate
from objectcache.lead import NO_LEAD

STAGED, JUST_IN_TIME, AT_ONCE = "staged", "just-in-time", "at-once"
MODES = (STAGED, JUST_IN_TIME, AT_ONCE)  # from patient to impatient
EARLY_STALL_S = 0.05  # of a request that is admitted before it is time
BUS_BYTES_PER_S = 40e9  # host to GPU in a step, with all that goes with it
# Of it, what is begun beside steps. Each call takes host time of one: at 25e9 the median step of 32 sequences
# was 8.5 ms in place of 7.1, of which the GPU's own work was 0.4 more, and the longest 14.
BESIDE_BYTES_PER_S = 16e9
AHEAD_LAG_S = 0.03  # a few steps: until its end is noticed, and the request is in one


@dataclass(frozen=True)
class Margin:
    """How sure to be that no layer is late: so many standard deviations, and seconds besides."""

    sigmas: float = 2.0
    seconds: float = 0.002


USUAL = Margin()


@dataclass(frozen=True)
class Moment:
    """When to admit, and why. Times in seconds on the clock of the arrivals."""

    mode: str
    at_s: float
    layer: int  # the one that decides
    arrives_s: float
    margin_s: float  # of `at_s`, beyond what is expected
    staged_s: float  # when all is expected in host memory
    layers: int
    layer_s: Estimate
    pass_s: float  # of the first forward pass, from its start, if nothing is late
    ahead: bool = False  # it is copied while others compute, and computes when that has ended
    lead: Estimate = NO_LEAD  # from `at_s` to the start of the pass

    def due(self, now: float) -> bool:
        """Whether it is time."""
        return now >= self.at_s

    def numbers(self, now: float) -> dict[str, float]:
        """For a machine that draws it: in milliseconds from now, but for the number of the layer."""
        each = {
            "possible_ms": self.at_s - now,
            "arrives_ms": self.arrives_s - now,
            "staged_ms": self.staged_s - now,
            "margin_ms": self.margin_s,
            "layer_ms": self.layer_s.mean_s,
            "layer_sigma_ms": self.layer_s.sigma_s,
            "pass_ms": self.pass_s,
            "lead_ms": self.lead.mean_s,
        }
        which = {"layer": self.layer, "ahead": int(self.ahead)}
        return which | {name: round(s * 1e3, 3) for name, s in each.items()}

    def tell(self, now: float) -> str:
        """For a person who asks why."""
        wait_s = self.at_s - now
        when = f"in {_ms(wait_s)}" if wait_s > 0.0 else f"now, possible since {_ms(-wait_s)}"
        if self.ahead:
            return (
                f"Admit {when}, to be copied while others compute: all layers are expected in "
                f"{_ms(self.staged_s - now)}; in its own step they would wait for it."
            )
        gain_s = self.staged_s - self.at_s
        than = "sooner than" if gain_s >= 0.0 else "later than"
        lead = ""
        if self.lead.mean_s:
            lead = f", and begins {_ms(self.lead.mean_s)} (+-{_ms(self.lead.sigma_s)}) after that"
        return (
            f"Admit {when} ({self.mode}): layer {self.layer} of {self.layers} decides, expected in "
            f"{_ms(self.arrives_s - now)}; a layer computes in {_ms(self.layer_s.mean_s)} "
            f"(+-{_ms(self.layer_s.sigma_s)}), the first pass in {_ms(self.pass_s)}{lead}. The margin is "
            f"{_ms(self.margin_s)}. That is {_ms(abs(gain_s))} {than} all layers are expected."
        )


def moment(
    arrivals: Arrivals,
    now: float,
    layer_s: Estimate,
    copy_s: float = 0.0,
    mode: str = JUST_IN_TIME,
    margin: Margin = USUAL,
    lead: Estimate = NO_LEAD,
) -> Moment:
    """The earliest moment, not before `now`, at which to admit a request.

    `layer_s` is the time to compute a layer in its first pass and `copy_s` that to copy one to the
    GPU, in seconds; `lead` is that from the moment to the start of the pass. The margin covers what is
    not sure about arrivals, about computing and about the lead: if a layer computes faster than
    expected, the next one is needed sooner. Who waits until all is there needs no lead.
    """
    layers = len(arrivals.mean_s)
    beat_s = max(layer_s.mean_s, copy_s)
    staged_s = max(arrivals.mean_s, default=now)
    decides, at_s, expected_s = 0, now, now
    for layer in range(layers) if mode != AT_ONCE else ():
        arrives_s, sigma_s = arrivals.mean_s[layer], arrivals.sigma_s[layer]
        if arrives_s <= now and sigma_s == 0.0:
            continue  # it is there
        starts_s = arrives_s
        sure_s = arrives_s + margin.sigmas * sigma_s + margin.seconds
        if mode == JUST_IN_TIME:
            # However fast it begins and computes, that need not be later than when the layer is there.
            starts_s = arrives_s - layer * beat_s - lead.mean_s
            all_s = math.hypot(sigma_s, layer * layer_s.sigma_s, lead.sigma_s)
            sure_s = min(sure_s, starts_s + margin.sigmas * all_s + margin.seconds)
        if sure_s > at_s:
            decides, at_s, expected_s = layer, sure_s, max(now, starts_s)
    return Moment(
        mode=mode,
        at_s=at_s,
        layer=decides,
        arrives_s=arrivals.mean_s[decides] if layers else now,
        margin_s=at_s - expected_s,
        staged_s=staged_s,
        layers=layers,
        layer_s=layer_s,
        pass_s=pass_s(layers, layer_s.mean_s, copy_s),
        lead=lead if mode == JUST_IN_TIME else NO_LEAD,
    )


def pass_s(layers: int, layer_s: float, copy_s: float = 0.0) -> float:
    """A pass over layers that are all in host memory, from its start to its end, in seconds."""
    return copy_s + layer_s + (layers - 1) * max(layer_s, copy_s) if layers else 0.0


def stall_s(
    start_s: float, arrivals: Sequence[float], layer_s: float, copy_s: float = 0.0
) -> float:
    """How much later than without waiting a pass ends that starts at `start_s`, in seconds, if the
    layers arrive at these times."""
    beat_s = max(layer_s, copy_s)
    return max((0.0, *(at - layer * beat_s - start_s for layer, at in enumerate(arrivals))))


def early(moment: Moment, now: float, stall_s: float, next_ask_s: float, others: int) -> bool:
    """Whether to admit although it is not time, because one cannot ask again before `next_ask_s`
    (seconds from now): if the stall is expected to cost this request and the `others` whose tokens
    wait with it less than the wait costs this one. Seconds of each count the same. And if it is a
    short stall: who comes during a long one waits as well, however few are there now."""
    waits_s = max(moment.at_s - now, next_ask_s)
    return stall_s <= EARLY_STALL_S and stall_s * (1 + others) <= waits_s


def ahead(moment: Moment, now: float, copy_s: float, total_bytes: int, beside: int) -> Moment:
    """The same, or if that is better the moment from which on the prefix is copied into the blocks of a
    parked request, while the `beside` others that are on the GPU go on.

    In its own step it is copied layer by layer as that computes, and all wait for the bus as far as it
    takes longer: `beside` times that, against how much later the request itself gets its token. Seconds
    of each count the same. It begins in its own step when that is safe, or when all is there: a margin
    does not outlast that. The lead comes before either.
    """
    computes_s = moment.layers * moment.layer_s.mean_s
    stalls_s = pass_s(moment.layers, moment.layer_s.mean_s, copy_s) - computes_s
    copies_s = total_bytes / BESIDE_BYTES_PER_S
    begins_s = max(now, moment.staged_s - copies_s)
    there_s = max(moment.staged_s, begins_s + copies_s) + AHEAD_LAG_S
    own_s = max(now, min(moment.at_s, moment.staged_s)) + stalls_s
    later_s = there_s - own_s
    if not beside or stalls_s * beside <= later_s:
        return moment
    return replace(moment, at_s=begins_s, margin_s=0.0, ahead=True, lead=NO_LEAD)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
