"""The conversation line by line: through pipes, and on a terminal of its own."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from driving import PATIENCE_S, Terminal
from quire import config
from quire.conversation import open_history
from quire.session import Session
from stitching import tried_out
from tiny_gguf import write_tiny_gguf

TEXT = "Water for tea is poured at 80 degrees.\n\nThe boiler needs service in May.\n"
QUIRE = [sys.executable, "-m", "quire", "chat", "--plain"]


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one note, and a tiny model, whose answers mean nothing but come at once."""
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "tea.md").write_text(TEXT)
    model = write_tiny_gguf(tmp_path / "tiny.gguf", "llama")
    monkeypatch.setenv("QUIRE_MODEL", str(model))
    monkeypatch.setenv("QUIRE_MAX_TOKENS", "8")
    monkeypatch.chdir(tmp_path)
    return folder


def piped(text: str | bytes, *words: str) -> tuple[int, str, str]:
    data = text if isinstance(text, bytes) else text.encode()
    done = subprocess.run([*QUIRE, *words], input=data, capture_output=True, timeout=PATIENCE_S)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def questions() -> list[list[str]]:
    """What was asked, by conversation, the last one first."""
    with open_history() as history:
        return [[turn.question for turn in history.turns(c.id)] for c in history.conversations(9)]


# Through pipes


def test_questions_come_from_a_pipe_and_form_one_conversation(notes: Path) -> None:
    code, out, err = piped("When is tea poured?\nAnd what needs service?\n", "notes")
    assert code == 0, err
    assert out.count("Source 1: notes/tea.md, lines 1 to 3.") == 2
    assert out.count("The first word came after ") == 2
    assert "Indexed: 1 added" in err
    assert questions() == [["When is tea poured?", "And what needs service?"]]
    with open_history() as history:
        first, second = history.turns(1)
        assert second.parent == first.id
        assert first.answer
        assert first.sources[0].text == TEXT.strip()


def test_commands(notes: Path) -> None:
    lines = ("/sources", "/add notes", "tea", "/new", "", "service", "/sources", "/help", "/quit", "never asked")
    code, out, err = piped("\n".join(lines))
    assert code == 0, err
    assert questions() == [["service"], ["tea"]]
    assert "There are no sources yet." in err
    assert "A new conversation." in err
    assert "/add PATH adds" in err
    assert out.count("Water for tea is poured at 80 degrees.") == 1, "once, by /sources"


def test_an_error_is_told_and_the_rest_goes_on(notes: Path) -> None:
    code, out, err = piped("/frobnicate\n/add nowhere\nxylophone\ntea\n", "notes")
    assert code == 1
    assert "There is no command /frobnicate." in err
    assert "There is no file or folder" in err
    assert "Nothing in your documents matches" in err
    assert "Source 1: notes/tea.md" in out
    assert questions() == [["tea"]], "what came to nothing is not kept"


def test_what_is_no_text_is_no_crash(notes: Path) -> None:
    code, out, err = piped(b"tea \xff\xfe \x1b]52;c;x\x07 \xc3\n", "notes")
    assert code == 0, err
    assert "\x1b" not in out + err


def test_the_application_names_the_plain_mode_where_there_is_no_terminal() -> None:
    done = subprocess.run([sys.executable, "-m", "quire"], capture_output=True, text=True, input="")
    assert done.returncode == 1
    assert "quire chat --plain" in done.stderr


def test_textual_is_never_loaded(notes: Path) -> None:
    code = """import sys; from quire.cli import main
try: main(["chat", "--plain"])
finally: print("textual" in sys.modules)"""
    done = subprocess.run([sys.executable, "-c", code], input="/help\n", capture_output=True, text=True)
    assert done.stdout == "False\n", "and there is no prompt where nobody sees it"


# On a terminal


@pytest.fixture
def terminal(notes: Path) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*words: str) -> Terminal:
        opened.append(Terminal([*QUIRE, *words]))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def test_a_terminal_shows_a_prompt_and_ctrl_d_leaves(terminal: Callable[..., Terminal]) -> None:
    screen = terminal("notes")
    screen.until(lambda: screen.seen.endswith("> "))
    assert "/help says what can be typed." in screen.seen
    screen.type("tea\r")
    screen.until(lambda: "The first word came after" in screen.seen and screen.seen.endswith("> "))
    screen.type("/frobnicate\r")
    screen.until(lambda: "There is no command" in screen.seen and screen.seen.endswith("> "))
    screen.type("\x04")
    assert screen.ends() == 0, "a mistyped command is no failure of the whole"


def test_ctrl_c_at_the_prompt_leaves_only_the_second_time(terminal: Callable[..., Terminal]) -> None:
    screen = terminal("notes")
    screen.until(lambda: screen.seen.endswith("> "))
    screen.settle()  # readline notices a signal only once it waits
    screen.type("\x03")
    screen.until(lambda: "Ctrl-C again" in screen.seen and screen.seen.endswith("> "))
    screen.settle()
    screen.type("\x03")
    assert screen.ends() == 130


def test_ctrl_c_stops_an_answer_and_keeps_it(
    terminal: Callable[..., Terminal], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QUIRE_MODEL")  # the bundled one writes slowly enough
    monkeypatch.setenv("QUIRE_MAX_TOKENS", "1000")
    monkeypatch.setenv("QUIRE_TEMPERATURE", "1.5")
    with Session(config.load()) as session:
        tried_out(session.engine)
    screen = terminal("notes")
    screen.until(lambda: screen.seen.endswith("> "))
    screen.type("Write a very long poem of tea, boilers and water.\r")
    start = len(screen.seen) + 60
    screen.until(lambda: "The first word comes in about" in screen.seen and len(screen.seen) > start + 150)
    screen.process.send_signal(signal.SIGINT)
    screen.until(lambda: "Stopped." in screen.seen and screen.seen.endswith("> "))
    with open_history() as history:
        [turn] = history.turns(1)
        assert turn.ending == "stopped"
        assert turn.answer
    screen.settle()
    screen.type("\x03")
    assert screen.ends() == 130, "a second one leaves"
