"""The worker half by itself, driven step by step as vLLM's worker drives it. With the scheduler half: test_scheduling.py."""

import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fakes import chunk_hash, eventually

from objectcache import keys
from objectcache.config import parse
from objectcache.device import CpuCopies
from objectcache.errors import Misconfigured
from objectcache.loop import LoopThread
from objectcache.messages import (
    LoadCommand,
    SaveCommand,
    Saved,
    StageCommand,
    Staged,
    StepCommands,
    StepReport,
    StreamCommand,
    Streamed,
)
from objectcache.worker import WorkerHalf

BLOCK_TOKENS, CHUNK_BLOCKS, BLOCKS = 4, 2, 24
LAYERS = ["layers.0.attn", "layers.1.attn", "layers.2.attn"]
PAGE_BYTES = (20_000, 24_000, 16_000)  # an object is 124,096 bytes: 8 slots in a ring of 1 MiB
LOAD_SLOTS, SAVE_SLOTS = 6, 2
SPACES = {name: (name, bytes([at]) * 32) for at, name in enumerate(("space-a", "space-b"), 1)}


class Worker:
    """A worker half with pages of its own, and the hooks of a step in vLLM's order."""

    def __init__(
        self,
        url: str,
        space: str = "space-a",
        writes: bool = True,
        kind: type[WorkerHalf] = WorkerHalf,
        streams: bool = False,
        **more: int,
    ) -> None:
        options = parse({"url": url, "chunk_tokens": 8, "ring_bytes": 1 << 20, **more})
        self.memory = [torch.zeros((BLOCKS, size + 64), dtype=torch.uint8) for size in PAGE_BYTES]
        self.pages = [m[:, :size] for m, size in zip(self.memory, PAGE_BYTES, strict=True)]
        self.half = kind(options, LAYERS, self.pages, BLOCK_TOKENS, 0, 1, writes, streams)
        self.namespace = SPACES[space]
        self.reports = StepReport()
        self.unparked: list[str] = []
        self.failed_blocks: set[int] = set()

    def fill(self, seed: int) -> None:
        for layer, memory in enumerate(self.memory):
            generator = torch.Generator().manual_seed(100 * seed + layer)
            shape = memory.shape
            memory.copy_(torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator))

    def blocks(self, block_ids: list[int]) -> list[torch.Tensor]:
        return [page[block_ids].clone() for page in self.pages]

    def step(self, **commands: list) -> None:
        self.half.receive(StepCommands(namespace=self.namespace, **commands))
        self.half.start_loads(True)
        for name in LAYERS:
            self.half.wait_for_layer(name)
        self.half.end_forward()
        self.unparked += sorted(self.half.unparked())
        self.failed_blocks |= self.half.failed_blocks()
        self.look()

    def streamed(self, job: int) -> Streamed:
        """The report of a stream, after as many steps as it takes."""

        def there() -> bool:
            self.step()
            return any(streamed.job == job for streamed in self.reports.streamed)

        assert eventually(there), f"no such report in {self.reports}"
        return next(streamed for streamed in self.reports.streamed if streamed.job == job)

    def look(self) -> None:
        report = self.half.report()
        if report is not None:
            self.reports = self.reports.aggregate(report)

    def staged(self, job: int) -> Staged:
        """The report of a job, soon."""
        return self._soon(lambda: [s for s in self.reports.staged if s.job == job])[0]

    def saved(self, count: int) -> list[Saved]:
        """The first `count` outcomes, soon; then they are forgotten."""
        saved = self._soon(lambda: self.reports.saved if len(self.reports.saved) >= count else [])
        assert len(saved) == count
        self.reports.saved = []
        return saved

    def _soon(self, found: "object") -> list:
        def there() -> bool:
            self.look()
            return bool(found())  # type: ignore[operator]

        assert eventually(there), f"no such report in {self.reports}"
        return found()  # type: ignore[operator]

    def quiet(self) -> bool:
        def zero() -> bool:
            self.look()
            return self.half.leased_slots == 0

        return eventually(zero)

    def forgot_all(self) -> bool:
        """Released jobs are not remembered for ever."""

        def forgot() -> bool:
            self.look()
            return not self.half._given_up

        return eventually(forgot, 1.0)


def save(number: int, block_ids: list[int]) -> SaveCommand:
    return SaveCommand(chunk_hash(number), block_ids)


def stage(job: int, *numbers: int) -> StageCommand:
    return StageCommand(job, [chunk_hash(number) for number in numbers])


def stream(job: int, *numbers: int, first_block: int = 0, ids: list[int]) -> StreamCommand:
    hashes = [chunk_hash(number) for number in numbers]
    return StreamCommand(job, f"request-{job}", hashes, first_block, ids)


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"memory://{uuid.uuid4().hex}" if request.param == "memory" else f"file://{tmp_path}"


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return f"file://{tmp_path}"


class Workers:
    """Makes workers; all must end with no thread and no slot left."""

    def __init__(self) -> None:
        self.made: list[Worker] = []

    def __call__(self, *args: object, **more: object) -> Worker:
        worker = Worker(*args, **more)  # type: ignore[arg-type]
        self.made.append(worker)
        return worker

    def end(self) -> None:
        for worker in self.made:
            worker.half.shutdown()
            worker.half.shutdown()
            assert worker.half.leased_slots == 0, "slots are lost at the end"


@pytest.fixture
def workers() -> Iterator[Workers]:
    before = set(threading.enumerate())
    made = Workers()
    yield made
    made.end()
    left = eventually(lambda: set(threading.enumerate()) <= before)
    assert left, f"threads are left: {set(threading.enumerate()) - before}"


def filled(workers: Workers, url: str, chunks: int, **more: int) -> Worker:
    """A worker that has saved chunks 1, 2, ... from blocks (0, 1), (2, 3), ..."""
    writer = workers(url, **more)
    writer.fill(1)
    for number in range(chunks):
        writer.step(saves=[save(number + 1, [2 * number, 2 * number + 1])])
        assert writer.saved(1) == [Saved(chunk_hash(number + 1), "written")]
    assert writer.quiet()
    return writer


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


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


def object_path(tmp_path: Path, number: int, space: str = "space-a") -> Path:
    return tmp_path / keys.object_key(space, chunk_hash(number), 0, 1)


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


# ---- releases, at any time


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
    assert eventually(lambda: bool(worker.half._results))
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

    def _hand_over_saves(self, loop: LoopThread) -> None:
        if self.copied:
            super()._hand_over_saves(loop)


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


# ---- more than the ring holds


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

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
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
    assert eventually(lambda: len(reader.half._parked._arrived) == LOAD_SLOTS)
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
    assert eventually(lambda: bool(worker.half._results))
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
    assert begun == {"objectcache-worker"}
    worker.step(stages=[stage(1, 1, 2)])
    worker.half.shutdown()
    assert eventually(lambda: set(threading.enumerate()) == before)


def test_a_step_without_a_namespace_is_harmless(workers: Workers, url: str) -> None:
    worker = workers(url)
    worker.namespace = ("", b"")
    worker.step()
    assert worker.half.leased_slots == 0
