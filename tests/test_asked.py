"""What a request may ask for itself, and what is no such wish. Deadlines: test_choosing.py; early admission and its wrong bytes: test_timely.py."""

import math
from collections.abc import Callable
from typing import Any

import pytest
from scheduling_lab import (  # noqa: F401 (pytest looks for the fixtures here)
    Engines,
    engine_fixture,
    model_fixture,
    objects,
)
from toy_engine import prompt

from objectcache.asked import ADMISSION, SAVE, Asked, asked, mode_of, saves_of
from objectcache.choosing import DEADLINE
from objectcache.errors import Misconfigured
from objectcache.moment import AT_ONCE, JUST_IN_TIME, MODES, STAGED
from objectcache.timely import Timely


def nobody(what: str, error: Misconfigured) -> None:
    raise AssertionError(what)


def test_nothing_is_asked_by_most() -> None:
    for params in (None, {}, {"other": 1}, {ADMISSION: None, SAVE: None}):
        for usual in MODES:
            assert asked(params, usual, nobody) == Asked(math.inf, usual, True)


def test_all_wishes_come_together() -> None:
    params = {DEADLINE: 250, ADMISSION: STAGED, SAVE: False}
    assert asked(params, JUST_IN_TIME, nobody) == Asked(0.25, STAGED, False)


ALLOWED = {
    STAGED: (STAGED,),
    JUST_IN_TIME: (STAGED, JUST_IN_TIME),
    AT_ONCE: (STAGED, JUST_IN_TIME, AT_ONCE),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("usual", MODES)
def test_a_request_may_be_more_patient_than_the_engine_and_never_less(
    mode: str, usual: str
) -> None:
    if mode in ALLOWED[usual]:
        assert mode_of({ADMISSION: mode}, usual) == mode
        return
    with pytest.raises(Misconfigured, match=f"admits no request sooner than {usual}") as refused:
        mode_of({ADMISSION: mode}, usual)
    assert f"'admission' to {mode}" in refused.value.hint
    assert "kv_load_failure_policy to fail" in refused.value.hint


def test_what_is_much_longer_than_a_name_is_compared_with_none() -> None:
    with pytest.raises(Misconfigured) as refused:
        mode_of({ADMISSION: "just-in-time" * 3}, AT_ONCE)
    assert "did you mean" not in refused.value.hint
    with pytest.raises(Misconfigured, match="none of staged") as refused:
        mode_of({ADMISSION: "just in time, if you please"}, AT_ONCE)
    assert "'just-in-time'" in refused.value.hint


def test_a_wish_that_is_none_is_ignored_told_and_spoils_no_other() -> None:
    told: list[tuple[str, str]] = []
    params = {DEADLINE: "soon", ADMISSION: "Just-in-tme", SAVE: "no"}
    found = asked(params, AT_ONCE, lambda what, error: told.append((what, str(error))))
    assert found == Asked(math.inf, AT_ONCE, True)
    assert [what for what, _ in told] == ["a deadline", "an admission", "whether to save"]
    assert "'just-in-time'" in told[1][1]
    assert not any(word in text for _, text in told for word in ("soon", "tme", "'no'"))


@pytest.mark.parametrize("value", ["at once, please", 1, True, [], {}])
def test_only_names_are_admissions(value: Any) -> None:
    with pytest.raises(Misconfigured, match="none of staged"):
        mode_of({ADMISSION: value}, JUST_IN_TIME)


@pytest.mark.parametrize("value", ["false", 0, [], {}])
def test_only_booleans_say_whether_to_save(value: Any) -> None:
    with pytest.raises(Misconfigured, match="neither true nor false"):
        saves_of({SAVE: value})
    assert saves_of({SAVE: True}) and not saves_of({SAVE: False})


def test_what_is_not_to_be_saved_is_not_and_what_others_ask_is(
    engine: Engines, tmp_path: Any
) -> None:
    one = engine()
    one.add(prompt(400), transfer={SAVE: False})
    one.run()
    one.settle()
    assert objects(tmp_path) == [] and one.stats.get("put_requests", 0) <= 1  # its own document
    one.generate(prompt(400))
    one.settle()
    assert len(objects(tmp_path)) == 6


def test_at_once_is_as_soon_as_the_first_layer_of_all_is_there() -> None:
    timely = Timely([1000] * 8, 100)
    timely.began(1, 4, 0.0)
    timely.seen(1, 4, 0, 20, 0.5)
    assert timely.when(1, 2000, 1000, 0.5, AT_ONCE) is None  # one chunk lacks its first
    timely.seen(1, 4, 1, 20, 0.6)
    found = timely.when(1, 2000, 1000, 0.6, AT_ONCE)
    assert found is not None and found.due(0.6) and found.mode == AT_ONCE
    later: Callable[..., Any] = timely.when
    staged = later(1, 2000, 1000, 0.6, STAGED)
    assert not staged.due(0.6)
