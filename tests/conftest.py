"""What every test has in common. Fixtures stand where they are used, but for the server that suites share."""

import gc
import os
from collections.abc import Iterator

import hypothesis
import pytest

from benchmarks.servers import SeaweedFS, seaweedfs

# With awscrt beside it botocore signs in another way. Most users have none; test_s3_crt.py is for
# those who do.
os.environ.setdefault("BOTO_DISABLE_CRT", "true")

# On a machine that does other things at the same time an example may take any time.
hypothesis.settings.register_profile("any time", deadline=None)
hypothesis.settings.load_profile("any time")


def pytest_collection_finish() -> None:
    """What was imported stays: without this each full collection walks through all of vLLM, for seconds."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", name="weed")
def weed_fixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """A real S3 server for all suites that do not stop it. Each makes a bucket of its own there."""
    with seaweedfs(tmp_path_factory.mktemp("seaweedfs"), "tests") as server:
        yield server
