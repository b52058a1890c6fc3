"""An HTTP server that says what it is told to say, and a store of the direct path before it. No tests here."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from s3_lab import BODY, PATIENT

from objectcache.config import parse
from objectcache.stores.base import Store
from objectcache.stores.s3 import S3Store
from objectcache.stores.s3_direct import DirectStore

Answer = Callable[[int, int, str], bytes | None]  # connection, its request, head: None closes


class Origin:
    """An HTTP server that says what it is told to say, on some addresses of one port."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.requests: list[tuple[str, str]] = []  # address, head
        self.connections = 0
        self.port = 0
        self._servers: list[asyncio.Server] = []

    async def listen(self, host: str) -> None:
        server = await asyncio.start_server(self._serve, host, self.port)
        self.port = server.sockets[0].getsockname()[1]
        self._servers.append(server)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number, self.connections = self.connections, self.connections + 1
        host = writer.get_extra_info("sockname")[0]
        for count in range(1000):
            try:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
            except (OSError, asyncio.IncompleteReadError):
                break
            self.requests.append((host, head))
            said = self.answer(number, count, head)
            if said is None:
                break
            writer.write(said)
            await writer.drain()
        writer.close()

    async def close(self) -> None:
        for server in self._servers:
            server.close()


def whole(number: int = 0, count: int = 0, head: str = "") -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    for name in before:
        if name.startswith("AWS_") or name.lower().endswith("_proxy"):
            del os.environ[name]
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@asynccontextmanager
async def direct(
    endpoint_url: str, others: Store | None = None, **options: object
) -> AsyncIterator[DirectStore]:
    settings = {"url": "s3://some-bucket", "endpoint_url": endpoint_url, **PATIENT}
    parsed = parse({**settings, "anonymous": True, "attempts": 1, **options})
    library = S3Store(parsed)
    store = DirectStore(library, others or library, parsed)
    try:
        yield store
    finally:
        await store.close()


def run(scenario: Callable[[], Awaitable[None]], **env: str) -> None:
    with environment({"AWS_EC2_METADATA_DISABLED": "true", "AWS_REGION": "us-east-1", **env}):
        asyncio.run(asyncio.wait_for(scenario(), 20))
