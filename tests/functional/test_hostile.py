"""Nothing that others wrote drives the terminal: hostile names and texts on every screen and in the plain mode.

What is looked at is every byte that Quire writes to a real terminal.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from driving import Terminal
from quire.conversation import open_history
from tiny_gguf import write_tiny_gguf

SIGNS = {
    "clipboard": "\x1b]52;c;aGFja2Vk\x07",
    "title": "\x1b]0;hacked\x1b\\",
    "colour": "\x1b[38;2;1;2;3m",
    "mode": "\x1b[?7777h",
    "device": "\x1bP7777q\x1b\\",
    "C1": "\x9b7777m",
    "C1 clipboard": "\x9d52;c;eA\x9c",
    "bell": "\x07",
    "overstrike": "\x08\x08",
    "bidi": "\u202e\u2067",
    "marks": "\u200f\u061c",
    "zero width": "\u200b\u2060\ufeff",
    "tags": "\U000e0041",
}
HOSTILE = "evil" + "evil".join(SIGNS.values()) + "evil"
MARKS = ["]52;", "]0;hacked", "38;2;1;2;3m", "[?7777h", "7777q", "\x07", "\x08\x08", *"\x9b\x9c\x9d\x90"]
MARKS += [*"\u202e\u2067\u200f\u061c\u200b\u2060\ufeff\U000e0041"]
POINTER = re.compile("\x1b\\]22;[a-z]*\x07")  # of the mouse, which Textual sets
SAYING = f"""
import sys
from quire import session
from quire_engine.types import Text
ask = session.Session.ask
def answer(*given, **named):
    for event in ask(*given, **named):
        yield Text({HOSTILE!r}) if isinstance(event, Text) else event
session.Session.ask = answer
from quire.cli import main
main(sys.argv[1:])
"""
ESC, F1, F2, F3 = "\x1b", "\x1bOP", "\x1bOQ", "\x1bOR"
CTRL_L, CTRL_N, CTRL_O, CTRL_P, CTRL_Q = "\x0c", "\x0e", "\x0f", "\x10", "\x11"


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, a document, a skipped file, a model and a conversation with hostile names and texts."""
    folder = tmp_path / f"notes{HOSTILE}"
    folder.mkdir()
    (folder / f"tea{HOSTILE}.md").write_text(f"# Tea {HOSTILE}\n\nWater {HOSTILE} is poured.\n")
    (folder / f"broken{HOSTILE}.md").write_bytes(b"\x00\xff" * 100)
    model = write_tiny_gguf(tmp_path / f"tiny{HOSTILE}.gguf", metadata={"general.name": f"tiny {HOSTILE}"})
    monkeypatch.setenv("QUIRE_MODEL", str(model))
    monkeypatch.setenv("QUIRE_MAX_TOKENS", "4")
    with open_history() as history:
        history.add_turn(history.begin(), 0, f"What is {HOSTILE}?", f"model {HOSTILE}")
    return folder


@pytest.fixture
def terminal(notes: Path, request: pytest.FixtureRequest) -> Iterator[Terminal]:
    words = [sys.executable, "-c", SAYING, "chat", *request.param, str(notes)]
    with closing(Terminal(words, (100, 40))) as opened:
        yield opened


def unharmed(written: str) -> None:
    """None of the marks is in it; Textual's own sequences are other ones."""
    assert [mark for mark in MARKS if mark in written] == []


@pytest.mark.parametrize("terminal", [()], indirect=True)
def test_no_screen_hands_them_on(terminal: Terminal) -> None:
    def see(keys: str, *words: str) -> None:
        terminal.settle()
        before = len(terminal.seen)
        terminal.type(keys)
        terminal.until(lambda: all(word in terminal.seen[before:] for word in words))
        assert terminal.process.poll() is None, terminal.seen[-3000:]

    see("", "Your folders:", "evil", "cached")
    see("@te", "teaevil")
    see("\t\x1b[200~paste\u202e\u200b\x9b7777mevil\x1b[201~", "pasteevil")
    see(" water\r", "1 source: ")
    see("\x1b[Z", "1 source: ")
    see("\r", "recomputed")
    see("\t", "Open ")
    see("\x1b[B", "")
    see("\r", "Esc closes")
    see(ESC, "Ask your documents")
    see(CTRL_L, "teaevil", "broken")
    see(ESC, "Ask your documents")
    see(CTRL_O, "Search")
    see("what", "What is evil")
    see(ESC, "Ask your documents")
    see(F2, "Kept in")
    see(ESC, "Ask your documents")
    see(F3, "tinyevil")
    see(ESC, "Ask your documents")
    see(F1, "Enter shows the")
    see(F1, "")
    see(CTRL_N, "Your folders:")
    see("\x1b[A", "pasteevil")
    see("\x1b[A" * 8, "What is evil")  # up through the lines of the one before
    terminal.type(CTRL_Q)
    assert terminal.ends() == 0
    assert terminal.sane
    unharmed(POINTER.sub("", terminal.seen))


@pytest.mark.parametrize("terminal", [("--plain",)], indirect=True)
def test_the_plain_mode_does_not_hand_them_on(terminal: Terminal) -> None:
    terminal.until(lambda: terminal.seen.endswith("> "))
    assert "tiny evil" in terminal.seen
    assert "evil" in terminal.seen
    for line, answer in (
        ("water", "The first word came"),
        ("/sources", "poured"),
        ("/add nowhere", "There is no file"),
        ("/new", "A new conversation."),
    ):
        before = len(terminal.seen)
        terminal.type(line + "\r")
        terminal.until(lambda: answer in terminal.seen[before:] and terminal.seen.endswith("> "))  # noqa: B023
    terminal.type("\x1b[A\x1b[A\x1b[A\x1b[A\x1b[A")  # the question of an earlier conversation
    terminal.until(lambda: "What is evil" in terminal.seen)
    terminal.type("\r/quit\r")
    assert terminal.ends() == 0
    unharmed(re.sub("[\x07\x08]", "", terminal.seen))  # readline's own: it moves the cursor and rings at the end


def test_the_plain_mode_through_a_pipe_does_not_either(notes: Path) -> None:
    words = [sys.executable, "-c", SAYING, "chat", "--plain", str(notes)]
    done = subprocess.run(words, input=f"water\n/sources\n/add {HOSTILE}\n".encode(), capture_output=True, timeout=60)
    written = (done.stdout + done.stderr).decode()
    assert "There is no file or folder" in written
    assert "poured" in written
    unharmed(written)


def test_the_marks_would_be_found() -> None:
    for mark in MARKS:
        with pytest.raises(AssertionError):
            unharmed(f"text {mark} text")
    assert all(any(mark in sign for mark in MARKS) for sign in SIGNS.values())
