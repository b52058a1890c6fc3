"""What a request asks for itself, in its kv_transfer_params: a deadline, an admission, not to be saved. Not what all requests of an engine get: see config.py.

Pure. What is no such wish is as if it were not there, and told.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from objectcache.choosing import deadline_s_of
from objectcache.errors import Misconfigured
from objectcache.moment import MODES

ADMISSION, SAVE = "objectcache.admission", "objectcache.save"
GUESSED = 32  # characters of a name, at most, that may be a misspelt one


@dataclass(frozen=True)
class Asked:
    """`deadline_s` are seconds for its first token, `mode` when it is admitted, `saves` whether its KV may be kept."""

    deadline_s: float
    mode: str
    saves: bool


def asked(
    params: Mapping[str, Any] | None, usual: str, ignore: Callable[[str, Misconfigured], None]
) -> Asked:
    """`usual` is the engine's option `admission`; `ignore` hears of each wish that is none, and why."""
    found: dict[str, Any] = {"deadline_s": deadline_s_of(None), "mode": usual, "saves": True}
    readers: tuple[tuple[str, str, Callable[[], Any]], ...] = (
        ("deadline_s", "a deadline", lambda: deadline_s_of(params)),
        ("mode", "an admission", lambda: mode_of(params, usual)),
        ("saves", "whether to save", lambda: saves_of(params)),
    )
    for name, what, read in readers:
        try:
            found[name] = read()
        except Misconfigured as error:
            ignore(what, error)
    return Asked(**found)


def mode_of(params: Mapping[str, Any] | None, usual: str) -> str:
    """When a request is admitted on an engine whose option `admission` is `usual`: no sooner than that
    allows, since a step that waits for one request's layers holds up all. Raises Misconfigured."""
    value = (params or {}).get(ADMISSION)
    if value is None:
        return usual
    if value not in MODES:
        text = value.lower() if isinstance(value, str) and len(value) <= GUESSED else ""
        near = difflib.get_close_matches(text, MODES, n=1, cutoff=0.5)
        raise Misconfigured(
            f"{ADMISSION} is none of {', '.join(MODES)}.",
            f"did you mean {near[0]!r}?" if near else "send one of them as a JSON string.",
        )
    if MODES.index(value) > MODES.index(usual):  # from patient to impatient
        raise Misconfigured(
            f"{ADMISSION} is {value}, and this engine admits no request sooner than {usual}.",
            f"set the engine's option 'admission' to {value} and vLLM's kv_load_failure_policy to fail.",
        )
    return str(value)


def saves_of(params: Mapping[str, Any] | None) -> bool:
    """Whether a request's KV may be written to the store. Raises Misconfigured."""
    value = (params or {}).get(SAVE)
    if value is not None and not isinstance(value, bool):
        raise Misconfigured(f"{SAVE} is neither true nor false.", "send it as a JSON boolean.")
    return value is not False
