"""The one table of what an S3 failure means and whether asking again may help. No I/O here.

Nothing that a server wrote reaches a message except its error code: S3 echoes key ids and strings
to sign in error bodies.
"""

import re
import ssl
from dataclasses import dataclass
from urllib.parse import urlsplit

import aiohttp
from botocore import exceptions as boto  # type: ignore[import-untyped]
from botocore.parsers import ResponseParserError  # type: ignore[import-untyped]

from objectcache.errors import (
    Corrupt,
    Denied,
    Misconfigured,
    NotFound,
    ObjectCacheError,
    Unavailable,
)

RETRY_AFTER_MAX_S = 2.0  # a server that wants a longer pause gets an Unavailable at once

_CHAIN = "credentials come from the standard AWS chain"
_CREDENTIALS_HINT = (
    f"{_CHAIN}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or give the machine a "
    "role; set 'anonymous' for a public bucket."
)
_POLICY_HINT = (
    "the role needs s3:GetObject and s3:PutObject on the prefix, and s3:ListBucket on the bucket, "
    "without which a missing key is answered with 403 in place of 404."
)
_BUCKET_HINT = "create the bucket or correct it in the option 'url'."
_REGION_HINT = "set the option 'region' or AWS_REGION."
_CA_HINT = "set the option 'ca_bundle' or AWS_CA_BUNDLE to a PEM file with the CA of the server."
_REACH_HINT = "check 'endpoint_url', DNS, firewalls and that the server runs."
_BUSY_HINT = "lower 'max_connections' if it goes on."

_DENIED_HINTS = {
    "InvalidAccessKeyId": "the server does not know this access key: check AWS_ACCESS_KEY_ID and "
    "that it belongs to this endpoint.",
    "SignatureDoesNotMatch": "the secret key is wrong, or a proxy changes the request: check "
    "AWS_SECRET_ACCESS_KEY.",
    "ExpiredToken": "the session token has expired: renew it, or use a role that renews itself.",
    "ExpiredTokenException": "the token of the role has expired: renew it.",
    "TokenRefreshRequired": "the session token must be renewed.",
    "InvalidToken": "the session token is malformed, or belongs to other keys: check "
    "AWS_SESSION_TOKEN.",
    "InvalidClientTokenId": "STS does not know these credentials.",
    "InvalidIdentityToken": "STS refuses the web identity token: check the trust policy of the "
    "role.",
    "RequestTimeTooSkewed": "the clock of this machine is wrong: run NTP.",
    "QuotaExceeded": "the quota of the user or bucket is used up.",
}
_REGION_CODES = {
    "301",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
    "IncorrectEndpoint",
    "PermanentRedirect",
    "TemporaryRedirect",
}
_THROTTLE_CODES = {
    "BandwidthLimitExceeded",
    "RequestLimitExceeded",
    "RequestThrottled",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
}
_OUR_OPERATIONS = {"GetObject", "HeadObject", "PutObject", "DeleteObject", "ListObjectsV2"}
_CONFLICT_CODES = {"ConditionalRequestConflict", "OperationAborted"}


def endpoint_of(url: str) -> str:
    """Scheme, host and port of `url`, or "": never what else stands in it."""
    parts = urlsplit(url)
    if not parts.hostname:
        return ""
    return f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")


@dataclass(frozen=True)
class Place:
    """What the messages name: `store` is its URL, `endpoint` scheme, host and port only."""

    store: str
    bucket: str
    endpoint: str


@dataclass(frozen=True)
class Verdict:
    """`error` is what to raise when the attempts are used up, or at once without `retry`."""

    error: ObjectCacheError
    retry: bool = False
    throttled: bool = False
    retry_after_s: float = 0.0  # the server's wish, above our own pause
    unsupported: bool = False  # the server does not know this kind of request (501)
    precondition: bool = False  # 412


def judge(exc: BaseException, what: str, place: Place) -> Verdict:
    """The one mapping from botocore, aiohttp and socket failures. `what` is e.g. "GET ns/key"."""
    if isinstance(exc, boto.ClientError):
        return _judge_answer(exc, what, place)
    if isinstance(exc, boto.SSLError):
        return _judge_tls(exc, what, place)
    if isinstance(exc, RecursionError):
        # botocore asks for the bucket's region by a request that is redirected as well, and so on.
        return Verdict(_wrong_region({}, {}, place))
    for kinds, verdict in (
        (
            (boto.NoCredentialsError, boto.PartialCredentialsError),
            Verdict(Denied(f"no complete AWS credentials for {place.store}.", _CREDENTIALS_HINT)),
        ),
        (
            (boto.CredentialRetrievalError, boto.TokenRetrievalError, boto.SSOError),
            _no_credentials(exc, place),
        ),
        (
            (boto.ProfileNotFound, boto.ConfigParseError, boto.InvalidConfigError),
            Verdict(
                Misconfigured(
                    f"the AWS configuration cannot be used ({type(exc).__name__}).",
                    "check the option 'profile', AWS_PROFILE and ~/.aws/config.",
                )
            ),
        ),
        (
            (boto.NoRegionError, boto.InvalidRegionError),
            Verdict(Misconfigured(f"no valid AWS region for {place.store}.", _REGION_HINT)),
        ),
    ):
        if isinstance(exc, kinds):
            return verdict
    return _judge_transport(exc, what, place)


def _judge_answer(exc: boto.ClientError, what: str, place: Place) -> Verdict:
    answer = exc.response
    if exc.operation_name not in _OUR_OPERATIONS:  # botocore asks STS or SSO on the way to S3
        return _no_credentials(exc, place)
    headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    status = int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) or 0)
    code = _code(exc)
    if code in _REGION_CODES or status in (301, 302, 307, 308):
        return Verdict(_wrong_region(answer, headers, place))
    return judge_answer(status, code, headers.get("retry-after", ""), what, place)


def judge_answer(status: int, code: str, retry_after: str, what: str, place: Place) -> Verdict:
    """What an answer that is no success means, but for another region. `code` is S3's, "" if unknown,
    of letters, digits and ._-; `retry_after` the header or ""."""
    said = f"{what}: {place.endpoint} answered {status}" + (
        f" {code}." if code and code != str(status) else "."
    )
    if code == "NoSuchBucket":
        return Verdict(Misconfigured(f"bucket {place.bucket!r} does not exist.", _BUCKET_HINT))
    if status == 404:
        return Verdict(NotFound(f"{what}: not in {place.store}."))
    if code == "InvalidObjectState":
        return Verdict(NotFound(f"{what}: archived.", "keep lifecycle archiving off this prefix."))
    if status == 416:
        return Verdict(Corrupt(f"{what}: the object is shorter than the range asked for."))
    if status == 412:
        return Verdict(Corrupt(f"{what}: the object was changed."), precondition=True)
    if code in _THROTTLE_CODES or status == 429 or status == 503:
        return Verdict(
            Unavailable(said, _BUSY_HINT),
            retry=True,
            throttled=True,
            retry_after_s=_retry_after_s(retry_after),
        )
    if status == 501 or code == "NotImplemented":
        return Verdict(Unavailable(said), unsupported=True)
    if status in (401, 403) or code in _DENIED_HINTS or code.startswith("KMS."):
        return Verdict(Denied(said, _DENIED_HINTS.get(code, _POLICY_HINT)))
    if status == 400 and code in ("", "400"):  # a HEAD has no body to say more
        return Verdict(Denied(said, "a HEAD answered so mostly means an expired or foreign token."))
    retry = status >= 500 or code in _CONFLICT_CODES or code == "RequestTimeout"
    return Verdict(Unavailable(said), retry=retry, retry_after_s=_retry_after_s(retry_after))


def unreachable(what: str, where: str) -> Verdict:
    """No connection could be made. `where` is scheme, host and port."""
    return Verdict(Unavailable(f"{what}: cannot connect to {where}.", _REACH_HINT), retry=True)


def _no_credentials(exc: BaseException, place: Place) -> Verdict:
    told = type(exc).__name__
    if isinstance(exc, boto.ClientError):
        told = f"{exc.operation_name}: {_code(exc)}"
    error = Denied(
        f"AWS credentials for {place.store} could not be fetched ({told}).",
        f"{_CHAIN}: check the role, its trust policy and the token of this machine or pod.",
    )
    return Verdict(error)


def _code(exc: boto.ClientError) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "?", str(exc.response.get("Error", {}).get("Code", "")))[:64]


def _wrong_region(
    answer: "dict[str, object]", headers: "dict[str, str]", place: Place
) -> Misconfigured:
    error = answer.get("Error")
    told = headers.get("x-amz-bucket-region") or (
        error.get("Region") if isinstance(error, dict) else None
    )
    if told and re.fullmatch(r"[a-z0-9-]{1,32}", str(told)):
        return Misconfigured(
            f"bucket {place.bucket!r} is in region {told!r}, not where {place.endpoint} looks.",
            f"set the option 'region' or AWS_REGION to {told!r}.",
        )
    return Misconfigured(
        f"{place.endpoint} sends requests for bucket {place.bucket!r} elsewhere.",
        f"{_REGION_HINT[:-1]}, and check 'endpoint_url'.",
    )


def _judge_tls(exc: boto.SSLError, what: str, place: Place) -> Verdict:
    inner = exc.kwargs.get("error")
    inner = getattr(inner, "certificate_error", None) or getattr(inner, "os_error", inner)
    if isinstance(inner, ssl.SSLCertVerificationError):
        why = inner.verify_message or "not trusted"
        return Verdict(
            Unavailable(f"{what}: the certificate of {place.endpoint} is refused: {why}.", _CA_HINT)
        )
    return Verdict(
        Unavailable(
            f"{what}: no TLS connection to {place.endpoint}.",
            "check that 'endpoint_url' is https and that the server speaks TLS 1.2 or later.",
        ),
        retry=True,
    )


def _judge_transport(exc: BaseException, what: str, place: Place) -> Verdict:
    told = exc.kwargs if isinstance(exc, boto.BotoCoreError) else {}
    inner, where = told.get("error"), endpoint_of(str(told.get("endpoint_url", "")))
    where = where or place.endpoint  # STS or IMDS, if that is what did not answer
    if isinstance(inner, (FileNotFoundError, PermissionError, ssl.SSLError)) and type(exc) is (
        boto.HTTPClientError
    ):  # raised where aiobotocore loads the CA file
        return Verdict(Misconfigured("the CA bundle cannot be read.", _CA_HINT))
    # aiobotocore says "cannot connect" of a connection that was reset later, too.
    if isinstance(exc, boto.ConnectTimeoutError) or isinstance(inner, aiohttp.ClientConnectorError):
        return unreachable(what, where)
    if isinstance(exc, (boto.ReadTimeoutError, TimeoutError)):
        return Verdict(Unavailable(f"{what}: {where} did not answer in time."), retry=True)
    if isinstance(exc, (boto.ConnectionError, boto.HTTPClientError, aiohttp.ClientError, OSError)):
        return Verdict(Unavailable(f"{what}: the connection to {where} broke."), retry=True)
    if isinstance(exc, ResponseParserError):
        return Verdict(
            Unavailable(f"{what}: {where} does not answer as S3 does.", _REACH_HINT),
            retry=True,
        )
    if isinstance(exc, (boto.BotoCoreError, ValueError)):
        return Verdict(
            Misconfigured(
                f"{what}: the S3 client cannot be used as configured ({type(exc).__name__}).",
                "check 'url', 'endpoint_url', 'region' and the AWS configuration.",
            )
        )
    raise exc  # a bug of ours: no failure of a store


def _retry_after_s(told: str) -> float:
    try:
        return max(0.0, float(told or 0))
    except ValueError:  # a date: our own pause will do
        return 0.0
