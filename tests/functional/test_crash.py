"""A mistake of Quire's own leaves a log that only its owner can read, a sane terminal, and a line that says where."""

import sys
from contextlib import closing
from pathlib import Path

import pytest

from driving import Terminal, on_a_screen, running, shown, until
from quire import crash, paths
from quire.session import Session

SECRET = "the text of a document"
F1 = "\x1bOP"


def log() -> Path:
    return paths.log_dir() / "quire.log"


def test_the_log_is_private_cut_and_rotated() -> None:
    for _ in range(2):
        said = crash.keep(ValueError("x" * 100_000))
    assert str(log()) in said
    assert log().stat().st_mode & 0o777 == 0o600
    assert log().read_text().count("ValueError: xxx") == 2
    assert len(log().read_text()) < 5_000
    log().write_text("old" * 300_000)
    crash.keep(ValueError("new"))
    assert "old" not in log().read_text()
    assert (paths.log_dir() / "quire.log.1").read_text().startswith("old")


def test_a_log_that_cannot_be_written_is_no_second_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIRE_LOG_DIR", "/dev/null/nowhere")
    assert "could not be written" in crash.keep(ValueError("x"))


@on_a_screen
async def test_a_mistake_on_the_engine_thread_is_told_and_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Session:
        value = SECRET
        raise RuntimeError(f"about {len(value)} letters")

    async with running(fail, (140, 40)) as (app, pilot):
        app.chat.prompt.put("why")
        await pilot.press("enter")
        await until(app, pilot, lambda: "Quire made a mistake." in shown(app))
        assert "quire.log" in shown(app).replace("\n", "")
    assert "RuntimeError: about 22 letters" in log().read_text()
    assert SECRET not in log().read_text()


CRASHING = f"""
import sys
from quire.tui import app
def fail(self):
    value = {SECRET!r}
    raise RuntimeError("a mistake on the screen")
app.QuireApp.action_help = fail
from quire.cli import main
main(["chat"])
"""


def test_a_mistake_on_the_screen_leaves_a_log_and_a_sane_terminal() -> None:
    with closing(Terminal([sys.executable, "-c", CRASHING])) as terminal:
        terminal.until(lambda: "Ask your documents" in terminal.seen)
        terminal.type(F1)
        assert terminal.ends() == 1
        assert terminal.sane
        assert "\x1b[?1049h" in terminal.seen
        _, left, last = terminal.seen.rpartition("\x1b[?1049l")
        assert left, "the terminal's own screen is back"
        assert "Quire made a mistake." in last
        assert "quire.log" in last
        assert "Traceback" not in terminal.seen
        assert SECRET not in terminal.seen
    assert "a mistake on the screen" in log().read_text()
    assert SECRET not in log().read_text()
