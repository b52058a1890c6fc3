"""One wire for several processes: its rate is kept, shared by bodies, and may change. Also what is uploaded to the server that has it."""

import os
import resource
import socket
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.raw_reads import rate_bytes_per_s
from benchmarks.s3_like import S3Like
from benchmarks.shared_wire import BURST_S, PIECE_BYTES, Share, Wire


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def shares(folder: Path, rate: float, bodies: list[int]) -> tuple[Wire, list[Share], Clock]:
    clock = Clock()
    Wire.make(folder / "wire", len(bodies), rate)
    wire = Wire(folder / "wire", len(bodies))
    found = [Share(Wire(folder / "wire", len(bodies)), n, clock) for n in range(len(bodies))]
    for share, count in zip(found, bodies, strict=True):
        for _ in range(count):
            share.begins()
    return wire, found, clock


def sent(share: Share) -> int:
    total = 0
    while count := share.take(1 << 30):
        assert count <= PIECE_BYTES
        total += count
    return total


@settings(max_examples=20, deadline=None)
@given(
    rate=st.sampled_from([50e6, 1.25e9, 12.5e9]),
    bodies=st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any),
)
def test_all_together_keep_the_rate_each_by_its_bodies(
    rate: float, bodies: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("wire")
    _, found, clock = shares(folder, rate, bodies)
    totals = [0] * len(found)
    for _ in range(500):
        clock.now += 0.001
        for number, share in enumerate(found):
            totals[number] += sent(share) if bodies[number] else 0
    slack = PIECE_BYTES * len(found) + rate * (BURST_S + 0.001)
    assert rate / 2 - slack <= sum(totals) <= rate / 2 + slack
    for total, count in zip(totals, bodies, strict=True):
        part = rate / 2 * count / sum(bodies)
        assert abs(total - part) <= 2 * PIECE_BYTES + part * (BURST_S + 0.001)


def test_the_rate_changes_and_who_ends_leaves_its_part_to_the_others(tmp_path: Path) -> None:
    wire, (one, other), clock = shares(tmp_path, 1e9, [1, 1])
    assert one.limits

    def in_a_second() -> tuple[int, int]:
        totals = [0, 0]
        for _ in range(1000):
            clock.now += 0.001
            totals[0] += sent(one)
            totals[1] += sent(other)
        return totals[0], totals[1]

    assert in_a_second() == pytest.approx((5e8, 5e8), rel=0.02)
    other.ends()
    assert in_a_second() == pytest.approx((1e9, 0), rel=0.02, abs=PIECE_BYTES + 1e9 * 0.005)
    wire.bytes_per_s = 2e8
    assert in_a_second()[0] == pytest.approx(2e8, rel=0.03)
    wire.bytes_per_s = 0.0
    assert not one.limits


def test_what_is_not_sent_is_given_back_and_nothing_is_saved_up(tmp_path: Path) -> None:
    _, (one,), clock = shares(tmp_path, 1e9, [1])
    clock.now += 0.002
    one.take(1000)
    clock.now += 0.010
    assert one.wait_s() == 0.0
    total = sent(one)
    assert total <= PIECE_BYTES + 1e9 * BURST_S  # not of all the time that passed
    assert one.take(PIECE_BYTES) == 0 and 0 < one.wait_s() < 0.001
    one.give_back(PIECE_BYTES)
    assert one.take(PIECE_BYTES) == PIECE_BYTES


def test_a_server_keeps_the_rate_of_its_wire_while_that_changes(tmp_path: Path) -> None:
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "key").write_bytes(bytes(1 << 20))
    law = {"p50_ms": 0.0, "p99_ms": 0.0, "bytes_per_s": 0.0}
    with S3Like(tmp_path / "server", "bucket", tmp_path, 2, **law) as server:
        for rate in (20e6, 80e6, 40e6):
            server.set_wire(rate)
            got = rate_bytes_per_s(server.port, "/bucket/key", 8, 2.0)
            assert 0.5 * rate < got < 1.2 * rate  # a busy machine gives less
        server.set_wire(0.0)
        assert rate_bytes_per_s(server.port, "/bucket/key", 8, 0.5) > 160e6
        with pytest.raises(OSError, match="not there"):
            rate_bytes_per_s(server.port, "/bucket/none", 1, 0.2)


def test_without_a_limit_nobody_waits(tmp_path: Path) -> None:
    wire, (one,), clock = shares(tmp_path, 1.0, [1])
    clock.now += 1.0
    assert one.take(PIECE_BYTES) == 0
    assert 0 < one.wait_s() < 0.1, "who waits for a slow wire does not see it change"
    wire.bytes_per_s = 0.0
    assert one.wait_s() == 0.0


def test_bodies_that_wait_for_a_slow_wire_come_when_its_limit_is_gone(tmp_path: Path) -> None:
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "key").write_bytes(bytes(8 << 20))
    law = {"p50_ms": 0.0, "p99_ms": 0.0, "bytes_per_s": 0.0, "wire_bytes_per_s": 1000.0}
    with S3Like(tmp_path / "server", "bucket", tmp_path, 1, **law) as server:
        readers = [socket.create_connection(("127.0.0.1", server.port), 10.0) for _ in range(3)]
        for reader in readers:
            reader.sendall(b"GET /bucket/key HTTP/1.1\r\nHost: s3\r\n\r\n")
            assert reader.recv(12) == b"HTTP/1.1 200"  # its head is there, and its body waits
        server.set_wire(0.0)
        for reader in readers:
            came = 0
            while came < 8 << 20:
                data = reader.recv(1 << 20)
                assert data, "the connection was closed"
                came += len(data)
            reader.close()


def test_a_server_may_open_as_many_files_as_the_host_lets_it(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, hard - 1), hard))
    try:
        with S3Like(tmp_path / "server", "bucket", tmp_path, 1, p50_ms=0.0, p99_ms=0.0) as server:
            assert resource.prlimit(server.pid, resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def put(server: S3Like, key: str, body: bytes, **headers: str) -> int:
    url = f"{server.endpoint_url}/{key}"
    request = urllib.request.Request(url, body, headers, method="PUT")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_what_is_uploaded_is_there_at_once_and_never_replaced(tmp_path: Path) -> None:
    law = {"p50_ms": 0.0, "p99_ms": 0.0}
    body = os.urandom(3 << 20)
    with S3Like(tmp_path / "server", "bucket", tmp_path / "o", 2, writable=True, **law) as server:
        url = f"{server.endpoint_url}/bucket/a/b"
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(url, timeout=10)
        assert put(server, "bucket/a/b", body) == 200
        for _ in range(4):  # whichever process answers
            assert urllib.request.urlopen(url, timeout=10).read() == body
        assert put(server, "bucket/a/b", b"other", **{"If-None-Match": "*"}) == 412
        assert put(server, "bucket/a/b", b"other") == 200  # and it stays
        assert (tmp_path / "o/bucket/a/b").read_bytes() == body
        assert put(server, "bucket/empty", b"") == 200
        assert put(server, "../out", b"x") == 405
        assert sorted(p.name for p in (tmp_path / "o").rglob("*")) == ["a", "b", "bucket", "empty"]
    with S3Like(tmp_path / "other", "bucket", tmp_path / "o", 1, **law) as server:
        assert put(server, "bucket/c", b"x") == 405
