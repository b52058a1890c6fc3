"""What users may set: every option's type and range, names that are nearly right, and secrets that stay secret."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from objectcache.config import Options, parse
from objectcache.errors import Misconfigured

URL = {"url": "s3://bucket/prefix"}
FIELDS = {field.name: field for field in dataclasses.fields(Options)}
INTEGERS = [name for name, field in FIELDS.items() if type(field.default) is int]
BYTES = [name for name in INTEGERS if FIELDS[name].metadata.get("bytes")]
CHOICES = [name for name, field in FIELDS.items() if "choices" in field.metadata]
SECRET = "AKIAhunter2hunter2"


def refused(extra: dict[str, Any]) -> Misconfigured:
    with pytest.raises(Misconfigured) as error:
        parse(extra)
    return error.value


def test_only_the_url_must_be_set() -> None:
    assert parse(URL) == Options(url="s3://bucket/prefix")
    assert "'url'" in refused({}).message and "s3://" in refused({}).hint
    assert "'url'" in refused({"url": ""}).message


def test_options_cannot_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse(URL).url = "memory://x"  # type: ignore[misc]


@pytest.mark.parametrize("name", FIELDS)
def test_every_option_says_what_it_is(name: str) -> None:
    doc = FIELDS[name].metadata["doc"]
    assert doc.endswith(".") and len(doc) > 15


@pytest.mark.parametrize("name", FIELDS)
def test_every_default_is_valid(name: str) -> None:
    """It can be written down without changing anything."""
    default = FIELDS[name].default
    assert parse({**URL, name: default or URL["url"] if name == "url" else default}) == parse(URL)


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("value", [1, True, "text", 1.0, None, [], {}], ids=repr)
def test_a_wrong_type_is_refused_by_name(name: str, value: Any) -> None:
    kind = type(FIELDS[name].default)
    if type(value) is kind:
        return
    error = refused({**URL, name: value})
    assert repr(name) in error.message and error.hint
    if not isinstance(value, str):
        assert type(value).__name__ in error.message


@pytest.mark.parametrize("name", INTEGERS)
def test_the_ends_of_a_range_are_valid_and_what_lies_beyond_is_not(name: str) -> None:
    rule = FIELDS[name].metadata
    low, high = rule["low"], rule.get("high", 1 << 40)
    assert low <= FIELDS[name].default <= high
    for value in (low, high):
        assert getattr(parse({**URL, name: value}), name) == value
    for value in (low - 1, high + 1, -(1 << 70), 1 << 70):
        error = refused({**URL, name: value})
        assert repr(name) in error.message and str(value) in error.message
        assert f"{low} to {high}" in error.message


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_is_one_of_few(name: str) -> None:
    for value in FIELDS[name].metadata["choices"]:
        assert getattr(parse({**URL, name: value}), name) == value
    error = refused({**URL, name: "perhaps"})
    assert all(value in error.message for value in FIELDS[name].metadata["choices"])


@pytest.mark.parametrize("name", BYTES)
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4GiB", 4 << 30),
        ("1TiB", 1 << 40),
        (" 64 MiB ", 64 << 20),
        ("2048KiB", 2 << 20),
        ("1048576", 1 << 20),
        ("1048576B", 1 << 20),
    ],
)
def test_bytes_may_have_a_unit(name: str, text: str, value: int) -> None:
    assert getattr(parse({**URL, name: text}), name) == value


@pytest.mark.parametrize("name", BYTES)
@pytest.mark.parametrize("text", ["4GB", "4gib", "4.5GiB", "-1GiB", "", "GiB", "4 Gi B", "0x10"])
def test_other_texts_are_no_number_of_bytes(name: str, text: str) -> None:
    error = refused({**URL, name: text})
    assert repr(name) in error.message and "4GiB" in error.hint


@pytest.mark.parametrize("name", BYTES)
def test_bytes_with_a_unit_have_the_range_too(name: str) -> None:
    assert repr(name) in refused({**URL, name: "1KiB"}).message
    assert repr(name) in refused({**URL, name: "99999TiB"}).message


# ---- names


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("chunk_token", "chunk_tokens"),
        ("chunks_tokens", "chunk_tokens"),
        ("chunkTokens", "chunk_tokens"),
        ("ring_byte", "ring_bytes"),
        ("URL", "url"),
        ("endpoint", "endpoint_url"),
        ("lookup_timeout", "lookup_timeout_ms"),
        ("known_ttl", "known_ttl_s"),
        ("adressing_style", "addressing_style"),
        ("ca-bundle", "ca_bundle"),
        ("max_connection", "max_connections"),
    ],
)
def test_a_name_that_is_nearly_right(typed: str, meant: str) -> None:
    error = refused({**URL, typed: 1})
    assert repr(typed) in error.message and f"did you mean {meant!r}?" in error.hint


def test_a_name_that_is_like_no_other_gets_the_list() -> None:
    error = refused({**URL, "zzz": 1})
    assert "'zzz'" in error.message and all(name in error.hint for name in FIELDS)


# ---- secrets


@pytest.mark.parametrize(
    "name",
    [
        "aws_secret_access_key",
        "secret_access_key",
        "aws_access_key_id",
        "accesskey",
        "session_token",
        "aws_session_token",
        "token",
        "password",
        "passwd",
        "credentials",
        "private_key",
        "SECRET",
    ],
)
@pytest.mark.parametrize("value", [SECRET, {"key": SECRET}, [SECRET]], ids=["str", "dict", "list"])
def test_credentials_are_refused_and_never_repeated(name: str, value: Any) -> None:
    error = refused({**URL, name: value})
    assert repr(name) in error.message and "vLLM prints" in error.message
    assert "AWS chain" in error.hint
    assert SECRET not in str(error) + repr(error)


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("value", [SECRET, [SECRET], {SECRET: SECRET}], ids=["str", "list", "dict"])
def test_no_refusal_repeats_a_value(name: str, value: Any) -> None:
    """A secret may stand in the wrong place."""
    if type(value) is type(FIELDS[name].default) and name not in ("url", "endpoint_url", *CHOICES):
        return  # a valid text
    error = refused({**URL, name: value})
    assert SECRET not in str(error) + repr(error)


@pytest.mark.parametrize(
    "extra",
    [
        {"url": f"s3://key:{SECRET}@bucket/prefix"},
        {"url": f"s3://bucket/prefix?token={SECRET}"},
        {"url": f"s3://bucket/prefix#{SECRET}"},
        {"url": f"https://{SECRET}@bucket"},
        {"url": f"s3://{SECRET}"},
        {"url": SECRET},
        {"url": f"{SECRET}://bucket"},
        {**URL, "endpoint_url": f"http://key:{SECRET}@host:9000"},
        {**URL, "endpoint_url": f"ftp://{SECRET}"},
    ],
)
def test_a_secret_in_a_url_is_refused_and_not_repeated(extra: dict[str, Any]) -> None:
    error = refused(extra)
    assert SECRET.lower() not in (str(error) + repr(error)).lower() and error.hint


# ---- URLs


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket",
        "s3://bucket/",
        "s3://my.bucket-1/a/b",
        "file:///var/cache/kv",
        "memory://",
        "memory://name",
    ],
)
def test_urls_that_are_known(url: str) -> None:
    assert parse({"url": url}).url == url


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("gs://bucket", "'gs'"),
        ("bucket/prefix", "place"),
        ("s3:/bucket", "place"),
        ("s3://", "bucket"),
        ("s3:///prefix", "bucket"),
        ("s3://Bucket", "bucket"),
        ("s3://b", "bucket"),
        ("s3://under score", "bucket"),
        ("file://relative/path", "three slashes"),
        ("file://", "three slashes"),
        ("s3://bucket/prefix?versioned", "'?'"),
        ("file:///var#1", "'#'"),
    ],
)
def test_urls_that_are_not(url: str, says: str) -> None:
    error = refused({"url": url})
    assert says in error.message and error.hint


@pytest.mark.parametrize("url", ["http://minio:9000", "https://s3.example.org", "http://[::1]:9"])
def test_endpoints_that_are_known(url: str) -> None:
    assert parse({**URL, "endpoint_url": url}).endpoint_url == url


@pytest.mark.parametrize("url", ["minio:9000", "http://", "ftp://host", "//host"])
def test_endpoints_that_are_not(url: str) -> None:
    assert "'endpoint_url'" in refused({**URL, "endpoint_url": url}).message


@given(
    st.dictionaries(
        st.sampled_from(sorted(FIELDS)) | st.text(max_size=12),
        st.none() | st.booleans() | st.integers() | st.text(max_size=20) | st.floats(),
        max_size=5,
    )
)
def test_whatever_is_typed_the_answer_is_options_or_a_refusal(extra: dict[str, Any]) -> None:
    try:
        options = parse(extra)
    except Misconfigured as error:
        assert error.message
        return
    for name, field in FIELDS.items():
        assert type(getattr(options, name)) is type(field.default)
