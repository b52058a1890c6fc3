"""A real S3 server behind a proxy that breaks what it is told to, and a model for toy engines. No tests here."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_server import FaultProxy

from benchmarks.servers import seaweedfs
from benchmarks.tiny_model import write_model


@pytest.fixture(name="model", scope="module")
def model_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(name="proxy", scope="module")
def proxy_fixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultProxy]:
    """Before a bucket kvcache; its credentials are in the environment."""
    before = dict(os.environ)
    with (
        seaweedfs(tmp_path_factory.mktemp("s3"), "kvcache") as server,
        FaultProxy(server.endpoint_url) as proxy,
    ):
        os.environ.update(server.env)  # the engine runs in this process
        yield proxy
        os.environ.clear()
        os.environ.update(before)
