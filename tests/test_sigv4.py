"""Our signatures are botocore's, for whatever key, token, host and moment."""

import time
from datetime import UTC, datetime

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import ReadOnlyCredentials
from hypothesis import example, given, settings
from hypothesis import strategies as st

from objectcache.stores.s3 import Credentials
from objectcache.stores.sigv4 import Signer, host_header, quoted

KEYS = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="\\"))
TOKENS = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1)
SECRETS = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1)
HOSTS = st.sampled_from(["minio", "bucket.s3.example.com", "127.0.0.1", "::1", "fe80::1:2"])


class AtThatTime(S3SigV4Auth):
    """botocore's signer, with a clock of ours and without a hash of the payload."""

    def __init__(self, credentials: ReadOnlyCredentials, region: str, now: float) -> None:
        super().__init__(credentials, "s3", region)
        self._now = datetime.fromtimestamp(now, UTC)

    def add_auth(self, request: AWSRequest) -> None:
        request.context["timestamp"] = self._now.strftime("%Y%m%dT%H%M%SZ")
        self._modify_request_before_signing(request)
        to_sign = self.string_to_sign(request, self.canonical_request(request))
        self._inject_signature_to_request(request, self.signature(to_sign, request))

    def payload(self, request: AWSRequest) -> str:
        return "UNSIGNED-PAYLOAD"


def theirs(
    method: str, url: str, credentials: ReadOnlyCredentials, region: str, now: float
) -> dict[str, str]:
    request = AWSRequest(method, url)
    AtThatTime(credentials, region, now).add_auth(request)
    return {name.lower(): value for name, value in request.headers.items()}


def ours(
    signer: Signer, method: str, path: str, credentials: ReadOnlyCredentials, now: float
) -> dict[str, str]:
    text = signer.headers(
        method,
        path,
        credentials.access_key,
        credentials.secret_key,
        credentials.token,
        time.gmtime(now),
    )
    assert text.endswith("\r\n")
    pairs = (line.partition(": ") for line in text[:-2].split("\r\n"))
    return {name.lower(): value for name, _, value in pairs}


@settings(max_examples=150, deadline=None)
@given(
    method=st.sampled_from(["GET", "HEAD"]),
    key=KEYS,
    host=HOSTS,
    port=st.sampled_from([80, 81, 443, 9000]),
    region=st.sampled_from(["us-east-1", "eu-central-1", "garage"]),
    secret=SECRETS,
    token=st.none() | TOKENS,
    now=st.floats(0, 4e9),
)
@example("GET", "a b%2F+~!*'()=&?#/@:,$;[]", "::1", 9000, "us-east-1", "s", "t/+=", 1e9)
def test_the_signature_is_botocores(
    method: str,
    key: str,
    host: str,
    port: int,
    region: str,
    secret: str,
    token: str | None,
    now: float,
) -> None:
    credentials = ReadOnlyCredentials("AKIDEXAMPLE", secret, token)
    name = host_header(host, port)
    path = f"/bucket/some/{quoted(key)}"
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}{path}"
    got = ours(Signer(name, region), method, path, credentials, int(now))
    want = theirs(method, url, credentials, region, int(now))
    want.pop("x-amz-content-sha256", None)  # botocore says here what it would have hashed
    assert got.pop("x-amz-content-sha256") == "UNSIGNED-PAYLOAD"
    assert got == want


def test_one_signer_follows_the_day_and_the_secret() -> None:
    signer = Signer("minio:9000", "us-east-1")
    moments = [0.0, 86_399.0, 86_400.0, 86_399.0, 1e9]
    for now in moments:
        for secret in ("one", "two"):
            credentials = ReadOnlyCredentials("AK", secret, None)
            want = theirs("GET", "http://minio:9000/b/k", credentials, "us-east-1", now)
            got = ours(signer, "GET", "/b/k", credentials, now)
            assert got["authorization"] == want["authorization"]


def test_credentials_are_not_in_a_repr() -> None:
    text = repr(Credentials("AKID", "a-secret", "a-token"))
    assert "a-secret" not in text and "a-token" not in text
