"""A real S3 bucket behind a proxy that can break, for the suites of the S3 store. No tests here."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
from fault_server import FaultProxy

from benchmarks.servers import SeaweedFS, Server
from objectcache.config import Options, parse
from objectcache.errors import ObjectCacheError
from objectcache.stores.base import Store, StoreCounters
from objectcache.stores.s3 import S3Store
from objectcache.stores.s3_direct import DirectStore
from objectcache.stores.s3_obstore import ObstoreStore

BODY = os.urandom(600_000)  # of the object `there`
# No answer is late with these, however busy the machine, and none is hedged: requests can be counted.
PATIENT = {"connect_timeout_ms": 5000, "read_timeout_ms": 5000, "attempts": 3, "hedge_percent": 0}
QUICK = {"connect_timeout_ms": 400, "read_timeout_ms": 400}  # for a server that falls silent
PATHS: dict[str, Callable[[Options], Store]] = {  # every data path to S3 passes the same suites
    "aiobotocore": S3Store,
    "obstore": lambda options: ObstoreStore(S3Store(options), options),
    "direct": lambda options: DirectStore(library := S3Store(options), library, options),
}
# Requests that a path may repeat by the library path, so that a rare answer gets its exact error;
# a HEAD by the direct path as a read.
ASKED_TWICE = {"aiobotocore": 0, "obstore": 1, "direct": 0}
READ_TWICE = {"aiobotocore": 0, "obstore": 1, "direct": 1}
SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


class Lab:
    """A bucket with `there` in it, behind a proxy that can break, and stores that live on."""

    def __init__(self, proxy: FaultProxy, path: str) -> None:
        self.proxy = proxy
        self.path = path
        self._runner = asyncio.Runner()
        self._stores: dict[str, Store] = {}

    def run(
        self,
        scenario: Callable[[Store], Awaitable[None]],
        limit_s: float = 5.0,
        **options: object,
    ) -> float:
        """Run `scenario` with a store that is connected; the seconds it took. It is PATIENT but for `options`."""
        return self._runner.run(asyncio.wait_for(self._run(scenario, limit_s, options), 60))

    async def _run(
        self,
        scenario: Callable[[Store], Awaitable[None]],
        limit_s: float,
        options: dict[str, object],
    ) -> float:
        store = self._stores.get(repr(options))
        if store is None:
            settings = {"url": "s3://faults/lab", "endpoint_url": self.proxy.url, **PATIENT}
            store = self._stores[repr(options)] = PATHS[self.path](parse({**settings, **options}))
        fault, self.proxy.fault = self.proxy.fault, None
        script = list(self.proxy.script)
        self.proxy.script.clear()
        await store.check()
        store.counters = StoreCounters()
        self.proxy.requests.clear()
        self.proxy.fault = fault
        self.proxy.script.extend(script)
        began = time.monotonic()
        await scenario(store)
        took_s = time.monotonic() - began
        assert took_s < limit_s
        return took_s

    def close(self) -> None:
        for store in self._stores.values():
            self._runner.run(store.close())
        self._runner.close()


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """These set, and all put back in the end."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def bucket(server: Server, name: str) -> Iterator[Any]:
    """A new bucket on a server that is up, whose credentials are in the environment; removed in the end. Yields a client."""
    client = server.client()
    client.create_bucket(Bucket=name)
    with environment(server.env):
        yield client
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=name):
        if found := [{"Key": entry["Key"]} for entry in page.get("Contents", ())]:
            client.delete_objects(Bucket=name, Delete={"Objects": found})
    client.delete_bucket(Bucket=name)
    client.close()


@contextmanager
def lab_on(server: Server, path: str, key: str, body: bytes) -> Iterator[Lab]:
    """A lab with one object."""
    with bucket(server, "faults") as client, FaultProxy(server.endpoint_url) as proxy:
        client.put_object(Bucket="faults", Key=f"lab/{key}", Body=body)
        lab = Lab(proxy, path)
        yield lab
        lab.close()


@pytest.fixture(scope="module", name="module_lab", params=PATHS)
def module_lab_fixture(request: pytest.FixtureRequest, weed: SeaweedFS) -> Iterator[Lab]:
    with lab_on(weed, request.param, "there", BODY) as lab:
        yield lab


@pytest.fixture(name="lab")
def lab_fixture(module_lab: Lab) -> Lab:
    module_lab.proxy.fault = None
    module_lab.proxy.script.clear()
    return module_lab


@asynccontextmanager
async def opened(
    endpoint_url: str, url: str = "s3://faults", path: str = "aiobotocore", **options: object
) -> AsyncIterator[Store]:
    store = PATHS[path](parse({"url": url, "endpoint_url": endpoint_url, **PATIENT, **options}))
    try:
        yield store
    finally:
        await store.close()


async def read_there(store: Store, start: int | None = None, size: int = len(BODY)) -> None:
    """Read and check every byte, and that `landed` announced only what stayed."""
    into, seen, first = bytearray(size), [0], start or 0

    def landed(n: int) -> None:
        assert n >= seen[-1]
        assert into[:n] == BODY[first : first + n]
        seen.append(n)

    await store.read("there", memoryview(into), start=start, landed=landed)
    assert into == BODY[first : first + size]
    assert seen[-1] == size


async def refused(kind: type[ObjectCacheError], call: Awaitable[object]) -> ObjectCacheError:
    with pytest.raises(kind) as caught:
        await call
    text = f"{caught.value} {caught.value!r} {caught.value.__cause__!r}"
    for name in SECRETS:
        assert os.environ.get(name, "no-such-secret") not in text
    assert type(caught.value) is kind
    return caught.value
