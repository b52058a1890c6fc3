"""What a user may set: the only reader of `kv_connector_extra_config`. Not what an engine is: see identity.py.

Every option is a field of `Options`; its default, type, range and meaning stand there once, and
docs/OPTIONS.md is generated from them.
"""

import dataclasses
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from objectcache.errors import Misconfigured

_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_SECRET = re.compile(r"secret|token|passw|credential|access_?key|private", re.IGNORECASE)
_CHAIN_HINT = (
    "leave credentials to the standard AWS chain: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
    "a profile, or the role of the machine."
)


def _option(default: Any, doc: str, **rule: Any) -> Any:
    return field(default=default, metadata={"doc": doc, **rule})


@dataclass(frozen=True)
class Options:
    """`kv_connector_extra_config`, checked. Build it with `parse`."""

    url: str = _option(
        "", "Where the chunks live: `s3://bucket/prefix`, `file:///path` or `memory://name`."
    )
    chunk_tokens: int = _option(
        256, "Tokens in one object; a multiple of the engine's block size.", low=1, high=1 << 20
    )
    model_id: str = _option(
        "",
        "Name of the weights, in place of a digest of the files. Engines that share chunks must "
        "have equal weights if they have equal names: change it with every change of the weights.",
    )
    save: bool = _option(
        True,
        "Write new chunks back. `false` reads only. A request may say so for itself, by "
        "`objectcache.save` in its `kv_transfer_params`.",
    )
    ring_bytes: int = _option(
        4 << 30,
        "Host memory for chunks on their way, in bytes or as `4GiB`; pinned when there is a GPU. "
        "A prefix that is larger streams through it if vLLM's `kv_load_failure_policy` is "
        "`recompute`, else it is loaded in part.",
        low=1 << 20,
        high=1 << 44,
        bytes=True,
    )
    max_connections: int = _option(
        256,
        "Most requests in flight to the store, for each half of the connector in each process of the engine. How many of them with bodies "
        "the store rewards is measured, beginning with 32, or with all if a process may have no more than 64; on 503 there are fewer.",
        low=1,
        high=4096,
    )
    transport: str = _option(
        "auto",
        "How objects travel: `direct` (received straight into the ring; plain http:// only), "
        "`obstore` (a client in Rust, for https:// and all but GET and HEAD), `aiobotocore` (the "
        "library, slow and most tried), or `auto`: direct where it can be, else obstore. What a way "
        "cannot do is done by the next.",
        choices=("auto", "direct", "obstore", "aiobotocore"),
    )
    mover: str = _option(
        "auto",
        "Where bytes are moved: in a `process` beside each engine worker, so that streams do not take "
        "Python's interpreter from vLLM's steps, in a `thread` of the worker, or `auto`: a process "
        "where there is a GPU.",
        choices=("auto", "process", "thread"),
    )
    processes: int = _option(
        0,
        "How many processes move bytes, each a part of every prefix, where `mover` is not a thread. "
        "`0`: one for each four cores of the worker's part of the host, one at least, four at most.",
        low=0,
        high=16,
    )
    admission: str = _option(
        "staged",
        "When a prompt is admitted whose prefix is on its way: `staged`, when all of it lies verified in "
        "host memory, `just-in-time`, when the layers still missing will be there before they are "
        "needed (who is alone on the GPU, or would else wait for a long step, may stall up to 50 ms), or `at-once`, when its first layer is there; the steps then wait for the others, and all "
        "running requests with them. The last two need vLLM's `kv_load_failure_policy` to be `fail`: a "
        "request of which a layer then does not come ends with an error. With `at-once` let "
        "`late_timeout_ms` exceed the longest load. A request may ask for one that is as patient as this or "
        "more, `staged` being the most patient, by `objectcache.admission` in its `kv_transfer_params`.",
        choices=("staged", "just-in-time", "at-once"),
    )
    load: str = _option(
        "always",
        "How much of a prefix that the store has is loaded: `always` all of it, or `sooner` as much as "
        "brings the first token soonest; the rest is computed. What is sooner follows from what the "
        "store was measured to give and this engine's passes to take; until both are known, and with a "
        "store that measures nothing (a directory), all is loaded.",
        choices=("always", "sooner"),
    )
    late_timeout_ms: int = _option(
        2000,
        "How long a step may wait for a layer of a prompt that was admitted before all was there; then that "
        "request ends with an error. With `admission` `at-once` it must exceed the longest load.",
        low=1,
        high=60_000,
    )
    lookup_timeout_ms: int = _option(
        1000, "A prompt is computed if the store has not said in this time what it has.", low=1
    )
    stage_timeout_ms: int = _option(
        10_000,
        "A prompt waits at most this long for its chunks, then uses what came; for a prefix that "
        "streams, as often as it fills the ring.",
        low=1,
    )
    connect_timeout_ms: int = _option(2000, "Longest time to open a connection.", low=1)
    read_timeout_ms: int = _option(
        5000, "Longest silence on a connection before a request is given up.", low=1
    )
    attempts: int = _option(3, "Tries for each request, the first included.", low=1, high=10)
    hedge_percent: int = _option(
        5,
        "How many of a hundred GETs may be sent a second time because the store's answer is late, "
        "later than as many of a hundred usually are; the answer that comes first counts. `0`: none.",
        low=0,
        high=20,
    )
    known_ttl_s: int = _option(
        300, "How long a chunk that was seen is taken to exist without asking again.", low=0
    )
    known_keys_max: int = _option(
        1_000_000, "Most chunks remembered as existing; about 150 bytes each.", low=0
    )
    shutdown_drain_ms: int = _option(
        2000,
        "How long uploads may go on when the engine stops; vLLM allows 5 s for everything.",
        low=0,
        high=4000,
    )
    startup_check: str = _option(
        "warn",
        "What to do at start-up if the store cannot be used: `warn` and run without hits until it "
        "can, or `require` and refuse to start.",
        choices=("warn", "require"),
    )
    trace_path: str = _option(
        "",
        "A file to which a line of JSON is added for each prompt that ended: when it arrived, was looked up, "
        "staged, admitted, computed, and why. Of no prompt it holds a token. At most 64 MiB; one for "
        "each engine. At level DEBUG the log tells the same.",
    )
    endpoint_url: str = _option(
        "", "S3 server other than AWS (MinIO, Ceph, SeaweedFS, R2), such as `http://minio:9000`."
    )
    region: str = _option("", "S3 region; by default what the AWS chain says.")
    profile: str = _option("", "Name of an AWS profile; by default what the AWS chain says.")
    addressing_style: str = _option(
        "auto",
        "`path` (endpoint/bucket/key), `virtual` (bucket.endpoint/key), or `auto`: path if "
        "`endpoint_url` is set, else virtual.",
        choices=("auto", "path", "virtual"),
    )
    ca_bundle: str = _option("", "PEM file with the CA of the server, for a private CA.")
    anonymous: bool = _option(False, "Send unsigned requests, for a public bucket.")


def parse(extra: Mapping[str, Any]) -> Options:
    """`kv_connector_extra_config` to `Options`. Raises Misconfigured; never repeats a value that may be secret."""
    fields = {f.name: f for f in dataclasses.fields(Options)}
    values: dict[str, Any] = {}
    for name, value in extra.items():
        if name not in fields:
            _refuse_unknown(name, list(fields))
        values[name] = _checked(name, value, fields[name])
    options = Options(**values)
    _check_url(options)
    return options


def _refuse_unknown(name: str, known: list[str]) -> None:
    lower = name.lower()
    near = difflib.get_close_matches(lower, known, n=1, cutoff=0.5)
    typo = difflib.get_close_matches(lower, known, n=1, cutoff=0.8)  # chunk_token is no token
    if _SECRET.search(name) and not typo:
        raise Misconfigured(
            f"kv_connector_extra_config must not hold {name!r}: vLLM prints that config.",
            _CHAIN_HINT,
        )
    hint = f"did you mean {near[0]!r}?" if near else f"the options are {', '.join(known)}."
    raise Misconfigured(f"objectcache has no option {name!r}.", hint)


def _checked(name: str, value: Any, spec: "dataclasses.Field[Any]") -> Any:
    rule = spec.metadata
    kind = type(spec.default)
    if rule.get("bytes") and isinstance(value, str):
        value = _bytes(name, value)
    if type(value) is not kind:
        raise Misconfigured(
            f"option {name!r} must be {_kind_name(kind, rule)}, not {type(value).__name__}.",
            f"its default is {spec.default!r}.",
        )
    if kind is int and not rule.get("low", 0) <= value <= rule.get("high", 1 << 40):
        raise Misconfigured(
            f"option {name!r} is {value}, outside {rule.get('low', 0)} to {rule.get('high', 1 << 40)}.",
            f"its default is {spec.default}.",
        )
    if "choices" in rule and value not in rule["choices"]:
        raise Misconfigured(f"option {name!r} must be one of {', '.join(rule['choices'])}.")
    return value


def _kind_name(kind: type, rule: Mapping[str, Any]) -> str:
    if rule.get("bytes"):
        return "a number of bytes such as 4294967296 or '4GiB'"
    return {int: "a whole number", bool: "true or false", str: "a string"}[kind]


def _bytes(name: str, text: str) -> int:
    match = re.fullmatch(r"\s*(\d+)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2] not in _UNITS:
        raise Misconfigured(f"option {name!r} is not a number of bytes.", "write it as '4GiB'.")
    return int(match[1]) * _UNITS[match[2]]


def _check_url(options: Options) -> None:
    where = "set kv_connector_extra_config to {'url': 's3://bucket/prefix'}."
    if not options.url:
        raise Misconfigured("objectcache needs the option 'url'.", where)
    match = re.fullmatch(r"(s3|file|memory)://([^?#]*)([?#].*)?", options.url, re.DOTALL)
    if match is None:
        scheme = options.url.split("://")[0] if "://" in options.url else ""
        named = f"of scheme {scheme!r} " if re.fullmatch(r"[a-z0-9+.-]{1,16}", scheme) else ""
        raise Misconfigured(
            f"option 'url' {named}is not a place that objectcache knows.",
            "use s3://bucket/prefix, file:///path or memory://name.",
        )
    if match[3]:
        raise Misconfigured(f"option 'url' must not hold {match[3][0]!r}.", where)
    for name in ("url", "endpoint_url"):
        if "@" in getattr(options, name):
            raise Misconfigured(f"option {name!r} must not hold credentials.", _CHAIN_HINT)
    if match[1] == "s3" and not re.match(r"[a-z0-9][a-z0-9._-]{2,62}(/|$)", match[2]):
        raise Misconfigured("option 'url' names no valid bucket.", where)
    if match[1] == "file" and not match[2].startswith("/"):
        raise Misconfigured("a file URL has three slashes.", "write file:///var/cache/kv.")
    if match[1] == "memory" and options.mover == "process":
        raise Misconfigured(
            "a memory:// store cannot be shared with a process.", "leave 'mover' at 'auto'."
        )
    if options.endpoint_url and not re.match(r"https?://[^/]+", options.endpoint_url):
        raise Misconfigured("option 'endpoint_url' is no HTTP address.", "write http://host:9000.")
