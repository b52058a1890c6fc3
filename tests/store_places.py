"""Where stores of every kind can be opened, S3 servers included. No tests here."""

import asyncio
import os
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from s3_lab import PATHS, bucket, environment

from benchmarks.servers import Server, moto_server, radosgw, radosgw_absent
from objectcache.config import Options, parse
from objectcache.stores import open_store
from objectcache.stores.base import Store

SERVERS = ("s3-moto", "s3-seaweedfs", "s3-radosgw")
KINDS = ("memory", "file", *(f"{server} {path}" for server in SERVERS for path in PATHS))
BODY = bytes(range(256)) * 12_000  # 3 MiB: several pieces for every store
MARKS = (4096, 1_000_000, 2_000_000)


@dataclass
class Place:
    """Where stores of one kind can be opened, each below a prefix of its own."""

    kind: str
    url: str
    endpoint_url: str = ""
    make: Callable[[Options], Store] = open_store

    def open(self, below: str = "", **options: object) -> Store:
        url = f"{self.url}/{below or uuid.uuid4().hex}"
        return self.make(parse({"url": url, "endpoint_url": self.endpoint_url, **options}))

    def run(
        self, scenario: Callable[[Store], Awaitable[None]], below: str = "", **options: object
    ) -> None:
        async def opened() -> None:
            store = self.open(below, **options)
            try:
                await scenario(store)
            finally:
                await store.close()

        asyncio.run(asyncio.wait_for(opened(), 60))


@pytest.fixture(name="ceph", scope="module")
def ceph_fixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    absent = radosgw_absent()
    if absent and os.environ.get("OBJECTCACHE_REQUIRE_CEPH") == "1":
        pytest.fail(absent)
    if absent:
        pytest.skip(absent)
    with radosgw(tmp_path_factory.mktemp("ceph") / "server", "contract") as server:
        yield server


@contextmanager
def _server(kind: str, request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server with a bucket `contract`, and its credentials in the environment."""
    if kind == "s3-moto":
        with moto_server("contract") as server, environment(server.env):
            yield server
    elif kind == "s3-seaweedfs":
        weed = request.getfixturevalue("weed")
        with bucket(weed, "contract"):
            yield weed
    else:
        ceph = request.getfixturevalue("ceph")
        with environment(ceph.env):
            yield ceph


@pytest.fixture(name="place", scope="module", params=KINDS)
def place_fixture(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    kind = request.param
    if kind == "memory":
        yield Place(kind, "memory://contract")
    elif kind == "file":
        yield Place(kind, f"file://{tmp_path_factory.mktemp(kind)}/store")
    else:
        kind, path = kind.split()
        with _server(kind, request) as server:
            # Objects outlive the place, hence a prefix for each path.
            yield Place(kind, f"s3://contract/some/{path}", server.endpoint_url, PATHS[path])
