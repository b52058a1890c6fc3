"""S3 clients in Rust and C++ behind the face of clients.py, for transport.py. Each is imported when it is used."""

import ctypes
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.clients import (
    SILENCE_S,
    Absent,
    Client,
    Endpoint,
    LoopClient,
    Read,
    ThreadedClient,
)

# Both clients that read in parts take 8 MiB by default; so little more cuts a chunk into four. With
# 33 MiB, one GET for a chunk as the others send it, they take three times the CPU and tell nothing
# until all of it is there.
_PART_BYTES = (8 << 20) + 4096
_CHUNK_BYTES = 32 << 20
_TARGET_GBPS = 400.0  # "as fast as you can", for the two that size themselves by it
_LMCACHE_IO_THREADS = 64
_POLL_S = 0.001


def _obstore_store(at: Endpoint) -> Any:
    try:
        from obstore.store import S3Store
    except ImportError:
        raise Absent("obstore is not installed") from None
    options: dict[str, Any] = {
        "allow_http": True,
        "timeout": f"{SILENCE_S:.0f}s",
        "connect_timeout": f"{SILENCE_S:.0f}s",
    }
    if at.ca:
        options["root_certificate"] = Path(at.ca).read_bytes()
    return S3Store(
        at.bucket,
        endpoint=at.url,
        access_key_id=at.access_key,
        secret_access_key=at.secret_key,
        region=at.region,
        virtual_hosted_style_request=False,
        client_options=options,
        retry_config={"max_retries": 0},
    )


def _range(read: Read) -> dict[str, Any]:
    if read.start is None:
        return {}
    return {"options": {"range": (read.start, read.start + len(read.into))}}


class Obstore(LoopClient):
    """obstore's coroutines: whole ranges, or with marks a stream in pieces of a slice."""

    async def connect(self) -> None:
        self._store = _obstore_store(self.at)

    async def read(self, read: Read) -> None:
        import obstore

        if read.landed is None and read.start is not None:
            body = await obstore.get_range_async(
                self._store, read.key, start=read.start, length=len(read.into)
            )
            read.into[:] = memoryview(body)
            return
        answer = await obstore.get_async(self._store, read.key, **_range(read))
        if read.landed is None:
            body = await answer.bytes_async()
            _whole(read, len(body))
            read.into[:] = memoryview(body)
            return
        have = 0
        async for piece in answer.stream(min_chunk_size=_piece_bytes(read)):
            have = _put(read, have, piece)
        _whole(read, have)


class ObstoreThreads(ThreadedClient):
    """obstore's blocking calls in threads."""

    def open(self) -> None:
        super().open()
        self._store = _obstore_store(self.at)

    def read(self, read: Read) -> None:
        import obstore

        if read.landed is None and read.start is not None:
            body = obstore.get_range(self._store, read.key, start=read.start, length=len(read.into))
            read.into[:] = memoryview(body)
            return
        answer = obstore.get(self._store, read.key, **_range(read))
        if read.landed is None:
            body = answer.bytes()
            _whole(read, len(body))
            read.into[:] = memoryview(body)
            return
        have = 0
        for piece in answer.stream(min_chunk_size=_piece_bytes(read)):
            have = _put(read, have, piece)
        _whole(read, have)


class Crt(Client):
    """The AWS common runtime's S3 client with 64 I/O threads and `on_body`, as LMCache uses it."""

    def open(self) -> None:
        try:
            from awscrt import auth, io, s3
        except ImportError:
            raise Absent("awscrt is not installed") from None
        group = io.EventLoopGroup(_LMCACHE_IO_THREADS)
        bootstrap = io.ClientBootstrap(group, io.DefaultHostResolver(group))
        keys = auth.AwsCredentialsProvider.new_static(self.at.access_key, self.at.secret_key)
        tls: dict[str, Any] = {"tls_mode": s3.S3RequestTlsMode.DISABLED}
        if self.at.tls:
            options = io.TlsContextOptions()
            options.override_default_trust_store_from_path(None, self.at.ca)
            connection = io.ClientTlsContext(options).new_connection_options()
            connection.set_server_name("127.0.0.1")
            tls = {"tls_mode": s3.S3RequestTlsMode.ENABLED, "tls_connection_options": connection}
        self._client = s3.S3Client(
            bootstrap=bootstrap,
            region=self.at.region,
            signing_config=s3.create_default_s3_signing_config(
                region=self.at.region, credential_provider=keys
            ),
            part_size=_PART_BYTES,
            throughput_target_gbps=_TARGET_GBPS,
            memory_limit=max(2 << 30, min(self.most * _CHUNK_BYTES * 2, _memory_bytes() // 4)),
            **tls,
        )
        self._host = self.at.url.split("//")[1]

    def fill(self, reads: Sequence[Read], in_flight: int) -> None:
        places = threading.Semaphore(in_flight)
        wrong: list[BaseException] = []
        for read in reads:
            places.acquire()
            self._start(read, places, wrong)
        for _ in range(in_flight):
            places.acquire()
        if wrong:
            raise wrong[0]

    def _start(self, read: Read, places: threading.Semaphore, wrong: list[BaseException]) -> None:
        from awscrt import http, s3

        have = 0

        def on_body(chunk: bytes, offset: int, **_: Any) -> None:
            nonlocal have
            have = _put(read, have, chunk)

        def on_done(error: BaseException | None, **_: Any) -> None:
            if error is not None:
                wrong.append(error)
            elif have != len(read.into):
                wrong.append(ConnectionError(f"{read.key} ended after {have} bytes"))
            places.release()

        headers = http.HttpHeaders([("Host", self._host), *read.range_header().items()])
        path = f"/{self.at.bucket}/{read.key}"
        self._client.make_request(
            type=s3.S3RequestType.GET_OBJECT,
            request=http.HttpRequest("GET", path, headers),
            on_body=on_body,
            on_done=on_done,
        )

    def close(self) -> None:
        del self._client


class S3TorchConnector(ThreadedClient):
    """Mountpoint's client, as the S3 connector for PyTorch reads with it."""

    def open(self) -> None:
        try:
            from s3torchconnectorclient._mountpoint_s3_client import MountpointS3Client
        except ImportError:
            raise Absent("s3torchconnectorclient is not installed") from None
        super().open()
        self._client = MountpointS3Client(
            region=self.at.region,
            throughput_target_gbps=_TARGET_GBPS,
            part_size=_PART_BYTES,
            endpoint=self.at.url,
            force_path_style=True,
            max_attempts=1,
        )

    def read(self, read: Read) -> None:
        bounds = {}
        if read.start is not None:
            bounds = {"start": read.start, "end": read.start + len(read.into)}
        have = 0
        for piece in self._client.get_object(self.at.bucket, read.key, **bounds):
            have = _put(read, have, piece)
        _whole(read, have)


class NixlObj(Client):
    """NVIDIA's NIXL with its OBJ plugin, which vLLM's own S3 tier uses. It tells of whole reads only."""

    def open(self) -> None:
        try:
            from nixl._api import nixl_agent, nixl_agent_config
        except ImportError as exc:
            raise Absent(f"NIXL does not load: {_short(exc)}") from None
        scheme, _, host = self.at.url.partition("://")
        self._agents: dict[int, Any] = {}
        self._params = {
            "bucket": self.at.bucket,
            "endpoint_override": host,
            "scheme": scheme,
            "access_key": self.at.access_key,
            "secret_key": self.at.secret_key,
            "region": self.at.region,
            **({"ca_bundle": self.at.ca} if self.at.ca else {}),
        }
        self._make = lambda: nixl_agent("transport", nixl_agent_config(backends=[]))
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self._agent(1)

    def _agent(self, in_flight: int) -> Any:
        """One for each number of threads, which is the number of reads in flight."""
        if in_flight not in self._agents:
            agent = self._make()
            try:
                agent.create_backend("OBJ", self._params | {"num_threads": str(in_flight)})
            except Exception as exc:
                raise Absent(f"NIXL's OBJ plugin does not load: {_short(exc)}") from exc
            agent.register_memory([(self._base, len(self.memory), 0, "")], "DRAM")
            self._agents[in_flight] = agent
        return self._agents[in_flight]

    def fill(self, reads: Sequence[Read], in_flight: int) -> None:
        agent = self._agent(in_flight)
        keys = [(0, 1 << 40, n + 1, read.key) for n, read in enumerate(reads)]
        registered = agent.register_memory(keys, "OBJ")
        told = any(read.landed is not None for read in reads)
        groups = [[n] for n in range(len(reads))] if told else [list(range(len(reads)))]
        try:
            waiting = [(self._submit(agent, reads, group), group) for group in groups]
            until = time.monotonic() + SILENCE_S
            while waiting:
                waiting = [w for w in waiting if not self._ended(agent, reads, *w)]
                if time.monotonic() > until:
                    raise TimeoutError("NIXL did not finish")
                time.sleep(_POLL_S)
        finally:
            agent.deregister_memory(registered)

    def _submit(self, agent: Any, reads: Sequence[Read], group: list[int]) -> Any:
        local, remote = [], []
        for n in group:
            read = reads[n]
            address = ctypes.addressof(ctypes.c_char.from_buffer(read.into))
            local.append((address, len(read.into), 0))
            remote.append((read.start or 0, len(read.into), n + 1))
        handle = agent.initialize_xfer(
            "READ",
            agent.get_xfer_descs(local, "DRAM"),
            agent.get_xfer_descs(remote, "OBJ"),
            "transport",
        )
        if agent.transfer(handle) == "ERR":
            raise ConnectionError("NIXL refused a transfer")
        return handle

    def _ended(self, agent: Any, reads: Sequence[Read], handle: Any, group: list[int]) -> bool:
        state = agent.check_xfer_state(handle)
        if state == "PROC":
            return False
        agent.release_xfer_handle(handle)
        if state != "DONE":
            raise ConnectionError(f"a NIXL transfer ended as {state}")
        for n in group:
            landed = reads[n].landed
            if landed is not None:
                landed(len(reads[n].into))
        return True

    def close(self) -> None:
        self._agents.clear()


def _piece_bytes(read: Read) -> int:
    """The size of a slice, or the header's if there is no slice."""
    sizes = [b - a for a, b in zip(read.marks, read.marks[1:], strict=False)]
    return max(sizes, default=10 << 20)  # 10 MiB is obstore's own


def _put(read: Read, have: int, piece: Any) -> int:
    """Copy what came to its place; how much is there now."""
    end = have + len(piece)
    read.into[have:end] = memoryview(piece)
    if read.landed is not None:
        read.landed(end)
    return end


def _whole(read: Read, have: int) -> None:
    if have != len(read.into):
        raise ConnectionError(f"{read.key} ended after {have} of {len(read.into)} bytes")


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _short(exc: BaseException) -> str:
    return f"{type(exc).__name__}: {str(exc)[:120]}"


NATIVE: dict[str, type[Client]] = {
    "obstore": Obstore,
    "obstore-threads": ObstoreThreads,
    "awscrt": Crt,
    "s3torchconnector": S3TorchConnector,
    "nixl-obj": NixlObj,
}
