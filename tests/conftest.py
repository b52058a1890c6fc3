"""What every test has in common. Fixtures stand where they are used, but for the server that suites share."""

import gc
import os
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest

from benchmarks.servers import SeaweedFS, seaweedfs

# With awscrt beside it botocore signs in another way. Most users have none; test_s3_crt.py is for
# those who do.
os.environ.setdefault("BOTO_DISABLE_CRT", "true")

# vLLM itself wants one thread "for serving", but cannot set it where front end and worker share a
# process. With more, each operation of a tiny model waits for a thread that another test keeps from
# its core: several times the CPU time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# On a machine that does other things at the same time an example may take any time.
hypothesis.settings.register_profile("any time", deadline=None)
hypothesis.settings.load_profile("any time")


# These start whole engines and use a core all the time: one after the other in one worker
# (pytest-xdist), while the others take the files whose tests mostly wait, and measure how long.
ENGINES = (
    *("test_engine.py", "test_serve.py", "test_throughput.py", "test_ttft.py"),
    *("test_models.py", "test_crowds.py"),
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Side by side what takes longest begins first."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.path.name not in ENGINES)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each worker takes the next file when it is free; all of ENGINES count as one."""
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = str(super()._split_scope(nodeid))
            return "engines" if file.rpartition("/")[2] in ENGINES else file

    return Files(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_collection_finish() -> None:
    """What was imported stays: without this each full collection walks through all of vLLM, for seconds."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", name="weed")
def weed_fixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """A real S3 server for all suites that do not stop it. Each makes a bucket of its own there."""
    with seaweedfs(tmp_path_factory.mktemp("seaweedfs"), "tests") as server:
        yield server
