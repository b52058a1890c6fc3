"""The command `objectcache`, as a user runs it: a process, its two outputs and its exit status."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from s3_lab import bucket

from benchmarks.servers import SeaweedFS, Server
from objectcache import admin, cli, config
from objectcache.errors import Denied, NotFound
from objectcache.keys import Namespace, object_key
from objectcache.stores import open_store
from objectcache.stores.base import Store
from objectcache.stores.memory import MemoryStore

LIMIT_S = 60


def objectcache(*arguments: str, **env: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "objectcache", *arguments]
    return subprocess.run(
        command, env=os.environ | env, capture_output=True, text=True, timeout=LIMIT_S
    )


def facts(**changed: Any) -> dict[str, Any]:
    model = {"label": "acme/small", "config": {"layers": 2, "rope": {"theta": 10000.0}}}
    return {"label": "acme/small", "model": model, "block_tokens": 16} | changed


def fill(url: str, namespace: Namespace, chunks: int, shards: int = 1) -> None:
    """What an engine leaves behind, with objects of 1000 bytes."""

    async def run() -> None:
        store = open_store(config.parse({"url": url}))
        document = memoryview(namespace.to_json())
        await store.write(f"{namespace.name}/namespace.json", document)
        for chunk in range(chunks):
            for shard in range(shards):
                key = object_key(namespace.name, bytes([chunk]) * 32, shard, shards)
                await store.write(key, memoryview(bytes(1000)))
        await store.close()

    asyncio.run(run())


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/store"


# ---- check


def test_check_tries_everything_and_leaves_nothing(url: str, tmp_path: Path) -> None:
    done = objectcache("check", url)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 7 and all(line.startswith("ok") for line in lines)
    for word in ("reach", "write", "again", "whole", "range", "list", "delete"):
        assert any(word in line for line in lines), word
    assert done.stderr == f"checking {url}\n"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_check_of_a_reader_writes_nothing(url: str, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    done = objectcache("check", url, "--no-save")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert list((tmp_path / "store").iterdir()) == []


def test_check_says_why_a_store_cannot_be_used() -> None:
    done = objectcache(
        *("check", "s3://bucket/prefix", "--endpoint-url", "http://127.0.0.1:9"),
        *("--attempts", "1", "--region", "us-east-1"),
        AWS_ACCESS_KEY_ID="key",
        AWS_SECRET_ACCESS_KEY="not-to-be-printed",
    )
    assert done.returncode == 1
    assert done.stdout.startswith("FAILED") and len(done.stdout.splitlines()) == 1
    assert "error: " in done.stderr and "cannot connect" in done.stderr
    assert "\n\nhint: check 'endpoint_url'" in done.stderr
    assert "not-to-be-printed" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


class Faulty(MemoryStore):
    """A store in memory of its own that gets one thing wrong."""

    def __init__(self, fault: str) -> None:
        super().__init__(f"faulty-{fault}-{id(self)}")
        self.fault = fault

    async def write(self, key: str, body: memoryview) -> bool:
        if self.fault == "no put":
            raise Denied("PUT: refused.", "allow s3:PutObject.")
        created = await super().write(key, body)
        return created or self.fault == "no condition"

    async def read(self, key: str, into: memoryview, **more: Any) -> None:
        await super().read(key, into, **more)
        if self.fault == ("bad range" if more else "bad body"):
            into[-1] ^= 1

    async def list(self, prefix: str) -> Any:
        async for entry in super().list(prefix):
            if self.fault != "no list":
                yield entry

    async def delete(self, key: str) -> None:
        if self.fault == "no delete":
            raise Denied("DELETE: refused.")
        await super().delete(key)


def steps_of(store: Store) -> list[admin.Step]:
    async def run() -> list[admin.Step]:
        return [step async for step in admin.check(store)]

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("fault", "where", "says"),
    [
        ("no put", "write an object", "refused"),
        ("bad body", "read it whole", "other bytes"),
        ("bad range", "read a range", "other bytes"),
        ("no list", "list it", "lacks an object"),
        ("no delete", "delete it", "is left behind"),
    ],
)
def test_check_finds_what_a_store_gets_wrong(fault: str, where: str, says: str) -> None:
    steps = steps_of(Faulty(fault))
    wrong = [step for step in steps if step.error is not None]
    assert len(wrong) == 1 and wrong[0].what.startswith(where)
    assert says in str(wrong[0].error)
    assert steps[-1].what == "delete it"


def test_check_notes_a_server_that_ignores_the_condition() -> None:
    steps = steps_of(Faulty("no condition"))
    assert all(step.error is None for step in steps)
    assert [step.what for step in steps if "If-None-Match" in step.note] == [
        "write it again, which must change nothing"
    ]


# ---- ls, show, diff


def test_ls_shows_each_namespace_with_its_chunks_and_bytes(url: str) -> None:
    one, two = Namespace(facts()), Namespace(facts(block_tokens=32))
    fill(url, one, chunks=3)
    fill(url, two, chunks=2, shards=2)
    done = objectcache("ls", url)
    assert done.returncode == 0 and done.stderr == ""
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows[0] == ["NAMESPACE", "MODEL", "CHUNKS", "SIZE"]
    assert {row[0]: row[1:3] for row in rows[1:]} == {
        one.name: ["acme/small", "3"],
        two.name: ["acme/small", "2"],
    }
    size = 3 * 1000 + len(one.to_json())
    assert {row[0]: row[3:] for row in rows[1:]}[one.name] == [f"{size / 1024:.1f}", "KiB"]


def test_ls_lives_with_what_is_not_ours(url: str, tmp_path: Path) -> None:
    namespace = Namespace(facts())
    fill(url, namespace, chunks=1)
    (tmp_path / "store" / namespace.name / "namespace.json").write_text("{}")
    (tmp_path / "store" / "notes.txt").write_text("somebody's")
    done = objectcache("ls", url)
    assert done.returncode == 0
    assert done.stdout.splitlines()[1].split()[:3] == [namespace.name, "?", "1"]
    assert "1 other objects" in done.stderr


def test_ls_of_an_empty_store_says_so(url: str) -> None:
    done = objectcache("ls", url)
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 1 and "no chunks" in done.stderr


def test_show_prints_every_fact(url: str) -> None:
    namespace = Namespace(facts())
    fill(url, namespace, chunks=0)
    done = objectcache("show", url, namespace.name)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.splitlines() == [
        "block_tokens = 16",
        'label = "acme/small"',
        "model.config.layers = 2",
        "model.config.rope.theta = 10000.0",
        'model.label = "acme/small"',
    ]


@pytest.mark.parametrize("name", ["absent-0123", "a/b", ""])
def test_show_of_what_is_not_there_fails_with_a_hint(url: str, name: str) -> None:
    done = objectcache("show", url, name)
    assert done.returncode == 1 and done.stdout == ""
    assert "\n\nhint: `objectcache ls` shows the names." in done.stderr


def test_diff_names_just_the_facts_that_differ(url: str) -> None:
    changed = {"config": {"layers": 2, "rope": {"theta": 500000.0}}}
    one, two = Namespace(facts()), Namespace(facts(model=changed, extra=["x"]))
    fill(url, one, chunks=0)
    fill(url, two, chunks=0)
    done = objectcache("diff", url, one.name, two.name)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.splitlines() == [
        "extra",
        f"  left   {cli.ABSENT}",
        '  right  ["x"]',
        "model.config.rope.theta",
        "  left   10000.0",
        "  right  500000.0",
        "model.label",
        '  left   "acme/small"',
        f"  right  {cli.ABSENT}",
    ]
    same = objectcache("diff", url, one.name, one.name)
    assert same.returncode == 0 and same.stdout == "" and "one namespace" in same.stderr


def test_differences_tell_numbers_from_strings() -> None:
    found = admin.differences({"a": 1, "b": []}, {"a": "1", "b": {}})
    assert [(one.path, one.left, one.right) for one in found] == [
        ("a", "1", '"1"'),
        ("b", "[]", "{}"),
    ]


def test_a_document_of_another_namespace_is_refused() -> None:
    store = MemoryStore("test-cli-swapped")
    one, two = Namespace(facts()), Namespace(facts(block_tokens=32))

    async def run() -> None:
        await store.write(f"{one.name}/namespace.json", memoryview(two.to_json()))
        with pytest.raises(Exception, match="describes another namespace"):
            await admin.namespace_facts(store, one.name)
        with pytest.raises(NotFound):
            await admin.namespace_facts(store, two.name)

    asyncio.run(run())


# ---- arguments


def test_store_options_are_options_of_the_connector() -> None:
    known = set(config.Options.__dataclass_fields__)
    assert set(cli.STORE_OPTIONS) <= known
    helped = objectcache("check", "--help").stdout
    for name in cli.STORE_OPTIONS:
        assert "--" + name.replace("_", "-") in helped


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("ls", "ftp://host/x"), 1, "hint: use s3://bucket/prefix"),
        (("ls", "s3://key:secret@bucket"), 1, "must not hold credentials"),
        (("ls", "memory://x", "--attempts", "0"), 1, "outside 1 to 10"),
        (("ls", "memory://x", "--endpoint", "http://h"), 2, "unrecognized arguments"),
        (("list", "memory://x"), 2, "invalid choice"),
        ((), 2, "required"),
    ],
)
def test_wrong_arguments_are_refused(arguments: tuple[str, ...], status: int, says: str) -> None:
    done = objectcache(*arguments)
    assert done.returncode == status and done.stdout == ""
    assert says in done.stderr and "Traceback" not in done.stderr
    assert "key:secret" not in done.stderr


def test_the_command_needs_neither_vllm_nor_torch() -> None:
    code = (
        "import sys; sys.modules['vllm'] = sys.modules['torch'] = None\n"
        "from objectcache.cli import main\n"
        "assert main(['check', 'memory://x']) == 0\n"
        "assert main(['docs', 'options']) == 0\n"
        "sys.exit(main(['docs', 'metrics']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 1  # of the last line only
    assert "hint: install vllm" in done.stderr and "Traceback" not in done.stderr


def test_a_reader_that_had_enough_is_no_error(url: str) -> None:
    namespace = Namespace(facts(many={str(i): i for i in range(20_000)}))
    fill(url, namespace, chunks=0)
    command = f"{sys.executable} -m objectcache show {url} {namespace.name} | head -1"
    done = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, timeout=LIMIT_S, check=True
    )
    assert done.stdout == "block_tokens = 16\n" and done.stderr == ""


# ---- a real S3 server


def test_on_a_real_server(weed: SeaweedFS) -> None:
    with bucket(weed, "kvcache"):
        _on_a_real_server(weed)


def _on_a_real_server(s3: Server) -> None:
    at = ("s3://kvcache/team", "--endpoint-url", s3.endpoint_url)
    done = objectcache("check", *at, **s3.env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 7 and "(" not in done.stdout
    assert s3.client().list_objects_v2(Bucket="kvcache").get("Contents", []) == []

    namespace = Namespace(facts())
    client = s3.client()
    client.put_object(
        Bucket="kvcache", Key=f"team/{namespace.name}/namespace.json", Body=namespace.to_json()
    )
    key = object_key(namespace.name, bytes(32), 0, 1)
    client.put_object(Bucket="kvcache", Key=f"team/{key}", Body=bytes(5000))
    listed = objectcache("ls", *at, **s3.env)
    assert listed.stdout.splitlines()[1].split()[:3] == [namespace.name, "acme/small", "1"]
    assert objectcache("show", at[0], namespace.name, *at[1:], **s3.env).returncode == 0

    absent = objectcache("check", "s3://no-such-bucket", *at[1:], **s3.env)
    assert absent.returncode == 1
    assert "hint: create the bucket" in absent.stderr
    wrong = objectcache("check", *at, **(s3.env | {"AWS_SECRET_ACCESS_KEY": "wrong"}))
    assert wrong.returncode == 1 and "AWS_SECRET_ACCESS_KEY" in wrong.stderr
