"""The worker half by itself, driven step by step as vLLM's worker drives it. With the scheduler half: test_scheduling.py."""

import threading
from pathlib import Path

import pytest
import torch
from fakes import chunk_hash, eventually
from worker_lab import (  # noqa: F401 (pytest looks for the fixtures here)
    BLOCKS,
    LAYERS,
    LOAD_SLOTS,
    SPACES,
    Holds,
    Worker,
    Workers,
    filled,
    folder_fixture,
    object_path,
    same,
    save,
    stage,
    url_fixture,
    workers_fixture,
)

from objectcache import keys
from objectcache.config import parse
from objectcache.errors import Misconfigured
from objectcache.messages import LoadCommand, Saved, Staged, StepCommands
from objectcache.streamer import StageResult
from objectcache.worker import WorkerHalf

# ---- the round trip


def test_what_one_worker_saves_another_loads(workers: Workers, url: str) -> None:
    writer = filled(workers, url, 3)
    reader = workers(url)
    reader.fill(2)
    before = reader.blocks(list(range(BLOCKS)))
    reader.step(stages=[stage(1, 1, 2, 3)])
    assert reader.staged(1) == Staged(1, 3)
    assert reader.half.leased_slots == 3
    ids = [20, 3, 11, 5, 17, 8]
    reader.step(loads=[LoadCommand(1, 0, ids)])
    assert same(reader.blocks(ids), writer.blocks([0, 1, 2, 3, 4, 5]))
    others = [block for block in range(BLOCKS) if block not in ids]
    assert same(reader.blocks(others), [page[others] for page in before])
    assert reader.quiet()


@pytest.mark.parametrize(("first", "count"), [(0, 1), (1, 1), (1, 2), (1, 4), (3, 3), (5, 1)])
def test_a_load_may_begin_and_end_inside_of_chunks(
    workers: Workers, folder: str, first: int, count: int
) -> None:
    writer = filled(workers, folder, 3)
    reader = workers(folder)
    reader.step(stages=[stage(1, 1, 2, 3)])
    reader.staged(1)
    ids = [20, 3, 11, 5, 17, 8][:count]
    reader.step(loads=[LoadCommand(1, first, ids)])
    assert same(reader.blocks(ids), writer.blocks(list(range(first, first + count))))
    others = [block for block in range(BLOCKS) if block not in ids]
    assert not any(page.any() for page in reader.blocks(others))
    assert reader.quiet()


def test_a_step_whose_layers_do_not_call_back_loads_before_the_forward_pass(
    workers: Workers, url: str
) -> None:
    writer = filled(workers, url, 1)
    reader = workers(url)
    reader.step(stages=[stage(1, 1)])
    reader.staged(1)
    reader.half.receive(StepCommands(reader.namespace, loads=[LoadCommand(1, 0, [6, 7])]))
    reader.half.start_loads(False)
    assert same(reader.blocks([6, 7]), writer.blocks([0, 1]))
    reader.half.end_forward()
    assert reader.quiet()


def test_a_layer_is_there_when_it_was_waited_for(workers: Workers, url: str) -> None:
    writer = filled(workers, url, 1)
    reader = workers(url)
    reader.step(stages=[stage(1, 1)])
    reader.staged(1)
    reader.half.receive(StepCommands(reader.namespace, loads=[LoadCommand(1, 0, [6, 7])]))
    reader.half.start_loads(True)
    reader.half.wait_for_layer("layers.9.attn.that.shares.its.kv")
    for layer, name in enumerate(LAYERS):
        reader.half.wait_for_layer(name)
        assert torch.equal(reader.pages[layer][6:8], writer.pages[layer][0:2])
    reader.half.end_forward()
    assert reader.quiet()


def test_a_model_that_skips_a_layer_fails_its_step(workers: Workers, url: str) -> None:
    filled(workers, url, 1)
    reader = workers(url)
    reader.step(stages=[stage(1, 1)])
    reader.staged(1)
    reader.half.receive(StepCommands(reader.namespace, loads=[LoadCommand(1, 0, [6, 7])]))
    reader.half.start_loads(True)
    reader.half.wait_for_layer(LAYERS[0])
    with pytest.raises(RuntimeError, match="never waited"):
        reader.half.end_forward()


def test_several_jobs_in_one_step(workers: Workers, url: str) -> None:
    writer = filled(workers, url, 3)
    reader = workers(url)
    reader.step(stages=[stage(1, 1, 2), stage(2, 1, 2, 3)])
    reader.staged(1), reader.staged(2)
    reader.step(loads=[LoadCommand(1, 0, [10, 11, 12, 13]), LoadCommand(2, 2, [1, 2, 3])])
    assert same(reader.blocks([10, 11, 12, 13]), writer.blocks([0, 1, 2, 3]))
    assert same(reader.blocks([1, 2, 3]), writer.blocks([2, 3, 4]))
    assert reader.quiet()


def test_an_object_in_the_store_is_as_the_format_says(workers: Workers, tmp_path: Path) -> None:
    filled(workers, f"file://{tmp_path}", 1)
    (path,) = [p for p in tmp_path.rglob("*") if p.is_file() and "of1" in p.name]
    assert str(path.relative_to(tmp_path)) == keys.object_key("space-a", chunk_hash(1), 0, 1)
    stored = path.read_bytes()
    assert stored[48:80] == SPACES["space-a"][1] and stored[80:112] == chunk_hash(1)


# ---- what can go wrong with the bytes


def test_a_missing_chunk_ends_the_prefix(workers: Workers, url: str) -> None:
    filled(workers, url, 2)
    reader = workers(url)
    reader.step(stages=[stage(1, 1, 9, 2)])
    assert reader.staged(1) == Staged(1, 1, "NotFound")
    reader.step(releases=[1])
    assert reader.quiet()
    stats = reader.half.stats()
    assert stats is not None and stats.data["missing_chunks"] == 1
    assert stats.data["staged_chunks"] == 1


def test_a_corrupt_chunk_ends_the_prefix_and_is_replaced(workers: Workers, tmp_path: Path) -> None:
    filled(workers, f"file://{tmp_path}", 2)
    path = object_path(tmp_path, 2)
    good = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    second = workers(f"file://{tmp_path}")
    second.fill(1)
    second.step(stages=[stage(1, 1, 2)])
    assert second.staged(1) == Staged(1, 1, "Corrupt")
    second.step(releases=[1], saves=[save(2, [2, 3])])
    assert second.saved(1) == [Saved(chunk_hash(2), "written")]
    assert path.read_bytes() == good
    assert second.quiet()


def test_a_chunk_that_exists_is_not_written_twice(workers: Workers, url: str) -> None:
    filled(workers, url, 1)
    second = workers(url)
    second.step(saves=[save(1, [4, 5])])
    assert second.saved(1) == [Saved(chunk_hash(1), "existed")]
    assert second.quiet()


def test_a_rank_that_does_not_write_says_nothing(workers: Workers, url: str) -> None:
    silent = workers(url, writes=False)
    silent.step(saves=[save(1, [0, 1])])
    silent.step(stages=[stage(1, 1)])
    assert silent.staged(1).error == "NotFound"
    assert silent.reports.saved == []
    silent.step(releases=[1])
    assert silent.quiet()


# ---- when there is no room


def test_saves_that_find_no_slot_are_dropped_and_said_to_be(workers: Workers, url: str) -> None:
    worker = workers(url)
    worker.fill(1)
    worker.step(saves=[save(n, [2 * n, 2 * n + 1]) for n in range(5)])
    outcomes = {saved.chunk_hash: saved.outcome for saved in worker.saved(5)}
    assert [outcomes[chunk_hash(n)] for n in range(5)] == ["written"] * 2 + ["dropped"] * 3
    assert worker.quiet()
    worker.step(saves=[save(3, [6, 7])])
    assert worker.saved(1) == [Saved(chunk_hash(3), "written")]
    stats = worker.half.stats()
    assert stats is not None
    assert (stats.data["saved_chunks"], stats.data["dropped_saves"]) == (3, 3)


def test_a_prefix_larger_than_the_ring_is_loaded_in_part(workers: Workers, url: str) -> None:
    writer = filled(workers, url, LOAD_SLOTS + 2)
    reader = workers(url)
    reader.step(stages=[stage(1, *range(1, LOAD_SLOTS + 3))])
    assert reader.staged(1) == Staged(1, LOAD_SLOTS)
    ids = list(range(2 * LOAD_SLOTS))
    reader.step(loads=[LoadCommand(1, 0, ids)])
    assert same(reader.blocks(ids), writer.blocks(ids))
    assert reader.quiet()


def test_a_job_waits_for_room_and_gets_it_from_a_release_or_a_load(
    workers: Workers, url: str
) -> None:
    filled(workers, url, 12)
    reader = workers(url)
    reader.step(stages=[stage(1, 1, 2, 3, 4, 5, 6), stage(2, 7, 8, 9, 10), stage(3, 11, 12, 1)])
    assert reader.staged(1).chunks == 6
    reader.step()
    assert [report.job for report in reader.reports.staged] == [1]
    reader.step(releases=[1])
    assert reader.staged(2).chunks == 4
    assert [report.job for report in reader.reports.staged] == [1, 2]
    reader.step(loads=[LoadCommand(2, 0, [0, 1])])
    assert reader.staged(3).chunks == 3
    reader.step(releases=[3])
    assert reader.quiet()


def test_a_ring_that_holds_less_than_two_chunks_is_refused() -> None:
    pages = [torch.zeros((4, 400_000), dtype=torch.uint8)]
    options = parse({"url": "memory://x", "chunk_tokens": 8, "ring_bytes": 1 << 20})
    with pytest.raises(Misconfigured) as refused:
        WorkerHalf(options, ["a"], pages, 4, 0, 1, True)
    assert str(2 * 804_096) in refused.value.hint


# ---- saves, layer by layer


class Computing(Worker):
    """Each layer's pages hold the layer's number when its hook is called, and something else after the
    hooks of all."""

    def compute(self, layer: int) -> None:
        self.pages[layer][:] = layer + 1
        if layer == len(LAYERS) - 1:
            for earlier in range(layer):
                self.pages[earlier][:] = 100


@pytest.mark.parametrize("whole_layers", [True, False])
def test_a_layer_is_saved_when_it_is_computed_if_its_hook_says_that_it_is(
    folder: str, tmp_path: Path, whole_layers: bool
) -> None:
    writer = Computing(folder, whole_layers=whole_layers)
    writer.step(saves=[save(1, [3, 5])])
    assert writer.saved(1) == [Saved(chunk_hash(1), "written")]
    writer.half.shutdown()
    reader = Worker(folder)
    reader.step(stages=[stage(1, 1)])
    reader.staged(1)
    reader.step(loads=[LoadCommand(1, 0, [0, 1])])
    values = [int(page[0, 0]) for page in reader.pages]
    assert values == ([1, 2, 3] if whole_layers else [100, 100, 3])
    assert all((page[:2] == page[0, 0]).all() for page in reader.pages)
    reader.half.shutdown()


# ---- loads that begin before all of it is there


def test_slots_of_an_early_load_go_back_after_its_copies_and_its_reads(
    workers: Workers, url: str
) -> None:
    writer = filled(workers, url, 2)
    reader = workers(url)
    held = reader.half._mover = Holds(reader.half._mover)
    reader.step(stages=[stage(1, 1, 2)])
    layers = 2 * len(LAYERS)

    def there() -> bool:
        reader.step(step=1)
        return any(coming.layers == layers for coming in reader.reports.coming)

    assert eventually(there)
    reader.step(loads=[LoadCommand(1, 0, [4, 5, 6, 7], coming=True)])
    assert same(reader.blocks([4, 5, 6, 7]), writer.blocks([0, 1, 2, 3]))
    reader.step()
    assert reader.half.leased_slots == 2, "a read may write there still"
    held.quiet = False
    reader.step()
    assert reader.quiet() and not reader.failed_blocks


# ---- releases, at any time


def ended(worker: object) -> bool:
    """A stage has ended, and nobody has heard of it."""
    return any(isinstance(event, StageResult) for event in worker.half._mover._events)  # type: ignore[attr-defined]


def test_release_after_the_report(workers: Workers, url: str) -> None:
    worker = filled(workers, url, 2)
    worker.step(stages=[stage(1, 1, 2)])
    worker.staged(1)
    assert worker.half.leased_slots == 2
    worker.step(releases=[1])
    assert worker.half.leased_slots == 0


def test_release_before_the_report(workers: Workers, url: str) -> None:
    """The job waits for room; nobody hears of it again."""
    worker = filled(workers, url, 8)
    worker.step(stages=[stage(1, 1, 2, 3, 4, 5, 6), stage(2, 7, 8)])
    worker.staged(1)
    worker.step(releases=[2])
    worker.step(releases=[1])
    assert worker.quiet()
    assert [report.job for report in worker.reports.staged] == [1]


def test_release_when_the_report_is_ready_but_was_not_taken(workers: Workers, url: str) -> None:
    worker = filled(workers, url, 2)
    worker.half.receive(StepCommands(worker.namespace, stages=[stage(1, 1, 2)]))
    assert eventually(lambda: ended(worker))
    worker.step(releases=[1])
    assert worker.quiet()
    assert worker.reports.staged == []


@pytest.mark.parametrize("round_", range(5))
def test_release_in_the_next_step(workers: Workers, url: str, round_: int) -> None:
    """The stage is anywhere on its way."""
    worker = filled(workers, url, 3)
    for job in range(10):
        worker.half.receive(StepCommands(worker.namespace, stages=[stage(job, 1, 2, 3)]))
        worker.half.receive(StepCommands(worker.namespace, releases=[job]))
    assert worker.quiet() and worker.forgot_all()
    assert worker.reports.staged == []


@pytest.mark.parametrize("first_step", [True, False])
def test_stage_and_release_in_one_step(workers: Workers, url: str, first_step: bool) -> None:
    """A request came and went between two steps, perhaps before the first one."""
    filled(workers, url, 2)
    worker = workers(url)
    if not first_step:
        worker.step()
    worker.step(stages=[stage(1, 1, 2), stage(2, 1)], releases=[1])
    assert worker.staged(2).chunks == 1
    worker.step(releases=[2])
    assert worker.quiet()
    assert [report.job for report in worker.reports.staged] == [2]
    assert worker.forgot_all()


# ---- another namespace, as after a change of the weights


def test_a_new_namespace_has_other_objects(workers: Workers, tmp_path: Path) -> None:
    worker = filled(workers, f"file://{tmp_path}", 1)
    worker.step(stages=[stage(1, 1)])
    assert worker.staged(1).chunks == 1
    worker.namespace = SPACES["space-b"]
    worker.step(releases=[1], stages=[stage(2, 1)])
    assert worker.staged(2) == Staged(2, 0, "NotFound")
    worker.fill(7)
    worker.step(releases=[2], saves=[save(1, [4, 5])])
    assert worker.saved(1) == [Saved(chunk_hash(1), "written")]
    worker.step(stages=[stage(3, 1)])
    assert worker.staged(3).chunks == 1
    worker.step(loads=[LoadCommand(3, 0, [10, 11])])
    assert same(worker.blocks([10, 11]), worker.blocks([4, 5]))
    assert worker.quiet()
    for space in SPACES:
        assert object_path(tmp_path, 1, space).read_bytes()[48:80] == SPACES[space][1]


def test_jobs_of_the_old_namespace_end_with_it(workers: Workers, url: str) -> None:
    """One is staged, one waits for room; both are released in the step that changes the name."""
    worker = filled(workers, url, 8)
    worker.step(stages=[stage(1, 1, 2, 3, 4, 5, 6), stage(2, 7, 8)])
    worker.staged(1)
    worker.namespace = SPACES["space-b"]
    worker.step(releases=[1, 2], stages=[stage(3, 1)])
    assert worker.staged(3) == Staged(3, 0, "NotFound")
    worker.step(releases=[3])
    assert worker.quiet()
    assert [report.job for report in worker.reports.staged] == [1, 3]


class SlowCopies(WorkerHalf):
    """As on a GPU: the copy of a save ends in a later step."""

    copied = False

    def _hand_over_saves(self) -> None:
        if self.copied:
            super()._hand_over_saves()


def test_a_save_that_outlasts_its_namespace_is_an_object_of_the_old_one(
    workers: Workers, tmp_path: Path
) -> None:
    worker = workers(f"file://{tmp_path}", kind=SlowCopies)
    worker.step(saves=[save(1, [4, 5])])
    worker.namespace = SPACES["space-b"]
    worker.step()
    worker.half.copied = True
    worker.step(saves=[save(2, [4, 5])])
    assert {saved.outcome for saved in worker.saved(2)} == {"written"}
    old, new = object_path(tmp_path, 1), object_path(tmp_path, 2, "space-b")
    assert old.read_bytes()[48:80] == SPACES["space-a"][1]
    assert new.read_bytes()[48:80] == SPACES["space-b"][1]
    assert worker.quiet()


# ---- the end


def test_shutdown_waits_for_uploads(workers: Workers, url: str) -> None:
    writer = workers(url)
    writer.fill(1)
    writer.half.receive(StepCommands(writer.namespace, saves=[save(1, [0, 1]), save(2, [2, 3])]))
    writer.half.end_forward()
    writer.half.shutdown()
    reader = workers(url)
    reader.step(stages=[stage(1, 1, 2)])
    assert reader.staged(1).chunks == 2
    reader.step(loads=[LoadCommand(1, 0, [0, 1, 2, 3])])
    assert same(reader.blocks([0, 1, 2, 3]), writer.blocks([0, 1, 2, 3]))


def test_shutdown_gives_back_what_nobody_will_ask_for(workers: Workers, url: str) -> None:
    """Staged and reported, ready and not reported, and waiting for room."""
    worker = filled(workers, url, 6)
    worker.step(stages=[stage(1, 1, 2)])
    worker.staged(1)
    worker.half.receive(StepCommands(worker.namespace, stages=[stage(2, 3, 4)]))
    assert eventually(lambda: ended(worker))
    worker.half.receive(StepCommands(worker.namespace, stages=[stage(3, 1, 2, 3, 4)]))
    worker.half.shutdown()
    assert worker.half.leased_slots == 0


def test_shutdown_of_a_worker_that_was_never_used(workers: Workers, url: str) -> None:
    worker = workers(url)
    worker.half.shutdown()
    assert worker.half.report() is None and worker.half.stats() is None


def test_all_that_runs_begins_with_the_worker_and_ends_with_it(workers: Workers, url: str) -> None:
    """In a start-up that is slow anyway, not in the first step with a request."""
    before = set(threading.enumerate())
    worker = workers(url)
    begun = {thread.name for thread in set(threading.enumerate()) - before}
    assert begun == {"objectcache-mover"}
    worker.step(stages=[stage(1, 1, 2)])
    worker.half.shutdown()
    assert eventually(lambda: set(threading.enumerate()) == before)


def test_a_step_without_a_namespace_is_harmless(workers: Workers, url: str) -> None:
    worker = workers(url)
    worker.namespace = ("", b"")
    worker.step()
    assert worker.half.leased_slots == 0
