"""The S3 store where awscrt is installed, as beside other KV connectors: botocore then signs with it."""

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.servers import seaweedfs

SCRIPT = """
import asyncio, sys
from botocore.compat import HAS_CRT
from objectcache.config import parse
from objectcache.errors import NotFound
from objectcache.stores import open_store

assert HAS_CRT, "botocore does not use awscrt"
BODY = bytes(range(256)) * 8000

async def main():
    store = open_store(parse({"url": "s3://crt/below", "endpoint_url": sys.argv[1]}))
    await store.check()
    assert await store.write("ns/key", memoryview(BODY)) is True
    assert await store.write("ns/key", memoryview(BODY)) is False
    assert await store.head("ns/key") == len(BODY)
    into = bytearray(len(BODY))
    await store.read("ns/key", memoryview(into))
    assert into == BODY
    assert [key async for key, _ in store.list("ns/")] == ["ns/key"]
    await store.delete("ns/key")
    try:
        await store.head("ns/key")
    except NotFound:
        print("all well")
    await store.close()

asyncio.run(main())
"""


def test_all_requests_with_the_crt_signer(tmp_path: Path) -> None:
    with seaweedfs(tmp_path / "s3", "crt") as server:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, server.endpoint_url],
            env=os.environ | server.env | {"BOTO_DISABLE_CRT": "false"},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.stdout == "all well\n", done.stderr[-2000:]
