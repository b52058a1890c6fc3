"""Heads of answers, whole and in pieces, and what is none."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from objectcache.stores.http1 import HEAD_BYTES_MAX, Head, HeadReader, NotHttp

PLAIN = (
    b'HTTP/1.1 206 Partial Content\r\nServer: x\r\nContent-Length: 4100\r\nETag: "abc"\r\n'
    b"Content-Range: bytes 0-4099/9000\r\nx-amz-request-id: 1\r\n\r\n"
)
HEADS = [
    PLAIN,
    b"HTTP/1.1 200 OK\r\ncontent-length:0\r\n\r\n",
    b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\n",
    b"HTTP/1.1 200\r\nContent-Length: 5\r\nContent-Length: 5\r\nConnection: Keep-Alive, CLOSE\r\n\r\n",
    b"HTTP/1.1 503 Slow Down\r\nRetry-After: 2\r\nTransfer-Encoding: chunked\r\nContent-Length: 9\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + PLAIN,
    b"HTTP/1.1 404 Not Found\r\n\r\n",
]
JUNK = [
    b"SSH-2.0-OpenSSH_9.2\r\n",
    b"HTTP/2 200 OK\r\n\r\n",
    b"HTTP/1.2 200 OK\r\n\r\n",
    b"HTTP/1.1 99 Odd\r\n\r\n",
    b"HTTP/1.1 2000 OK\r\n\r\n",
    b"HTTP/1.1  200 OK\r\n\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nA: b\r\n folded\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length : 5\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nA: b\nContent-Length: 5\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nA: b\rContent-Length: 5\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nA: \0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\ncontent-length: 6\r\n\r\n",
    *(b"HTTP/1.1 200 OK\r\nContent-Length: %s\r\n\r\n" % n for n in (b"", b"-1", b"+5", b"5, 5")),
    b"HTTP/1.1 200 OK\r\nContent-Length: 0x10\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 9999999999999999\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * HEAD_BYTES_MAX,
    b"HTTP/1.1 100 Continue\r\n\r\n" * HEAD_BYTES_MAX,
    b"HTTP/1.1 200 " + b"x" * HEAD_BYTES_MAX,
]


def fed(pieces: list[bytes]) -> Head | None:
    """The head, with all that came after it in `rest`."""
    reader = HeadReader()
    for i, piece in enumerate(pieces):
        head = reader.feed(memoryview(piece))
        if head is not None:
            head.rest += b"".join(pieces[i + 1 :])
            return head
    return None


def cut_up(data: bytes, cuts: list[int]) -> list[bytes]:
    ends = sorted({min(cut, len(data)) for cut in cuts} | {len(data)})
    return [data[a:b] for a, b in zip([0, *ends], ends, strict=False)]


def test_what_matters_is_found() -> None:
    assert fed([PLAIN + b"body"]) == Head(
        206, 4100, "bytes 0-4099/9000", '"abc"', "", coded=False, keep=True, rest=b"body"
    )
    told = [fed([head]) for head in HEADS]
    assert [(h.status, h.length, h.keep, h.coded) for h in told if h is not None] == [
        (206, 4100, True, False),
        (200, 0, True, False),
        (200, 5, False, False),
        (200, 5, False, False),
        (503, None, True, True),
        (206, 4100, True, False),
        (404, None, True, False),
    ]
    assert told[4] is not None and told[4].retry_after == "2"


@pytest.mark.parametrize("junk", JUNK, ids=lambda junk: repr(junk[:60]))
def test_what_is_no_answer_is_refused(junk: bytes) -> None:
    with pytest.raises(NotHttp) as caught:
        fed([junk])
    assert "OpenSSH" not in str(caught.value)  # nothing of the server's is repeated
    with pytest.raises(NotHttp):
        fed([junk[i : i + 1000] for i in range(0, len(junk), 1000)])


def test_a_wrong_beginning_is_seen_at_once() -> None:
    """Not only when a line or a timeout ends it."""
    with pytest.raises(NotHttp):
        HeadReader().feed(b"\x15\x03")


@given(st.sampled_from(HEADS), st.binary(max_size=50), st.lists(st.integers(0, 500)))
def test_pieces_make_no_difference(head: bytes, body: bytes, cuts: list[int]) -> None:
    whole = fed([head + body])
    assert whole is not None and whole.rest == body
    assert fed(cut_up(head + body, cuts)) == whole
    assert fed([bytes([byte]) for byte in head + body]) == whole


@given(st.sampled_from(HEADS), st.integers(0, 300))
def test_a_head_that_is_not_complete_is_none(head: bytes, cut: int) -> None:
    assert fed([head[: min(cut, len(head) - 1)]]) is None


@given(
    st.binary(max_size=200)
    | st.builds(
        lambda head, at, new: head[:at] + new + head[at + len(new) :],
        st.sampled_from(HEADS),
        st.integers(0, 200),
        st.binary(min_size=1, max_size=4),
    ),
    st.lists(st.integers(0, 200)),
)
@example(b"HTTP/1.1 200 OK\r\nContent-Length: \xb2\r\n\r\n", [])
def test_garbage_gives_one_kind_of_error(data: bytes, cuts: list[int]) -> None:
    outcomes = []
    for pieces in ([data], cut_up(data, cuts), [bytes([byte]) for byte in data]):
        try:
            outcomes.append(fed(pieces))
        except NotHttp:
            outcomes.append(None)
    found = [outcome for outcome in outcomes if outcome is not None]
    assert all(outcome == found[0] for outcome in found)
    assert found == [] or len(found) == 3
