"""A worker half that is driven step by step as vLLM's worker drives it, for the suites of the worker. No tests here."""

import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fakes import chunk_hash, eventually

from objectcache import keys
from objectcache.config import parse
from objectcache.messages import (
    SaveCommand,
    Saved,
    StageCommand,
    Staged,
    StepCommands,
    StepReport,
    StreamCommand,
    Streamed,
)
from objectcache.mover import Event, Mover
from objectcache.movers import Movers
from objectcache.streamer import StageResult
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
        whole_layers: bool = True,
        **more: int,
    ) -> None:
        options = parse({"url": url, "chunk_tokens": 8, "ring_bytes": 1 << 20, **more})
        self.memory = [torch.zeros((BLOCKS, size + 64), dtype=torch.uint8) for size in PAGE_BYTES]
        self.pages = [m[:, :size] for m, size in zip(self.memory, PAGE_BYTES, strict=True)]
        self.half = kind(
            *(options, LAYERS, self.pages, BLOCK_TOKENS, 0, 1),
            writes=writes,
            streams=streams,
            whole_layers=whole_layers,
        )
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
        for layer, name in enumerate(LAYERS):
            self.half.wait_for_layer(name)
            self.compute(layer)
            self.half.layer_computed(name)
        self.half.end_forward()
        self.unparked += sorted(self.half.unparked())
        self.failed_blocks |= self.half.failed_blocks()
        self.look()

    def compute(self, layer: int) -> None:
        """What the model does to a layer's pages in this step, before its hook. A test may give another."""

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


class Holds(Movers):
    """One mover, whose reports on stages are kept back while `quiet` is set."""

    def __init__(self, mover: Mover) -> None:
        super().__init__([mover])
        self.quiet = True
        self._kept: list[Event] = []

    def take(self) -> list[Event]:
        kept, self._kept = self._kept, []
        events = kept + super().take()
        if self.quiet:
            self._kept = [event for event in events if isinstance(event, StageResult)]
        return [event for event in events if event not in self._kept]


def save(number: int, block_ids: list[int]) -> SaveCommand:
    return SaveCommand(chunk_hash(number), block_ids)


def stage(job: int, *numbers: int) -> StageCommand:
    return StageCommand(job, [chunk_hash(number) for number in numbers])


def stream(job: int, *numbers: int, first_block: int = 0, ids: list[int]) -> StreamCommand:
    hashes = [chunk_hash(number) for number in numbers]
    return StreamCommand(job, f"request-{job}", hashes, first_block, ids)


@pytest.fixture(name="url", params=["memory", "file"])
def url_fixture(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"memory://{uuid.uuid4().hex}" if request.param == "memory" else f"file://{tmp_path}"


@pytest.fixture(name="folder")
def folder_fixture(tmp_path: Path) -> str:
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


@pytest.fixture(name="workers")
def workers_fixture() -> Iterator[Workers]:
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


def object_path(tmp_path: Path, number: int, space: str = "space-a") -> Path:
    return tmp_path / keys.object_key(space, chunk_hash(number), 0, 1)
