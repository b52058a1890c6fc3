"""Where stores of every kind can be opened, S3 servers included. No tests here."""

import asyncio
import os
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from s3_lab import PATHS

from benchmarks.servers import Server, moto_server, radosgw, radosgw_absent, seaweedfs
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


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _server(kind: str, root: Path) -> Server:
    if kind == "s3-moto":
        return moto_server("contract")
    if kind == "s3-seaweedfs":
        return seaweedfs(root, "contract")
    absent = radosgw_absent()
    if absent and os.environ.get("OBJECTCACHE_REQUIRE_CEPH") == "1":
        pytest.fail(absent)
    if absent:
        pytest.skip(absent)
    return radosgw(root, "contract")


@pytest.fixture(name="place", scope="module", params=KINDS)
def place_fixture(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    kind = request.param
    root = tmp_path_factory.mktemp(kind.split()[0])
    if kind == "memory":
        yield Place(kind, "memory://contract")
    elif kind == "file":
        yield Place(kind, f"file://{root}/store")
    else:
        kind, path = kind.split()
        with _server(kind, root / "server") as server, _environment(server.env):
            # moto's objects outlive its server, hence a prefix for each path.
            yield Place(kind, f"s3://contract/some/{path}", server.endpoint_url, PATHS[path])
