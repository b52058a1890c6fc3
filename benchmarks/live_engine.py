"""A real vLLM engine in a process of its own that is told one step after the other. Whole plans: engine.py; what is asked and why: ttft.py.

Commands and answers are JSON, one a line. Commands are the steps of engine.py, and

* `{"do": "start", "kwargs": {LLM arguments}}` and `{"do": "stop"}`: one engine at a time;
* `{"do": "decodes", ...}`: see decodes.py; `{"do": "crowd", ...}`: see crowd.py.

An answer is what the step returns, or `{"error": ...}`. All that vLLM prints goes to the log.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.engine import ROOT, SETTINGS, Engine, end_group, python_path
from benchmarks.servers import die_with_parent

_LOG_TAIL_BYTES = 20_000
_STOP_LIMIT_S = 60.0


class EngineGone(RuntimeError):
    """The process died, hangs, or could not do what it was told. The message says why.

    `told`: it lives, and said so itself.
    """

    def __init__(self, why: str, told: bool = False) -> None:
        super().__init__(why)
        self.told = told


class EngineProcess:
    """`env` is added to this process's own; the engine is started by `start`."""

    def __init__(self, env: Mapping[str, str], log: Path) -> None:
        self._log = log
        self._unread = b""
        with log.open("ab") as output:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.live_engine"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env=dict(os.environ) | SETTINGS | dict(env) | {"PYTHONPATH": python_path()},
                cwd=ROOT,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def start(self, kwargs: Mapping[str, Any], limit_s: float) -> float:
        """Start an engine: how long it took. Raises EngineGone."""
        return float(self.ask({"do": "start", "kwargs": dict(kwargs)}, limit_s)["seconds"])

    def stop(self, limit_s: float) -> None:
        self.ask({"do": "stop"}, limit_s)

    def ask(self, command: Mapping[str, Any], limit_s: float) -> dict[str, Any]:
        """Its answer. Raises EngineGone if there is none in time, or none that was hoped for."""
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps(command).encode() + b"\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            raise EngineGone(self._why()) from None
        answer: dict[str, Any] = json.loads(self._line(command["do"], limit_s))
        if "error" in answer:
            raise EngineGone(root_cause(answer["error"], self._tail()), told=True)
        return answer

    def end(self) -> None:
        """End it and all that it has started."""
        end_group(self._child)

    def _line(self, what: str, limit_s: float) -> bytes:
        assert self._child.stdout is not None
        until = time.monotonic() + limit_s
        while b"\n" not in self._unread:
            left = until - time.monotonic()
            if left <= 0:
                raise EngineGone(f"no answer to {what!r} in {limit_s:.0f} s")
            ready, _, _ = select.select([self._child.stdout], [], [], min(left, 1.0))
            more = os.read(self._child.stdout.fileno(), 1 << 20) if ready else b""
            if not more and (ready or self._child.poll() is not None):
                raise EngineGone(self._why())
            self._unread += more
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _why(self) -> str:
        return root_cause("its process ended", self._tail())

    def _tail(self) -> str:
        with self._log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
            return file.read().decode(errors="replace")


class Processes:
    """Where engines run: one after the other in one process that has imported vLLM, or each in a fresh one."""

    def __init__(self, env: Mapping[str, str], folder: Path, fresh: bool) -> None:
        self._env, self._folder, self._fresh = env, folder, fresh
        self._process: EngineProcess | None = None

    def start(self, kwargs: Mapping[str, Any], limit_s: float) -> EngineProcess:
        """Raises EngineGone. What an engine before it may be to blame for is tried in a fresh process."""
        if self._process is not None:
            try:
                self._process.start(kwargs, limit_s)
                return self._process
            except EngineGone as gone:
                if gone.told and "memory" not in str(gone):
                    raise
                print(f"a second engine did not start in one process: {gone}", file=sys.stderr)
                self.end()
        self._process = EngineProcess(self._env, self._folder / "engine.log")
        self._process.start(kwargs, limit_s)
        return self._process

    def stop(self) -> None:
        """Of the engine that was started last, well behaved until now."""
        try:
            if self._process is not None:
                self._process.stop(_STOP_LIMIT_S)
        except EngineGone as gone:
            print(f"an engine did not stop: {gone}", file=sys.stderr)
            self.end()
        if self._fresh:
            self.end()

    def end(self) -> None:
        if self._process is not None:
            self._process.end()
            self._process = None


def root_cause(told: str, log: str) -> str:
    """The first error of the last traceback in a log, which vLLM's own error only points to."""
    causes = [
        line.partition("]")[2].strip() or line.strip()
        for line in log.splitlines()
        if ("Error: " in line or "Exception: " in line) and "Root cause" not in line
    ]
    causes = [cause for cause in causes if "Engine core initialization failed" not in cause]
    return causes[-1] if causes else told


class _Child:
    """What answers commands."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._one_process = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0"

    def do(self, command: dict[str, Any]) -> dict[str, Any]:
        began = time.monotonic()
        if command["do"] == "start":
            self._engine = Engine(command["kwargs"], self._one_process)
            return {"seconds": time.monotonic() - began}
        assert self._engine is not None, "no engine was started"
        if command["do"] == "stop":
            engine, self._engine = self._engine, None
            engine.stop()
            return {"seconds": time.monotonic() - began}
        if command["do"] == "decodes":
            from benchmarks.decodes import beside

            return beside(self._engine, **{k: v for k, v in command.items() if k != "do"})
        if command["do"] == "crowd":
            from benchmarks.crowd import crowd

            return crowd(self._engine, **{k: v for k, v in command.items() if k != "do"})
        return self._engine.run(command)


def main() -> None:
    """Answer commands until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is no answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    child = _Child()
    for line in sys.stdin:
        try:
            answer = child.do(json.loads(line))
        except Exception as error:  # told to the parent, who decides
            import traceback

            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
    sys.stdout.flush()
    os._exit(0)  # an engine that was not stopped leaves threads that would not end
