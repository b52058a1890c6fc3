"""How a request without a body is signed for S3 (Signature Version 4), and how S3 quotes a key. No I/O, no clock.

The payload is not signed (UNSIGNED-PAYLOAD): there is none. Only the host and the `x-amz-` headers
are, which is what S3 asks for; Range and If-Match may stand beside them.
"""

import hmac
from hashlib import sha256
from typing import TYPE_CHECKING
from urllib.parse import quote

if TYPE_CHECKING:
    from time import struct_time

_PAYLOAD = "UNSIGNED-PAYLOAD"


def quoted(key: str) -> str:
    """`key` as it stands in a URL and in what is signed: all but unreserved marks and slashes escaped."""
    return quote(key, safe="/~")


def host_header(host: str, port: int) -> str:
    """The value of `Host` for an http:// address. `host` is a name or an address, without brackets."""
    name = f"[{host}]" if ":" in host else host
    return name if port == 80 else f"{name}:{port}"


class Signer:
    """Signs for one host and region. The key of a day is derived once, so a request costs two hashes."""

    def __init__(self, host: str, region: str) -> None:
        self._host = host  # exactly as the header Host says it
        self._region = region
        self._day_of = ("", "")  # what the key was derived for
        self._day_mac = hmac.new(b"", digestmod="sha256")

    def headers(
        self,
        method: str,
        path: str,
        access_key: str,
        secret_key: str,
        token: str | None,
        now: "struct_time",
    ) -> str:
        """The header lines that authorize `method` of `path` (quoted, no query) at `now` (UTC).

        Each line ends with CRLF. They hold no secret but what the server must see; do not log them.
        """
        day = f"{now.tm_year:04}{now.tm_mon:02}{now.tm_mday:02}"
        stamp = f"{day}T{now.tm_hour:02}{now.tm_min:02}{now.tm_sec:02}Z"
        scope = f"{day}/{self._region}/s3/aws4_request"
        token_line = f"x-amz-security-token:{token}\n" if token else ""
        signed = "host;x-amz-content-sha256;x-amz-date" + (";x-amz-security-token" if token else "")
        canonical = (
            f"{method}\n{path}\n\nhost:{self._host}\nx-amz-content-sha256:{_PAYLOAD}\n"
            f"x-amz-date:{stamp}\n{token_line}\n{signed}\n{_PAYLOAD}"
        )
        digest = sha256(canonical.encode()).hexdigest()
        to_sign = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{digest}"
        mac = self._mac(secret_key, day).copy()  # hmac.digest would let go of the GIL for so little
        mac.update(to_sign.encode())
        token_header = f"x-amz-security-token: {token}\r\n" if token else ""
        return (
            f"x-amz-content-sha256: {_PAYLOAD}\r\nx-amz-date: {stamp}\r\n{token_header}"
            f"Authorization: AWS4-HMAC-SHA256 Credential={access_key}/{scope}, "
            f"SignedHeaders={signed}, Signature={mac.hexdigest()}\r\n"
        )

    def _mac(self, secret_key: str, day: str) -> hmac.HMAC:
        """Of nothing, with the key of that day."""
        if self._day_of != (secret_key, day):
            key = f"AWS4{secret_key}".encode()
            for part in (day, self._region, "s3", "aws4_request"):
                key = hmac.digest(key, part.encode(), "sha256")
            self._day_mac, self._day_of = hmac.new(key, digestmod="sha256"), (secret_key, day)
        return self._day_mac
