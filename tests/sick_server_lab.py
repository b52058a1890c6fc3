"""A real S3 server behind a proxy that breaks what it is told to, and a model for toy engines. No tests here."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_server import FaultProxy
from s3_lab import bucket

from benchmarks.servers import SeaweedFS
from benchmarks.tiny_model import write_model


@pytest.fixture(name="model", scope="module")
def model_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(name="proxy", scope="module")
def proxy_fixture(weed: SeaweedFS) -> Iterator[FaultProxy]:
    """Before a bucket kvcache; its credentials are in the environment: engines run in this process."""
    with bucket(weed, "kvcache"), FaultProxy(weed.endpoint_url) as proxy:
        yield proxy
