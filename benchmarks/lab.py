"""Servers with chunks in them, the destination, and the processes of the clients: what transport.py measures with. Not what is measured."""

import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.chunks import Chunks
from benchmarks.nginx import Nginx, nginx_absent, tls_absent
from benchmarks.s3_like import S3Like
from benchmarks.servers import SeaweedFS, Server, cores, die_with_parent, workers

BUCKET = "transport"
MIB = 1 << 20
PARTS = (32, 8, 2, 1)  # in how many parts the slices of a chunk are stored: 1, 4, 16 and 32 MiB
_ANSWER_LIMIT_S = 45.0
_LOG_TAIL_BYTES = 400


class Gone(RuntimeError):
    """A reader's process died or hangs."""


@dataclass(frozen=True)
class Scale:
    """What fits this machine."""

    slots: int  # chunks that the destination holds
    objects: int
    cores: int
    slice_bytes: int = MIB
    split: int = 8  # of how many chunks a server has the parts as objects of their own
    fill_s: float = 0.15
    busy_s: float = 0.7

    @property
    def chunk_bytes(self) -> int:
        """Of the slices, which is what ranges are taken from."""
        return self.slice_bytes * 32


class Lab:
    """The servers with the chunks in them, and the destination. All of it in memory."""

    def __init__(
        self, folder: Path, scale: Scale, servers: set[str], destination: bool = True
    ) -> None:
        self.folder, self.scale, self.wanted = folder, scale, servers
        self._destination = destination
        self.chunks = Chunks(folder / "objects" / BUCKET, scale.objects, scale.slice_bytes)
        self.memory = folder / "destination"
        self.servers: dict[str, Server] = {}
        self.absent: dict[str, str] = {}
        self._open = ExitStack()

    def __enter__(self) -> "Lab":
        try:
            self._start()
        except BaseException:
            self._open.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _start(self) -> None:
        self.chunks.make()
        if self._destination:
            with self.memory.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, self.scale.slots * self.chunks.object_bytes)
        objects = self.folder / "objects"
        if self.wanted & {"nginx", "tls"}:
            absent = nginx_absent()
            if absent:
                self.absent |= {"nginx": absent, "tls": absent}
            else:
                nginx = Nginx(self.folder / "nginx", BUCKET, objects, workers())
                self.servers["nginx"] = self._open.enter_context(nginx)
                if tls_absent():
                    self.absent["tls"] = tls_absent()
                else:
                    self.servers["tls"] = nginx
        if "s3-like" in self.wanted:
            slow = S3Like(self.folder / "s3-like", BUCKET, objects, workers())
            self.servers["s3-like"] = self._open.enter_context(slow)
        if "seaweedfs" in self.wanted:
            weed = SeaweedFS(self.folder / "weed", BUCKET, piece_mib=64)
            self.servers["seaweedfs"] = self._open.enter_context(weed)
            self._upload(weed)

    def _upload(self, server: Server) -> None:
        """Chunks in parts, an object for each, in all the sizes that are asked for."""
        client, header = server.client(), self.chunks.layout.header_bytes

        def put(number: int) -> None:
            content = self.chunks.content(number)[header:]
            for split in PARTS:
                size = self.scale.chunk_bytes // split
                for part in range(split):
                    body = bytes(content[part * size : (part + 1) * size])
                    key = self.chunks.part_key(number, size, part)
                    client.put_object(Bucket=BUCKET, Key=key, Body=body)

        with ThreadPoolExecutor(min(16, self.scale.cores * 2)) as threads:
            list(threads.map(put, range(self.scale.split)))
        client.close()

    def endpoints(self) -> dict[str, dict[str, str]]:
        found = {}
        for name, server in self.servers.items():
            at = {"url": server.endpoint_url, "bucket": BUCKET}
            if name == "tls" and isinstance(server, Nginx):
                at |= {"url": server.tls_url, "ca": str(server.ca)}
            found[name] = at
        return found

    def env(self) -> dict[str, str]:
        """For readers: credentials, and the CA for clients that take it from nowhere else."""
        env = next(iter(self.servers.values())).env
        del env["AWS_ENDPOINT_URL_S3"]
        nginx = self.servers.get("tls")
        if isinstance(nginx, Nginx):
            env |= {"AWS_CA_BUNDLE": str(nginx.ca), "SSL_CERT_FILE": str(nginx.ca)}
        return dict(os.environ) | env | {"AWS_EC2_METADATA_DISABLED": "true"}

    def requests(self, server: str) -> int | None:
        """How many it has answered, where it can say."""
        found = self.servers[server]
        if isinstance(found, S3Like):
            return found.counts().requests
        return found.requests() if isinstance(found, Nginx) else None

    @contextmanager
    def off_first_core(self, server: str, really: bool) -> Iterator[None]:
        """Meanwhile the server leaves the first core to a busy main thread."""
        all_, first = cores(), min(os.sched_getaffinity(0))
        found = self.servers[server]
        if not really or not all_ - {first} or not isinstance(found, (Nginx, S3Like)):
            yield
            return
        try:
            _bind(found.pid, all_ - {first})
            yield
        finally:
            _bind(found.pid, all_)


def _bind(pid: int, allowed: set[int]) -> None:
    """A process of one thread and those that it started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for one in (pid, *map(int, children)):
        os.sched_setaffinity(one, allowed)


class ReaderProcess:
    """`python -m benchmarks.reader` for one system."""

    def __init__(self, system: str, lab: Lab, most: int) -> None:
        self._system = system
        self._log = lab.folder / f"{system}.log"
        plan = {
            "name": system,
            "memory": str(lab.memory),
            "slots": lab.scale.slots,
            "split": lab.scale.split,
            "most": most,
            "endpoints": lab.endpoints(),
            "chunks": {
                "folder": str(lab.chunks.folder),
                "count": lab.chunks.count,
                "slice_bytes": lab.chunks.slice_bytes,
            },
        }
        with self._log.open("ab") as log:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.reader", json.dumps(plan)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=lab.env(),
                preexec_fn=die_with_parent,
            )

    def ask(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """Its answer. Raises Gone if there is none in time; the process is then ended."""
        assert self._child.stdin is not None and self._child.stdout is not None
        try:
            self._child.stdin.write(json.dumps(command).encode() + b"\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            raise Gone(self._last_words()) from None
        ready, _, _ = select.select([self._child.stdout], [], [], _ANSWER_LIMIT_S)
        text = self._child.stdout.readline() if ready else b""
        if not text:
            self.end()
            raise Gone(self._last_words() if ready else f"no answer in {_ANSWER_LIMIT_S:.0f} s")
        answer: dict[str, Any] = json.loads(text)
        return answer

    def end(self) -> None:
        self._child.kill()
        self._child.wait()

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()
        return f"its process ended: {lines[-1][-_LOG_TAIL_BYTES:] if lines else 'no word'}"
