"""A bucket as a store, by aiobotocore. What a failure means: see s3_errors.py.

botocore's own retries are off: attempts.py has the one loop for all data paths. (Below us, aiohttp repeats a
request once if its connection ends without an answer, and botocore follows a bucket to another
region; neither is counted.) A request holds one of `max_connections` slots while it runs. A body is received on the loop, straight into the caller's
memory, so a cancelled read never writes again.

The other data paths to S3 lean on this one: it knows the chain of credentials and the address of a
bucket, does all that is rare, and what they cannot do they hand to it.
"""

import asyncio
import functools
import logging
import os
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import botocore  # type: ignore[import-untyped]
from aiobotocore.config import AioConfig  # type: ignore[import-untyped]
from aiobotocore.session import AioSession  # type: ignore[import-untyped]
from botocore import exceptions as boto
from botocore.handlers import add_expect_header  # type: ignore[import-untyped]
from botocore.httpsession import get_cert_path  # type: ignore[import-untyped]
from botocore.loaders import Loader, create_loader  # type: ignore[import-untyped]
from botocore.utils import get_environ_proxies  # type: ignore[import-untyped]

from objectcache.config import Options
from objectcache.errors import Corrupt, Misconfigured, NotFound, ObjectCacheError, Unavailable
from objectcache.order import Turns
from objectcache.stores.attempts import Attempts, Failed
from objectcache.stores.base import Pace, Store, StoreCounters, check_key
from objectcache.stores.fill import Fill
from objectcache.stores.gate import Gate
from objectcache.stores.hedged import Hedged, Leg, Lost
from objectcache.stores.s3_errors import Place, Verdict, endpoint_of, judge

_LOG = logging.getLogger("vllm.objectcache.stores")  # only below "vllm" is there a handler
_PIECE_BYTES = 256 << 10  # of a body being sent: what one send takes, so nothing piles up behind
_RECEIVE_BYTES = 256 << 10  # of a body: less than this comes at once
_SET_UP_LIMIT_S = 15.0  # for the chain to find credentials: STS and IMDS have limits of minutes
_SET_UP_PAUSE_S = 3.0  # how long "no credentials" is believed before asking the chain again
_COUNTER = {
    "get_object": "get_requests",
    "head_object": "head_requests",
    "put_object": "put_requests",
    "list_objects_v2": "list_requests",
    "delete_object": "delete_requests",
}


class _Body:
    """A memoryview as botocore and its CRT signer (a file) and aiohttp (async iterable) take it, uncopied."""

    def __init__(self, view: memoryview, counters: StoreCounters) -> None:
        self._view = view.cast("B") if view.nbytes != len(view) else view
        self._counters = counters
        self._at = 0

    def __len__(self) -> int:
        return len(self._view)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: len(self)}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        piece = self._view[self._at :] if size < 0 else self._view[self._at : self._at + size]
        self._at += len(piece)
        return bytes(piece)

    async def __aiter__(self) -> AsyncIterator[memoryview]:
        for at in range(0, len(self._view), _PIECE_BYTES):
            piece = self._view[at : at + _PIECE_BYTES]
            yield piece
            self._counters.written_bytes += len(piece)


@dataclass(frozen=True)
class Address:
    """Where a bucket's objects are: `{scheme}://{host}:{port}{path}{key}`, key quoted as S3 quotes it."""

    scheme: str
    host: str
    port: int
    path: str  # ends with a slash; the store's prefix is in it
    region: str


@dataclass(frozen=True)
class Credentials:
    """For signing now; ask again for each request, the chain renews them in time."""

    access_key: str
    secret_key: str = field(repr=False)
    token: str | None = field(repr=False)


class S3Store(Store):
    """Objects of one bucket below one prefix. The client is made on the loop, at the first call."""

    def __init__(self, options: Options) -> None:
        self._bucket, _, prefix = options.url.removeprefix("s3://").partition("/")
        prefix = prefix.strip("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self.name = f"s3://{self._bucket}/{prefix}".rstrip("/")
        self.counters = StoreCounters()
        if options.ca_bundle and not Path(options.ca_bundle).is_file():
            raise Misconfigured(
                f"option 'ca_bundle': {options.ca_bundle!r} is no file.",
                "give the path of a PEM file with the CA of the server.",
            )
        self._options = options
        self.place = Place(self.name, self._bucket, endpoint_of(options.endpoint_url) or "AWS S3")
        self.gate = Gate(options.max_connections, options.hedge_percent)
        self.attempts = Attempts(options, self.gate)
        self.hedged = Hedged(self.gate, lambda: self.counters, options.read_timeout_ms / 1000)
        self.conditional_put = True  # until the server says that it does not know it
        self._client: Any = None
        self._chain: Any = None  # botocore's credentials, which renew themselves
        self._ca_bundle = ""
        self._client_lock = asyncio.Lock()
        self._no_client: tuple[float, ObjectCacheError] | None = None  # until when, and why
        self._closed = False

    async def open(self) -> None:
        await self._ready()

    def pace(self) -> Pace:
        return Pace(self.gate.model(), self.gate.bulk_limit)

    async def head(self, key: str) -> int:
        check_key(key)
        async with self.gate.slot():
            return await self.attempts.run(0, lambda until: self.size(key, until))

    async def read(
        self,
        key: str,
        into: memoryview,
        *,
        start: int | None = None,
        marks: Sequence[int] = (),
        landed: Callable[[int], None] | None = None,
        turns: Turns | None = None,
    ) -> None:
        check_key(key)
        if start is not None and not len(into):  # HTTP has no empty range
            if await self.head(key) < start:
                raise Corrupt(f"GET {key}: the object ends before {start}.")
            if landed is not None:
                landed(0)
            return
        fill = Fill(into, start, landed)
        async with self.gate.slot(bulk=True, turns=turns):
            await self.attempts.run(len(into), lambda until: self.receive(key, fill, until))

    async def write(self, key: str, body: memoryview) -> bool:
        check_key(key)
        async with self.gate.slot(bulk=True):
            return await self.attempts.run(body.nbytes, lambda until: self.put(key, body, until))

    async def delete(self, key: str) -> None:
        check_key(key)
        await self._ask("delete_object", f"DELETE {key}", Key=self._prefix + key)

    async def list(self, prefix: str) -> AsyncIterator[tuple[str, int]]:
        more: dict[str, str] = {}
        while True:
            page = await self._ask(
                "list_objects_v2", f"LIST {prefix}", Prefix=self._prefix + prefix, **more
            )
            for entry in page.get("Contents", ()):
                yield entry["Key"][len(self._prefix) :], int(entry["Size"])
            token = page.get("NextContinuationToken")
            if not page.get("IsTruncated"):
                return
            if not token or token == more.get("ContinuationToken"):
                raise Unavailable(f"LIST {prefix}: {self.place.endpoint} repeats a page.")
            more = {"ContinuationToken": token}

    async def check(self) -> None:
        """A GET of a key that need not exist: it needs just what loading needs, and a GET's refusal
        says why, as a HEAD's does not."""
        what = f"check of {self.name}"

        async def once(until: float) -> None:
            key = f"{self._prefix}objectcache-check"
            try:
                answer = await self._send("get_object", what, self.attempts.silence_s, Key=key)
            except Failed as failed:
                if not isinstance(failed.verdict.error, NotFound):
                    raise
            else:
                answer["Body"].close()

        async with self.gate.slot():
            await self.attempts.run(0, once)

    async def close(self) -> None:
        self._closed = True
        async with self._client_lock:
            client, self._client = self._client, None
            if client is not None:
                await client.__aexit__(None, None, None)

    # -- for the other data paths ---------------------------------------------------------------

    async def address(self) -> Address:
        """Where the chain and the options say that the bucket is. Asks the server nothing."""
        client = await self._ready()
        try:
            async with asyncio.timeout(_SET_UP_LIMIT_S):  # it signs, and may have to renew for that
                url = await client.generate_presigned_url(
                    "get_object", Params={"Bucket": self._bucket, "Key": f"{self._prefix}x"}
                )
        except Exception as exc:  # judge() re-raises what is no failure of a store
            raise judge(exc, "set-up", self.place).error from None
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        path = parts.path.removesuffix("x")
        host = parts.hostname or ""
        if (
            host == f"{self._bucket}.s3.amazonaws.com"
        ):  # botocore presigns for no region, unlike it asks
            host = f"{self._bucket}.{urlsplit(client.meta.endpoint_url).hostname}"
        return Address(parts.scheme, host, port, path, client.meta.region_name)

    async def credentials(self) -> Credentials | None:
        """None if requests are not signed. Raises Denied if the chain has none now."""
        if self._options.anonymous:
            return None
        await self._ready()
        try:
            async with asyncio.timeout(_SET_UP_LIMIT_S):
                frozen = await self._chain.get_frozen_credentials()
        except Exception as exc:  # judge() re-raises what is no failure of a store
            raise judge(exc, "set-up", self.place).error from None
        return Credentials(frozen.access_key, frozen.secret_key, frozen.token)

    async def proxy(self) -> str:
        """The URL of the HTTP proxy on the way to the bucket; "" for none. It may hold a password."""
        client = await self._ready()
        url = client.meta.endpoint_url
        return str(get_environ_proxies(url).get(urlsplit(url).scheme) or "")

    async def trusted(self) -> bytes:
        """The certificates (PEM) of the CAs that may vouch for the server. Raises Misconfigured."""
        await self._ready()
        try:
            return Path(get_cert_path(self._ca_bundle or True)).read_bytes()
        except OSError as exc:
            raise judge(boto.HTTPClientError(error=exc), "set-up", self.place).error from None

    # -- one attempt, in a slot of the caller's. Raises Failed, or an error that no other attempt
    #    would change.

    async def size(self, key: str, until: float) -> int:
        answer = await self._send(
            "head_object", f"HEAD {key}", self.attempts.silence_s, Key=self._prefix + key
        )
        return int(answer.get("ContentLength") or 0)

    async def put(self, key: str, view: memoryview, until: float) -> bool:
        what, where = f"PUT {key}", {"Key": self._prefix + key}
        if not self.conditional_put and await self._exists(what, where):
            return False
        condition = {"IfNoneMatch": "*"} if self.conditional_put else {}
        body, limit_s = _Body(view, self.counters), self.attempts.limit_s(view.nbytes)
        try:
            await self._send("put_object", what, limit_s, Body=body, **where, **condition)
        except Failed as failed:
            if failed.verdict.precondition:
                return False
            if not (failed.verdict.unsupported and condition):
                raise
            if self.conditional_put:
                self.conditional_put = False
                _LOG.warning(
                    "%s does not know conditional PUT (If-None-Match); a HEAD stands in for it",
                    self.place.endpoint,
                )
            return await self.put(key, view, until)
        return True

    async def receive(self, key: str, fill: Fill, until: float) -> None:
        """One GET of what `fill` lacks, into its memory; a second one if it is late."""
        await self._ready()  # not in the time of the request
        await self.hedged.run(_RECEIVE_BYTES, partial(self._receive_once, key, fill, until))

    async def _receive_once(self, key: str, fill: Fill, until: float, leg: Leg) -> None:
        if fill.complete:  # while a request that seemed to have stalled was ended
            return
        what, had = f"GET {key}", fill.have
        missing = {"Range": fill.range_header(), "IfMatch": fill.if_match_header()}
        params = {name: value for name, value in missing.items() if value is not None}
        answer = await self._send(
            "get_object", what, self.attempts.silence_s, Key=self._prefix + key, **params
        )
        body = answer["Body"]
        try:
            if not leg.claim():
                raise Lost
            leg.body = fill
            status = answer["ResponseMetadata"]["HTTPStatusCode"]
            skip = fill.offset(
                status, answer.get("ContentRange") or "", answer.get("ContentLength")
            )
            fill.etag = fill.etag or answer.get("ETag", "")
            stream = getattr(body, "raw_stream", body).content  # the aiohttp StreamReader
            await self._drain(stream, fill, skip, what, until)
            self.gate.arrived(fill.have - had, leg.age_s(), leg.answered_s)
        except Corrupt as exc:
            raise Corrupt(f"{what}: {exc.message}") from None
        finally:
            body.close()  # an unread rest takes its connection with it; a read one gave it back

    # -- one request -----------------------------------------------------------------------------

    async def _ask(self, operation: str, what: str, **params: Any) -> dict[str, Any]:
        """A request whose answer has no body to stream, with its attempts."""

        async def once(until: float) -> dict[str, Any]:
            return await self._send(operation, what, self.attempts.silence_s, **params)

        async with self.gate.slot():
            return await self.attempts.run(0, once)

    async def _send(
        self, operation: str, what: str, limit_s: float, **params: Any
    ) -> dict[str, Any]:
        """One request up to the head of its answer (for other than GET: all of it)."""
        client = await self._ready()
        counter = _COUNTER[operation]
        setattr(self.counters, counter, getattr(self.counters, counter) + 1)
        try:
            async with asyncio.timeout(limit_s):
                answer: dict[str, Any] = await getattr(client, operation)(
                    Bucket=self._bucket, **params
                )
                return answer
        except ObjectCacheError:
            raise
        except Exception as exc:  # judge() re-raises what is no failure of a store
            raise Failed(judge(exc, what, self.place)) from None

    async def _exists(self, what: str, where: dict[str, str]) -> bool:
        try:
            await self._send("head_object", what, self.attempts.silence_s, **where)
        except Failed as failed:
            if isinstance(failed.verdict.error, NotFound):
                return False
            raise
        return True

    async def _drain(
        self, stream: aiohttp.StreamReader, fill: Fill, skip: int, what: str, until: float
    ) -> None:
        """Body to memory. Each chunk is copied once, as it comes; nothing is joined."""
        clock = asyncio.get_running_loop().time
        wanted = len(fill.into)
        while True:
            try:
                chunk, boundary = await stream.readchunk()
            except (aiohttp.ClientError, OSError) as exc:
                if fill.have == wanted:
                    return
                raise Failed(judge(exc, what, self.place)) from None
            if not chunk:
                if boundary:  # of HTTP's chunked coding, not the end
                    continue
                break
            self.counters.read_bytes += len(chunk)
            view = memoryview(chunk)[min(skip, len(chunk)) :]
            skip -= len(chunk) - len(view)
            if len(view) > wanted - fill.have:
                if fill.start is None:
                    raise Corrupt(f"the body is longer than {wanted} bytes.")
                view = view[: wanted - fill.have]  # a 200 for a range goes on behind it
            if len(view):
                fill.take(view)
            if fill.have == wanted and fill.start is not None:
                return
            if clock() > until:
                raise Failed(Verdict(Unavailable(f"{what}: {self.place.endpoint} is too slow.")))
        if fill.have < wanted:
            error = Unavailable(f"{what}: the body ended after {fill.have} of {wanted} bytes.")
            raise Failed(Verdict(error, retry=True))

    # -- the client ------------------------------------------------------------------------------

    async def _ready(self) -> Any:
        """The client; made at first use. Raises Denied without credentials, asking again later."""
        if self._client is not None:
            return self._client
        async with self._client_lock:
            if self._closed:
                raise Unavailable(f"{self.name} is closed.")
            now = asyncio.get_running_loop().time()
            if self._no_client is not None and now < self._no_client[0]:
                raise self._no_client[1]
            if self._client is None:
                try:
                    async with asyncio.timeout(_SET_UP_LIMIT_S):
                        self._client = await self._make_client()
                    self.place = Place(
                        self.name, self._bucket, endpoint_of(self._client.meta.endpoint_url)
                    )
                except Exception as exc:  # judge() re-raises what is no failure of a store
                    error = judge(exc, "set-up", self.place).error
                    self._no_client = (now + _SET_UP_PAUSE_S, error)
                    raise error from None
            return self._client

    async def _make_client(self) -> Any:
        options = self._options
        session = AioSession(profile=options.profile or None)
        session.register_component("data_loader", _models(session.get_config_variable("data_path")))
        self._chain = None if options.anonymous else await session.get_credentials()
        if not options.anonymous and self._chain is None:
            # A client made now would stay without credentials for ever; a role may come later.
            raise botocore.exceptions.NoCredentialsError
        self._ca_bundle = options.ca_bundle or session.get_config_variable("ca_bundle") or ""
        style = options.addressing_style
        config = AioConfig(
            connect_timeout=options.connect_timeout_ms / 1000,
            read_timeout=options.read_timeout_ms / 1000,
            max_pool_connections=options.max_connections,
            retries={"total_max_attempts": 1, "mode": "standard"},
            signature_version=botocore.UNSIGNED if options.anonymous else None,
            # Hashing every body twice costs 2.6 times the CPU of a PUT. Chunks carry checksums of
            # their own, checked by whoever reads them; older Ceph refuses the SDK's trailers.
            s3={
                "payload_signing_enabled": False,
                # botocore's own default is what `auto` promises, AWS_ENDPOINT_URL included.
                "addressing_style": None if style == "auto" else style,
            },
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            parameter_validation=False,  # it refuses a body that is neither bytes nor a file
        )
        client = await session.create_client(
            "s3",
            region_name=options.region or None,
            endpoint_url=options.endpoint_url or None,
            verify=options.ca_bundle or None,
            config=config,
        ).__aenter__()
        # It would ask before each body that reads like a file, and wait for servers that never answer.
        client.meta.events.unregister("before-call.s3", add_expect_header)
        return client


@functools.cache
def _models(data_path: str | None) -> Loader:
    """botocore's description of S3, read once for all stores of this process: it is megabytes of JSON."""
    return create_loader(data_path)
