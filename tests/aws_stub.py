"""A stub of what AWS puts around S3: STS, IMDS, the container endpoint, and an S3 without objects."""

import json
import re
import socket
import ssl
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

STS_REPLY = """<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">
<AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>AKIDWEB</AccessKeyId>
<SecretAccessKey>web-secret</SecretAccessKey><SessionToken>web-token</SessionToken>
<Expiration>2999-01-01T00:00:00Z</Expiration></Credentials>
<AssumedRoleUser><Arn>arn:aws:sts::1:assumed-role/r/s</Arn><AssumedRoleId>R:s</AssumedRoleId>
</AssumedRoleUser></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"""


def _keys(name: str, end: str) -> str:
    return json.dumps(
        {
            "Code": "Success",
            "AccessKeyId": f"AKID{name.upper()}",
            "SecretAccessKey": f"{name}-secret",
            "Token": f"{name}-token",
            "Expiration": end,
        }
    )


@dataclass
class Seen:
    """A request as a stub got it; header names are lower case."""

    method: str
    path: str
    headers: dict[str, str]

    @property
    def access_key(self) -> str:
        match = re.search(r"Credential=([^/]+)/", self.headers.get("authorization", ""))
        return match[1] if match else ""

    @property
    def region(self) -> str:
        return self.headers["authorization"].split("Credential=")[1].split("/")[2]


@dataclass
class Stub:
    """One server that plays S3 (all keys absent), STS, IMDS and the container endpoint."""

    tls: ssl.SSLContext | None = None
    seen: list[Seen] = field(default_factory=list)
    busy: int = 0
    busy_max: int = 0
    delay_s: float = 0.0
    connections: int = 0
    sts_status: int = 200
    container: str = "container"  # whose keys its endpoint gives
    keys_end: str = "2999-01-01T00:00:00Z"
    host: str = "127.0.0.1"

    def __enter__(self) -> "Stub":
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                stub.connections += 1
                super().setup()

            def _answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                headers = {k.lower(): v for k, v in self.headers.items()}
                stub.seen.append(Seen(self.command, self.path, headers))
                stub.busy += 1
                stub.busy_max = max(stub.busy, stub.busy_max)
                time.sleep(stub.delay_s)
                status, body = stub.reply(self.command, self.path)
                stub.busy -= 1
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(b"" if self.command == "HEAD" else body.encode())

            do_GET = do_PUT = do_POST = do_HEAD = do_CONNECT = _answer

            def log_message(self, *args: object) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            address_family = socket.AF_INET6 if ":" in stub.host else socket.AF_INET

            def handle_error(self, *args: object) -> None:
                """Refused handshakes are what some tests are about."""

        self._server = Quiet((self.host, 0), Handler)
        if self.tls is not None:
            self._server.socket = self.tls.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        scheme = "https" if self.tls else "http"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}://{host}:{self._server.server_port}"

    @property
    def s3(self) -> list[Seen]:
        return [request for request in self.seen if "objectcache-check" in request.path]

    def reply(self, method: str, path: str) -> tuple[int, str]:
        if method == "CONNECT":
            return 403, ""
        if method == "POST":
            return self.sts_status, STS_REPLY if self.sts_status == 200 else "<Error/>"
        if path == "/container":
            return 200, _keys(self.container, self.keys_end)
        if path == "/latest/api/token":
            return 200, "imds-session"
        if path == "/latest/meta-data/iam/security-credentials/":
            return 200, "role"
        if path == "/latest/meta-data/iam/security-credentials/role":
            return 200, _keys("imds", self.keys_end)
        return 404, "<Error><Code>NoSuchKey</Code></Error>"
