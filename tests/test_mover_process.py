"""A mover in a process of its own does what one in a thread does; and what becomes of an engine's work when that process ends. The commands themselves: test_worker.py."""

import gc
import os
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from multiprocessing.connection import Pipe
from pathlib import Path

import pytest
from fakes import LAYOUT, chunk_hash, eventually, sealed
from fault_server import Fault, FaultProxy
from hypothesis import given
from hypothesis import strategies as st
from sick_server_lab import proxy_fixture  # noqa: F401
from worker_lab import (  # noqa: F401 (pytest looks for the fixtures here)
    BLOCKS,
    LOAD_SLOTS,
    SPACES,
    Worker,
    Workers,
    filled,
    object_path,
    same,
    save,
    stage,
    stream,
    workers_fixture,
)

from objectcache.config import parse
from objectcache.errors import Unavailable
from objectcache.messages import LoadCommand, Saved, StageCommand, Staged, StepCommands, Streamed
from objectcache.mover import Berth, Placed
from objectcache.mover_process import MoverProcess
from objectcache.movers import most_chunks, split
from objectcache.saver import SaveResult
from objectcache.slots import HostSlots
from objectcache.streamer import StageResult
from objectcache.worker import processes_for


def processes() -> set[int]:
    """Of this one's children, those that move bytes."""
    found = set()
    for folder in Path("/proc").iterdir():
        try:
            line = (folder / "cmdline").read_bytes()
            status = (folder / "status").read_text()
        except OSError:
            continue
        if b"mover_process" in line and f"PPid:\t{os.getpid()}\n" in status:
            found.add(int(folder.name))
    return found


@pytest.fixture(name="url")
def url_fixture(tmp_path: Path) -> str:
    return f"file://{tmp_path}"


@pytest.fixture(autouse=True)
def _none_is_left() -> Iterator[None]:
    yield
    assert eventually(lambda: not processes()), "a process is left"


def beside(workers: Workers, url: str, **more: object) -> Worker:
    return workers(url, mover="process", **more)


def kill(worker: Worker) -> None:
    (process,) = processes()
    os.kill(process, signal.SIGKILL)
    assert eventually(lambda: worker.half._mover._child.ended)


def test_what_one_process_saves_another_loads(workers: Workers, url: str) -> None:
    writer = beside(workers, url)
    writer.fill(1)
    writer.step(saves=[save(1, [0, 1]), save(2, [2, 3])])
    assert set(writer.saved(2)) == {Saved(chunk_hash(n), "written") for n in (1, 2)}
    reader = beside(workers, url)
    reader.step(stages=[stage(1, 1, 2)])
    assert reader.staged(1) == Staged(1, 2)
    assert reader.half.leased_slots == 2
    reader.step(loads=[LoadCommand(1, 0, [20, 3, 11, 5])])
    assert same(reader.blocks([20, 3, 11, 5]), writer.blocks([0, 1, 2, 3]))
    assert reader.quiet() and writer.quiet()
    stats = reader.half.stats()
    assert stats is not None and stats.data["read_bytes"] > 0 and stats.data["staged_chunks"] == 2


def test_a_prefix_larger_than_the_ring_streams_through_it(workers: Workers, url: str) -> None:
    writer = filled(workers, url, 12)
    reader = beside(workers, url, streams=True)
    ids = [(7 * at) % BLOCKS for at in range(BLOCKS)]
    reader.step(streams=[stream(1, *range(1, 13), ids=ids)])
    assert reader.streamed(1) == Streamed(1, 12)
    assert same(reader.blocks(ids), writer.blocks(list(range(BLOCKS))))
    assert reader.quiet()


def test_a_corrupt_chunk_ends_the_prefix_and_is_replaced(workers: Workers, tmp_path: Path) -> None:
    url = f"file://{tmp_path}"
    filled(workers, url, 2)
    path = object_path(tmp_path, 2)
    good = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    second = beside(workers, url)
    second.fill(1)
    second.step(stages=[stage(1, 1, 2)])
    assert second.staged(1) == Staged(1, 1, "Corrupt")
    second.step(releases=[1], saves=[save(2, [2, 3])])
    assert second.saved(1) == [Saved(chunk_hash(2), "written")]
    assert path.read_bytes() == good and second.quiet()


@pytest.mark.parametrize("round_", range(3))
def test_release_in_the_next_step(workers: Workers, url: str, round_: int) -> None:
    filled(workers, url, 3)
    worker = beside(workers, url)
    for job in range(10):
        worker.half.receive(StepCommands(worker.namespace, stages=[stage(job, 1, 2, 3)]))
        worker.half.receive(StepCommands(worker.namespace, releases=[job]))
    assert worker.quiet() and worker.forgot_all()
    assert worker.reports.staged == []


def test_a_new_namespace_has_other_objects(workers: Workers, url: str) -> None:
    filled(workers, url, 1)
    worker = beside(workers, url)
    worker.step(stages=[stage(1, 1)])
    assert worker.staged(1).chunks == 1
    worker.namespace = SPACES["space-b"]
    worker.step(releases=[1], stages=[stage(2, 1)])
    assert worker.staged(2) == Staged(2, 0, "NotFound")
    worker.step(releases=[2])
    assert worker.quiet()


# ---- the end


def test_shutdown_waits_for_uploads(workers: Workers, url: str) -> None:
    writer = beside(workers, url)
    writer.fill(1)
    writer.half.receive(StepCommands(writer.namespace, saves=[save(1, [0, 1])]))
    writer.half.end_forward()
    writer.half.shutdown()
    assert writer.half.leased_slots == 0
    reader = workers(url)
    reader.step(stages=[stage(1, 1)])
    assert reader.staged(1).chunks == 1
    reader.step(releases=[1])


def test_it_ends_with_its_parent(tmp_path: Path) -> None:
    """In whatever way that ends."""
    code = (
        "import os, sys; sys.path[:0] = ['tests', '.']\n"
        "from test_mover_process import mover_at\n"
        f"mover, _ = mover_at({str(tmp_path)!r})\n"
        "print(mover._child._process.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert parent.stdout is not None and parent.stdin is not None
    process = int(parent.stdout.readline())
    assert Path(f"/proc/{process}").exists()
    parent.kill()
    parent.wait()
    parent.stdin.close()
    parent.stdout.close()
    assert eventually(lambda: not _lives(process))


def _lives(process: int) -> bool:
    try:
        return "\tZ" not in Path(f"/proc/{process}/status").read_text().split("State:")[1][:4]
    except OSError:
        return False


def mover_at(folder: str) -> tuple[MoverProcess, HostSlots]:
    slots = HostSlots(4, LAYOUT.object_bytes, pinned=False, shared=True)
    assert slots.descriptor is not None
    options = parse({"url": f"file://{folder}", "chunk_tokens": LAYOUT.chunk_tokens})
    mover = MoverProcess(Berth(options, LAYOUT, 4, range(3), 0), slots.descriptor)
    mover.enter("space", LAYOUT.namespace_digest)
    return mover, slots


def heard(mover: MoverProcess, count: int) -> list:
    events: list = []

    def there() -> bool:
        events.extend(event for event in mover.take() if not isinstance(event, Placed))
        return len(events) >= count

    assert eventually(there), events
    return events


def test_what_it_owed_fails_and_another_takes_over(
    workers: Workers, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    writer = filled(workers, url, 8)
    worker = beside(workers, url, streams=True)
    worker.step(stages=[stage(1, 1, 2)])
    assert worker.staged(1) == Staged(1, 2)
    assert worker.half._mover.counters.get_requests == 2
    kill(worker)
    # What it brought is in memory and whole.
    worker.step(stages=[stage(2, 3)], loads=[LoadCommand(1, 0, [20, 3, 11, 5])])
    assert same(worker.blocks([20, 3, 11, 5]), writer.blocks([0, 1, 2, 3]))
    assert worker.staged(2) == Staged(2, 0, "Unavailable")
    worker.step(streams=[stream(3, 4, 5, ids=[0, 1, 2, 3])], saves=[save(9, [4, 5])])
    assert worker.streamed(3) == Streamed(3, 0, "Unavailable")
    assert worker.failed_blocks == {0, 1, 2, 3}
    assert worker.saved(1) == [Saved(chunk_hash(9), "failed")]
    worker.step(releases=[2])
    assert worker.quiet()
    assert "has ended with code -9" in caplog.text

    job, asked = 10, worker.half._mover.counters.get_requests

    def brought() -> bool:
        nonlocal job
        job += 1
        worker.step(stages=[stage(job, 3, 4)])
        came = worker.staged(job).chunks
        worker.step(loads=[LoadCommand(job, 0, [1, 2, 6, 7])] if came else [], releases=[])
        if not came:
            worker.step(releases=[job])
            time.sleep(0.05)
        return bool(came)

    assert eventually(brought, 10.0)
    assert same(worker.blocks([1, 2, 6, 7]), writer.blocks([4, 5, 6, 7]))
    assert worker.quiet()
    asked_again = worker.half._mover.counters.get_requests
    assert asked == 2 and asked_again == asked + 2, "each is counted once, whoever asked"


def test_no_other_begins_while_slots_of_the_last_are_in_use(tmp_path: Path) -> None:
    """It would take them for free."""
    space = tmp_path / "space"
    mover, slots = mover_at(str(tmp_path))
    try:
        mover.save(3, "space", chunk_hash(1))
        slots.view(3)[:] = sealed(1)
        (saved,) = heard(mover, 1)
        assert saved == SaveResult(3, chunk_hash(1), "written") and space.exists()
        mover.stage(1, [chunk_hash(1)])
        (staged,) = heard(mover, 1)
        assert staged.slots == [0]
        mover._child._process.kill()
        assert eventually(lambda: mover._child.ended)
        assert mover.take() == [] and mover._child is None
        time.sleep(1.1)  # until another may begin
        mover.stage(2, [chunk_hash(1)])
        (staged,) = heard(mover, 1)
        assert isinstance(staged, StageResult) and isinstance(staged.error, Unavailable)
        assert mover._child is None and bytes(slots.view(0)) == sealed(1)
        mover.release(1)
        mover.release(2)
        mover.stage(3, [chunk_hash(1)])
        (staged,) = heard(mover, 1)
        assert staged.slots == [0] and staged.error is None
        mover.release(3)
        assert eventually(lambda: mover.leased == 0)
    finally:
        mover.close(1.0)
        mover.close(1.0)


def test_it_takes_no_memory_of_the_parent(tmp_path: Path) -> None:
    """It imports neither torch nor vLLM, and starts within seconds."""
    began = time.monotonic()
    mover, _ = mover_at(str(tmp_path))
    mover.stage(1, [chunk_hash(1)])
    heard(mover, 1)
    mapped = Path(f"/proc/{mover._child._process.pid}/maps").read_text()
    mover.close(1.0)
    assert "libtorch" not in mapped and "vllm" not in mapped
    assert time.monotonic() - began < 10


def test_no_collection_looks_at_its_libraries(tmp_path: Path) -> None:
    """One of all objects would stop every thread for about 0.1 s, within the first prefixes."""
    code = (
        "import gc, sys, threading, time\n"
        "from objectcache.mover_process import serve\n"
        "def watch():\n"
        "    while not gc.get_freeze_count(): time.sleep(0.01)\n"
        "    print(gc.get_freeze_count(), len(gc.get_objects()), flush=True)\n"
        "threading.Thread(target=watch, daemon=True).start()\n"
        "serve(*map(int, sys.argv[1:]))\n"
    )
    slots = HostSlots(4, LAYOUT.object_bytes, pinned=False, shared=True)
    assert slots.descriptor is not None
    options = parse({"url": f"file://{tmp_path}", "chunk_tokens": LAYOUT.chunk_tokens})
    ours, theirs = Pipe()
    handed = (theirs.fileno(), slots.descriptor)
    command = [sys.executable, "-c", code, *map(str, handed)]
    process = subprocess.Popen(command, pass_fds=handed, stdout=subprocess.PIPE)
    theirs.close()
    try:
        ours.send((Berth(options, LAYOUT, 4, range(3), 0), 20))
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], 10.0)
        assert ready, "its heap is not set apart"
        apart, others = map(int, process.stdout.readline().split())
        assert apart > 5 * others
    finally:
        ours.close()
        process.kill()
        process.communicate()


def test_what_was_asked_of_the_store_is_told_now_and_then(
    workers: Workers, proxy: FaultProxy
) -> None:
    """Each word wakes a thread beside vLLM's. In an engine nothing but metrics waits for this."""
    url, at = "s3://kvcache/now-and-then", {"endpoint_url": proxy.url}
    layout = filled(workers, url, 6, **at).half._layout
    ends_s = iter([0.15, 0.3, 0.45, 0.6, 0.75, 2.6])
    proxy.fault = lambda request: (
        Fault(bytes_per_s=int(layout.object_bytes / next(ends_s, 2.6)))
        if request.method == "GET"
        else None
    )
    slots = HostSlots(6, layout.object_bytes, pinned=False, shared=True)
    assert slots.descriptor is not None
    options = parse({"url": url, "chunk_tokens": 8, "hedge_percent": 0, **at})
    ours, theirs = Pipe()
    handed = (theirs.fileno(), slots.descriptor)
    code = "import sys; from objectcache.mover_process import serve; serve(*map(int, sys.argv[1:]))"
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, handed)], pass_fds=handed)
    theirs.close()
    try:
        ours.send((Berth(options, layout, 6, range(6), 0), 20))
        ours.send(("enter", SPACES["space-a"]))
        ours.send(("stage", (1, [chunk_hash(number) for number in range(1, 7)])))
        told, began = [ours.recv()], time.monotonic()
        while not any(isinstance(event, StageResult) for event in told[-1].events):
            assert ours.poll(10.0), "it says nothing"
            told.append(ours.recv())
        took_s = time.monotonic() - began
    finally:
        proxy.fault = None
        ours.close()
        process.kill()
        process.wait()
    assert len(told[-1].events[-1].slots) == 6
    read = [state.counters.read_bytes // layout.object_bytes for state in told]
    assert read[-1] == 6 and 5 in read[:-1], "nobody hears of it before all is there"
    alone = [
        after
        for before, after in pairwise(told)
        if after == replace(before, events=[], lines=[], counters=after.counters)
    ]
    assert len(alone) <= 1 + took_s, alone


# ---- several of them


@pytest.mark.parametrize("count", [2, 3])
def test_several_bring_a_prefix_together(workers: Workers, url: str, count: int) -> None:
    writer = filled(workers, url, 12)
    worker = beside(workers, url, processes=count)
    assert len(processes()) == count and worker.half.stage_chunks == LOAD_SLOTS
    worker.step(stages=[StageCommand(1, [chunk_hash(n) for n in (2, 3, 4)], first=1)])
    assert worker.staged(1) == Staged(1, 3)
    ids = [20, 3, 11, 5, 17, 8]
    worker.step(loads=[LoadCommand(1, 0, ids)])
    assert same(worker.blocks(ids), writer.blocks([2, 3, 4, 5, 6, 7]))
    worker.step(stages=[stage(2, 1, 2, 99, 4, 5)])
    assert worker.staged(2) == Staged(2, 2, "NotFound")
    worker.step(stages=[stage(3, 1, 2, 3, 4, 5, 6), stage(4, 7, 8, 9, 10)])
    worker.step(releases=[2])
    assert worker.staged(3) == Staged(3, 6)
    worker.step(releases=[3])
    assert worker.staged(4) == Staged(4, 4)
    worker.step(releases=[4], saves=[save(20, [0, 1]), save(21, [2, 3])])
    assert {saved.outcome for saved in worker.saved(2)} == {"written"}
    assert worker.quiet() and worker.forgot_all()
    if count == 2:
        kill_one(worker)
        worker.step(stages=[stage(5, 1, 2, 3)])
        assert worker.staged(5).error == "Unavailable"
        worker.step(releases=[5])
        assert worker.quiet()


def kill_one(worker: Worker) -> None:
    one = worker.half._mover._movers[0]
    one._child._process.kill()
    assert eventually(lambda: one._child.ended)


def test_several_end_together(workers: Workers, url: str) -> None:
    """vLLM allows 5 s for everything, whatever they are doing."""
    filled(workers, url, 4)
    worker = beside(workers, url, processes=3, shutdown_drain_ms=1000)
    worker.step(stages=[stage(1, 1, 2, 3)])
    worker.staged(1)
    for process in processes():
        os.kill(process, signal.SIGSTOP)  # the worst that one can do
    began = time.monotonic()
    worker.half.shutdown()
    assert time.monotonic() - began < 4.5 and not processes()


@pytest.mark.parametrize("round_", range(3))
def test_several_and_releases_at_any_time(workers: Workers, url: str, round_: int) -> None:
    filled(workers, url, 6)
    worker = beside(workers, url, processes=2)
    for job in range(30):
        numbers = [1 + (job + k) % 6 for k in range(1 + job % 6)]
        worker.half.receive(StepCommands(worker.namespace, stages=[stage(job, *numbers)]))
        if job % 3 == 0:
            time.sleep(0.003)
        worker.half.receive(StepCommands(worker.namespace, releases=[job]))
    assert worker.quiet() and worker.forgot_all()
    assert worker.reports.staged == [] and worker.half._mover._stages == {}


@given(st.integers(2, 400), st.integers(1, 16), st.integers(1, 4096), st.integers(0, 3))
def test_parts_share_slots_and_connections_and_nothing_twice(
    loads: int, count: int, connections: int, apart: int
) -> None:
    options = parse({"url": "memory://x", "max_connections": connections})
    whole = Berth(options, LAYOUT, loads + 3, range(loads), min(apart, loads - 1))
    parts = split(whole, count)
    slots = [slot for part in parts for slot in part.load_slots]
    assert len(set(slots)) == len(slots) <= loads and set(slots) <= set(range(loads))
    assert sum(part.options.max_connections for part in parts) <= connections
    assert all(part.apart < len(part.load_slots) for part in parts)
    assert (apart > 0) == all(part.apart for part in parts)
    assert 1 <= most_chunks(parts) <= loads


def test_workers_of_one_host_share_its_cores() -> None:
    assert [processes_for(1, cores) for cores in (1, 2, 4, 8, 16, 64)] == [1, 1, 1, 2, 4, 4]
    assert [processes_for(8, cores) for cores in (8, 64, 128, 192)] == [1, 2, 4, 4]


def test_nothing_but_the_memory_itself_is_left_open(workers: Workers, url: str) -> None:
    def open_files() -> Counter[str]:
        links = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        return Counter(str(link) for link in links)

    gc.collect()  # the memory of earlier tests has the same name
    before = open_files()
    worker = beside(workers, url, processes=2)
    worker.step(stages=[stage(1, 1)])
    worker.staged(1)
    worker.step(releases=[1])
    worker.half.shutdown()
    (left,) = (open_files() - before).elements()  # Python's mapping holds a copy
    assert "objectcache-ring" in left
    assert worker.half._slots.descriptor is None
