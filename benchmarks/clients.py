"""S3 clients behind one face, for transport.py: objectcache and the Python ones. The native ones: native_clients.py.

Each is set up as its documentation advises for many large reads: a pool as large as the reads in
flight, no retries, path-style addresses, no checksums of the client's own. Each pays for the way of
the bytes into the caller's memory.
"""

import asyncio
import dataclasses
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

SILENCE_S = 60.0  # the one timeout: a large read in a crowd of 256 may take long on two cores


_USUAL_COUNTERS = {
    *(f"{verb}_requests" for verb in ("get", "put", "head", "list", "delete")),
    *("read_bytes", "written_bytes"),
}


class Absent(RuntimeError):
    """A system cannot be measured here; the message says why."""


class Read(NamedTuple):
    """Bytes of an object to bring into memory: of a range from `start`, or of all of it (None).

    `landed(n)` says that into[:n] is there; it is called soon after each of `marks` is passed.
    """

    key: str
    start: int | None
    into: memoryview
    marks: tuple[int, ...] = ()
    landed: Callable[[int], None] | None = None

    def range_header(self) -> dict[str, str]:
        if self.start is None:
            return {}
        return {"Range": f"bytes={self.start}-{self.start + len(self.into) - 1}"}


@dataclass(frozen=True)
class Endpoint:
    """Where a server is. The credentials are in the environment, by the names of AWS's chain."""

    url: str
    bucket: str
    ca: str = ""  # PEM file, for https

    @property
    def tls(self) -> bool:
        return self.url.startswith("https:")

    @property
    def access_key(self) -> str:
        return os.environ["AWS_ACCESS_KEY_ID"]

    @property
    def secret_key(self) -> str:
        return os.environ["AWS_SECRET_ACCESS_KEY"]

    @property
    def region(self) -> str:
        return os.environ["AWS_REGION"]


class Client(ABC):
    """`fill` brings all reads, at most `in_flight` (<= most) at once, and returns when all are there.

    `memory` is what the reads are into, for those who must register it.
    """

    def __init__(self, at: Endpoint, most: int, memory: memoryview) -> None:
        self.at, self.most, self.memory = at, most, memory
        self.open()

    @abstractmethod
    def open(self) -> None:
        """Raises Absent if this client cannot be had, or cannot reach such a server."""

    @abstractmethod
    def fill(self, reads: Sequence[Read], in_flight: int) -> None: ...

    def counts(self) -> dict[str, int]:
        """What it says of its own work since it was made, by name."""
        return {}

    @abstractmethod
    def close(self) -> None: ...


class ThreadedClient(Client):
    """A blocking client: threads, one for each read in flight."""

    def open(self) -> None:
        self._threads = ThreadPoolExecutor(self.most)

    def fill(self, reads: Sequence[Read], in_flight: int) -> None:
        left = iter(reads)  # next() of a list's iterator is atomic

        def work() -> None:
            for read in left:
                self.read(read)

        for done in [self._threads.submit(work) for _ in range(min(in_flight, len(reads)))]:
            done.result()

    @abstractmethod
    def read(self, read: Read) -> None: ...

    def close(self) -> None:
        self._threads.shutdown()


class LoopClient(Client):
    """A client of asyncio: one loop in a thread, one task for each read in flight."""

    def open(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.run(self.connect())

    def run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def fill(self, reads: Sequence[Read], in_flight: int) -> None:
        self.run(self._fill(reads, in_flight))

    async def _fill(self, reads: Sequence[Read], in_flight: int) -> None:
        left = iter(reads)

        async def work() -> None:
            for read in left:
                await self.read(read)

        await asyncio.gather(*(work() for _ in range(min(in_flight, len(reads)))))

    async def connect(self) -> None:
        """What must be made on the loop."""

    async def disconnect(self) -> None: ...

    @abstractmethod
    async def read(self, read: Read) -> None: ...

    def close(self) -> None:
        self.run(self.disconnect())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class ObjectCache(LoopClient):
    """Our store, driven as the streamer does: chunks are cut as a plan says, and all reads begin at once;
    the store has its own limit of those in flight, which it adapts."""

    transport = ""

    def open(self) -> None:
        from objectcache.config import Options

        choosable = any(field.name == "transport" for field in dataclasses.fields(Options))
        if not choosable and self.transport != "aiobotocore":
            raise Absent("this version of objectcache has no option 'transport'")
        if self.transport == "direct" and self.at.tls:
            raise Absent("the direct path is for plain http only")
        self._choice = {"transport": self.transport} if choosable else {}
        self._stores: dict[int, Any] = {}
        super().open()

    def _store(self, in_flight: int) -> Any:
        """One for each number of connections, since a store is made for one number."""
        if in_flight not in self._stores:
            from objectcache.config import parse

            options: dict[str, Any] = {
                "url": f"s3://{self.at.bucket}",
                "endpoint_url": self.at.url,
                "region": self.at.region,
                "ca_bundle": self.at.ca,
                "max_connections": _connections(in_flight),
                "connect_timeout_ms": int(SILENCE_S * 1000),
                "read_timeout_ms": int(SILENCE_S * 1000),
                "attempts": 1,
                **self._choice,
            }
            self._stores[in_flight] = self.make(parse(options))
        return self._stores[in_flight]

    def make(self, options: Any) -> Any:
        from objectcache.stores import open_store

        return open_store(options)

    async def _fill(self, reads: Sequence[Read], in_flight: int) -> None:
        store = self._store(in_flight)
        reads = list(_cut(reads, store.pace())) if reads[0].marks else reads
        await asyncio.gather(
            *(
                store.read(
                    read.key, read.into, start=read.start, marks=read.marks, landed=read.landed
                )
                for read in reads
            )
        )

    async def read(self, read: Read) -> None:
        raise NotImplementedError

    def counts(self) -> dict[str, int]:
        """Counters that not every store has, such as how often a path handed a read to another."""
        total: dict[str, int] = {}
        for store in self._stores.values():
            for name, value in vars(store.counters).items():
                if name not in _USUAL_COUNTERS and isinstance(value, int):
                    total[name] = total.get(name, 0) + value
        return total

    async def disconnect(self) -> None:
        for store in self._stores.values():
            await store.close()


def _cut(chunks: Sequence[Read], pace: Any) -> Iterator[Read]:
    """Whole chunks as the parts that a plan has them read in, in its order."""
    from objectcache.format import ObjectLayout
    from objectcache.plan import Limits, plan

    ends = chunks[0].marks
    layout = ObjectLayout(bytes(32), 1, 1, 0, 1, tuple(b - a for a, b in pairwise(ends)))
    assert layout.header_bytes == ends[0], "the plan is for another layout"
    joined = [_Joined(chunk) for chunk in chunks]
    limits = Limits(pace.connections, part_bytes=pace.part_bytes)
    for number, first, last in plan(len(chunks), layout, pace.model, limits).fetches():
        span = layout.span(first, last)
        into, start = (
            chunks[number].into[span],
            None if last - first == len(ends) - 1 else span.start,
        )
        marks = tuple(end - span.start for end in ends if span.start < end <= span.stop)
        landed = joined[number].part(span.start)
        yield Read(chunks[number].key, start, into, marks, landed)


class _Joined:
    """Tells of a chunk that is read in parts how far it is there from its beginning."""

    def __init__(self, chunk: Read) -> None:
        self._chunk = chunk
        self._have: dict[int, int] = {}  # by the first byte of a part: up to where it is there
        self._lock = threading.Lock()

    def part(self, start: int) -> Callable[[int], None]:
        self._have[start] = start

        def landed(n: int) -> None:
            with self._lock:
                self._have[start] = start + n
                there = 0
                while self._have.get(there, 0) > there:
                    there = self._have[there]
                # What is there of the part that is not whole yet counts as well.
                if self._chunk.landed is not None:
                    self._chunk.landed(there)

        return landed


def _connections(reads: int) -> int:
    """The fewest of which a store gives `reads` to bodies; it keeps an eighth, at least one, back."""
    most = reads
    while most - max(1, most // 8) < reads:
        most += 1
    return most


class ObjectCacheDirect(ObjectCache):
    transport = "direct"


class ObjectCacheObstore(ObjectCache):
    transport = "obstore"


class ObjectCacheAiobotocore(ObjectCache):
    transport = "aiobotocore"


class AioBotocore(LoopClient):
    """aiobotocore alone, each piece copied to its place as it comes (`readany`)."""

    async def connect(self) -> None:
        from aiobotocore.config import AioConfig  # type: ignore[import-untyped]
        from aiobotocore.session import AioSession  # type: ignore[import-untyped]

        self._made = AioSession().create_client(
            "s3", **_botocore_options(self.at, AioConfig, self.most)
        )
        self._client = await self._made.__aenter__()

    async def read(self, read: Read) -> None:
        answer = await self._client.get_object(
            Bucket=self.at.bucket, Key=read.key, **read.range_header()
        )
        have, wanted, into = 0, len(read.into), read.into
        async with answer["Body"] as body:
            content = getattr(body, "content", None) or body.raw_stream.content
            while have < wanted:
                piece = await content.readany()
                if not piece:
                    raise ConnectionError(f"{read.key} ended after {have} of {wanted} bytes")
                into[have : have + len(piece)] = piece
                have += len(piece)
                if read.landed is not None:
                    read.landed(have)
            await content.readany()  # the end of the body: the connection may be used again

    async def disconnect(self) -> None:
        await self._made.__aexit__(None, None, None)


class Boto3(ThreadedClient):
    """boto3, received straight into place by the http.client response below its wrappers."""

    def open(self) -> None:
        import boto3  # type: ignore[import-untyped]
        from botocore.config import Config  # type: ignore[import-untyped]

        super().open()
        self._client = boto3.client("s3", **_botocore_options(self.at, Config, self.most))

    def read(self, read: Read) -> None:
        answer = self._client.get_object(Bucket=self.at.bucket, Key=read.key, **read.range_header())
        below = answer["Body"]._raw_stream  # urllib3's, and in it http.client's
        into, have = read.into, 0
        for stop in _stops(read):
            while have < stop:
                count = below._fp.readinto(into[have:stop])
                if not count:
                    raise ConnectionError(f"{read.key} ended after {have} bytes")
                have += count
            if read.landed is not None:
                read.landed(have)
        below._fp.read()  # the end: marks the response as read
        below.release_conn()

    def close(self) -> None:
        super().close()
        self._client.close()


def _stops(read: Read) -> Iterator[int]:
    """Where to stop and tell: the marks, and the end."""
    yield from (mark for mark in read.marks if mark < len(read.into))
    yield len(read.into)


def _botocore_options(at: Endpoint, config: Any, most: int) -> dict[str, Any]:
    return {
        "endpoint_url": at.url,
        "region_name": at.region,
        "verify": at.ca or None,
        "config": config(
            max_pool_connections=most,
            connect_timeout=SILENCE_S,
            read_timeout=SILENCE_S,
            retries={"total_max_attempts": 1, "mode": "standard"},
            s3={"addressing_style": "path", "payload_signing_enabled": False},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    }


def system(name: str) -> type[Client]:
    """The class of a system. Raises Absent with the reason if its package is not installed."""
    systems: dict[str, type[Client]] = {
        "objectcache-direct": ObjectCacheDirect,
        "objectcache-obstore": ObjectCacheObstore,
        "objectcache-aiobotocore": ObjectCacheAiobotocore,
        "aiobotocore": AioBotocore,
        "boto3": Boto3,
    }
    if name not in systems:
        from benchmarks.native_clients import NATIVE

        systems = NATIVE
    return systems[name]


SYSTEMS = (
    "objectcache-direct",
    "objectcache-obstore",
    "objectcache-aiobotocore",
    "aiobotocore",
    "boto3",
    "obstore",
    "obstore-threads",
    "awscrt",
    "s3torchconnector",
    "nixl-obj",
)
