"""How failures are told: once with the hint, then once a minute with how many there were."""

import logging
import pickle

import pytest

from objectcache import errors
from objectcache.errors import (
    Corrupt,
    Denied,
    Misconfigured,
    NotFound,
    ObjectCacheError,
    Unavailable,
)
from objectcache.report import REPEAT_S, Reporter, log

KINDS = [ObjectCacheError, NotFound, Corrupt, Unavailable, Denied, Misconfigured]


class Said(logging.Handler):
    """Collects what was logged; the clock stands until a test moves it."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.now = 5.0  # just after boot, less than REPEAT_S
        logger = logging.Logger("test")
        logger.addHandler(self)
        self.reporter = Reporter(logger, lambda: self.now)

    def emit(self, record: logging.LogRecord) -> None:
        assert record.levelno == logging.WARNING
        self.lines.append(record.getMessage())


def test_a_failure_is_one_line_with_its_hint() -> None:
    said = Said()
    said.reporter.warn("look up chunks", Denied("403 from the bucket.", "look at the policy."))
    assert said.lines == [
        "objectcache could not look up chunks: 403 from the bucket. hint: look at the policy. "
        "Prompts are computed instead."
    ]


def test_the_same_failure_is_told_once_a_minute_with_a_count() -> None:
    said = Said()
    for _ in range(11):
        said.reporter.warn("read chunks", Unavailable("503."))
    said.now += REPEAT_S - 0.001
    said.reporter.warn("read chunks", Unavailable("503."))
    assert len(said.lines) == 1
    said.now += 0.001
    said.reporter.warn("read chunks", Unavailable("reset."))
    assert len(said.lines) == 2 and "reset." in said.lines[1]
    assert "(11 more since the last warning)" in said.lines[1]
    said.now += REPEAT_S
    said.reporter.warn("read chunks", Unavailable("503."))
    assert len(said.lines) == 3 and "more since" not in said.lines[2]


def test_other_failures_are_told_for_themselves() -> None:
    said = Said()
    for doing in ("read chunks", "save chunks"):
        for error in (Unavailable("503."), Denied("403.")):
            said.reporter.warn(doing, error)
            said.reporter.warn(doing, error)
    assert len(said.lines) == 4


def test_a_percent_sign_in_a_message_is_no_format() -> None:
    said = Said()
    said.reporter.warn("read chunks", Unavailable("GET a%20b %s."))
    assert "GET a%20b %s." in said.lines[0]


def test_our_logger_is_below_the_one_that_vllm_shows() -> None:
    assert log.name.startswith("vllm.")


@pytest.mark.parametrize("kind", KINDS)
def test_errors_cross_process_boundaries_whole(kind: type[ObjectCacheError]) -> None:
    error = pickle.loads(pickle.dumps(kind("It failed.", "do this.")))
    assert type(error) is kind
    assert (error.message, error.hint, str(error)) == (
        "It failed.",
        "do this.",
        "It failed. hint: do this.",
    )
    assert str(kind("It failed.")) == "It failed."


def test_there_are_six_kinds_of_failure() -> None:
    found = [value for value in vars(errors).values() if isinstance(value, type)]
    assert found == KINDS
