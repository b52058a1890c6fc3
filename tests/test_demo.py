"""What `make demo` says for what it saw. The demo itself runs in CI (`.ci/run`), not here."""

from benchmarks.demo import PROMPT_TOKENS, Serving, caveats, complaints, table

COMPUTED = Serving(
    "computes", [5, 6], 3.2, 0, {"vllm:objectcache_written_bytes_total": float(30 << 20)}
)
FOUND = Serving(
    "finds", [5, 6], 0.4, PROMPT_TOKENS // 2, {"vllm:objectcache_get_requests_total": 15.0}
)
WITHOUT = Serving("off", [5, 6], 3.1, 0, {})


def test_the_table_has_a_row_for_each_engine_under_its_heads() -> None:
    lines = table([COMPUTED, FOUND, WITHOUT]).splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert "30.0 MiB" in lines[1] and "equal" in lines[1]
    assert "50%" in lines[2] and "15" in lines[2] and "0.40 s" in lines[2]


def test_other_tokens_than_without_the_connector_are_called_different() -> None:
    wrong = Serving("finds", [5, 7], 0.4, 1, {})
    rows = table([COMPUTED, wrong, WITHOUT]).splitlines()
    assert "DIFFERENT" in rows[2] and "DIFFERENT" not in rows[1] + rows[3]


def test_success_has_no_complaints() -> None:
    assert complaints(True, FOUND) == []


def test_failure_says_where_to_look() -> None:
    different, nothing_found = complaints(False, COMPUTED)
    assert "different tokens" in different
    assert "engine-1.log" in nothing_found and "found nothing" in nothing_found


def test_a_wait_for_the_store_is_not_passed_off_as_computing() -> None:
    late = Serving("first engine", [5, 6], 12.7, 0, {"vllm:objectcache_late_prompts_total": 1.0})
    (note,) = caveats([late, FOUND, WITHOUT])
    assert "first engine" in note and "no measure" in note
    assert caveats([COMPUTED, FOUND, WITHOUT]) == []
