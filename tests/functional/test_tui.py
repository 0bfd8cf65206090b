"""The terminal application, driven through Textual's pilot.

Most tests use a double of the session that says what it is told to, slowly: they are about the screen. Two use the
real small model. What a test looks for is the text that the screen shows, not the widgets that hold it.
"""

import functools
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import Collapsible, HelpPanel, Markdown

import driving
from driving import on_a_screen, shown
from quire import config
from quire.chunking import Passage
from quire.indexer import Change, IndexProgress, IndexReport
from quire.library import Chunk, Hit, StoredDocument
from quire.session import Estimate, Found, Session
from quire.shelf import CacheProgress, Item, Usage
from quire.tui.app import QuireApp, editor_command
from quire.tui.library import LibraryScreen
from quire.tui.sources import Preview, Sources
from quire.tui.streaming import closed_length
from quire.tui.widgets import Answer, Trouble
from quire_engine.errors import QuireError
from quire_engine.types import Answered, Event, Exchange, Forecast, Text, Timings, TokenCounts
from stitching import tried_out

SAMPLE = Path(__file__).resolve().parents[2] / "assets" / "sample"
QUESTION = "Who was the engineer of the lighthouse at Grey Point?"
PATIENCE_S = 20.0
MODEL_PATIENCE_S = 300.0  # a busy machine is ten times slower
HOSTILE = "\x1b]0;owned\x07\x1b[41m\x1b[2J\x9b5m[red]not markup[/red] [@click=app.quit]x[/]"
TABLE = "| crop | sow |\n|---|---|\n" + "".join(f"| bean {i} | May {i} |\n" for i in range(30))
LIST = "".join(f"- item {i} of the list\n" for i in range(60))
FENCE = "```python\n" + "".join(f"x{i} = {i}\n\n" for i in range(30)) + "```\n"
LONG = f"# Title\n\nFirst paragraph.\n\n{LIST}\n{TABLE}\n{FENCE}\nLast paragraph."


class FakeLibrary:
    """Documents by path, each with the texts of its passages."""

    def __init__(self) -> None:
        self.added: list[Path] = []
        self.stored: dict[Path, list[str]] = {}
        self.skipped: dict[Path, str] = {}

    def roots(self) -> list[Path]:
        return list(self.added)

    def add_root(self, path: Path) -> Path:
        if not path.exists():
            raise QuireError(f"There is no file or folder {path}.", "Check the spelling.")
        self.added += [] if path in self.added else [path]
        return path

    def documents(self) -> list[StoredDocument]:
        read = [StoredDocument(path, 1, 1, "", "") for path in self.stored]
        return read + [StoredDocument(p, 0, 0, "", "", "skipped", why, "") for p, why in self.skipped.items()]

    def all_chunks(self) -> list[Chunk]:
        return [Chunk(p.chunk_id, p.text, p.tokens) for path in self.stored for p in self.chunks_of(path)]

    def chunks_of(self, path: Path) -> list[Passage]:
        return [Passage(text, 100, 1, 2, "") for text in self.stored.get(path, [])]

    def close(self) -> None:
        pass


class FakeEngine:
    model_name = "fake"
    known_reuse_off = reuse_off = ""

    def __init__(self) -> None:
        self.cached: set[str] = set()
        self.runtime = self

    def abortable(self, _: Callable[[], bool]) -> AbstractContextManager[None]:
        return nullcontext()

    def is_cached(self, passage: str) -> bool:
        return passage in self.cached


class FakeShelf:
    """What of the documents is cached, found out anew each time."""

    def __init__(self, session: "FakeSession") -> None:
        self._session = session
        self.cache = session.cache
        self.pins: tuple[Path, ...] = ()

    def refresh(self, between: Callable[[], None]) -> None:
        between()

    def settle(self, passages: Iterable[str]) -> None:
        pass

    @property
    def items(self) -> tuple[Item, ...]:
        library = self._session.library
        return tuple(Item(d, tuple(p.chunk_id for p in library.chunks_of(d.path)), False) for d in library.documents())

    @property
    def tokens(self) -> dict[str, int]:
        return {chunk.id: chunk.tokens for chunk in self._session.library.all_chunks()}

    @property
    def waiting(self) -> dict[str, int]:
        session = self._session
        return {c.id: c.tokens for c in session.library.all_chunks() if not session.engine.is_cached(c.text)}

    def progress(self) -> CacheProgress:
        total, left = len(self.tokens), len(self.waiting)
        return CacheProgress(total - left, total, 100 * (total - left), 100 * total)

    def usage(self) -> Usage:
        return Usage(0, 0, 0, 0)


@dataclass
class FakeSession:
    """Answers with `pieces`, one every `pause_s`; caches one passage every `cache_s`."""

    pieces: Sequence[str] = ("It was ", "Ida Marlow.")
    pause_s: float = 0.002
    cache_s: float = 0.005
    fails: QuireError | None = None
    hits: tuple[Hit, ...] = (
        Hit("id", "The tower was built by Ida Marlow.", 9, Path("/d/tower.md"), 1, 3, "Tower", 1.0),
    )
    library: FakeLibrary = field(default_factory=FakeLibrary)
    engine: FakeEngine = field(default_factory=FakeEngine)
    settings: config.Settings = field(default_factory=config.Settings)
    asked: list[str] = field(default_factory=list)
    histories: list[tuple[Exchange, ...]] = field(default_factory=list)
    estimated: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    thread: str = ""
    read: int = 0
    closed: bool = False

    def embed(self, should_stop: Callable[[], bool]) -> None:
        """Has no embedding model."""

    @property
    def shelf(self) -> FakeShelf:
        return FakeShelf(self)

    def __enter__(self) -> "FakeSession":
        self.thread = threading.current_thread().name
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def take_notice(self) -> str:
        return ""

    def index(self, roots: Sequence[Path], progress: Callable[[IndexProgress], None]) -> IndexReport:
        files = [path for path in self.library.stored if any(path.is_relative_to(root) for root in roots)]
        for done, path in enumerate(files, 1):
            time.sleep(self.pause_s)
            self.read += 1
            progress(IndexProgress(done, len(files), path))
        return IndexReport(tuple(Change(path, "added", 1, 1) for path in files), (), 0)

    def cache(self, progress: Callable[[CacheProgress], None], should_stop: Callable[[], bool]) -> CacheProgress:
        chunks = self.library.all_chunks()
        for chunk in chunks:
            done = sum(map(self.engine.is_cached, (c.text for c in chunks)))
            state = CacheProgress(done, len(chunks), 100 * done, 100 * len(chunks))
            progress(state)
            if should_stop():
                return state
            time.sleep(self.cache_s)
            self.engine.cached.add(chunk.text)
        state = CacheProgress(len(chunks), len(chunks), 100 * len(chunks), 100 * len(chunks))
        progress(state)
        return state

    def estimate(self, question: str, history: Sequence[Exchange]) -> Estimate:
        self.estimated.append(question)
        return Estimate(1509, 240, 8192, 900.0)

    def ask(
        self, question: str, within: object, should_stop: Callable[[], bool], history: Sequence[Exchange]
    ) -> Iterator[Found | Event]:
        self.asked.append(question)
        self.histories.append(tuple(history))
        if self.fails:
            raise self.fails
        yield Found(self.hits, 1.0)
        yield Forecast(1000, 0, 0.16, "", 200.0, 3000.0)
        ending: Any = "end"
        for piece in self.pieces:
            time.sleep(self.pause_s)
            if should_stop():
                ending = "stopped"
                break
            self.said.append(piece)
            yield Text(piece)
        counts = TokenCounts(1000, 840, 160, 20, len(self.said))
        yield Answered(counts, Timings(0, 20, 30, 100, 50, 200, 500), 0.16, ending)


def with_documents(session: FakeSession, root: Path, count: int = 30) -> FakeSession:
    session.library.added = [root]
    session.library.stored = {root / f"note{i}.md": [f"note {i}, passage {j}" for j in range(2)] for i in range(count)}
    return session


@asynccontextmanager
async def running(
    session: Any, size: tuple[int, int] = (100, 30), add: tuple[Path, ...] = ()
) -> AsyncIterator[tuple[QuireApp, Pilot[None]]]:
    """The application on a screen of this size; afterwards the engine thread has ended."""
    app = QuireApp(lambda: session, add)
    async with app.run_test(size=size) as pilot:
        yield app, pilot
    assert not app.chat.worker.alive


async def until(app: QuireApp, pilot: Pilot[None], true: Callable[[], Any], patience_s: float = PATIENCE_S) -> None:
    await driving.until(app, pilot, true, patience_s)


def grown(answer: Answer, length: int) -> bool:
    return len(answer.said) > length


def rendered(answer: Answer) -> str:
    """The Markdown of an answer, put together again."""
    return "".join(part.source for part in answer.query(Markdown))


async def ask(app: QuireApp, pilot: Pilot[None], question: str = QUESTION) -> Answer:
    app.chat.prompt.put(question)
    await pilot.press("enter")
    await until(app, pilot, lambda: app.chat.query(Answer))
    return app.chat.query(Answer).last()


async def answered(
    app: QuireApp, pilot: Pilot[None], question: str = QUESTION, patience_s: float = PATIENCE_S
) -> Answer:
    answer = await ask(app, pilot, question)
    await until(app, pilot, lambda: answer.query(Collapsible), patience_s)
    await pilot.pause()
    return answer


# The first screen


@on_a_screen
async def test_the_first_screen_explains_itself_before_anything_is_loaded(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    opening = threading.Event()

    def open_slowly() -> Any:
        opening.wait(PATIENCE_S)
        return FakeSession()

    app = QuireApp(open_slowly)
    async with app.run_test(size=(100, 30)) as pilot:
        await pilot.press(*"typed")
        assert "Quire answers from your own documents" in shown(app)
        assert "Nothing leaves this computer" in shown(app)
        assert "loading the model" in shown(app)
        assert app.focused is app.chat.prompt
        assert app.chat.prompt.text == "typed"
        opening.set()
        await until(app, pilot, lambda: "No folder was added yet" in shown(app))
        assert f"/add {tmp_path}"[:60] in shown(app)
        assert "model that came along is small" in shown(app)
        assert app.chat.prompt.text == "typed"


def test_the_screen_can_be_painted_without_the_engine() -> None:
    code = (
        "import sys, quire.tui.app\n"
        "print([m for m in ('numpy', 'llama_cpp', 'torch', 'sqlite_utils', 'quire.session') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


@pytest.mark.parametrize("size", [(80, 24), (200, 60)])
@on_a_screen
async def test_everything_fits(tmp_path: Path, size: tuple[int, int]) -> None:
    session = with_documents(FakeSession(pieces=["Ida ", "Marlow."], cache_s=0), tmp_path, 3)
    async with running(session, size) as (app, pilot):
        await until(app, pilot, lambda: "6/6 cached" in shown(app))
        await until(app, pilot, lambda: "Help" in shown(app))
        for words in ("Quire answers", "Ask your documents", "Send", "Library"):
            assert words in shown(app)
        answer = await answered(app, pilot)
        assert "Ida Marlow." in shown(app)
        assert "1 source: tower.md" in shown(app)
        assert "First word 200 ms (full prefill about 3.0 s)" in shown(app)
        assert "saved 2.8 s of full prefill" in shown(app)
        answer.query_one(Collapsible).collapsed = False
        await until(app, pilot, lambda: "1. /d/tower.md:1-3  Tower" in shown(app))
        await pilot.press("ctrl+l")
        await until(app, pilot, lambda: "note2.md" in shown(app))
        for words in ("C cached", "Pause", "Back"):
            assert words in shown(app)
        await pilot.press("escape", "f1")
        await until(app, pilot, lambda: app.screen.query(HelpPanel))
        await pilot.press("f1")
        await until(app, pilot, lambda: not app.screen.query(HelpPanel))


@on_a_screen
async def test_every_theme_of_textual_can_be_chosen(tmp_path: Path) -> None:
    async with running(with_documents(FakeSession(cache_s=0), tmp_path, 3)) as (app, pilot):
        await answered(app, pilot)
        for theme in ("textual-light", "ansi-dark", "ansi-light", "nord"):
            app.theme = theme
            await pilot.pause(0.1)
            assert "Ida Marlow." in shown(app)


# Typing and sending


@on_a_screen
async def test_typing_goes_on_while_caching_which_makes_room(tmp_path: Path) -> None:
    session = with_documents(FakeSession(cache_s=0.05), tmp_path)
    async with running(session) as (app, pilot):
        await until(app, pilot, lambda: "caching" in shown(app) and len(session.engine.cached) > 2)
        await pilot.press(*"Who")
        await until(app, pilot, lambda: "caching waits while you type" in shown(app))
        assert app.chat.prompt.text == "Who"
        before = len(session.engine.cached)
        await pilot.pause(0.3)
        assert len(session.engine.cached) == before
        await until(app, pilot, lambda: len(session.engine.cached) > before)


@on_a_screen
async def test_a_question_goes_before_caching(tmp_path: Path) -> None:
    session = with_documents(FakeSession(cache_s=0.05), tmp_path)
    async with running(session) as (app, pilot):
        await until(app, pilot, lambda: len(session.engine.cached) > 2)
        answer = await answered(app, pilot)
        assert answer.said == "It was Ida Marlow."
        assert len(session.engine.cached) < 60
        assert session.thread == "quire-engine"


@on_a_screen
async def test_a_question_does_not_wait_for_a_folder_to_be_read(tmp_path: Path) -> None:
    session = with_documents(FakeSession(), tmp_path, 200)
    async with running(session) as (app, pilot):
        session.pause_s = 0.3  # for every file
        await until(app, pilot, lambda: "reading" in shown(app))
        answer = await answered(app, pilot)
        assert answer.said == "It was Ida Marlow."
        await until(app, pilot, lambda: "reading" in shown(app))  # it goes on
        assert session.read < 200


@on_a_screen
async def test_new_lines_and_the_last_question() -> None:
    session = FakeSession()
    async with running(session) as (app, pilot):
        await pilot.press("a", "ctrl+j", "b", "shift+enter", "c")
        assert app.chat.prompt.text == "a\nb\nc"
        await pilot.press("enter")
        await until(app, pilot, lambda: session.asked == ["a\nb\nc"])
        await until(app, pilot, lambda: app.chat.query(Collapsible))
        assert app.chat.prompt.text == ""
        await pilot.press("enter")
        await pilot.press("up")
        assert app.chat.prompt.text == "a\nb\nc"
        assert len(session.asked) == 1, "nothing is not a question"


@on_a_screen
async def test_a_second_question_waits_in_the_prompt() -> None:
    session = FakeSession(pieces=["word "] * 500, pause_s=0.01)
    async with running(session) as (app, pilot):
        await ask(app, pilot, "first")
        await pilot.press(*"second", "enter")
        await pilot.pause(0.1)
        assert app.chat.prompt.text == "second"
        assert session.asked == ["first"]


@on_a_screen
async def test_folders_are_added_in_the_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my notes").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    session = FakeSession()
    async with running(session, size=(160, 30)) as (app, pilot):
        app.chat.prompt.put("/add '~/my notes'")
        await pilot.press("enter")
        await until(app, pilot, lambda: session.library.added == [tmp_path / "my notes"])
        await until(app, pilot, lambda: "Indexed" in shown(app))
        app.chat.prompt.put("/add nowhere")
        await pilot.press("enter")
        await until(app, pilot, lambda: "There is no file or folder nowhere." in shown(app))
        app.chat.prompt.put("/frobnicate")
        await pilot.press("enter")
        await until(app, pilot, lambda: "There is no command /frobnicate." in shown(app))
        assert session.asked == []


@on_a_screen
async def test_folders_of_the_command_line_are_added(tmp_path: Path) -> None:
    session = FakeSession()
    async with running(session, add=(tmp_path,)) as (app, pilot):
        await until(app, pilot, lambda: session.library.added == [tmp_path])
        await until(app, pilot, lambda: "Your folders" in shown(app))


# Streaming


@pytest.mark.parametrize("step", [1, 4000])
@on_a_screen
async def test_a_long_answer_keeps_its_order(step: int) -> None:
    pieces = [LONG[i : i + step] for i in range(0, len(LONG), step)]
    async with running(FakeSession(pieces=pieces, pause_s=0.0002), size=(100, 60)) as (app, pilot):
        answer = await answered(app, pilot)
        assert answer.said == LONG
        assert rendered(answer) == LONG
        widgets = [block for part in answer.query(Markdown) for block in part.children]
        blocks = [type(block).__name__.removeprefix("Markdown") for block in widgets]
        assert blocks == ["H1", "Paragraph", "BulletList", "Table", "Fence", "Paragraph"]
        fence = answer.query_one("MarkdownFence")
        assert [f"x{i} = {i}" in str(getattr(fence, "code", "")) for i in (0, 15, 29)] == [True] * 3
        assert "Last paragraph." in shown(app)


@pytest.mark.parametrize(
    ("text", "closed"),
    [
        ("one", ""),
        ("one\n\n", ""),
        ("one\n\ntwo", "one\n\n"),
        ("- a\n\n- b\n\n  c", ""),
        ("- a\n\n- b\n\nEnd", "- a\n\n- b\n\n"),
        ("1. a\n\n2", "1. a\n\n"),
        ("```\na\n\nb\n", ""),
        ("```\na\n\nb\n```\n\nc", "```\na\n\nb\n```\n\n"),
        ("````\n```\n\nb\n```\n\nc", ""),
        ("~~~\n```\n\nb", ""),
        ("```not closed\n```py\n\nc", ""),
    ],
)
def test_what_is_closed(text: str, closed: str) -> None:
    assert text[: closed_length(text)] == closed


@on_a_screen
async def test_resizing_while_streaming_loses_nothing() -> None:
    pieces = [LONG[i : i + 5] for i in range(0, len(LONG), 5)]
    async with running(FakeSession(pieces=pieces, pause_s=0.001)) as (app, pilot):
        answer = await ask(app, pilot)
        for size in ((80, 24), (200, 60), (40, 12), (100, 30)):
            await pilot.resize_terminal(*size)
            await pilot.pause(0.1)
        await until(app, pilot, lambda: answer.query(Collapsible))
        assert answer.said == rendered(answer) == LONG


@on_a_screen
async def test_the_window_is_resized_while_text_streams(tmp_path: Path) -> None:
    pieces = [LONG[i : i + 20] for i in range(0, len(LONG), 20)]
    session = with_documents(FakeSession(pieces=pieces, cache_s=0.0), tmp_path, 3)
    async with running(session, (80, 24)) as (app, pilot):
        session.pause_s = 0.1  # for every piece
        answer = await ask(app, pilot)
        await until(app, pilot, lambda: "First paragraph." in answer.said)
        for size in ((200, 60), (40, 12), (120, 30), (80, 24)):
            before = len(answer.said)
            await pilot.resize_terminal(*size)
            await until(app, pilot, functools.partial(grown, answer, before))
            lines = shown(app).splitlines()
            assert len(lines) == size[1]
            assert max(map(len, lines)) <= size[0]
            assert "Ask your" in shown(app), "the prompt stays in sight"
            assert app.chat._turn, "it streams"
        session.pause_s = 0.0
        await until(app, pilot, lambda: not app.chat._turn)
        assert rendered(answer) == LONG
        await until(app, pilot, lambda: "Last paragraph." in shown(app))


@on_a_screen
async def test_esc_stops_and_keeps_what_there_is() -> None:
    session = FakeSession(pieces=[f"word{i} " for i in range(2000)], pause_s=0.005)
    async with running(session) as (app, pilot):
        answer = await ask(app, pilot)
        await until(app, pilot, lambda: "word20" in answer.said)
        await pilot.press("escape")
        await until(app, pilot, lambda: answer.query(Collapsible))
        assert answer.said == "".join(session.said)
        assert rendered(answer) == answer.said
        assert len(session.said) < 2000
        assert "Stopped. First word" in shown(app)
        assert app.focused is app.chat.prompt


@on_a_screen
async def test_a_new_conversation_never_sees_the_old_answer() -> None:
    session = FakeSession(pieces=["ancient "] * 2000, pause_s=0.005)
    async with running(session) as (app, pilot):
        await until(app, pilot, lambda: app.chat.state.model)
        answer = await ask(app, pilot)
        await until(app, pilot, lambda: answer.said)
        await pilot.press("ctrl+n")
        await until(app, pilot, lambda: "Quire answers" in shown(app))
        assert not app.chat.query(Answer)
        session.pieces, session.said = ["new"], []
        second = await answered(app, pilot)
        assert second.said == "new"
        assert "ancient" not in shown(app)


# Errors


@on_a_screen
async def test_an_error_gives_the_question_back() -> None:
    session = FakeSession(fails=QuireError("Nothing matches the words.", "Use other words.", "[bold]details[/bold]"))
    async with running(session) as (app, pilot):
        await ask(app, pilot, "zebra?")
        await until(app, pilot, lambda: app.chat.query(Trouble))
        await pilot.pause()
        for words in ("Nothing matches the words.", "Use other words.", "[bold]details[/bold]"):
            assert words in shown(app)
        assert app.chat.prompt.text == "zebra?"
        session.fails = None
        await pilot.press("enter")
        await until(app, pilot, lambda: app.chat.query(Collapsible))
        assert "Ida Marlow." in shown(app)


@on_a_screen
async def test_a_mistake_of_ours_is_no_traceback() -> None:
    def broken() -> Any:
        raise ZeroDivisionError("by us")

    app = QuireApp(broken)
    async with app.run_test() as pilot:
        await until(app, pilot, lambda: "Quire made a mistake." in shown(app))
        await ask(app, pilot)
        await until(app, pilot, lambda: len(app.chat.query(Trouble)) == 2)
        assert app.chat.prompt.text == QUESTION
        assert "ZeroDivisionError" in shown(app)


# Sources


@on_a_screen
async def test_a_source_is_previewed_and_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[Path, int]] = []
    monkeypatch.setattr(QuireApp, "_edit", lambda _, path, line: opened.append((path, line)))
    async with running(FakeSession()) as (app, pilot):
        answer = await answered(app, pilot)
        await pilot.press("shift+tab", "enter", "tab")
        assert isinstance(app.focused, Sources)
        await pilot.press("o")
        await until(app, pilot, lambda: opened == [(Path("/d/tower.md"), 1)])
        await pilot.press("enter")
        await until(app, pilot, lambda: "The tower was built by Ida Marlow." in shown(app))
        assert isinstance(app.screen, Preview)
        await pilot.press("o")
        await until(app, pilot, lambda: len(opened) == 2)
        await pilot.press("escape")
        await until(app, pilot, lambda: app.screen is app.chat)
        assert answer.is_mounted


def test_editors_are_told_the_line() -> None:
    path = Path("/d/a b.md")
    assert editor_command("vim -R", path, 7) == ["vim", "-R", "+7", "/d/a b.md"]
    assert editor_command("/usr/bin/code -w", path, 7) == ["/usr/bin/code", "-w", "--goto", "/d/a b.md:7"]
    assert editor_command("hx", path, 7) == ["hx", "/d/a b.md:7"]


# The library


@on_a_screen
async def test_the_library_shows_letters_and_can_pause(tmp_path: Path) -> None:
    session = with_documents(FakeSession(cache_s=0.1), tmp_path, 10)
    session.library.skipped[tmp_path / "scan.pdf"] = "it holds no text"
    session.engine.cached = {"note 0, passage 0", "note 0, passage 1"}
    async with running(session) as (app, pilot):
        await pilot.press("ctrl+l")
        await until(app, pilot, lambda: "scan.pdf" in shown(app) and "to go · caching" in shown(app))
        assert isinstance(app.screen, LibraryScreen)
        letters = {words[1]: words[0] for line in shown(app).splitlines() if len(words := line.split()) > 2}
        assert (letters["note0.md"], letters["note9.md"], letters["scan.pdf"]) == ("C", "Q", "S"), shown(app)
        assert "skipped: it holds no text" in shown(app)
        assert str(tmp_path)[:20] in shown(app)
        await pilot.press("p")
        await until(app, pilot, lambda: "caching paused" in shown(app))
        before = len(session.engine.cached)
        await pilot.pause(0.3)
        assert len(session.engine.cached) == before
        await pilot.press("p")
        await until(app, pilot, lambda: "about" in shown(app) and "left" in shown(app))
        session.cache_s = 0.0
        await until(app, pilot, lambda: "All 20 passages are cached." in shown(app))
        assert " Q " not in shown(app).replace("Q queued", "")
        await pilot.press("escape")
        await until(app, pilot, lambda: "20/20 cached" in shown(app))


# Hostile text


@on_a_screen
async def test_hostile_text_reaches_the_screen_as_text(tmp_path: Path) -> None:
    folder = tmp_path / "evil \x1b]0;owned\x07[red]"
    folder.mkdir()
    file = folder / "a\x1b[41m [bold]b[/bold].md"
    hit = Hit("id", f"Preview {HOSTILE}", 9, file, 1, 3, f"Heading {HOSTILE}", 1.0)
    session = FakeSession(
        pieces=list(f"Good {HOSTILE} <b>tag</b>\n\nand [link](http://evil) more {HOSTILE}"), hits=(hit,)
    )
    session.library.added, session.library.stored = [folder], {file: [f"text {HOSTILE}"]}
    session.engine.model_name = f"model {HOSTILE}"
    session.settings = config.Settings(model=Path("/m.gguf"))  # the bundled one has a name of ours
    seen: list[str] = []
    async with running(session, size=(200, 50)) as (app, pilot):

        def look() -> str:
            svg_and_text = app.export_screenshot() + shown(app)
            seen.append(svg_and_text)
            return shown(app)

        await until(app, pilot, lambda: "1/1 cached" in shown(app))
        assert "[red]not markup[/red]" in look()
        answer = await answered(app, pilot, f"Question {HOSTILE}?")
        answer.query_one(Collapsible).collapsed = False
        await pilot.pause(0.2)
        text = look()
        assert "Good " in text
        assert "<b>tag</b>" in text
        assert "a [bold]b[/bold].md:1-3  Heading" in text
        await pilot.press("shift+tab", "enter")
        await until(app, pilot, lambda: isinstance(app.screen, Preview))
        await pilot.pause(0.1)
        assert "Preview [red]not markup[/red]" in look()
        await pilot.press("escape", "ctrl+l")
        await until(app, pilot, lambda: isinstance(app.screen, LibraryScreen))
        await pilot.pause(0.1)
        assert "a [bold]b[/" in look(), "a folder, by its last slash"
        await pilot.press("escape", "escape")
        assert app.focused is app.chat.prompt
        session.fails = QuireError(f"Message {HOSTILE}", f"Hint {HOSTILE}", f"Details {HOSTILE}")
        await ask(app, pilot)
        await until(app, pilot, lambda: app.chat.query(Trouble))
        await pilot.pause(0.1)
        assert "Message [red]not markup[/red]" in look()
        assert app.is_running, "nothing in the text was an action"
    assert not any(sign in text for text in seen for sign in "\x1b\x07\x9b"), "no control character is left"


# Quitting


@pytest.mark.parametrize("busy", ["streaming", "caching", "reading"])
@on_a_screen
async def test_quitting_is_clean_whatever_runs(tmp_path: Path, busy: str) -> None:
    session = with_documents(FakeSession(pieces=["word "] * 5000, cache_s=0.2), tmp_path, 60)
    session.pause_s = {"streaming": 0.01, "caching": 0.0, "reading": 0.3}[busy]
    async with running(session) as (app, pilot):
        if busy == "streaming":
            answer = await ask(app, pilot)
            await until(app, pilot, lambda: answer.said)
        await until(app, pilot, lambda: busy == "streaming" or busy in shown(app))
        await pilot.press("ctrl+q")
    assert session.closed
    left = {
        "streaming": 5000 - len(session.said),
        "caching": 120 - len(session.engine.cached),
        "reading": 60 - session.read,
    }
    assert left[busy] > 0, "it did not wait for the end"
    assert app.return_code == 0
    assert not [thread for thread in threading.enumerate() if thread.name == "quire-engine"]


# The real small model


@pytest.fixture(scope="module")
def model_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cached KV that both tests share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def open_real(model_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Session]:
    monkeypatch.setenv("QUIRE_CACHE_DIR", str(model_cache))
    settings = config.load({"threads": 1, "max_tokens": 400})
    with Session(settings) as session:
        tried_out(session.engine)
    return lambda: Session(settings)


@on_a_screen
async def test_a_folder_is_added_cached_and_asked(open_real: Callable[[], Session], tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    shutil.copy(SAMPLE / "lighthouse.md", docs)
    app = QuireApp(open_real)
    async with app.run_test(size=(100, 30)) as pilot:
        app.chat.prompt.put(f"/add {docs}")
        await pilot.press("enter")
        await until(app, pilot, lambda: "1/1 cached" in shown(app), MODEL_PATIENCE_S)
        assert "Indexed: 1 added" in shown(app)
        answer = await answered(app, pilot, patience_s=MODEL_PATIENCE_S)
        assert "Ida Marlow" in answer.said
        assert "lighthouse.md" in shown(app)
        assert "tokens reused" in shown(app)


@on_a_screen
async def test_esc_stops_the_model_and_keeps_the_text(open_real: Callable[[], Session]) -> None:
    app = QuireApp(open_real, (SAMPLE / "lighthouse.md",))
    async with app.run_test(size=(100, 30)) as pilot:
        await until(app, pilot, lambda: "1/1 cached" in shown(app), MODEL_PATIENCE_S)
        answer = await ask(app, pilot, "Tell me everything about the lighthouse keepers and list all facts.")
        await until(app, pilot, lambda: answer.said, MODEL_PATIENCE_S)
        await pilot.press("escape")
        await until(app, pilot, lambda: answer.query(Collapsible), MODEL_PATIENCE_S)
        await pilot.pause()
        assert answer.said
        await until(app, pilot, lambda: "Stopped. First word" in shown(app))
        assert rendered(answer) == answer.said
