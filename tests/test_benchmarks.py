"""Do the benchmarks still run, and do they say what they should? Their numbers mean nothing here."""

import json
import math
import os
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError
from smoke_runs import run, smoke_run

from benchmarks.clients import Endpoint, ObjectCacheAiobotocore
from benchmarks.command import clean
from benchmarks.hedges import calculated
from benchmarks.lab import MIB, Lab, ReaderProcess, Scale
from benchmarks.movers import write_report
from benchmarks.nginx import Nginx, nginx_absent, tls_absent
from benchmarks.results import Lines, latest, read
from benchmarks.s3_like import FIRST_BYTE_P50_MS, FIRST_BYTE_P99_MS, S3Like, sigma
from benchmarks.servers import cores_of
from benchmarks.steps import ClientSource, Seen, Stream, measure
from benchmarks.transport import cases, modelled_best_s
from benchmarks.transport_report import write
from objectcache.errors import Corrupt

SYSTEMS = "objectcache-aiobotocore,boto3,obstore"  # one that is not installed says so
METRICS = {
    "latency": {"ttfb_ms", "layer0_ms", "layer1_ms", "last_layer_ms", "share_of_best_percent"},
    "rate": {"gb_per_s", "cpu_s_per_gb"},
    "busy": {"gb_per_s", "step_slowdown_percent"},
    "verify": {"verified_bytes"},
}
CHUNK_BYTES = 32 * (16 << 10)  # of a smoke run


@pytest.fixture(scope="module", name="lines")
def lines_fixture(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    path = tmp_path_factory.mktemp("results") / "transport-smoke.jsonl"
    smoke(path)
    return read(path)


def smoke(path: Path) -> str:
    options = ("--systems", SYSTEMS, "--rounds", "1", "--out", str(path))
    return smoke_run("transport", *options, limit_s=120)


def test_each_line_says_what_was_measured_where(lines: list[dict[str, Any]]) -> None:
    for line in lines:
        assert {"benchmark", "machine", "commit", "system", "case", "metrics"} <= set(line)
        assert (line["benchmark"], line["machine"]) == ("transport", "smoke")
        if "skipped" in line:
            assert line["metrics"] == {} and line["skipped"]
            continue
        assert METRICS.get(line["case"]["group"], set()) <= set(line["metrics"])
        numbers = [v for v in line["metrics"].values() if not isinstance(v, bool)]
        assert all(math.isfinite(number) for number in numbers)


def test_our_store_and_boto3_are_measured_in_every_case(lines: list[dict[str, Any]]) -> None:
    for system in ("objectcache-aiobotocore", "boto3"):
        groups = [one["case"]["group"] for one in lines if one["system"] == system]
        ours = system.startswith("objectcache")
        assert sorted(groups) == sorted(
            ["busy", "latency", *(["latency"] if ours else []), "rate", "rate", "verify", "verify"]
        )


def test_every_byte_was_compared_before_anything_was_timed(lines: list[dict[str, Any]]) -> None:
    seen: set[tuple[str, str]] = set()
    for line in lines:
        at = (line["system"], line["case"].get("server", ""))
        if line["case"]["group"] == "verify":
            chunks = 2 if line["case"]["server"] == "seaweedfs" else 4
            assert line["metrics"]["verified_bytes"] == chunks * CHUNK_BYTES
            seen.add(at)
        elif line["metrics"] and line["system"] != "environment":
            assert at in seen


def test_wrong_bytes_are_seen(tmp_path: Path) -> None:
    """A reader that is told other contents than the server has must not be measured."""
    with Lab(tmp_path, Scale(2, 2, 2, slice_bytes=4096), {"s3-like"}) as lab:
        served = lab.chunks.folder / lab.chunks.key(1)
        kept = served.read_bytes()
        reader = ReaderProcess("boto3", lab, 2)
        command = {"server": "s3-like", "request_bytes": 4096, "in_flight": 2}
        try:
            assert reader.ask({"do": "verify", **command}) == {"verified_bytes": 2 * 32 * 4096}
            other = tmp_path / "other"
            other.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
            other.replace(served)  # a reader that starts now compares with this one
            reader.end()
            reader = ReaderProcess("boto3", lab, 2)
            assert "wrong bytes" in reader.ask({"do": "verify", **command})["error"]
            many = {"do": "rate", "count": 64, **command}
            assert "wrong bytes" in reader.ask(many)["error"]
        finally:
            reader.end()


def test_what_has_a_line_is_not_measured_again(lines: list[dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "transport-smoke.jsonl"
    kept = Lines(path)
    for line in lines:
        kept.put(line | {"metrics": dict.fromkeys(line["metrics"], 7), "skipped": "kept"})
    told = smoke(path)
    assert "nothing is left to measure" in told
    assert all(set(one["metrics"].values()) <= {7} for one in read(path))


def test_the_report_shows_every_system(lines: list[dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "transport-smoke.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write(tmp_path)
    text = (tmp_path / "transport.md").read_text()
    assert "| boto3 |" in text and "| objectcache-aiobotocore, verified |" in text
    assert (tmp_path / "transport-smoke.svg").stat().st_size > 1000


def test_a_later_line_of_a_case_takes_the_place_of_the_earlier() -> None:
    line = {"benchmark": "transport", "machine": "m", "commit": "a", "system": "s", "case": {}}
    found = latest([line | {"metrics": {"x": 1}}, line | {"commit": "b", "metrics": {"x": 2}}])
    assert [one["metrics"] for one in found] == [{"x": 2}]


def test_all_that_was_asked_for_is_a_case() -> None:
    found = list(cases(Scale(slots=256, objects=64, cores=16)))
    rates = {
        (one.case["request_mib"], one.case["in_flight"]) for one in found if "rate-n" in one.plan
    }
    assert rates == {(size, n) for size in (1, 4, 16, 32) for n in (1, 16, 64, 256)}
    layers = {one.reads for one in found if one.plan == "layers-nginx"}
    latency = {one.reads for one in found if one.plan == "latency-s3-like"}
    assert (layers, latency) == ({16, 64, 256}, {224})


def test_a_reason_holds_no_path_of_this_machine() -> None:
    assert clean("no /opt/some/where/lib.so, sorry") == "no ..., sorry"


def test_the_modelled_best_time_is_the_latest_first_byte_and_a_body() -> None:
    assert sigma(FIRST_BYTE_P50_MS, FIRST_BYTE_P99_MS) == pytest.approx(0.619, abs=0.001)
    assert modelled_best_s(1, 85 * 1_000_000) == pytest.approx(1.027, abs=0.001)
    assert modelled_best_s(224, 32 * MIB) == pytest.approx(0.541, abs=0.005)


class ToyEngine:
    """Steps of 2 ms that only wait."""

    def begin(self) -> list[str]:
        return ["one"]

    def step_times_ms(self, seconds: float) -> list[float]:
        time.sleep(seconds)
        return [2.0] * max(1, int(seconds / 0.002))

    def end(self, names: list[str]) -> None:
        assert names == ["one"]


def test_steps_are_measured_beside_a_verified_stream(tmp_path: Path) -> None:
    before = dict(os.environ)
    with Lab(tmp_path, Scale(2, 2, 2, slice_bytes=4096), {"s3-like"}, destination=False) as lab:
        os.environ.update(lab.env())
        memory = memoryview(bytearray(2 * lab.chunks.object_bytes))
        client = ObjectCacheAiobotocore(Endpoint(**lab.endpoints()["s3-like"]), 2, memory)
        try:
            source, seen = ClientSource(lab.chunks, memory, client), Seen()
            stream = Stream("objectcache-aiobotocore", 0, 0.0)
            engine: Any = ToyEngine()
            for _ in range(10):  # a machine that is busy opens its first connection late
                measure(engine, source, stream, 0.5, seen)
                if seen.gb_per_s[-1] > 0:
                    break
            assert seen.gb_per_s[-1] > 0 and seen.metrics()["step_p50_ms"] == 2.0
            assert memory[:100] == lab.chunks.content(0)[:100]
            served = lab.chunks.folder / lab.chunks.key(1)
            served.write_bytes(bytes(lab.chunks.object_bytes))
            source.start(0.0)
            with pytest.raises(Corrupt):
                time.sleep(0.5)
                source.stop()
        finally:
            client.close()
            os.environ.clear()
            os.environ.update(before)


@pytest.mark.skipif(bool(nginx_absent() or tls_absent()), reason=nginx_absent() or tls_absent())
def test_nginx_serves_files_by_http_and_by_https_and_counts(tmp_path: Path) -> None:
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "key").write_bytes(b"body")
    with Nginx(tmp_path / "nginx", "bucket", tmp_path, workers=1) as server:
        trust = ssl.create_default_context(cafile=server.ca)
        before = server.requests()
        for url in (server.endpoint_url, server.tls_url):
            with urllib.request.urlopen(f"{url}/bucket/key", context=trust, timeout=5) as answer:
                assert answer.read() == b"body"
        assert server.requests() - before == 2
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE"):
            urllib.request.urlopen(f"{server.tls_url}/bucket/key", timeout=5)


def test_the_s3_like_server_keeps_its_rate_and_its_limit(tmp_path: Path) -> None:
    (tmp_path / "bucket").mkdir()
    body = os.urandom(1 << 20)
    (tmp_path / "bucket" / "key").write_bytes(body)
    law = {"p50_ms": 20, "p99_ms": 20.001, "bytes_per_s": 4e6, "requests_per_s": 16}
    with S3Like(tmp_path / "server", "bucket", tmp_path, 1, **law) as server:
        client = boto3.client(
            "s3",
            endpoint_url=server.endpoint_url,
            aws_access_key_id="any",
            aws_secret_access_key="any",
            region_name="us-east-1",
            config=Config(retries={"total_max_attempts": 1}),
        )
        began = time.monotonic()
        assert client.get_object(Bucket="bucket", Key="key")["Body"].read() == body
        assert time.monotonic() - began > 0.02 + 0.6 * len(body) / 4e6  # a burst goes ahead
        part = client.get_object(Bucket="bucket", Key="key", Range="bytes=5-9")
        assert part["Body"].read() == body[5:10] and part["ContentRange"].endswith("/1048576")
        assert client.head_object(Bucket="bucket", Key="key")["ContentLength"] == len(body)
        with pytest.raises(ClientError, match="NoSuchKey"):
            client.get_object(Bucket="bucket", Key="none")
        with pytest.raises(ClientError, match="SlowDown"):
            for _ in range(30):
                client.get_object(Bucket="bucket", Key="key", Range="bytes=0-0")["Body"].read()
        assert server.counts().throttled == 1
        assert server.counts().requests >= 5


def test_servers_run_on_the_cores_that_are_theirs(tmp_path: Path) -> None:
    assert cores_of("16-18,24") == {16, 17, 18, 24}
    theirs = max(os.sched_getaffinity(0))
    script = (
        "import os, sys; from pathlib import Path; from benchmarks.servers import Process, apart;"
        "child = Process([sys.executable, '-c', 'import os; print(os.sched_getaffinity(0))'],"
        "Path(sys.argv[1]), dict(os.environ)); os.waitpid(child.pid, 0); print(apart())"
    )
    env = os.environ | {"OBJECTCACHE_SERVER_CORES": str(theirs), "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", script, str(tmp_path / "log")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=60)
    assert (tmp_path / "log").read_text() == f"{ {theirs} }\n"
    assert done.stdout == "{}\n"  # they are this process's own as well


def test_a_lane_has_its_gpu_cores_and_caches(tmp_path: Path) -> None:
    first, last = min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))
    script = (
        "import os; from benchmarks.servers import cores; "
        "print(os.sched_getaffinity(0), cores(), os.environ['CUDA_VISIBLE_DEVICES'], os.environ['VLLM_CACHE_ROOT'])"
    )
    lane = Path(__file__).parent.parent / "benchmarks" / "lane.sh"
    command = [str(lane), "3", str(first), str(last), sys.executable, "-c", script]
    env = os.environ | {"OBJECTCACHE_LANE_CACHES": str(tmp_path), "PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split("\n")[0] == f"{ {first} } { {last} } 3 {tmp_path / '3'}"


def test_second_requests_are_measured_beside_none(tmp_path: Path) -> None:
    """Enough reads to know the store by, and each line says what it cost."""
    out = tmp_path / "hedges.jsonl"
    options = ["--percent", "0,20", "--chunks", "8", "--slice-kib", "4", "--rounds", "12"]
    run("hedges", *options, "--out", str(out), limit_s=120)
    lines = {line["case"]["hedge_percent"]: line["metrics"] for line in read(out)}
    assert set(lines) == {0, 20}
    assert lines[0]["extra_requests_percent"] == 0 and lines[0]["requests_per_chunk"] == 1
    assert 0 < lines[20]["extra_requests_percent"] <= 100 * (32 + 8 * 12 * 0.2) / (8 * 12)
    for metrics in lines.values():
        assert 0 < metrics["layer0_p50_ms"] <= metrics["last_layer_p95_ms"]


def test_what_second_requests_give_by_calculation() -> None:
    alone, hedged = (calculated(28, percent, 300) for percent in (0, 5))
    # Of 28 of that law the latest takes 91 ms in the median.
    assert alone["first_bytes_p50_ms"] == pytest.approx(91, rel=0.1)
    assert hedged["first_bytes_p95_ms"] < 0.9 * alone["first_bytes_p95_ms"]
    assert 0 < hedged["extra_requests_percent"] <= 5.5


def test_movers_bring_a_prefix_from_each_kind_of_store(tmp_path: Path) -> None:
    """What a line says of layers, of CPU time and of requests fits together; and a table comes of it."""
    out = tmp_path / "movers-smoke.jsonl"
    options = ["--stores", "s3-like,seaweedfs", "--chunks", "6", "--slice-kib", "16"]
    options += ["--processes", "2", "--threads", "2", "--rounds", "2", "--machine", "smoke"]
    run("movers", *options, "--folder", str(tmp_path), "--out", str(out), limit_s=120)
    lines = {line["case"]["store"]: line["metrics"] for line in read(out)}
    assert set(lines) == {"s3-like", "seaweedfs"}
    for found in lines.values():
        assert 0 < found["layer0_ms"] <= found["middle_layer_ms"] <= found["last_layer_ms"]
        assert found["cpu_s_per_gb"] > 0
    assert 0 < lines["s3-like"]["share_of_best_percent"] <= 110
    assert lines["s3-like"]["requests_per_gib"] >= (1 << 30) / (32 * (16 << 10)) * 0.9
    write_report(tmp_path)
    assert (tmp_path / "movers.md").read_text().count("\n| smoke") == 2
