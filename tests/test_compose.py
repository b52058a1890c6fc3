"""docker-compose.minio.yml: valid for Compose, pinned, private, and with a bucket. No container runs."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

COMPOSE = Path(__file__).parent.parent / "docker-compose.minio.yml"
PINNED = re.compile(
    r"quay\.io/minio/\w+:RELEASE\.\d{4}-\d\d-\d\dT\d\d-\d\d-\d\dZ@sha256:[0-9a-f]{64}"
)


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return dict(yaml.safe_load(COMPOSE.read_text())["services"])


def schema_errors(path: Path) -> str:
    """What Compose's own schema says against the file, or nothing."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, timeout=60)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_follows_the_schema_of_compose() -> None:
    assert schema_errors(COMPOSE) == ""


def test_the_schema_would_refuse_a_mistake(tmp_path: Path) -> None:
    wrong = tmp_path / "compose.yml"
    wrong.write_text(COMPOSE.read_text().replace("healthcheck:", "heathcheck:"))
    assert "heathcheck" in schema_errors(wrong)


def test_every_image_is_pinned_to_a_release_and_its_digest(services: dict[str, Any]) -> None:
    for service in services.values():
        assert PINNED.fullmatch(service["image"])


def test_only_this_machine_can_reach_it(services: dict[str, Any]) -> None:
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports and all(port.startswith("127.0.0.1:") for port in ports)


def test_the_bucket_is_made_once_minio_is_healthy(services: dict[str, Any]) -> None:
    assert services["minio"]["healthcheck"]["test"][0] == "CMD"
    assert services["bucket"]["depends_on"] == {"minio": {"condition": "service_healthy"}}
    assert "mc mb --ignore-existing" in services["bucket"]["command"][0]


def test_data_outlives_the_container(services: dict[str, Any]) -> None:
    name, _, place = services["minio"]["volumes"][0].partition(":")
    assert place == services["minio"]["command"][1]
    assert name in yaml.safe_load(COMPOSE.read_text())["volumes"]


def test_both_services_take_the_same_credentials(services: dict[str, Any]) -> None:
    server, client = (services[name]["environment"] for name in ("minio", "bucket"))
    for name in ("MINIO_ROOT_USER", "MINIO_ROOT_PASSWORD"):
        assert server[name] == client[name] and server[name].startswith(f"${{{name}:-")
