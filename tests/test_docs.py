"""The documents against the code: every option, metric, command, message, file and example in them is real."""

import ast
import dataclasses
import json
import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from objectcache import (
    asked,
    choosing,
    cli,
    config,
    device,
    index,
    metrics,
    moment,
    reference,
    support,
)

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")], key=lambda path: path.as_posix()
)
TROUBLE = ROOT / "docs" / "TROUBLESHOOTING.md"
OPTIONS = {field.name for field in dataclasses.fields(config.Options)}
GAP = "…"

each_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix()
)


def blocks(document: Path, *languages: str) -> list[str]:
    """Fenced blocks of these languages ("" for none named)."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", document.read_text(), re.DOTALL | re.MULTILINE)
    return [text for language, text in found if language in languages]


def code_spans(document: Path) -> list[str]:
    """What stands between backticks in a line, outside of fenced blocks."""
    prose = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`([^`\n]+)`", prose)


# ---- pages made from code


def test_the_page_of_options_is_current() -> None:
    assert (ROOT / "docs/OPTIONS.md").read_text() == reference.options_page(), (
        "run `objectcache docs options > docs/OPTIONS.md`"
    )


def test_the_page_of_metrics_is_current() -> None:
    assert (ROOT / "docs/METRICS.md").read_text() == reference.metrics_page(), (
        "run `objectcache docs metrics > docs/METRICS.md`"
    )


def test_the_page_of_options_has_each_one_with_its_default() -> None:
    page = reference.options_page()
    for field in dataclasses.fields(config.Options):
        row = re.search(rf"^\| `{field.name}` \|(.*)$", page, re.MULTILINE)
        assert row is not None, field.name
        default = row[1].split("|")[0].strip().strip("`")
        if default not in ("none", "must be set"):
            kind: Any = type(field.default)
            read = json.loads(default) if kind in (bool,) else default
            given = {"url": "memory://x", field.name: read if kind is not int else _number(default)}
            assert getattr(config.parse(given), field.name) == field.default


def _number(text: str) -> int | str:
    return int(text) if text.isdigit() else text


# ---- what documents name exists


def shown_configs() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every kv_transfer_config that a document shows, in shell or Python."""
    for document in DOCUMENTS:
        for text in blocks(document, "sh"):
            for words in map(shlex.split, _commands(text)):
                if "--kv-transfer-config" in words:
                    yield document.name, json.loads(words[words.index("--kv-transfer-config") + 1])
        for text in blocks(document, "python"):
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.keyword) and node.arg == "kv_transfer_config":
                    yield document.name, ast.literal_eval(node.value)
        for span in code_spans(document):
            if span.startswith('"kv_connector_extra_config":'):
                yield document.name, json.loads("{" + span + "}")


def _commands(text: str) -> list[str]:
    """Logical lines of a shell block: quotes may span lines."""
    commands, pending = [], ""
    for line in text.splitlines():
        pending += line + "\n"
        try:
            shlex.split(pending, comments=True)
        except ValueError:
            continue
        commands.append(pending)
        pending = ""
    assert not pending, f"an open quote in {text!r}"
    return commands


def test_every_config_that_is_shown_is_accepted() -> None:
    shown = list(shown_configs())
    assert {name for name, _ in shown} >= {"README.md", "TROUBLESHOOTING.md"}
    assert len(shown) >= 4
    for _, transfer in shown:
        config.parse(transfer["kv_connector_extra_config"])
        assert transfer.get("kv_connector", "ObjectCacheConnector") == "ObjectCacheConnector"
        assert transfer.get("kv_role", "kv_both") in ("kv_both", "kv_consumer", "kv_producer")


@each_document
def test_blocks_are_valid(document: Path) -> None:
    for text in blocks(document, "json"):
        json.loads(text)
    for text in blocks(document, "python"):
        compile(text, str(document), "exec")
    for text in blocks(document, "sh"):
        _commands(text)


def commands_shown(document: Path) -> list[list[str]]:
    in_blocks = [line for text in blocks(document, "sh") for line in _commands(text)]
    in_lines = [
        span
        for span in code_spans(document)
        # A sentence of the log may begin with the name as well.
        if re.match(r"(objectcache|make) ", span) and GAP not in span and not span.endswith(".")
    ]
    return [shlex.split(text, comments=True) for text in in_blocks + in_lines]


@each_document
def test_commands_exist(document: Path) -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in commands_shown(document):
        if words[:1] == ["make"]:
            assert {w for w in words[1:] if "=" not in w} <= targets, words
        if words[:1] == ["objectcache"]:
            complete = [*words[1:], *_operands(words[1:])]
            cli.parser().parse_args(complete[: complete.index(">")] if ">" in words else complete)


def _operands(words: list[str]) -> list[str]:
    """What a command named without its operands lacks: `objectcache ls` means any URL."""
    wanted = {"check": 1, "ls": 1, "show": 2, "diff": 3}.get(words[0], 0)
    return ["memory://x"] * wanted if len(words) == 1 else []


def test_the_two_commands_of_the_readme_are_targets_of_make() -> None:
    text = (ROOT / "README.md").read_text()
    assert "`make demo`" in text and "`make test`" in text


@each_document
def test_links_lead_somewhere(document: Path) -> None:
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        found = (document.parent / name) if name else document
        assert found.exists(), target
        if anchor:
            assert anchor in _anchors(found), target


def _anchors(document: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@each_document
def test_files_modules_and_metrics_that_are_named_exist(document: Path) -> None:
    for span in code_spans(document):
        if re.fullmatch(r"[\w./-]+\.(py|md|yml|json|txt|toml)", span) and span not in (
            "config.json",  # of models
            "namespace.json",
        ):
            places = [ROOT / span, document.parent / span, ROOT / "objectcache" / span]
            assert any(place.exists() for place in places), span
        for name in re.findall(r"\bobjectcache_(\w+)_total\b", span):
            assert name in metrics.COUNTERS and f"vllm:objectcache_{name}" in span, span
        for name in re.findall(r"\bobjectcache\.(\w+)", span):
            module = ROOT / "objectcache" / f"{name}.py"
            assert module.exists() or span in (choosing.DEADLINE, asked.SAVE), span


# Words with an underscore, in backticks, that are somebody else's.
FOREIGN = {
    "additional_config", "attention_config.use_non_causal", "cache_salt", "calculate_kv_scales",
    "checksum_kind", "chunk_hash", "gpu_memory_utilization", "header_bytes", "header_checksum", "kv_both",
    "kv_consumer", "kv_connector_extra_config", "kv_load_failure_policy", "kv_producer", "kv_role", "layer_bytes",
    "load_format", "max_model_len", "model_name", "namespace_digest", "object_bytes", "reset_connector",
    "reset_prefix_cache", "block_tokens", "model.tensor_parallel_size", "kv_sharing_fast_prefill", "kv_transfer_params",
    "num_computed_tokens", "num_external_computed_tokens",
}  # fmt: skip


@each_document
def test_options_that_are_named_exist(document: Path) -> None:
    for span in code_spans(document):
        if re.fullmatch(r"[a-z]+(_[a-z]+)+", span):
            assert span in OPTIONS | FOREIGN, f"{span} is no option"
        assigned = re.fullmatch(r"([a-z]+(?:_[a-z]+)+)=\S+", span)
        if assigned:
            assert assigned[1] in OPTIONS | FOREIGN, span


# ---- troubleshooting knows the messages


def sources() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted((ROOT / "objectcache").rglob("*.py")):
        yield path.relative_to(ROOT / "objectcache").as_posix(), ast.parse(path.read_text())


def _text(node: ast.expr) -> str | None:
    """A literal or an f-string, with GAP for what is put in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = (v.value if isinstance(v, ast.Constant) else GAP for v in node.values)
        return "".join(str(part) for part in parts)
    return None


def _pattern(sentence: str) -> "re.Pattern[str]":
    """`sentence` with anything at its gaps, the logger's %s among them."""
    return re.compile(".*".join(re.escape(part) for part in re.split(GAP, sentence)), re.DOTALL)


def refusals_at_start() -> list[str]:
    """Messages that stop an engine, and reasons why the connector stays out of one."""
    not_at_start = ("admin.py", "reference.py", "cli.py", "stores/base.py", "stores/s3_errors.py")
    found = []
    for name, tree in sources():
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Call)
                and getattr(node.func, "id", "") == "Misconfigured"
                and name not in not_at_start
            ):
                found.append(_text(node.args[0]))
            if name == "support.py" and isinstance(node, ast.Return) and node.value is not None:
                found.append(_text(node.value))
    return [
        text for text in found if text is not None and text.endswith((".", GAP)) and " " in text
    ]


def test_every_refusal_is_in_the_troubleshooting() -> None:
    said = refusals_at_start()
    assert len(said) > 35
    spans = code_spans(TROUBLE)
    # Reached by no engine: _ring_for refuses before with numbers.
    missing = [
        text
        for text in said
        if text != "the ring has no room for two objects."
        and not any(_pattern(span).search(text) for span in spans if len(span) > 12)
    ]
    assert missing == []


def test_every_message_in_the_troubleshooting_is_in_the_code() -> None:
    """A quoted sentence: one with a space that ends like one or has a gap."""
    said = [
        re.sub(r"%[sd.\d]*[sdf]", GAP, text)
        for _, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.expr) and (text := _text(node)) is not None
    ]
    quoted = [
        span
        for span in code_spans(TROUBLE)
        if " " in span and (span.endswith(".") or GAP in span) and not span.startswith("rate(")
    ]
    assert len(quoted) > 60
    built = re.compile(r"^… answered \d|hint: |not of scheme|^option 'url' …")
    unknown = [
        span
        for span in quoted
        if not built.search(span)
        and not any(_pattern(span.rstrip(".")).search(text) for text in said)
    ]
    assert unknown == []


def test_the_reasons_to_stay_out_are_those_of_the_code() -> None:
    assert (
        "objectcache stays out of this engine: %s"
        in (ROOT / "objectcache/connector.py").read_text()
    )
    assert callable(support.refusal)


# ---- numbers in the README


def test_the_readme_counts_requests_rightly() -> None:
    """At most n HEADs up to 16 chunks, 2 sqrt(n) + 1 above."""
    text = (ROOT / "README.md").read_text()
    assert "at most `n` HEAD up to 16 chunks, at most 2√`n` + 1 above" in text
    assert index.ALL_AT_ONCE == 16
    for chunks in range(1, 1200):
        first = index.first_round(chunks)
        most = chunks if chunks <= 16 else 2 * math.sqrt(chunks) + 1
        for there in {0, 1, chunks // 2, chunks - 1, chunks, *first, *(p + 1 for p in first)}:
            answers = {at: at < there for at in first}
            assert len(first) + len(index.second_round(chunks, answers)) <= most


def test_the_readme_states_the_defaults_it_mentions() -> None:
    text, default = (ROOT / "README.md").read_text(), config.Options()
    assert default.chunk_tokens == 256 and "chunk of 256 tokens" in text
    assert default.ring_bytes == 4 << 30 and "`ring_bytes` (4 GiB)" in text
    assert default.lookup_timeout_ms == 1000 and "1 s for a lookup" in text
    assert default.stage_timeout_ms == 10_000 and "10 s for loading" in text
    assert default.known_ttl_s == 300 and "seen in the last 300 s" in text


def test_the_documents_state_how_much_gpu_memory_copies_take_and_how_long_one_alone_stalls() -> (
    None
):
    text = (ROOT / "README.md").read_text()
    each = (device.LOADS_STAGING_BYTES, device.APART_STAGING_BYTES, device.STAGING_BYTES)
    assert each == (256 << 20, 128 << 20, 64 << 20)
    assert device.APART_STAGING_SHARE == device.LOADS_STAGING_SHARE / 2
    assert "loads 256 MiB" in text and "half as much of each" in text
    assert "and 64 MiB for saves" in text
    most = sum(each)
    assert f"Up to {most >> 20} MiB on a GPU of 80 GB" in text
    assert 80e9 * device.LOADS_STAGING_SHARE >= device.LOADS_STAGING_BYTES
    stall = f"stall up to {moment.EARLY_STALL_S * 1e3:.0f} ms"
    for name in ("HOW_IT_WORKS.md", "OPTIONS.md"):
        assert stall in (ROOT / "docs" / name).read_text()


def test_the_readme_says_what_is_verified_and_moved_when() -> None:
    text, default = (ROOT / "README.md").read_text(), config.Options()
    assert default.mover == "auto" and default.admission == moment.STAGED
    assert "processes of their own move the bytes by default" in text
    assert "is not there yet" not in text and "the way from S3 does not yet" not in text
    assert "only the first layer of all chunks, or just their headers" in text
    for name in ("timely_prompts", "failed_prompts"):
        assert "just in time or at once" in metrics.COUNTERS[name]


def test_the_run_of_the_demo_in_the_readme_is_one_that_succeeded() -> None:
    table, line = next(
        text.strip().rsplit("\n", 1)
        for text in blocks(ROOT / "README.md", "")
        if "tokens_equal" in text
    )
    result = json.loads(line)
    assert result["tokens_equal"] and 0 < result["hit_tokens"] < result["prompt_tokens"]
    shown = f"{result['warm_ttft_s']:.2f} s"
    assert shown in table and f"{result['hit_tokens'] / result['prompt_tokens']:.0%}" in table
