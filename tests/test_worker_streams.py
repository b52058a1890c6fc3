"""Prefixes that stream through the worker half's ring. What fits into it: test_worker.py."""

import time
from pathlib import Path

import pytest
from fakes import chunk_hash, eventually
from worker_lab import (  # noqa: F401 (pytest looks for the fixtures here)
    BLOCKS,
    LOAD_SLOTS,
    SPACES,
    Workers,
    filled,
    object_path,
    same,
    save,
    stage,
    stream,
    url_fixture,
    workers_fixture,
)

from objectcache.device import CpuCopies
from objectcache.messages import LoadCommand, Saved, Staged, StepCommands, Streamed
from objectcache.worker import WorkerHalf

ALL = 12  # chunks, of two blocks each: all blocks; six load slots, one of them for streams alone


def test_streams_leave_one_slot_less_to_stages(workers: Workers, url: str) -> None:
    assert workers(url).half.stage_chunks == LOAD_SLOTS
    assert workers(url, streams=True).half.stage_chunks == LOAD_SLOTS - 1


@pytest.mark.parametrize(("first", "count"), [(0, 24), (1, 23), (0, 23), (1, 20)])
def test_a_prefix_larger_than_the_ring_streams_through_it(
    workers: Workers, url: str, first: int, count: int
) -> None:
    writer = filled(workers, url, ALL)
    reader = workers(url, streams=True)
    ids = [(7 * at) % BLOCKS for at in range(BLOCKS)][:count]
    chunks = range(1, (first + count + 1) // 2 + 1)
    reader.step(streams=[stream(1, *chunks, first_block=first, ids=ids)])
    assert reader.streamed(1) == Streamed(1, len(chunks))
    assert same(reader.blocks(ids), writer.blocks(list(range(first, first + count))))
    others = [block for block in range(BLOCKS) if block not in ids]
    assert not any(page.any() for page in reader.blocks(others))
    assert reader.unparked == ["request-1"] and reader.failed_blocks == set()
    stats = reader.half.stats()
    assert stats is not None and stats.data["staged_chunks"] == len(chunks)
    reader.step()
    assert reader.unparked == ["request-1"] and reader.quiet()


@pytest.mark.parametrize("bad", [1, 5, 12])
@pytest.mark.parametrize("kind", ["missing", "corrupt"])
def test_what_did_not_come_is_named_and_not_touched(
    workers: Workers, tmp_path: Path, bad: int, kind: str
) -> None:
    url = f"file://{tmp_path}"
    writer = filled(workers, url, ALL)
    path = object_path(tmp_path, bad)
    good = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    if kind == "missing":
        path.unlink()
    reader = workers(url, streams=True)
    ids = list(range(1, BLOCKS))
    reader.step(streams=[stream(1, *range(1, 13), first_block=1, ids=ids)])
    error = {"missing": "NotFound", "corrupt": "Corrupt"}[kind]
    assert reader.streamed(1) == Streamed(1, bad - 1, error)
    came = list(range(1, max(1, 2 * (bad - 1))))
    assert reader.unparked == ["request-1"] and reader.failed_blocks == set(ids) - set(came)
    assert same(reader.blocks(came), writer.blocks(came))
    assert not any(page.any() for page in reader.blocks(sorted(reader.failed_blocks)))
    stats = reader.half.stats()
    assert stats is not None and stats.data[f"{kind}_chunks"] == 1
    reader.fill(1)
    reader.step(saves=[save(bad, [2 * bad - 2, 2 * bad - 1])])
    assert reader.saved(1) == [Saved(chunk_hash(bad), "written")]
    assert path.read_bytes() == good and reader.quiet()


class LateCopies(CpuCopies):
    """As on a GPU: copies end later, when a test says so."""

    held = True

    def chunks_loaded(self) -> list[tuple[int, int]]:
        return [] if self.held else super().chunks_loaded()


class LateWorker(WorkerHalf):
    copies: LateCopies

    def __init__(self, *args: object, **more: object) -> None:
        super().__init__(*args, **more)  # type: ignore[arg-type]
        self.copies = LateCopies(self._pages, self._slots, self._layout)
        self._copies = self._parked._copies = self.copies


@pytest.mark.parametrize("stop", [False, True])
def test_a_request_is_not_named_before_its_last_copy_has_ended(
    workers: Workers, url: str, stop: bool
) -> None:
    """vLLM gives its blocks to others then."""
    filled(workers, url, 3)
    reader = workers(url, streams=True, kind=LateWorker)
    reader.step(streams=[stream(1, 1, 2, 3, ids=[0, 1, 2, 3, 4, 5])])

    def copied() -> bool:
        reader.step()
        return len(reader.half.copies._chunks) == 3

    assert eventually(copied)
    reader.step(stops=[1] if stop else [])
    for _ in range(20):
        reader.step()
    assert reader.unparked == [] and reader.half.leased_slots == 3
    reader.half.copies.held = False
    assert reader.streamed(1) == Streamed(1, 0 if stop else 3)
    assert reader.unparked == ["request-1"]
    assert reader.failed_blocks == (set(range(6)) if stop else set())
    assert reader.quiet()


@pytest.mark.parametrize("steps", range(6))
def test_a_stream_that_is_stopped_is_named_once_and_none_of_it_counts(
    workers: Workers, url: str, steps: int
) -> None:
    """Its request is gone, or the weights have changed."""
    filled(workers, url, ALL)
    reader = workers(url, streams=True)
    reader.step(streams=[stream(1, *range(1, 13), ids=list(range(BLOCKS)))])
    for _ in range(steps):
        reader.step()
        time.sleep(0.001)
    whole = reader.unparked == ["request-1"]
    reader.namespace = SPACES["space-b"]
    reader.step(stops=[1])
    assert reader.streamed(1) == Streamed(1, 12 if whole else 0)
    assert reader.unparked == ["request-1"]
    assert reader.failed_blocks == (set() if whole else set(range(BLOCKS)))
    reader.step(stops=[1])
    assert reader.unparked == ["request-1"] and reader.quiet()


def test_what_came_for_a_stream_that_is_stopped_is_not_copied(workers: Workers, url: str) -> None:
    filled(workers, url, ALL)
    reader = workers(url, streams=True)
    command = stream(1, *range(1, 13), ids=list(range(BLOCKS)))
    reader.half.receive(StepCommands(reader.namespace, streams=[command]))
    assert eventually(lambda: len(reader.half._mover._events) == LOAD_SLOTS)
    reader.step(stops=[1])
    assert reader.streamed(1) == Streamed(1, 0)
    assert not any(page.any() for page in reader.pages) and reader.quiet()


def test_streams_and_stages_at_the_same_time(workers: Workers, url: str) -> None:
    writer = filled(workers, url, ALL)
    reader = workers(url, streams=True)
    reader.step(
        stages=[stage(1, 1, 2, 3), stage(2, 11, 12)],
        streams=[
            stream(3, 1, 2, 3, 4, 5, 6, 7, 8, ids=list(range(16))),
            stream(4, 9, 10, 11, 12, ids=list(range(16, 24))),
        ],
    )
    assert reader.staged(1).chunks == 3 and reader.staged(2).chunks == 2  # kept to the end
    assert reader.streamed(3) == Streamed(3, 8) and reader.streamed(4) == Streamed(4, 4)
    assert same(reader.blocks(list(range(24))), writer.blocks(list(range(24))))
    reader.step(releases=[1, 2])
    assert reader.quiet()


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_shutdown_while_a_prefix_streams(workers: Workers, url: str, steps: int) -> None:
    filled(workers, url, ALL)
    reader = workers(url, streams=True)
    command = stream(1, *range(1, 13), ids=list(range(BLOCKS)))
    reader.half.receive(StepCommands(reader.namespace, streams=[command]))
    for _ in range(steps):
        time.sleep(0.002)
        reader.half.end_forward()
    reader.half.shutdown()
    assert reader.half.leased_slots == 0
    reader.half.end_forward()  # harmless
    assert reader.half.unparked() == set() and reader.half.failed_blocks() == set()


@pytest.mark.parametrize("kind", ["missing", "corrupt"])
def test_a_load_of_a_parked_request_that_had_ended_short_before_it_began_says_why(
    workers: Workers, tmp_path: Path, kind: str
) -> None:
    """The scheduler may admit it before it hears of that: who comes next must know which chunk to doubt."""
    url = f"file://{tmp_path}"
    filled(workers, url, 2)
    path = object_path(tmp_path, 2)
    good = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    if kind == "missing":
        path.unlink()
    reader = workers(url)
    reader.step(stages=[stage(1, 1, 2)])
    error = {"missing": "NotFound", "corrupt": "Corrupt"}[kind]
    assert reader.staged(1) == Staged(1, 1, error)
    reader.step(loads=[LoadCommand(1, 0, [0, 1, 2, 3], coming=True, request_id="request-1")])
    assert reader.streamed(1) == Streamed(1, 1, error)
    assert reader.unparked == ["request-1"] and reader.failed_blocks == {0, 1, 2, 3}
    assert reader.quiet() and reader.forgot_all()
