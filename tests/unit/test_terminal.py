"""Text that was made by others cannot drive the terminal."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.terminal import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 漢字 🙂\n\ttab", "plain é 漢字 🙂\n\ttab"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x9b2Jgone", "gone"),
        ("\x1b]0;title\x07text", "text"),
        ("\x1b]52;c;aGVsbG8=\x1b\\text", "text"),
        ("\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1bPq#0\x1b\\after", "after"),
        ("\x1b(0lqk", "lqk"),
        ("\x1bcreset", "reset"),
        ("a\rb\bc\x00d\x7fe\x85f", "abcdef"),
        ("invoice\u202efdp.exe", "invoicefdp.exe"),
        ("\u2066isolated\u2069", "isolated"),
        ("\x1b]0;never ended\nnext line", "]0;never ended\nnext line"),
        ("\x1b", ""),
        ("name\udcff", "name\ufffd"),
        ("rm\u200b -rf\u2060 \ufeff\u00ad\U000e0041/", "rm -rf /"),
        ("left\u200e right\u200f\u061c", "left right"),
        ("👩\u200d💻 نمی\u200cخواهم", "👩\u200d💻 نمی\u200cخواهم"),  # noqa: RUF001
    ],
)
def test_what_is_left(text: str, shown: str) -> None:
    assert printable(text) == shown


_PIECES = st.sampled_from(
    ["\x1b", "[", "]", "P", "31m", "\x07", "\\", "\x9b", "\x9d", "\x9c", "\u202e", "\r", "a", "\n"]
)


@given(st.lists(_PIECES).map("".join) | st.text())
def test_nothing_unsafe_survives(text: str) -> None:
    shown = printable(text)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff]", shown)
    assert printable(shown) == shown
    shown.encode("utf-8")


@pytest.mark.parametrize("piece", ["\x1b]", "\x1b[", "\x1b[1;", "\x9d", "\x1bP", "\x1b(", "\x1b "])
def test_hostile_repetition_ends(piece: str) -> None:
    """A pattern that backtracks would need hours for this."""
    assert "\x1b" not in printable(piece * 200_000)
