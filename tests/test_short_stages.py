"""A chunk that does not come, of a prefix that a step may compute on already: its slot is nobody else's, its request fails, and nobody waits for it. Other loads of the worker: test_worker.py."""

import time
from pathlib import Path

import pytest
from fakes import eventually
from worker_lab import (  # noqa: F401 (pytest looks for the fixtures here)
    Holds,
    Worker,
    Workers,
    filled,
    folder_fixture,
    object_path,
    same,
    stage,
    workers_fixture,
)

from objectcache.messages import Coming, LoadCommand
from objectcache.ring import FAILED


def spoil(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
        return
    body = bytearray(path.read_bytes())
    body[-1] ^= 1  # the last layer is wrong, the header right
    path.chmod(0o600)
    path.write_bytes(body)


@pytest.mark.parametrize("how", ["missing", "wrong"])
@pytest.mark.parametrize("heard", [False, True])
def test_no_other_chunk_comes_to_a_slot_that_a_load_may_still_look_at(
    workers: Workers, folder: str, tmp_path: Path, how: str, heard: bool
) -> None:
    """Its progress would be taken for that of the chunk that failed, and its bytes for that chunk's."""
    writer = filled(workers, folder, 8)
    spoil(object_path(tmp_path, 2), how)
    reader = workers(folder)
    held = reader.half._mover = Holds(reader.half._mover)  # as while another mover has not ended
    held.quiet = not heard
    reader.step(stages=[stage(1, 1, 2)], step=1)
    reader.step(
        stages=[stage(2, 3, 4, 5, 6, 7)], step=2
    )  # there is no room for it without that slot
    until = time.monotonic() + 0.3
    while time.monotonic() < until:
        reader.look()
        assert 2 not in reader.half._placed, "it has the slot of a chunk that failed"
    reader.step(loads=[LoadCommand(1, 0, [8, 9, 10, 11], coming=True)], step=3)
    assert reader.failed_blocks == {8, 9, 10, 11}
    for number in range(1, 9):
        others = writer.blocks([2 * number - 2, 2 * number - 1])
        assert not same(reader.blocks([10, 11]), others), f"chunk {number} is taken for chunk 2"
    held.quiet = False
    assert eventually(lambda: over(reader)), "the load does not end"
    assert [landed.lost for landed in reader.reports.landed] == [True]
    assert reader.staged(2).chunks == 5, "who waited has room now"
    reader.step(releases=[2])
    assert reader.quiet()


def over(reader: Worker) -> bool:
    reader.step()
    return bool(reader.reports.landed)


def test_a_chunk_that_failed_is_told_before_its_job_has_ended(
    workers: Workers, folder: str, tmp_path: Path
) -> None:
    filled(workers, folder, 2)
    spoil(object_path(tmp_path, 2), "wrong")
    reader = workers(folder)
    held = reader.half._mover = Holds(reader.half._mover)
    reader.step(stages=[stage(1, 1, 2)], step=1)

    # All layers of the other chunk, and none less for the one that failed.
    word = Coming(1, 2, FAILED, 3)

    def told() -> bool:
        reader.step(step=2)
        return word in reader.reports.coming

    assert eventually(told), reader.reports.coming
    assert not reader.reports.staged and word.failed
    held.quiet = False
    assert reader.staged(1).chunks == 1
    reader.step(releases=[1])
    assert reader.quiet()


def test_a_step_does_not_wait_for_a_chunk_that_failed_although_its_job_goes_on(
    workers: Workers, folder: str, tmp_path: Path
) -> None:
    filled(workers, folder, 2)
    spoil(object_path(tmp_path, 2), "wrong")
    reader = workers(folder, late_timeout_ms=20_000)
    held = reader.half._mover = Holds(reader.half._mover)
    reader.step(stages=[stage(1, 1, 2)], step=1)
    assert eventually(lambda: failed(reader))
    began = time.monotonic()
    reader.step(loads=[LoadCommand(1, 0, [8, 9, 10, 11], coming=True)], step=2)
    assert time.monotonic() - began < 5.0
    assert reader.failed_blocks == {8, 9, 10, 11}
    held.quiet = False
    assert eventually(lambda: over(reader)) and reader.quiet()


def failed(reader: Worker) -> bool:
    reader.look()
    slots = reader.half._placed.get(1)
    return slots is not None and FAILED in reader.half._slots.progress[slots]
