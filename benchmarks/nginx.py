"""nginx over files, http and https, as the fastest server that a client can meet. Real S3 servers: servers.py.

It answers GET, HEAD and ranges of files below `objects`, on wish PUT and DELETE as well, ignores
signatures, and counts requests.
The certificate is signed by a CA that is made for one run and thrown away. The binary is that of
OBJECTCACHE_NGINX, or `nginx` on the PATH.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

from benchmarks.servers import Process, Server, ServerError, free_ports

_START_LIMIT_S = 10.0
_OPENSSL_LIMIT_S = 60.0
# What a client may need thousands of connections and large bodies for, and nothing else. Connections have
# their turns of 512 KiB, not of 2 MiB: a network serves all at once, packet by packet.
_CONF = """
{user}
worker_processes {workers};
pid {root}/nginx.pid;
daemon off;
error_log {root}/error.log warn;
events {{ worker_connections 4096; }}
http {{
  access_log off; sendfile on; sendfile_max_chunk 512k; tcp_nopush on; tcp_nodelay on;
  keepalive_requests 1000000; keepalive_timeout 300s; max_ranges 1;
  client_body_temp_path {root}/t1; proxy_temp_path {root}/t2; fastcgi_temp_path {root}/t3;
  uwsgi_temp_path {root}/t4; scgi_temp_path {root}/t5;
  default_type application/octet-stream;
  server {{
    listen 127.0.0.1:{port} backlog=4096 reuseport;
    {tls}
    root {objects};
    {writes}
    location = /-/status {{ stub_status; }}
  }}
}}
"""
_WRITES_CONF = """client_max_body_size 0; client_body_buffer_size 64k;
    location / { dav_methods PUT DELETE; create_full_put_path on; dav_access user:rw; }"""
_TLS_CONF = """listen 127.0.0.1:{tls_port} ssl backlog=4096 reuseport;
    ssl_certificate {root}/server.pem; ssl_certificate_key {root}/server.key;
    ssl_protocols TLSv1.2 TLSv1.3; ssl_buffer_size 16k;"""


class Nginx(Server):
    """Serves the files `objects/<bucket>/<key>`.

    `tls_url` is the same by https, its CA in `ca`, unless `tls_absent` says why not.
    """

    def __init__(
        self, root: Path, bucket: str, objects: Path, workers: int, writable: bool = False
    ) -> None:
        super().__init__(root, bucket)
        self._writable = writable
        self._objects = objects
        self._workers = workers
        self._tls_port = 0
        self._process: Process | None = None

    @property
    def tls_url(self) -> str:
        return f"https://127.0.0.1:{self._tls_port}"

    @property
    def ca(self) -> Path:
        return self.root / "ca.pem"

    @property
    def pid(self) -> int:
        """Of the parent of all its processes."""
        if self._process is None:
            raise ServerError("nginx does not run.")
        return self._process.pid

    def start(self) -> None:
        absent = nginx_absent()
        if absent:
            raise ServerError(absent)
        self.root.mkdir(parents=True, exist_ok=True)
        if not self.port:
            self.port, self._tls_port = free_ports(2)
            if not tls_absent():
                _make_certificate(self.root)
        tls = "" if tls_absent() else _TLS_CONF
        conf = self.root / "nginx.conf"
        conf.write_text(
            _CONF.format(
                user="user root;" if os.geteuid() == 0 else "",
                workers=self._workers,
                root=self.root,
                port=self.port,
                tls=tls.format(root=self.root, tls_port=self._tls_port),
                objects=self._objects,
                writes=_WRITES_CONF if self._writable else "",
            )
        )
        env = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        command = [_nginx(), "-c", str(conf), "-p", str(self.root)]
        self._process = Process(command, self.root / "nginx.log", env)
        self._wait()

    def stop(self) -> None:
        if self._process is not None:
            self._process.stop(signal.SIGTERM)
            self._process = None

    def requests(self) -> int:
        """All requests that it has answered, those of this method left out."""
        with urllib.request.urlopen(f"{self.endpoint_url}/-/status", timeout=10) as answer:
            found = re.search(rb"\n +\d+ +\d+ +(\d+)", answer.read())
        self._asked += 1
        return int(found[1]) - self._asked if found else 0

    _asked = 0

    def _wait(self) -> None:
        until = time.monotonic() + _START_LIMIT_S
        while True:
            assert self._process is not None
            self._process.check()
            try:
                socket.create_connection(("127.0.0.1", self.port), 1.0).close()
                return
            except OSError as exc:
                if time.monotonic() > until:
                    raise ServerError(f"nginx does not listen: {exc}") from exc
                time.sleep(0.02)


def nginx_absent() -> str:
    """Why `Nginx` cannot run here, or ""."""
    if not (_nginx() and os.access(_nginx(), os.X_OK)):
        return "there is no nginx: run `apt-get install nginx-light`, or set OBJECTCACHE_NGINX."
    return ""


def tls_absent() -> str:
    """Why `Nginx` cannot serve https here, or ""."""
    if shutil.which("openssl") is None:
        return "there is no openssl: run `apt-get install openssl`."
    return ""


def _nginx() -> str:
    # Debian keeps it where only root's PATH looks.
    path = os.environ.get("PATH", "") + os.pathsep + "/usr/sbin"
    told = os.environ.get("OBJECTCACHE_NGINX")
    return str(Path(told).resolve()) if told else shutil.which("nginx", path=path) or ""


def _make_certificate(folder: Path) -> None:
    """A CA, and a certificate for 127.0.0.1 that it signed; both are valid for two days."""
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    ca, server = ("ca.key", "ca.pem"), ("server.key", "server.csr")
    for name in ("ca.key", "server.key"):
        (folder / name).touch(mode=0o600)
    _openssl(
        *(folder, "req", "-x509", *key, "-keyout", ca[0], "-out", ca[1], "-days", "2"),
        *("-subj", "/CN=objectcache throw-away CA"),
        *("-addext", "keyUsage=critical,keyCertSign,cRLSign"),
    )
    _openssl(folder, "req", *key, "-keyout", server[0], "-out", server[1], "-subj", "/CN=127.0.0.1")
    (folder / "server.ext").write_text(
        "subjectAltName=IP:127.0.0.1,DNS:localhost\nbasicConstraints=CA:FALSE\n"
    )
    _openssl(
        *(folder, "x509", "-req", "-in", server[1], "-CA", ca[1], "-CAkey", ca[0]),
        *("-CAcreateserial", "-days", "2", "-out", "server.pem", "-extfile", "server.ext"),
    )


def _openssl(folder: Path, *args: str) -> None:
    done = subprocess.run(
        ["openssl", *args],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=_OPENSSL_LIMIT_S,
        check=False,
    )
    if done.returncode:
        raise ServerError(f"openssl {args[0]} ended with {done.returncode}: {done.stderr[-500:]}")
