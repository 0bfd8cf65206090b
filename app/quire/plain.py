"""`quire chat --plain`: the conversation line by line, for screen readers, pipes and simple terminals.

Reads questions from standard input and says everything in words, one thing a line: no colours, no movement. Answers,
sources and costs go to standard output, all else to standard error. The conversation is kept like the application's.
Knows nothing of Textual, and of the model no more than the application does.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from threading import Event as Flag

from quire import crash, elsewhere, render
from quire.conversation import NEW, Kept, Recorder, Unkept
from quire.history import ROOT
from quire.library import Hit
from quire.session import Found, Session
from quire.terminal import printable, typed
from quire.transcript import Mention
from quire.whole import COMMAND, Account, Part, Plan, asks_for_all
from quire_engine.errors import QuireError
from quire_engine.types import Answered, Forecast, Text

HELP = """\
Type a question about your documents and press Enter. @notes/tea.md or @notes/ in it limits it to that file or folder.
/all QUESTION reads every passage for it, and says what became of every document; so do the words "in all files".
/add PATH adds a folder or file. /new begins a new conversation. /sources reads the passages of the last answer.
/quit or Ctrl-D leaves. Ctrl-C stops an answer and keeps what there is."""
_MOST_PAST = 500  # questions that Up walks through
_INTERRUPTED = 130
_ENDINGS = {"end": "", "stopped": "\nStopped.", "length": "\nCut off: too long."}

Interruptible = Callable[[], AbstractContextManager[Flag]]


def run(session: Session, add: Sequence[Path], interruptible: Interruptible) -> int:
    """Answers until the input ends; returns the exit code: 1 when a question failed, 130 when Ctrl-C ended it.

    interruptible: within it the first Ctrl-C sets the flag, a second one raises KeyboardInterrupt.
    """
    try:
        with Recorder() as recorder:
            return _Chat(session, recorder, interruptible).run(add)
    except (QuireError, BrokenPipeError):
        raise
    except Exception as error:
        raise crash.explained(error) from error


class _Chat:
    def __init__(self, session: Session, recorder: Recorder, interruptible: Interruptible) -> None:
        self._session = session
        self._recorder = recorder
        self._interruptible = interruptible
        self._watched = sys.stdin.isatty() and sys.stdout.isatty()
        self._conversation, self._leaf = NEW, ROOT
        self._sources: tuple[Hit, ...] = ()
        self._documents: tuple[Mention, ...] = ()
        self._failed = False
        self._stopped = False  # by the last Ctrl-C

    def run(self, add: Sequence[Path]) -> int:
        if self._watched:
            self._edit_lines()
            _note(f"Quire, {printable(self._session.engine.model_name)}. /help says what can be typed.")
        if leaves := elsewhere.leaves(self._session.settings):
            _note(leaves)
        self._read(add)
        try:
            while (line := self._line()) != "/quit":
                self._obey(line)
        except EOFError:
            pass
        except KeyboardInterrupt:
            return _INTERRUPTED
        return 1 if self._failed and not self._watched else 0

    def _line(self) -> str:
        """What is typed next. Raises KeyboardInterrupt at the second Ctrl-C; the one that stopped an answer counts."""
        while True:
            try:
                return typed(input("> " if self._watched else "")).strip()
            except KeyboardInterrupt:
                if self._stopped or not self._watched:
                    raise
                self._stopped = True
                _note("\nCtrl-C again, Ctrl-D or /quit leaves.")

    def _edit_lines(self) -> None:
        """Arrow keys within the line, and earlier questions with Up, where Python has readline."""
        with suppress(ImportError, QuireError):
            import readline

            for question in self._recorder.questions(_MOST_PAST):
                readline.add_history(printable(" ".join(question.split())))

    def _obey(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        self._stopped = False
        try:
            match command:
                case "":
                    pass
                case "/help":
                    _note(HELP)
                case "/new":
                    self._conversation, self._leaf = NEW, ROOT
                    self._sources = self._documents = ()
                    _note("A new conversation.")
                case "/add":
                    self._read([Path(rest.strip().strip("\"'") or ".")])
                case "/sources":
                    self._read_out()
                case _ if command.startswith("/") and command[1:].isalpha() and command != COMMAND:
                    raise QuireError(f"There is no command {command}.", "/help says which there are.")
                case _:
                    self._ask(line)
        except QuireError as error:
            self._failed = True
            _note("\n".join(filter(None, (error.message, error.hint, error.details))))

    # Folders

    def _read(self, add: Sequence[Path]) -> None:
        """Reads the new folders or files, and with none what changed in the others."""
        roots = [self._session.library.add_root(path) for path in add] or self._session.library.roots()
        report = self._session.index(roots, lambda _: None)
        if add or report.changes:
            for line in render.index_lines(report):
                _note(line)

    def _read_out(self) -> None:
        if not self._sources and not self._documents:
            _note("There are no sources yet.")
        for number, hit in enumerate(self._sources, 1):
            _say(f"{_source(number, hit)}\n{hit.text}\n")
        for line in render.account_lines(self._documents, ""):
            _say(line)

    # Questions

    def _ask(self, question: str) -> None:
        place = self._conversation, self._leaf
        with self._interruptible() as stop:
            events = self._recorder.ask(
                self._session, question, self._conversation, self._leaf, should_stop=stop.is_set
            )
            for event in events:
                match event:
                    case Kept():
                        place = event.conversation, event.turn
                    case Unkept(error):
                        _note(f"This is not kept: {error.message} {error.hint}")
                    case Found():
                        found = event
                    case Forecast():
                        forecast = event
                        self._announce(forecast)
                    case Text():
                        _say(event.text, end="")
                    case Plan():
                        _note(f"Reading {render.plan_line(event)}")
                    case Part():
                        _note(render.part_line(event))
                    case Account():
                        account = event
                    case Answered() if asks_for_all(question):
                        self._finish_all(account, event)
                    case Answered():
                        self._finish(found, forecast, event)
            self._stopped = stop.is_set()
        self._conversation, self._leaf = place

    def _announce(self, forecast: Forecast) -> None:
        if self._watched and forecast.first_token_ms:
            _note(f"The first word comes in about {render.duration(forecast.first_token_ms)}.")

    def _finish(self, found: Found, forecast: Forecast, answered: Answered) -> None:
        self._sources, self._documents = found.sources, ()
        _say(_ENDINGS[answered.ending])
        for number, hit in enumerate(found.sources, 1):
            _say(_source(number, hit))
        _say(_truth(found, forecast, answered) + "\n")

    def _finish_all(self, account: Account, answered: Answered) -> None:
        self._sources, self._documents = account.sources, account.documents
        _say(_ENDINGS[answered.ending])
        for line in render.account_lines(account.documents, "/sources lists all"):
            _say(line)
        _say(f"{render.read_line(answered)}." + " /sources reads what contributed." * bool(self._sources) + "\n")


def _source(number: int, hit: Hit) -> str:
    """Source 1: notes/tea.md, lines 12 to 30: Tea, Brewing."""
    heading = f": {hit.heading.replace(' > ', ', ')}" if hit.heading else ""
    return " ".join(f"Source {number}: {render.path_from_here(hit.path)}, {_lines(hit)}{heading}.".split())


def _lines(hit: Hit) -> str:
    if hit.place:
        return hit.place
    return f"line {hit.start_line}" if hit.start_line == hit.end_line else f"lines {hit.start_line} to {hit.end_line}"


def _truth(found: Found, forecast: Forecast, answered: Answered) -> str:
    """What it took, in sentences."""
    tokens, first_ms = answered.tokens, answered.timings.first_token_ms
    if not first_ms:
        return "Nothing was computed."
    full = f", full prefill would have taken about {render.duration(forecast.full_prefill_ms)}"
    against = full if render.spared(answered) else ""
    kept = f"{tokens.kept:,} tokens were kept from before, {tokens.reused:,} reused"
    parts = [
        f"The first word came after {render.duration(found.search_ms + first_ms)}{against}",
        (kept if tokens.kept else f"{tokens.reused:,} tokens were reused")
        + f", {tokens.recomputed + tokens.fresh:,} computed",
    ]
    if speed := render.speed(answered):
        parts.append(f"{speed:.0f} tokens a second")
    return " ".join(filter(None, (". ".join(parts) + ".", render.dropped_line(forecast))))


def _say(text: str, end: str = "\n") -> None:
    sys.stdout.write(printable(text) + end)
    sys.stdout.flush()


def _note(text: str) -> None:
    sys.stderr.write(printable(text) + "\n")
    sys.stderr.flush()
