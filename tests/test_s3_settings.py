"""Where the S3 store takes credentials, addresses and trust from. What it does with them: the suites beside."""

import asyncio
import os
import socket
import ssl
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from aws_stub import Stub
from s3_lab import ASKED_TWICE, PATHS

from benchmarks.servers import seaweedfs
from objectcache.config import parse
from objectcache.errors import Denied, Misconfigured, NotFound, ObjectCacheError, Unavailable
from objectcache.stores.base import Store

URL = "s3://some-bucket/prefix"


@pytest.fixture
def stub() -> Iterator[Stub]:
    with Stub() as running:
        yield running


@contextmanager
def _only(values: Mapping[str, str], home: Path) -> Iterator[None]:
    """An environment without any AWS setting but `values`."""
    before = dict(os.environ)
    for name in before:
        if name.startswith("AWS_") or name.lower().endswith("_proxy"):
            del os.environ[name]
    os.environ.update({"HOME": str(home), "AWS_EC2_METADATA_DISABLED": "true", **values})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


Check = Callable[..., None]


@pytest.fixture(params=PATHS, name="path")
def path_fixture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def check(path: str) -> Check:
    """Opens a store in an environment, and asks it by the data path whether it works."""

    def check(env: Mapping[str, str], home: Path, **options: object) -> None:
        with _only(env, home):
            asyncio.run(asyncio.wait_for(scenario(options), 30))

    async def scenario(options: Mapping[str, object]) -> None:
        store = PATHS[path](parse({"url": URL, "attempts": 1, **options}))
        try:
            await _use(store)
        finally:
            await store.close()

    return check


async def _use(store: Store) -> None:
    """As `check` of a store does, but by its data path."""
    with suppress(NotFound):
        await store.read("objectcache-check", memoryview(bytearray(1)))


ENV_KEYS = {"AWS_ACCESS_KEY_ID": "AKIDENV", "AWS_SECRET_ACCESS_KEY": "env-secret"}


def test_credentials_from_the_environment(check: Check, stub: Stub, tmp_path: Path) -> None:
    env = {**ENV_KEYS, "AWS_SESSION_TOKEN": "env-token"}
    check(env, tmp_path, endpoint_url=stub.url)
    assert stub.s3[0].access_key == "AKIDENV"
    assert stub.s3[0].headers["x-amz-security-token"] == "env-token"


@pytest.mark.parametrize("by", ["option", "AWS_PROFILE"])
def test_credentials_from_a_profile(check: Check, stub: Stub, tmp_path: Path, by: str) -> None:
    credentials = tmp_path / "credentials"
    credentials.write_text(
        textwrap.dedent(
            """
            [default]
            aws_access_key_id = AKIDDEFAULT
            aws_secret_access_key = d-secret
            [cache]
            aws_access_key_id = AKIDPROFILE
            aws_secret_access_key = p-secret
            """
        )
    )
    env = {"AWS_SHARED_CREDENTIALS_FILE": str(credentials)}
    if by == "option":
        check(env, tmp_path, endpoint_url=stub.url, profile="cache")
    else:
        check({**env, "AWS_PROFILE": "cache"}, tmp_path, endpoint_url=stub.url)
    assert stub.s3[0].access_key == "AKIDPROFILE"


def test_an_unknown_profile_is_a_mistake(check: Check, stub: Stub, tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match="profile"):
        check(ENV_KEYS, tmp_path, endpoint_url=stub.url, profile="absent")


def _web_identity(stub: Stub, home: Path) -> dict[str, str]:
    token = home / "token"
    token.write_text("some.web.token")
    return {
        "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/cache",
        "AWS_WEB_IDENTITY_TOKEN_FILE": str(token),
        "AWS_ENDPOINT_URL_STS": stub.url,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def test_credentials_from_a_web_identity(check: Check, stub: Stub, tmp_path: Path) -> None:
    check(_web_identity(stub, tmp_path), tmp_path, endpoint_url=stub.url)
    assert stub.s3[0].access_key == "AKIDWEB"
    assert stub.s3[0].headers["x-amz-security-token"] == "web-token"


def test_a_web_identity_that_sts_refuses(check: Check, stub: Stub, tmp_path: Path) -> None:
    stub.sts_status = 403
    with pytest.raises(Denied) as caught:
        check(_web_identity(stub, tmp_path), tmp_path, endpoint_url=stub.url)
    assert caught.value.hint
    assert stub.s3 == []


@pytest.mark.parametrize("token_by", ["none", "variable", "file"])
def test_credentials_from_the_container(
    check: Check, stub: Stub, tmp_path: Path, token_by: str
) -> None:
    """ECS, and EKS pod identity with its token file."""
    (tmp_path / "token").write_text("pod-token")
    env = {"AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{stub.url}/container"}
    if token_by == "variable":
        env["AWS_CONTAINER_AUTHORIZATION_TOKEN"] = "pod-token"
    if token_by == "file":
        env["AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"] = str(tmp_path / "token")
    check(env, tmp_path, endpoint_url=stub.url)
    assert stub.s3[0].access_key == "AKIDCONTAINER"
    assert stub.seen[0].headers.get("authorization", "") == (
        "" if token_by == "none" else "pod-token"
    )


def test_credentials_from_the_machine(check: Check, stub: Stub, tmp_path: Path) -> None:
    env = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": stub.url, "AWS_EC2_METADATA_DISABLED": "false"}
    check(env, tmp_path, endpoint_url=stub.url)
    assert stub.s3[0].access_key == "AKIDIMDS"


def test_no_credentials_are_refused_without_a_request(
    check: Check, stub: Stub, tmp_path: Path
) -> None:
    with pytest.raises(Denied, match="AWS_ACCESS_KEY_ID"):
        check({}, tmp_path, endpoint_url=stub.url)
    assert stub.seen == []


def test_credentials_that_come_later_are_found(stub: Stub, tmp_path: Path, path: str) -> None:
    async def scenario() -> None:
        store = PATHS[path](parse({"url": URL, "endpoint_url": stub.url}))
        try:
            for _ in range(3):
                with pytest.raises(Denied):
                    await _use(store)
            os.environ.update(ENV_KEYS)
            await asyncio.sleep(3.1)
            await _use(store)
        finally:
            await store.close()

    with _only({}, tmp_path):
        asyncio.run(scenario())
    assert stub.s3[0].access_key == "AKIDENV"


def test_anonymous_requests_are_not_signed(check: Check, stub: Stub, tmp_path: Path) -> None:
    check(ENV_KEYS, tmp_path, endpoint_url=stub.url, anonymous=True)
    assert "authorization" not in stub.s3[0].headers


def test_the_region_comes_from_the_option_then_the_chain(
    check: Check, stub: Stub, tmp_path: Path
) -> None:
    env = {**ENV_KEYS, "AWS_DEFAULT_REGION": "eu-central-1"}
    check(env, tmp_path, endpoint_url=stub.url, region="eu-west-3")
    check(env, tmp_path, endpoint_url=stub.url)
    check(ENV_KEYS, tmp_path, endpoint_url=stub.url)
    assert [request.region for request in stub.s3] == ["eu-west-3", "eu-central-1", "us-east-1"]


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_the_endpoint_may_come_from_the_environment(
    check: Check, stub: Stub, tmp_path: Path, variable: str
) -> None:
    check({**ENV_KEYS, variable: stub.url}, tmp_path)
    assert stub.s3[0].path == "/some-bucket/prefix/objectcache-check"


@pytest.mark.parametrize(
    ("style", "host", "asked"),
    [
        ("auto", "s3.example.test", "/some-bucket/prefix/objectcache-check"),
        ("path", "s3.example.test", "/some-bucket/prefix/objectcache-check"),
        ("virtual", "some-bucket.s3.example.test", "/prefix/objectcache-check"),
    ],
)
def test_addressing_styles(
    check: Check, stub: Stub, tmp_path: Path, style: str, host: str, asked: str
) -> None:
    """Seen from an HTTP proxy, so that no name need exist."""
    env = {**ENV_KEYS, "HTTP_PROXY": stub.url}
    check(env, tmp_path, endpoint_url="http://s3.example.test", addressing_style=style)
    assert stub.s3[0].path == f"http://{host}{asked}"


def test_an_endpoint_may_be_an_ipv6_address(check: Check, tmp_path: Path) -> None:
    with Stub(host="::1") as stub:
        check(ENV_KEYS, tmp_path, endpoint_url=stub.url)
        assert stub.s3[0].headers["host"] == stub.url.removeprefix("http://")


@pytest.mark.parametrize(
    ("no_proxy", "by_proxy"), [("127.0.0.1", False), ("10.0.0.1", True), ("*", False)]
)
def test_no_proxy_is_heeded(
    check: Check, stub: Stub, tmp_path: Path, no_proxy: str, by_proxy: bool
) -> None:
    with Stub() as proxy:
        env = {**ENV_KEYS, "HTTP_PROXY": proxy.url, "NO_PROXY": no_proxy, "ALL_PROXY": proxy.url}
        check(env, tmp_path, endpoint_url=stub.url)
        assert bool(proxy.seen) == by_proxy
        assert bool(stub.seen) != by_proxy


@pytest.mark.parametrize(
    ("options", "host"),
    [
        ({}, "some-bucket.s3.eu-west-3.amazonaws.com:443"),
        ({"addressing_style": "path"}, "s3.eu-west-3.amazonaws.com:443"),
        ({"url": "s3://dotted.bucket"}, "s3.eu-west-3.amazonaws.com:443"),  # no such certificate
    ],
)
def test_aws_itself_is_addressed_by_bucket_and_region(
    check: Check, stub: Stub, tmp_path: Path, options: dict[str, object], host: str
) -> None:
    with pytest.raises(Unavailable):  # the proxy refuses
        check({**ENV_KEYS, "HTTPS_PROXY": stub.url}, tmp_path, region="eu-west-3", **options)
    assert (stub.seen[0].method, stub.seen[0].path) == ("CONNECT", host)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CA (ca.pem) and a server for 127.0.0.1 (server.pem, server.key)."""
    where = tmp_path_factory.mktemp("certificates")

    def openssl(*args: str) -> None:
        subprocess.run(["openssl", *args], cwd=where, check=True, capture_output=True)

    new = ("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    (where / "names").write_text("subjectAltName=IP:127.0.0.1")
    openssl(*new, "-x509", "-days", "2", "-subj", "/CN=ca", "-keyout", "ca.key", "-out", "ca.pem")
    openssl(*new, "-subj", "/CN=server", "-keyout", "server.key", "-out", "server.csr")
    sign = ("x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-days", "2")
    openssl(*sign, "-CAcreateserial", "-extfile", "names", "-out", "server.pem")
    return where


@pytest.fixture
def tls_stub(certificates: Path) -> Iterator[Stub]:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
    with Stub(context) as running:
        yield running


@pytest.mark.parametrize("by", ["option", "AWS_CA_BUNDLE"])
def test_a_private_ca_is_trusted_if_named(
    check: Check, tls_stub: Stub, certificates: Path, tmp_path: Path, by: str
) -> None:
    bundle = str(certificates / "ca.pem")
    if by == "option":
        check(ENV_KEYS, tmp_path, endpoint_url=tls_stub.url, ca_bundle=bundle)
    else:
        check({**ENV_KEYS, by: bundle}, tmp_path, endpoint_url=tls_stub.url)
    assert len(tls_stub.s3) == 1


def test_an_unknown_ca_is_refused_at_once(
    check: Check, tls_stub: Stub, tmp_path: Path, path: str
) -> None:
    began = time.monotonic()
    with pytest.raises(Unavailable, match="certificate") as caught:
        check(ENV_KEYS, tmp_path, endpoint_url=tls_stub.url, attempts=5)
    assert time.monotonic() - began < 3
    assert "ca_bundle" in caught.value.hint
    assert tls_stub.connections == 1 + ASKED_TWICE[path]
    assert tls_stub.seen == []


def test_a_ca_bundle_that_is_none_is_a_mistake(
    check: Check, tls_stub: Stub, tmp_path: Path
) -> None:
    junk = tmp_path / "junk.pem"
    junk.write_text("no certificate")
    with pytest.raises(Misconfigured, match="ca_bundle"):
        check(ENV_KEYS, tmp_path, endpoint_url=tls_stub.url, ca_bundle=str(junk))


@pytest.mark.parametrize("server_speaks", ["http", "https"])
def test_the_wrong_scheme_is_told(
    check: Check, stub: Stub, tls_stub: Stub, tmp_path: Path, server_speaks: str
) -> None:
    other = stub.url.replace("http:", "https:")
    if server_speaks == "https":
        other = tls_stub.url.replace("https:", "http:")
    with pytest.raises(Unavailable) as caught:
        check(ENV_KEYS, tmp_path, endpoint_url=other, read_timeout_ms=500)
    assert server_speaks == "https" or "TLS" in caught.value.message


@pytest.mark.parametrize("max_connections", [1, 4])
def test_no_more_connections_than_allowed(
    stub: Stub, tmp_path: Path, max_connections: int, path: str
) -> None:
    async def scenario() -> None:
        options = {"url": URL, "endpoint_url": stub.url, "max_connections": max_connections}
        store = PATHS[path](parse(options))
        calls = [store.head(f"k{i}") for i in range(12)]
        calls += [store.write(f"k{i}", memoryview(b"x")) for i in range(12)]
        await asyncio.gather(*calls, return_exceptions=True)
        await store.close()

    stub.delay_s = 0.05 * max_connections  # long enough for as many to meet, and no longer in all
    with _only(ENV_KEYS, tmp_path):
        asyncio.run(scenario())
    assert stub.busy_max == max_connections
    # obstore keeps connections for bodies to send apart; its errors are looked at by the library path.
    # The direct path keeps those for HEAD, and leaves PUT to others.
    kinds = {"aiobotocore": 1, "obstore": 3, "direct": 2}[path]
    assert stub.connections <= max_connections * kinds


def test_a_real_server_refuses_wrong_keys(check: Check, tmp_path: Path) -> None:
    with seaweedfs(tmp_path / "server", "some-bucket") as server:
        right = {k: v for k, v in server.env.items() if "ENDPOINT" not in k}
        check(right, tmp_path, endpoint_url=server.endpoint_url)
        for wrong in ({"AWS_SECRET_ACCESS_KEY": "nope"}, {"AWS_ACCESS_KEY_ID": "nope"}):
            with pytest.raises(Denied) as caught:
                check({**right, **wrong}, tmp_path, endpoint_url=server.endpoint_url)
            assert next(iter(wrong)) in caught.value.hint
            assert right["AWS_SECRET_ACCESS_KEY"] not in str(caught.value)
        with pytest.raises(ObjectCacheError):
            check({}, tmp_path, endpoint_url=server.endpoint_url, anonymous=True)
        with pytest.raises(Misconfigured, match="does not exist"):
            check(right, tmp_path, endpoint_url=server.endpoint_url, url="s3://other-bucket")


def test_a_process_ends_without_a_word(stub: Stub, tmp_path: Path, path: str) -> None:
    """No unclosed session, socket or thread, also if a call was cancelled on the way."""
    code = """
        import asyncio, sys
        from objectcache.config import parse
        from objectcache.errors import NotFound
        from objectcache.stores import open_store

        async def main():
            options = {"url": "s3://some-bucket", "transport": sys.argv[2]}
            store = open_store(parse({**options, "endpoint_url": sys.argv[1]}))
            await store.check()
            try:
                await store.read("there", memoryview(bytearray(1)))
            except NotFound:
                pass
            call = asyncio.ensure_future(store.head("key"))
            await asyncio.sleep(0.01)
            call.cancel()
            await asyncio.wait([call])
            await store.close()

        asyncio.run(main(), debug=True)
        print("done")
    """
    done = subprocess.run(
        [
            sys.executable,
            "-X",
            "dev",
            "-W",
            "error::ResourceWarning",
            "-c",
            textwrap.dedent(code),
            stub.url,
            path,
        ],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), **ENV_KEYS},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "done\n")
    told = [line for line in done.stderr.splitlines() if "Executing <" not in line]
    assert told == []


def test_a_host_that_drops_packets_is_given_up(check: Check, tmp_path: Path) -> None:
    """A full accept queue answers as a firewall does: not at all."""
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for sock in waiting:
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        began = time.monotonic()
        with pytest.raises(Unavailable, match="connect"):
            endpoint_url = f"http://127.0.0.1:{full.getsockname()[1]}"
            check(ENV_KEYS, tmp_path, endpoint_url=endpoint_url, connect_timeout_ms=300, attempts=2)
        assert time.monotonic() - began < 4
        for sock in waiting:
            sock.close()
