"""How long a user waits for the first token: context x hit ratio x store x system, on real vLLM engines side by side.

    python -m benchmarks.ttft                           a GPU with vLLM; adds to benchmarks/results/
    python -m benchmarks.ttft --systems objectcache,local --stores nginx --seconds 280
    python -m benchmarks.ttft --cases 65536x0.875,4096  these contexts, or contexts x hit ratios
    python -m benchmarks.ttft --stores minio --endpoint-url http://127.0.0.1:9000 --bucket objectcache
    python -m benchmarks.ttft --bucket my-bucket --region eu-central-1     AWS
    python -m benchmarks.ttft --overhead save           cold, with every chunk saved and without
    python -m benchmarks.ttft --decodes                 steps of 32 sequences beside prefixes that come, and saves
    python -m benchmarks.ttft --report                  the table and the plots, from the results

One request at a time, of `context_tokens` random tokens; the first `hit_ratio` of them, in whole
chunks of 256, are a prefix that lies somewhere, all others nobody has seen before. TTFT is from
giving the request to vLLM to its first token. A run counts only if vLLM says that exactly the prefix
was cached and, for objectcache, if its counters say where from. Systems:

recompute    no connector; nothing is cached
hbm          no connector; the prefix is in vLLM's own cache on the GPU
objectcache  from the store. Each prefix is read once by an engine that has neither read nor saved it
             before; lookups included. The reading engine itself saves nothing (`save` is off).
local        right after that, the same prefix with other tokens behind: it still lies in objectcache's
             pinned memory, and not a byte comes from the store. Measured with each store, in turn
vllm-cpu     vLLM's OffloadingConnector, 256-token chunks, in host memory
vllm-s3      the same before its own S3 tier, through NIXL, 256-token chunks, 32 threads; its host
             memory is emptied before each run
saving       (`--overhead save`) objectcache, cold, `hit_ratio` 0; a run begins when the chunks of the one
             before are written. Compare with recompute
decodes      (`--decodes`) see decodes.py; of the case with the longest prefix
decodes-hbm  the same with prefixes that are in vLLM's own cache: what such prompts cost without us
decodes-saving, decodes-cold    (`--decodes`) beside cold prompts of the middle context, and a second behind
             each: with what they compute saved meanwhile, and without a connector

Stores: nginx (files in memory, signatures ignored: the ceiling), SeaweedFS (pieces of 64 MiB, so that a
chunk is one), wire-100 (s3_like.py without its latency: all bodies together come at 100 Gbit/s, as by a card,
where a loopback brings some of them as fast as memory is), or a bucket by `--bucket`. An engine writes the prefixes into the first store; the others
get them from there while an engine starts. Engines are started one after the other; each runs all its systems and cases in
rounds. Prefixes of three rounds of all cases are 43 GiB with this model, in `--folder`. The weights are
random numbers: timing does not see that.

Local stores share the machine with the engine, but not its cores where they are given others: see
servers.py. Not measured: more than one request at a time (TPOT apart), a network, the time until a saved prefix can be found.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import command, results
from benchmarks.command import clean, say
from benchmarks.live_engine import EngineGone, Processes
from benchmarks.servers import ServerError, apart
from benchmarks.ttft_plan import Plan, Wanted, cases_of, planned, said, told, written
from benchmarks.ttft_stores import (
    LOCAL,
    Move,
    Place,
    absent,
    is_local,
    local_place,
    room_bytes,
    somebodys_place,
)
from benchmarks.ttft_systems import (
    WARM_UP,
    Case,
    Reading,
    S3Tier,
    Sample,
    Saving,
    Session,
    Setup,
    beside,
    make_setup,
    ring_bytes,
)

CONTEXTS, RATIOS = (65536, 16384, 4096), (0.875, 0.5)
SMOKE_CONTEXTS, SMOKE_RATIOS = (1536,), (0.5,)
SYSTEMS = ("objectcache", "local", "recompute", "hbm", "vllm-cpu", "vllm-s3")
EXTRA = ("saving", "decodes")
DECODES = ("decodes", "decodes-hbm", "decodes-saving", "decodes-cold")
START_LIMIT_S, LEAST_S = 200.0, 20.0
GRACE_S = 20.0  # for what was begun when time is up
_MODULES = ("vllm", "vllm-cpu", "torch", "nixl", "obstore")


class Run:
    """Sessions one after the other; a line is written as soon as there is something to say."""

    def __init__(
        self,
        setup: Setup,
        lines: results.Lines,
        about: Mapping[str, str],
        rounds: int,
        until: float,
        processes: Processes,
    ) -> None:
        self._setup, self._lines, self._about = setup, lines, dict(about)
        self._rounds, self._until, self._processes = rounds, until, processes
        self._samples: dict[str, list[Sample]] = {}

    def session(self, session: Session, wanted: Sequence[Wanted], move: Move | None = None) -> None:
        """Start its engine and measure. What moves meanwhile has ended before that."""
        store = session.place.name if session.place else "none"
        name = f"{', '.join(dict.fromkeys(system for system, _ in wanted))} ({store})"
        if not self._begin(session, name, [case for _, case in wanted], wanted, move):
            return
        try:
            self._measure(session, store, wanted)
        except (EngineGone, RuntimeError) as gone:
            say(f"{name}: {gone}")
            self._processes.end()
        else:
            self._processes.stop()

    def write(self, session: Saving, wanted: Sequence[Wanted], cases: Iterable[Case]) -> bool:
        """What `session` is wanted for itself, then prefixes of these cases for all rounds."""
        place = session.place
        assert place is not None
        if not self._begin(session, f"writing to {place.name}", [], wanted):
            return False
        try:
            self._measure(session, place.name, wanted)
            began = time.monotonic()
            session.write(WARM_UP, 0)
            for case, number in ((case, n) for case in cases for n in range(self._rounds)):
                if self.time_is_up:
                    break
                wrong = session.write(case, number)
                if wrong:
                    say(f"prefix of {case}: {wrong}")
            say(f"prefixes written in {time.monotonic() - began:.0f} s")
        except EngineGone as gone:
            say(f"writing to {place.name}: {gone}")
            self._processes.end()
            return False
        self._processes.stop()
        return True

    @property
    def time_is_up(self) -> bool:
        return time.monotonic() > self._until

    @property
    def left_s(self) -> float:
        return max(0.0, self._until - time.monotonic())

    def skip(self, wanted: Iterable[Wanted], store: str, why: str) -> None:
        for system, case in wanted:
            self._put(system, case, store, {"metrics": {}, "skipped": clean(why)})

    def _begin(
        self,
        session: Session,
        name: str,
        cases: Sequence[Case],
        wanted: Sequence[Wanted],
        move: Move | None = None,
    ) -> bool:
        left = self.left_s
        if left < LEAST_S:
            say(f"time is up before {name}")
            return False
        say(f"starting an engine: {name}")
        began = time.monotonic()
        try:
            process = self._processes.start(session.kwargs(), min(left, START_LIMIT_S))
            started = time.monotonic()
            if move is not None:
                self._await(move, session)
            session.begin(process, list(dict.fromkeys(cases)), self._until + GRACE_S)
        except (EngineGone, RuntimeError) as gone:
            self._processes.end()
            if not self.time_is_up:
                say(f"{name} is left out: {gone}")
                self.skip(wanted, session.place.name if session.place else "none", str(gone))
            else:
                say(f"time is up: {name}: {gone}")
            return False
        say(f"ready after {started - began:.0f} s and {time.monotonic() - started:.0f} s")
        return True

    def _await(self, move: Move, session: Session) -> None:
        began = time.monotonic()
        why = move.wait(self.left_s)
        to = f"prefixes to {move.target.name}"
        say(f"waited {time.monotonic() - began:.0f} s more for {to}{why and ': ' + why}")
        if why and isinstance(session, Reading):
            raise RuntimeError(f"{to} did not come: {why}")

    def _measure(self, session: Session, store: str, wanted: Sequence[Wanted]) -> None:
        decodes = [(system, case) for system, case in wanted if system in DECODES]
        runs = [(system, case) for system, case in wanted if system not in DECODES]
        for number in range(self._rounds):
            for system, case in runs:
                if self.time_is_up:
                    say(f"time is up in round {number + 1}")
                    return
                sample = session.sample(system, case, number)
                if sample.wrong:
                    say(f"{system}, {case}, round {number + 1} does not count: {sample.wrong}")
                key = json.dumps([system, store, case.context_tokens, case.hit_ratio])
                samples = self._samples.setdefault(key, [])
                samples.append(sample)
                self._put(system, case, store, said(samples, case, system))
        for system, case in decodes:
            self._decodes(session, system, case, store)
        if self._setup.profiles is not None and isinstance(session, Reading):
            for case in [case for system, case in runs if system == "objectcache"]:
                # The first prefix again: with three of the longest, others took its place in host memory.
                say(session.profile(case, 0).wrong or f"{case} is profiled")
            for _, case in [one for one in decodes if one[1].hit_ratio]:
                say(session.profile_decodes(case, [1]) or "decodes are profiled")

    def _decodes(self, session: Session, system: str, case: Case, store: str) -> None:
        rounds: list[dict[str, Any]] = []
        for number in range(self._rounds):
            if self.time_is_up:
                say(f"time is up in round {number + 1} of the decodes")
                return
            if case.hit_ratio:
                found, wrong = session.decodes(case, range(self._rounds))
            else:
                found, wrong = session.decodes_cold(case, self._rounds)
            if wrong:
                say(f"decodes, round {number + 1} does not count: {wrong}")
                continue
            rounds.append(found)
            metrics = results.rounded(beside(rounds)) | {"rounds": len(rounds)}
            self._put(system, case, store, {"metrics": metrics})

    def _put(self, system: str, case: Case, store: str, what: Mapping[str, Any]) -> None:
        self._lines.put(self._about | {"system": system, "case": told(case, store)} | dict(what))


def measure(args: argparse.Namespace) -> int:
    until = time.monotonic() + args.seconds
    path, lines, about = command.begin("ttft", args, args.smoke)
    cases = cases_of(
        args.cases,
        SMOKE_CONTEXTS if args.smoke else CONTEXTS,
        SMOKE_RATIOS if args.smoke else RATIOS,
    )

    def has(system: str, case: Case, store: str) -> bool:
        return not args.again and lines.has(about | {"system": system, "case": told(case, store)})

    with ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="ttft-", dir=args.folder))
        )
        folder.chmod(0o755)
        names = _stores(args)
        plan = planned(_systems(args), cases, names, has)
        if not any(plan.values()):
            say("nothing is left to measure; --again measures anew")
            return 0
        needed = dict.fromkeys(store for (_, store), wanted in plan.items() if wanted)
        needed |= dict.fromkeys(names[:1] if any(written(plan)) else [])
        places = {
            name: stack.enter_context(_place(args, name, folder))
            for name in needed
            if name != "none"
        }
        setup = make_setup(args.smoke, args.engine, args.options, folder, cases)
        if args.trace is not None:
            args.trace.mkdir(parents=True, exist_ok=True)
            setup.traces = args.trace.resolve()
        if args.profile is not None:
            setup.profiles = args.profile.resolve()
        rounds = _affordable(args, setup, list(written(plan)), folder)
        env = {name: text for place in places.values() for name, text in place.env.items()}
        env["AWS_REQUEST_CHECKSUM_CALCULATION"] = "when_required"  # NIXL's objects are plain bytes
        if args.smoke:
            env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # starts in seconds
        processes = Processes(env, folder, _fresh(args))
        stack.callback(processes.end)
        run = Run(setup, lines, about, rounds, until, processes)
        lines.put(about | _environment(args, setup, rounds))
        try:
            sessions(run, setup, plan, places, importlib.util.find_spec("nixl") is not None)
        finally:
            if args.keep_log:
                log = folder / "engine.log"
                args.keep_log.write_bytes(log.read_bytes() if log.exists() else b"")
    print(path)
    return 0


def sessions(
    run: Run, setup: Setup, plan: Plan, places: Mapping[str, Place], has_nixl: bool
) -> None:
    """All of them, in the order of the plan. Prefixes are written once and move on with the stores,
    while an engine starts."""
    prefixes = list(written(plan))
    readers = [store for (kind, store), wanted in plan.items() if kind is Reading and wanted]
    lies_in, move = "", None
    for (kind, store), wanted in plan.items():
        if kind is Saving and (wanted or prefixes):
            if run.write(Saving(setup, places[store]), wanted, prefixes):
                lies_in = store
        elif kind is Reading and wanted and store not in (lies_in, move and move.target.name):
            say(f"there are no prefixes in {store}, so none are read")
        elif kind is S3Tier and wanted and not has_nixl:
            run.skip(wanted, store, "there is no nixl: see requirements/benchmarks.txt")
        elif wanted:
            run.session(kind(setup, places.get(store)), wanted, move)
        if move is not None:
            lies_in, move = "" if move.wait(run.left_s) else move.target.name, None
        if kind is Reading and store in readers:
            readers.remove(store)
            if not readers:
                places[store].give_room()  # to vLLM's tiers
        if lies_in and readers and readers[0] != lies_in:
            move = Move(places[lies_in], places[readers[0]])


def _stores(args: argparse.Namespace) -> list[str]:
    """Their names. Local servers that cannot run here are left out."""
    if args.bucket:
        return [args.stores or "s3"]
    names = []
    for name in (args.stores or ("seaweedfs" if args.smoke else ",".join(LOCAL))).split(","):
        if not is_local(name):
            raise SystemExit(
                f"no store {name!r}: take {', '.join(LOCAL)} or wire-100, or give --bucket."
            )
        why = absent(name)
        if why:
            say(f"no {name}: {why}")
        else:
            names.append(name)
    return names


def _systems(args: argparse.Namespace) -> list[str]:
    extra = ["saving"] * (args.overhead == "save") + ["decodes"] * args.decodes
    asked = args.systems
    if not asked and not extra:
        asked = "recompute,hbm,local,objectcache" if args.smoke else ",".join(SYSTEMS)
    if "saving" in extra:
        extra.append("recompute")  # what it is compared with
    found = list(dict.fromkeys([name for name in asked.split(",") if name] + extra))
    unknown = set(found) - {*SYSTEMS, *EXTRA}
    if unknown:
        raise SystemExit(f"no system {', '.join(sorted(unknown))}: take {', '.join(SYSTEMS)}.")
    return found


def _place(args: argparse.Namespace, name: str, folder: Path) -> Any:
    if args.bucket:
        return somebodys_place(name, args.bucket, args.endpoint_url, args.region)
    return local_place(name, folder)


def _affordable(
    args: argparse.Namespace, setup: Setup, written: Sequence[Case], folder: Path
) -> int:
    """As many rounds as were asked for, or as the prefixes of which fit the folder."""
    one = sum(case.hit_tokens for case in written) * setup.token_bytes
    if args.bucket or not one:
        return int(args.rounds)
    fit = int(0.9 * room_bytes(folder) / one)
    if fit < 1:
        raise SystemExit(
            f"prefixes of {one / 2**30:.0f} GiB do not fit {args.folder}: take fewer --cases, or "
            "another --folder."
        )
    if fit < args.rounds:
        say(f"{args.folder} has room for the prefixes of {fit} rounds only")
    return min(int(args.rounds), fit)


def _fresh(args: argparse.Namespace) -> bool:
    """With scheduler and worker in this process too, only its end gives a GPU's memory back."""
    in_one = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0"
    return bool(args.fresh_processes or (in_one and not args.smoke))


def _environment(args: argparse.Namespace, setup: Setup, rounds: int) -> dict[str, Any]:
    """What a reader of the results must know of the machine and the engines."""
    metrics = {
        **{"cores": len(os.sched_getaffinity(0)), **apart()},
        "kv_bytes_per_token": setup.token_bytes,
        "ring_bytes": ring_bytes(setup),
        "rounds": rounds,
    }
    return {
        **{"system": "environment", "case": {"group": "machine"}, "metrics": metrics},
        **{
            "versions": command.versions(_MODULES),
            "engine": dict(args.engine),
            "options": dict(args.options),
        },
    }


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parser = command.parser(
        __doc__, "systems", "seconds", "rounds", "machine", "out", "again", "report"
    )
    add = parser.add_argument
    add("--cases", default="", help="contexts, or contexts x hit ratios, with commas between")
    add(
        "--stores",
        default="",
        help=f"of {', '.join(LOCAL)}, wire-100; with --bucket, a name for results",
    )
    add("--endpoint-url", default="", help="S3 server other than AWS")
    add("--bucket", default="", help="a bucket that is there; one prefix of it is used and emptied")
    add("--region", default="", help="of the bucket")
    add("--overhead", choices=("save",), help="what saving costs a cold prompt")
    add("--decodes", action="store_true", help="what prefixes that come cost decoding")
    add("--engine", type=json.loads, default={}, help="JSON: LLM arguments to add or change")
    add("--options", type=json.loads, default={}, help="JSON: options of objectcache, as well")
    add("--folder", default="/dev/shm", help="for the local servers' data")
    add("--fresh-processes", action="store_true", help="import vLLM anew for each engine")
    add("--keep-log", type=Path, help="a file for what the engines said")
    add("--trace", type=Path, help="a folder for objectcache's traces: see timeline.py")
    add("--profile", type=Path, help="a folder for torch's profiles: see gpu_timeline.py")
    add("--smoke", action="store_true", help="a tiny model on the CPU, to see that it all works")
    args = parser.parse_args()
    if args.report:
        from benchmarks.ttft_report import write

        write(results.FOLDER)
        return 0
    try:
        return measure(args)
    except ServerError as error:
        say(f"a store does not run: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
