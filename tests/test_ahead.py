"""Copies ahead of the step, against what they promise: a parked request goes on once, when all of its blocks are right or named. With an engine: test_ahead_engine.py."""

from collections.abc import Iterator

import numpy as np
import pytest
from device_lab import BLOCKS, CHUNK_BLOCKS, LAYERS, Rig, make
from hypothesis import given, settings
from hypothesis import strategies as st

from objectcache.ahead import LEAST_S, MOST_S, Ahead, Landing
from objectcache.moment import BESIDE_BYTES_PER_S
from objectcache.runs import Batch, Run

RUNS = [Run(2, 0, [6, 7, 8, 9]), Run(0, 0, [30, 1, 2, 3]), Run(5, 0, [20, 21])]
LIMIT_S = 60.0
IDS = [block for run in RUNS for block in run.block_ids]


class Scene:
    """`Ahead` over real copies; time goes on by what a test says."""

    def __init__(self, rig: Rig) -> None:
        self.rig, self.now = rig, 0.0
        self.progress = rig.slots.progress
        sizes = rig.layout.slice_bytes
        self.ahead = Ahead(
            rig.copies, self.progress, sizes, CHUNK_BLOCKS, LIMIT_S, lambda: self.now
        )

    def step(self, step_s: float = 1.0) -> list[Landing]:
        self.now += step_s
        self.ahead.carry()
        return self.ahead.over()

    def right(self, layer: int) -> bool:
        """Whether a layer's pages are what lies in the slots."""
        return all(
            self.rig.page(layer, block) == self.rig.in_slot(layer, run.slot, run.first_block + at)
            for run in RUNS
            for at, block in enumerate(run.block_ids)
        )

    def touched(self, layer: int) -> bool:
        poison = bytes([0xEE]) * self.rig.sizes[layer]
        return any(self.rig.page(layer, block) != poison for block in IDS)


@pytest.fixture(name="scene")
def scene_fixture() -> Iterator[Scene]:
    rig = make("cpu")
    yield Scene(rig)
    rig.slots.close()


def test_each_layer_is_copied_when_all_of_its_chunks_have_it(scene: Scene) -> None:
    scene.ahead.begin(1, "r", RUNS, 0)
    scene.progress[[2, 0]] = LAYERS
    assert scene.step() == [] and not scene.touched(0)
    for layer in range(LAYERS):
        scene.progress[5] = layer + 1
        assert scene.step() == []
        assert scene.right(layer) and (layer + 1 == LAYERS or not scene.touched(layer + 1))
    assert scene.ahead.ended(1, 3, "")
    assert scene.step() == [Landing(1, "r", 3, [], "", lost=False, heard=True)]
    others = [block for block in range(BLOCKS) if block not in IDS]
    poison = bytes([0xEE]) * scene.rig.sizes[0]
    assert all(scene.rig.page(0, block) == poison for block in others)
    assert scene.step() == [] and not scene.ahead.ended(1, 3, "")


def test_what_lies_there_already_goes_on_with_the_step_that_copies_it(scene: Scene) -> None:
    scene.progress[:] = LAYERS
    scene.ahead.begin(1, "r", RUNS, 0)
    scene.ahead.ended(1, 3, "")
    assert [landing.chunks for landing in scene.step()] == [3]
    assert all(scene.right(layer) for layer in range(LAYERS))


@pytest.mark.parametrize("came", [0, 1, 2])
def test_if_a_chunk_does_not_come_all_blocks_are_named(scene: Scene, came: int) -> None:
    scene.ahead.begin(1, "r", RUNS, 0)
    scene.progress[:] = 1
    scene.step()
    scene.ahead.ended(1, came, "Corrupt")
    assert scene.step() == [Landing(1, "r", came, IDS, "Corrupt", lost=True, heard=True)]


def test_chunks_of_the_job_before_the_load_do_not_count(scene: Scene) -> None:
    scene.progress[:] = LAYERS
    scene.ahead.begin(1, "r", RUNS, first=4)
    scene.ahead.ended(1, 7, "")
    assert scene.step() == [Landing(1, "r", 3, [], "", lost=False, heard=True)]
    scene.ahead.begin(2, "s", RUNS, first=4)
    scene.ahead.ended(2, 6, "NotFound")
    assert scene.step() == [Landing(2, "s", 2, IDS, "NotFound", lost=True, heard=True)]


@pytest.mark.parametrize("heard", [False, True])
def test_who_is_stopped_is_named_once_whether_or_not_the_mover_has_ended(
    scene: Scene, heard: bool
) -> None:
    scene.ahead.begin(1, "r", RUNS, 0)
    scene.progress[:] = 1
    scene.step()
    if heard:
        scene.ahead.ended(1, 3, "")
    assert scene.ahead.stop(1) is not heard, "whether the mover is to be told"
    scene.progress[:] = LAYERS
    assert scene.step() == [Landing(1, "r", 0, IDS, "", lost=False, heard=heard)]
    assert not scene.touched(1), "copied for nobody"
    assert not scene.ahead.stop(1)


def test_a_mover_that_does_not_answer_is_not_waited_for_longer_than_its_limit(scene: Scene) -> None:
    scene.ahead.begin(1, "r", RUNS, 0)
    scene.progress[:] = 1
    assert scene.step(LIMIT_S / 2) == [] and scene.step(LIMIT_S / 2 - 1) == []
    assert scene.step() == [Landing(1, "r", 0, IDS, "Unavailable", lost=True, heard=False)]
    assert not scene.ahead.ended(1, 3, "") and scene.step() == []


class Held:
    """Copies that are under way until a test says so, as on a GPU; it keeps what was begun."""

    def __init__(self, most_blocks: int) -> None:
        self.most_blocks = most_blocks
        self.begun: list[tuple[int, int, tuple[int, ...]]] = []
        self.ended: list[int] = []

    def begin_apart(self, runs: list[Run]) -> list[Batch]:
        return [Batch.of([run]) for run in runs]

    def submit_part(self, job: int, layer: int, batch: Batch) -> None:
        self.begun.append((job, layer, tuple(batch.block_ids.tolist())))

    def parts_loaded(self) -> list[int]:
        ended, self.ended = self.ended, []
        return ended


@pytest.mark.parametrize("how", ["whole", "lost", "stopped"])
def test_nobody_goes_on_before_its_last_copy_has_ended(how: str) -> None:
    """vLLM gives blocks to others then, and the mover the slots."""
    copies, progress = Held(4), np.full(8, LAYERS, np.int16)
    ahead = Ahead(copies, progress, [256] * LAYERS, CHUNK_BLOCKS, LIMIT_S, lambda: 0.0)  # type: ignore[arg-type]
    ahead.begin(1, "r", RUNS, 0)
    ahead.carry()
    assert len(copies.begun) == LAYERS * len(RUNS)
    if how == "stopped":
        ahead.stop(1)
    ahead.ended(1, 2 if how == "lost" else 3, "")
    for _ in range(LAYERS * len(RUNS)):
        assert ahead.over() == []
        copies.ended.append(1)
    assert [bool(landing.failed_blocks) for landing in ahead.over()] == [how != "whole"]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.floats(0.0, 0.01)), min_size=1, max_size=4),
    st.lists(st.floats(0.0, 0.02), max_size=30),
)
def test_a_step_begins_about_as_much_as_the_bus_can_bring_in_one(
    loads: list[tuple[int, float]], steps: list[float]
) -> None:
    """And each part once, layer by layer within its load, whatever the steps are."""
    slice_bytes = 20 << 20  # of a chunk of 4 blocks
    copies, progress, now = Held(4), np.full(16, LAYERS, np.int16), 0.0
    ahead = Ahead(copies, progress, [slice_bytes] * LAYERS, CHUNK_BLOCKS, LIMIT_S, lambda: now)  # type: ignore[arg-type]
    for job, (chunks, _) in enumerate(loads):
        runs = [Run(at, 0, [4 * at, 4 * at + 1, 4 * at + 2, 4 * at + 3]) for at in range(chunks)]
        ahead.begin(job, f"r{job}", runs, 0)
        ahead.ended(job, chunks, "")
    seen, last_s, allowed = 0, 0.0, 0.0
    for step_s in [*steps, *[1.0] * 6]:
        now += step_s
        ahead.carry()
        usual_s = min(step_s, last_s)  # of a long step alone the next one does not get longer still
        most = min(MOST_S, max(LEAST_S, usual_s)) * BESIDE_BYTES_PER_S
        assert (len(copies.begun) - seen - 1) * slice_bytes < most
        allowed += most
        assert (len(copies.begun) - 1) * slice_bytes < allowed, "a part too many each time adds up"
        seen, last_s = len(copies.begun), step_s
    assert len(set(copies.begun)) == len(copies.begun) == LAYERS * sum(n for n, _ in loads)
    for job in range(len(loads)):
        layers = [layer for one, layer, _ in copies.begun if one == job]
        assert layers == sorted(layers)
    copies.ended = [job for job, _, _ in copies.begun]
    assert sorted(landing.job for landing in ahead.over()) == list(range(len(loads)))
