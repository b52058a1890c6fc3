"""The command `objectcache`: arguments in, reports out. What the operations do: admin.py, reference.py.

Data goes to stdout, everything else to stderr. Exit status: 0 done, 1 failed, 2 wrong arguments.
"""

import argparse
import asyncio
import dataclasses
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import objectcache
from objectcache import admin, config, reference
from objectcache.errors import ObjectCacheError
from objectcache.stores import open_store
from objectcache.stores.base import Store

STORE_OPTIONS = (
    "endpoint_url",
    "region",
    "profile",
    "addressing_style",
    "ca_bundle",
    "anonymous",
    "connect_timeout_ms",
    "read_timeout_ms",
    "attempts",
)
"""Options of config.Options that say how a store is reached, and so are options here."""

Action = Callable[[argparse.Namespace, Store], Awaitable[int]]
ABSENT = "(absent)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status."""
    arguments = parser().parse_args(argv)
    try:
        if arguments.command == "docs":
            return _docs(arguments.page)
        return asyncio.run(_with_store(arguments))
    except ObjectCacheError as error:
        _complain(error)
        return 1
    except KeyboardInterrupt:
        _say("interrupted.")
        return 130
    except BrokenPipeError:  # the reader had enough: `objectcache show ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def parser() -> argparse.ArgumentParser:
    """All commands with their arguments."""
    root = argparse.ArgumentParser(
        prog="objectcache",
        description="Look after a store of vLLM's prefix KV cache.",
        allow_abbrev=False,
    )
    root.add_argument("--version", action="version", version=objectcache.__version__)
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, action, about, operands in (
        ("check", _check, "try whether the store can be used, and say why not", ()),
        ("ls", _ls, "list namespaces: which models' KV lies there, and how much", ()),
        ("show", _show, "show what the chunks of a namespace were computed with", ("NAMESPACE",)),
        ("diff", _diff, "show why two engines do not share chunks", ("LEFT", "RIGHT")),
    ):
        command = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
        command.set_defaults(action=action)
        command.add_argument("url", metavar="URL", help="s3://bucket/prefix or file:///path")
        for operand in operands:
            command.add_argument(
                operand.lower(), metavar=operand, help="name of a namespace, as `ls` shows it"
            )
        if name == "check":
            command.add_argument(
                "--no-save", action="store_true", help="write nothing: for engines that only read"
            )
        _add_store_options(command)
    docs = commands.add_parser(
        "docs", help="print a reference page, made from the code", allow_abbrev=False
    )
    docs.add_argument("page", choices=("options", "metrics"))
    return root


def _add_store_options(command: argparse.ArgumentParser) -> None:
    fields = {spec.name: spec for spec in dataclasses.fields(config.Options)}
    group = command.add_argument_group("how the store is reached, as in kv_connector_extra_config")
    for name in STORE_OPTIONS:
        kind: type = type(fields[name].default)
        settings: dict[str, Any] = (
            {"action": "store_true"}
            if kind is bool
            else {"type": kind, "metavar": "N" if kind is int else "TEXT"}
        )
        group.add_argument(
            "--" + name.replace("_", "-"),
            dest=name,
            default=argparse.SUPPRESS,
            help=fields[name].metadata["doc"].replace("%", "%%"),
            **settings,
        )


async def _with_store(arguments: argparse.Namespace) -> int:
    given = vars(arguments)
    extra = {name: given[name] for name in ("url", *STORE_OPTIONS) if name in given}
    if given.get("no_save"):
        extra["save"] = False
    store = open_store(config.parse(extra))
    try:
        action: Action = arguments.action
        return await action(arguments, store)
    finally:
        await store.close()


async def _check(arguments: argparse.Namespace, store: Store) -> int:
    _say(f"checking {store.name}")
    failures: list[ObjectCacheError] = []
    async for step in admin.check(store, save=not arguments.no_save):
        verdict = "FAILED" if step.error else "ok"
        note = f"  ({step.note})" if step.note else ""
        print(f"{verdict:<6}  {step.took_s * 1000:7.0f} ms  {step.what}{note}", flush=True)
        if step.error is not None:
            failures.append(step.error)
    for failure in failures:
        _complain(failure)
    return 1 if failures else 0


async def _ls(arguments: argparse.Namespace, store: Store) -> int:
    listing = await admin.usage(store)
    rows = [("NAMESPACE", "MODEL", "CHUNKS", "SIZE")]
    rows += [
        (use.name, use.label, str(use.chunks), _size(use.stored_bytes))
        for use in listing.namespaces
    ]
    print(_table(rows, right=2))
    if not listing.namespaces:
        _say(f"there are no chunks in {store.name}.")
    if listing.other_objects:
        _say(f"{listing.other_objects} other objects there are not objectcache's.")
    return 0


async def _show(arguments: argparse.Namespace, store: Store) -> int:
    for path, value in admin.flat(await admin.namespace_facts(store, arguments.namespace)):
        print(f"{path} = {value}")
    return 0


async def _diff(arguments: argparse.Namespace, store: Store) -> int:
    left = await admin.namespace_facts(store, arguments.left)
    right = await admin.namespace_facts(store, arguments.right)
    found = admin.differences(left, right)
    if not found:
        _say("the two are one namespace.")
    for difference in found:
        print(difference.path)
        for name, value in (("left", difference.left), ("right", difference.right)):
            print(f"  {name:<5}  {ABSENT if value is None else value}")
    return 0


def _docs(page: str) -> int:
    text = reference.options_page() if page == "options" else reference.metrics_page()
    print(text, end="")
    return 0


def _table(rows: Sequence[Sequence[str]], right: int) -> str:
    """Columns from `right` on are aligned to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column >= right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _size(count: int) -> str:
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"


def _complain(error: ObjectCacheError) -> None:
    _say(f"error: {error.message}")
    if error.hint:
        _say(f"\nhint: {error.hint}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
