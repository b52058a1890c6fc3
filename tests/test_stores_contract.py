"""What any store must do, against every store and S3 server we can start. Faults: test_s3_faults.py."""

import asyncio
import mmap
import threading
import time

import pytest
from store_places import (  # noqa: F401 (pytest looks for the fixtures here)
    BODY,
    MARKS,
    Place,
    ceph_fixture,
    place_fixture,
)

from objectcache.errors import Corrupt, Misconfigured, NotFound, ObjectCacheError
from objectcache.stores.base import Store


async def _whole(store: Store, key: str, size: int) -> bytes:
    into = bytearray(size)
    await store.read(key, memoryview(into))
    return bytes(into)


@pytest.mark.parametrize("size", [0, 1, 65_537, len(BODY)])
def test_what_was_written_is_read_back(place: Place, size: int) -> None:
    async def scenario(store: Store) -> None:
        assert await store.write("ns/key", memoryview(BODY)[:size])
        assert await store.head("ns/key") == size
        assert await _whole(store, "ns/key", size) == BODY[:size]

    place.run(scenario)


@pytest.mark.parametrize(
    ("start", "size"), [(0, 1), (0, 1000), (1, 2_000_000), (len(BODY) - 5, 5), (7, 0)]
)
def test_a_range_is_exactly_that(place: Place, start: int, size: int) -> None:
    async def scenario(store: Store) -> None:
        await store.write("ns/key", memoryview(BODY))
        into = bytearray(b"\xaa" * (size + 2))
        await store.read("ns/key", memoryview(into)[1 : 1 + size], start=start)
        assert into == b"\xaa" + BODY[start : start + size] + b"\xaa"

    place.run(scenario)


@pytest.mark.parametrize(
    ("start", "size"),
    [(None, 999), (None, 1001), (None, 0), (0, 1001), (500, 501), (1000, 1), (5000, 1), (1001, 0)],
)
def test_a_length_that_does_not_fit_is_corrupt(place: Place, start: int | None, size: int) -> None:
    async def scenario(store: Store) -> None:
        await store.write("ns/key", memoryview(BODY)[:1000])
        with pytest.raises(Corrupt):
            await store.read("ns/key", memoryview(bytearray(size)), start=start)
        assert await _whole(store, "ns/key", 1000) == BODY[:1000]

    place.run(scenario)


def test_an_empty_object_has_no_ranges(place: Place) -> None:
    async def scenario(store: Store) -> None:
        await store.write("ns/empty", memoryview(b""))
        with pytest.raises(Corrupt):
            await store.read("ns/empty", memoryview(bytearray(1)), start=0)

    place.run(scenario)


def test_what_is_absent_is_not_found(place: Place) -> None:
    async def scenario(store: Store) -> None:
        await store.write("ns/key", memoryview(b"there"))
        for key in ("ns/kez", "other/key", "ns"):
            with pytest.raises(NotFound):
                await store.head(key)
            with pytest.raises(NotFound):
                await store.read(key, memoryview(bytearray(5)))
            with pytest.raises(NotFound):
                await store.read(key, memoryview(bytearray(2)), start=1)

    place.run(scenario)


def test_an_object_is_written_once(place: Place) -> None:
    async def scenario(store: Store) -> None:
        assert await store.write("ns/key", memoryview(b"first")) is True
        assert await store.write("ns/key", memoryview(b"later")) is False
        assert await _whole(store, "ns/key", 5) == b"first"

    place.run(scenario)


def test_of_many_writers_at_once_one_wins(place: Place) -> None:
    async def scenario(store: Store) -> None:
        other = place.open("race")
        bodies = [bytes([i]) * 100_000 for i in range(20)]
        try:
            won = await asyncio.gather(
                *(
                    (store, other)[i % 2].write("ns/key", memoryview(b))
                    for i, b in enumerate(bodies)
                )
            )
        finally:
            await other.close()
        assert won.count(True) == 1
        assert await _whole(store, "ns/key", 100_000) == bodies[won.index(True)]

    place.run(scenario, below="race")


def test_no_reader_sees_an_object_in_part(place: Place) -> None:
    async def scenario(store: Store) -> None:
        async def look() -> int:
            sizes = set()
            while not writing.done():
                try:
                    sizes.add(await store.head("ns/key"))
                except NotFound:
                    sizes.add(-1)
                await asyncio.sleep(0)
            return len(sizes - {-1, len(BODY)})

        writing = asyncio.ensure_future(store.write("ns/key", memoryview(BODY)))
        assert await look() == 0
        assert await writing

    place.run(scenario)


def test_landed_rises_to_the_end_and_tells_the_truth(place: Place) -> None:
    async def scenario(store: Store) -> None:
        await store.write("ns/key", memoryview(BODY))
        for start, marks in ((None, ()), (None, MARKS), (10, ()), (10, MARKS)):
            want = BODY[start or 0 :]
            into, seen, busy = bytearray(len(want)), [0], threading.Lock()

            def landed(
                n: int,
                into: bytearray = into,
                seen: list[int] = seen,
                want: bytes = want,
                busy: threading.Lock = busy,
            ) -> None:
                assert busy.acquire(blocking=False)
                assert into[seen[-1] : n] == want[seen[-1] : n]
                seen.append(n)
                busy.release()

            await store.read(
                "ns/key", memoryview(into), start=start, marks=[*marks, len(want)], landed=landed
            )
            assert seen == sorted(seen)
            assert seen[-1] == len(want)
            ended = len(seen)
            await asyncio.sleep(0.01)
            assert len(seen) == ended

    place.run(scenario)


@pytest.mark.parametrize(("start", "slice_bytes"), [(None, 1 << 20), (5, 700_001), (None, 6 << 20)])
def test_a_large_object_comes_in_order_with_news_at_each_mark(
    place: Place, start: int | None, slice_bytes: int
) -> None:
    """A data path may ask for such an object in several pieces."""
    body = BODY * 4
    want = body[start or 0 :]
    marks = [*range(4096, len(want), slice_bytes), len(want)]

    async def scenario(store: Store) -> None:
        await store.write("ns/key", memoryview(body))
        into, seen = bytearray(len(want)), [0]

        def landed(n: int) -> None:
            assert into[seen[-1] : n] == want[seen[-1] : n]
            seen.append(n)

        await store.read("ns/key", memoryview(into), start=start, marks=marks, landed=landed)
        assert into == want
        assert seen[-1] == len(want)
        for mark in marks if place.kind != "memory" else ():  # the news of it came before much else
            assert next(n for n in seen if n >= mark) - mark < 5 << 20
        with pytest.raises(Corrupt):
            await store.read("ns/key", memoryview(bytearray(len(body) + 1)), marks=marks)

    place.run(scenario)


@pytest.mark.parametrize(
    "raised", [ZeroDivisionError(), TimeoutError("mine"), OSError("mine"), NotFound("mine")]
)
def test_an_exception_from_landed_ends_the_read_and_comes_out(
    place: Place, raised: Exception
) -> None:
    async def scenario(store: Store) -> None:
        calls = []

        def landed(n: int) -> None:
            calls.append(n)
            raise raised

        await store.write("ns/key", memoryview(BODY))
        with pytest.raises(type(raised)) as caught:
            await store.read("ns/key", memoryview(bytearray(len(BODY))), landed=landed)
        assert caught.value is raised
        assert len(calls) == 1
        assert await _whole(store, "ns/key", len(BODY)) == BODY

    place.run(scenario, max_connections=2)


def test_a_cancelled_read_writes_no_more_and_leaves_the_store_usable(place: Place) -> None:
    async def scenario(store: Store) -> None:
        await store.write("ns/key", memoryview(BODY))
        loop, loop_thread = asyncio.get_running_loop(), threading.get_ident()
        for _ in range(8):
            into = bytearray(len(BODY))
            reading: asyncio.Future[None]
            loop = asyncio.get_running_loop()

            def landed(n: int) -> None:
                if threading.get_ident() == loop_thread:
                    reading.cancel()  # noqa: B023 (called while this turn of the loop lasts)
                else:
                    loop.call_soon_threadsafe(reading.cancel)  # noqa: B023

            reading = asyncio.ensure_future(store.read("ns/key", memoryview(into), landed=landed))
            await asyncio.wait([reading])
            then = bytes(into)
            await asyncio.sleep(0.01)
            assert bytes(into) == then
        assert await _whole(store, "ns/key", len(BODY)) == BODY

    place.run(scenario, max_connections=2)


def test_a_cancelled_read_gives_the_memory_back(place: Place) -> None:
    """Whoever gets the memory next must not find the old read writing there."""

    async def scenario(store: Store) -> None:
        await store.write("ns/key", memoryview(BODY))
        for turns in range(40):
            into = mmap.mmap(-1, len(BODY))  # fresh pages, which are slow to fill
            reading = asyncio.ensure_future(store.read("ns/key", memoryview(into)))
            for _ in range(turns % 11):
                await asyncio.sleep(0)
            time.sleep(20e-6 * (turns % 7))  # a thread may be in the middle of it now
            reading.cancel()
            await asyncio.wait([reading])
            then = into[:]
            await asyncio.sleep(0.002)
            assert into[:] == then

    place.run(scenario, max_connections=2)


def test_a_cancelled_write_leaves_all_or_nothing(place: Place) -> None:
    async def scenario(store: Store) -> None:
        for i, turns in enumerate((0, 1, 2, 5, 10, 20)):
            writing = asyncio.ensure_future(store.write(f"ns/{i}", memoryview(BODY)))
            for _ in range(turns):
                await asyncio.sleep(0.001)
            writing.cancel()
            await asyncio.wait([writing])
        await asyncio.sleep(0.1)
        for _, size in [entry async for entry in store.list("ns/")]:
            assert size == len(BODY)
        await store.write("ns/after", memoryview(BODY))
        assert await _whole(store, "ns/after", len(BODY)) == BODY

    place.run(scenario, max_connections=2)


@pytest.mark.parametrize("max_connections", [1, 4])
def test_more_calls_than_connections_queue(place: Place, max_connections: int) -> None:
    async def scenario(store: Store) -> None:
        count = 24
        views = [memoryview(BODY)[i : i + 50_000] for i in range(count)]
        assert all(await asyncio.gather(*(store.write(f"ns/{i}", views[i]) for i in range(count))))
        reads = (_whole(store, f"ns/{i}", 50_000) for i in range(count))
        heads = (store.head(f"ns/{i}") for i in range(count))
        got, sizes = await asyncio.gather(asyncio.gather(*reads), asyncio.gather(*heads))
        assert got == [bytes(view) for view in views]
        assert sizes == [50_000] * count

    place.run(scenario, max_connections=max_connections)


def test_list_gives_the_keys_below_a_prefix_in_order(place: Place) -> None:
    async def scenario(store: Store) -> None:
        keys = ["ns/a", "ns/a-b/c", "ns/a.b", "ns/ab/c", "ns/ab/d/e", "ns/b", "nt/a"]
        for size, key in enumerate(keys):
            await store.write(key, memoryview(BODY)[:size])
        every = [(key, size) for size, key in enumerate(keys)]
        for prefix in ("", "n", "ns/", "ns/a", "ns/ab/", "ns/ab/d/e", "ns/zz", "zz/"):
            listed = [entry async for entry in store.list(prefix)]
            assert listed == sorted(e for e in every if e[0].startswith(prefix)), prefix

    place.run(scenario)


def test_list_goes_on_behind_its_first_page(place: Place) -> None:
    if place.kind == "s3-moto":
        pytest.skip("a thousand requests take moto seconds, and the others page as S3 does")

    async def scenario(store: Store) -> None:
        keys = [f"ns/{i:04d}" for i in range(1005)]  # S3 gives 1000 at a time
        await asyncio.gather(*(store.write(key, memoryview(b"x")) for key in keys))
        assert [key async for key, _ in store.list("ns/")] == keys
        if place.kind.startswith("s3"):
            assert store.counters.list_requests == 2

    place.run(scenario)


def test_delete_removes_and_is_idempotent(place: Place) -> None:
    async def scenario(store: Store) -> None:
        await store.write("ns/key", memoryview(b"x"))
        await store.delete("ns/key")
        with pytest.raises(NotFound):
            await store.head("ns/key")
        await store.delete("ns/key")
        await store.delete("never/was")
        assert await store.write("ns/key", memoryview(b"again"))

    place.run(scenario)


def test_stores_of_two_prefixes_do_not_meet(place: Place) -> None:
    async def scenario(store: Store) -> None:
        deeper = place.open("outer/inner")
        try:
            await store.write("inner2/key", memoryview(b"outer"))
            assert await deeper.write("key", memoryview(b"inner"))
            assert [key async for key, _ in deeper.list("")] == ["key"]
            if place.kind != "memory":  # whose name is one name, slashes or not
                assert await _whole(store, "inner/key", 5) == b"inner"
        finally:
            await deeper.close()

    place.run(scenario, below="outer")


@pytest.mark.parametrize(
    "key", ["", "/abs", "a//b", "a/", "..", "a/../b", ".hidden", "a b", "ä", "a\n", "\\", "x" * 901]
)
def test_a_key_that_some_store_cannot_hold_is_refused(place: Place, key: str) -> None:
    async def scenario(store: Store) -> None:
        with pytest.raises(Misconfigured):
            await store.write(key, memoryview(b"x"))
        assert [entry async for entry in store.list("")] == []

    place.run(scenario)


def test_any_other_printable_key_is_held(place: Place) -> None:
    async def scenario(store: Store) -> None:
        for mark in "!\"#$%&'()*+,-.:;<=>?@[]^_`{|}~":
            key = f"ns/a{mark}b%2Fc"
            assert await store.write(key, memoryview(mark.encode())), key
            assert await _whole(store, key, 1) == mark.encode()
            assert [k async for k, _ in store.list(key)] == [key]
            await store.delete(key)

    place.run(scenario)


def test_counters_count(place: Place) -> None:
    async def scenario(store: Store) -> None:
        await store.write("ns/key", memoryview(BODY)[:5000])
        await store.write("ns/key", memoryview(BODY)[:5000])
        await store.head("ns/key")
        await _whole(store, "ns/key", 5000)
        await store.read("ns/key", memoryview(bytearray(10)), start=3)
        _ = [entry async for entry in store.list("")]
        await store.delete("ns/key")
        seen = store.counters
        assert (seen.put_requests, seen.head_requests, seen.get_requests) == (2, 1, 2)
        assert (seen.list_requests, seen.delete_requests, seen.read_bytes) == (1, 1, 5010)
        assert seen.written_bytes in (5000, 10_000)  # a file store need not write a duplicate

    place.run(scenario)


def test_check_is_content_with_a_store_that_works(place: Place) -> None:
    async def scenario(store: Store) -> None:
        await store.check()
        assert [entry async for entry in store.list("")] == []

    place.run(scenario)


def test_close_is_idempotent_and_final(place: Place, recwarn: pytest.WarningsRecorder) -> None:
    async def scenario(store: Store) -> None:
        await store.write("ns/key", memoryview(b"x"))
        await store.close()
        await store.close()
        with pytest.raises(ObjectCacheError):
            await store.head("ns/key")

    threads = set(threading.enumerate())
    place.run(scenario)
    for thread in set(threading.enumerate()) - threads:
        if "moto" not in thread.name and "process_request" not in thread.name:
            thread.join(5)
            assert not thread.is_alive(), thread.name
    assert [str(w.message) for w in recwarn if "nclosed" in str(w.message)] == []


def test_a_store_closes_that_was_never_used(place: Place) -> None:
    async def scenario(store: Store) -> None:
        assert store.name.startswith(place.url)

    place.run(scenario)


def test_a_file_store_needs_no_s3_client() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from objectcache.config import Options; from objectcache.stores import open_store;"
        "open_store(Options(url='file:///tmp/x')); open_store(Options(url='memory://x'));"
        "sys.exit('aiobotocore' in sys.modules or 'botocore' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
