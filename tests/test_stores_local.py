"""What only a store of files can get wrong. What it shares with all stores: test_stores_contract.py."""

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from objectcache.errors import Misconfigured
from objectcache.stores.base import Store
from objectcache.stores.local import LocalStore

BODY = bytes(range(256)) * 12_000


def _run(root: Path, scenario: Callable[[Store], Awaitable[None]]) -> None:
    async def opened() -> None:
        store = LocalStore(root)
        try:
            await scenario(store)
        finally:
            await store.close()

    asyncio.run(opened())


async def _whole(store: Store, key: str, size: int) -> bytes:
    into = bytearray(size)
    await store.read(key, memoryview(into))
    return bytes(into)


def test_partial_files_are_not_objects_and_go_away(tmp_path: Path) -> None:
    async def scenario(store: Store) -> None:
        stale, fresh = tmp_path / ".partial" / "stale", tmp_path / ".partial" / "fresh"
        stale.parent.mkdir()
        stale.write_bytes(b"x")
        fresh.write_bytes(b"x")
        os.utime(stale, (1, 1))
        assert [entry async for entry in store.list("")] == []
        await store.write("ns/key", memoryview(BODY))
        writing = asyncio.ensure_future(store.write("ns/other", memoryview(BODY)))
        while store.counters.written_bytes == len(BODY):
            await asyncio.sleep(0)
        writing.cancel()
        await asyncio.wait([writing])
        await asyncio.sleep(0.05)
        assert [path.name for path in stale.parent.iterdir()] == ["fresh"]
        assert [key async for key, _ in store.list("")] == ["ns/key"]

    _run(tmp_path, scenario)


def test_a_file_system_without_links_still_writes_once(tmp_path: Path) -> None:
    def link(source: str, target: str) -> None:
        raise PermissionError(1, "no links here")

    async def scenario() -> None:
        stores = [LocalStore(tmp_path, link=link) for _ in range(2)]
        bodies = [bytes([i]) * 10 for i in range(16)]
        for key in (f"ns/{i}" for i in range(60)):
            won = await asyncio.gather(
                *(stores[i % 2].write(key, memoryview(b)) for i, b in enumerate(bodies))
            )
            assert won.count(True) == 1
            assert await _whole(stores[0], key, 10) == bodies[won.index(True)]
        for store in stores:
            await store.close()

    asyncio.run(scenario())


def test_a_cancelled_call_ends_after_its_thread(tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def link(source: str, target: str) -> None:
        begun.set()
        go_on.wait(10)
        os.link(source, target)

    async def scenario() -> None:
        store = LocalStore(tmp_path, link=link)
        writing = asyncio.ensure_future(store.write("key", memoryview(BODY)))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        for _ in range(2):
            writing.cancel()
            await asyncio.sleep(0.02)
            assert not writing.done()
        go_on.set()
        await asyncio.wait([writing])
        assert writing.cancelled()
        await store.close()

    asyncio.run(scenario())


def test_a_directory_that_cannot_be_is_refused_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")

    async def scenario(store: Store) -> None:
        with pytest.raises(Misconfigured, match="hint:"):
            await store.check()

    _run(tmp_path / "file" / "below", scenario)
