"""install.py: where torch comes from, what is removed, and when nothing is done. No network."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from install import PYTORCH_CPU_INDEX, REQUIREMENTS, ROOT, SetupError, install_torch


class Pip:
    """A pip whose settings and PyTorch's index do or do not lead to the wheel."""

    def __init__(self, at_hand: bool, index_answers: bool = True) -> None:
        self.at_hand, self.index_answers = at_hand, index_answers
        self.calls: list[Sequence[str]] = []

    def __call__(self, arguments: Sequence[str], advice: str = "") -> None:
        self.calls.append(arguments)
        found = self.index_answers if PYTORCH_CPU_INDEX in arguments else self.at_hand
        if not found:
            raise SetupError(advice)


def test_torch_at_hand_is_used_and_no_other_index_is_asked() -> None:
    pip = Pip(at_hand=True, index_answers=False)
    install_torch(pip)
    assert len(pip.calls) == 1 and PYTORCH_CPU_INDEX not in pip.calls[0]


def test_torch_comes_from_pytorchs_index_otherwise() -> None:
    pip = Pip(at_hand=False)
    install_torch(pip)
    assert list(pip.calls[1][-2:]) == ["--index-url", PYTORCH_CPU_INDEX]


def test_torch_nowhere_says_what_to_do() -> None:
    with pytest.raises(SetupError, match="PIP_FIND_LINKS"):
        install_torch(Pip(at_hand=False, index_answers=False))


def test_torch_is_installed_alone_so_that_no_cuda_build_can_come_with_it() -> None:
    pip = Pip(at_hand=False)
    install_torch(pip)
    assert all("--no-deps" in call for call in pip.calls)


def pinned(name: str) -> str:
    """The one requirement of a requirements file, without comments and hashes."""
    lines = (REQUIREMENTS / f"{name}.txt").read_text().splitlines()
    (line,) = [line for line in lines if "==" in line and not line.startswith("#")]
    return line.removesuffix("\\").strip()


def test_torch_is_the_build_that_the_engine_asks_for() -> None:
    name, _, version = pinned("engine").partition("==")
    assert importlib.metadata.version(name) == version
    wanted = importlib.metadata.requires(name) or []
    assert any(line.startswith(pinned("torch") + ";") and "x86_64" in line for line in wanted)


def test_the_s3_server_is_pinned_by_hash_for_both_machines() -> None:
    name, _, version = pinned("seaweedfs").partition("==")
    assert importlib.metadata.version(name) == version
    assert (REQUIREMENTS / "seaweedfs.txt").read_text().count("--hash=sha256:") == 2


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """As much of a checkout as setting up needs."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("install.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(REQUIREMENTS, folder / "requirements")
    return folder


def run(checkout: Path, code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the checkout, with pip cut off from the network and from its settings."""
    (checkout / "empty").mkdir(exist_ok=True)
    offline = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": (checkout / "empty").as_uri()}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    return subprocess.run(
        [sys.executable, "-c", f"import install as i\n{code}"],
        cwd=checkout,
        env=kept | offline | env,
        capture_output=True,
        text=True,
        timeout=120,
    )


def write_wheel(folder: Path, name: str, version: str, source: str) -> None:
    """Write a wheel of one module."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}/__init__.py": source,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in {**files, f"{info}/RECORD": record}.items():
            wheel.writestr(path, text)


def test_offline_with_the_wheel_at_hand(checkout: Path, tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    write_wheel(wheels, *pinned("torch").split("=="), "")
    write_wheel(wheels, "torchvision", "0.28.0", "raise RuntimeError('no operator nms')")
    write_wheel(wheels, "torchaudio", "2.11.0", "")
    done = run(
        checkout,
        "i.create_venv(); i.install_torch(i.pip)\n"
        "i.pip(['install', '--no-deps', 'torchvision', 'torchaudio'])\n"
        "i.remove_companions_of_another_torch()\n",
        PIP_FIND_LINKS=str(wheels),
    )
    assert done.returncode == 0, done.stderr
    (site,) = (checkout / ".venv/lib").glob("python*/site-packages")
    assert {"torch", "torchaudio"} <= {path.name for path in site.iterdir()}
    assert not (site / "torchvision").exists()
    assert "pytorch.org" not in (checkout / ".venv/install.log").read_text() + done.stderr


def stamp(checkout: Path) -> str:
    done = run(checkout, "print(i.fingerprint())")
    return done.stdout.strip()


def test_a_finished_setup_is_not_repeated(checkout: Path) -> None:
    (checkout / ".venv").mkdir()
    (checkout / ".venv/installed").write_text(stamp(checkout))
    done = run(checkout, "raise SystemExit(i.main())")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [path.name for path in (checkout / ".venv").iterdir()] == ["installed"]


@pytest.mark.parametrize("changed", ["pyproject.toml", "requirements/engine.txt", "install.py"])
def test_a_change_of_what_is_wanted_sets_up_again(checkout: Path, changed: str) -> None:
    before = stamp(checkout)
    with (checkout / changed).open("a") as file:
        file.write("# changed\n")
    assert stamp(checkout) != before
