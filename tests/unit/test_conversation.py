"""What is asked and answered stands in the history, whatever happens meanwhile; on a real SQLite file."""

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire import conversation, paths
from quire.conversation import Kept, Recorder, Tree, Unkept, exchanges, open_history, open_line
from quire.history import ROOT, UNMEASURED, Turn
from quire.library import Hit
from quire.session import Found
from quire_engine.errors import Aborted, QuireError
from quire_engine.types import Answered, Event, Exchange, Forecast, Text, Timings, TokenCounts

HITS = (
    Hit("a", "Steep it.", 3, Path("/d/tea.md"), 1, 2, "Tea", 2.5),
    Hit("b", "Boil.", 1, Path("/d/b.md"), 4, 4, "", 1.0),
)
FORECAST = Forecast(1000, 10, 0.15, "", 900.0, 5000.5)
ANSWERED = Answered(TokenCounts(1000, 850, 150, 20, 64), Timings(1.0, 2.0, 3.0, 4.0, 5.0, 15.0, 2000.25), 0.15, "end")


class Teller:
    """A session that tells these events, and what it was asked."""

    def __init__(self, *events: Found | Event | BaseException | Callable[[], object]) -> None:
        self.events = events or (Found(HITS, 12.5), FORECAST, Text("Four "), Text("minutes."), ANSWERED)
        self.engine = SimpleNamespace(model_name="m")
        self.heard: list[tuple[str, tuple[Exchange, ...]]] = []

    def ask(
        self, question: str, within: object, should_stop: object, history: Sequence[Exchange]
    ) -> Iterator[Found | Event]:
        self.heard.append((question, tuple(history)))
        for event in self.events:
            if isinstance(event, BaseException):
                raise event
            elif callable(event):
                event()
            else:
                yield event


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    with Recorder() as recorder:
        yield recorder


def ask(recorder: Recorder, session: Any, question: str = "How long?", at: tuple[int, int] = (0, 0)) -> list[Any]:
    return list(recorder.ask(session, question, *at))


def stored(turn: int) -> Turn:
    with open_history() as history:
        return history.turn(turn)


def test_a_turn_is_kept_as_it_was_told(recorder: Recorder) -> None:
    session = Teller()
    kept, *told = ask(recorder, session)
    assert tuple(told) == session.events
    turn = stored(kept.turn)
    assert kept == Kept(turn.conversation, turn.id, (turn.id,))
    assert (turn.question, turn.answer, turn.ending, turn.model) == ("How long?", "Four minutes.", "end", "m")
    assert [(s.path, s.text, s.score) for s in turn.sources] == [(h.path, h.text, h.score) for h in HITS]
    assert (turn.truth.search_ms, turn.truth.predicted, turn.truth.tokens) == (12.5, FORECAST, ANSWERED.tokens)


def test_the_next_question_comes_with_the_line_before_it(recorder: Recorder) -> None:
    session = Teller()
    first = ask(recorder, session)[0]
    second = ask(recorder, session, "Why?", (first.conversation, first.turn))[0]
    branch = ask(recorder, session, "Who?", (first.conversation, first.turn))[0]
    ask(recorder, session, "When?", (first.conversation, second.turn))
    assert branch.siblings == (second.turn, branch.turn)
    past = Exchange(("Steep it.", "Boil."), "How long?", "Four minutes.")
    why = Exchange(("Steep it.", "Boil."), "Why?", "Four minutes.")
    assert [history for _, history in session.heard] == [(), (past,), (past,), (past, why)]


def test_the_question_is_kept_before_it_is_answered_and_the_answer_while_it_grows(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversation, "_KEEP_SECONDS", 0.0)
    seen: list[Turn] = []

    def look() -> None:
        with open_history() as history:
            seen.extend(history.turns(history.conversations(1)[0].id))

    ask(recorder, Teller(look, Found(HITS, 1.0), FORECAST, Text("Fo"), look, Text("ur"), ANSWERED))
    assert [(t.question, t.answer, t.ending, len(t.sources)) for t in seen] == [
        ("How long?", "", "lost", 0),
        ("How long?", "Fo", "lost", 2),
    ]


def test_a_failure_takes_the_question_back_and_text_stays(recorder: Recorder) -> None:
    trouble = QuireError("Nothing matches.")
    with pytest.raises(QuireError, match="Nothing matches"):
        ask(recorder, Teller(trouble))
    with open_history() as history:
        assert history.conversations(9) == []
    first = ask(recorder, Teller())[0]
    at = first.conversation, first.turn
    for session in (Teller(trouble), Teller(ZeroDivisionError())):
        with pytest.raises((QuireError, ZeroDivisionError)):
            ask(recorder, session, "Why?", at)
    with open_history() as history:
        assert [t.id for t in history.turns(first.conversation)] == [first.turn]
        assert history.conversation(first.conversation).leaf == first.turn
    with pytest.raises(QuireError):
        ask(recorder, Teller(Found(HITS, 1.0), Text("Because "), trouble), "Why?", at)
    with open_history() as history:
        *_, why = history.turns(first.conversation)
    assert (why.question, why.answer, why.ending) == ("Why?", "Because ", "lost")


def test_what_others_follow_is_not_taken_back(recorder: Recorder) -> None:
    first = ask(recorder, Teller())[0]
    second = ask(recorder, Teller(), "Why?", (first.conversation, first.turn))[0]
    with open_history() as history:
        with pytest.raises(QuireError):
            history.take_back(first.turn)
        assert [t.id for t in history.turns(first.conversation)] == [first.turn, second.turn]
        history.take_back(second.turn)
        assert history.conversation(first.conversation).leaf == first.turn
        history.take_back(first.turn)
        assert (history.conversations(9), history.search("why", 9)) == ([], [])


@pytest.mark.parametrize("end", [Aborted(), KeyboardInterrupt()])
def test_leaving_keeps_the_question(recorder: Recorder, end: BaseException) -> None:
    with pytest.raises(type(end)):
        ask(recorder, Teller(Found(HITS, 1.0), end))
    with open_history() as history:
        (turn,) = history.turns(history.conversations(1)[0].id)
    assert (turn.question, turn.answer, turn.ending) == ("How long?", "", "lost")


def test_who_stops_listening_at_the_end_loses_nothing(recorder: Recorder) -> None:
    session: Any = Teller()
    events = recorder.ask(session, "How long?")
    kept = next(events)
    assert isinstance(kept, Kept)
    assert any(isinstance(event, Answered) for event in events)
    del events
    assert stored(kept.turn).ending == "end"


def test_a_conversation_that_was_deleted_elsewhere(recorder: Recorder) -> None:
    first = ask(recorder, Teller())[0]

    def delete() -> None:
        with open_history() as history:
            history.delete(first.conversation)

    at = first.conversation, first.turn
    _, unkept, answered = ask(recorder, Teller(Text("x"), delete, ANSWERED), "Why?", at)[1:]
    assert isinstance(unkept, Unkept)
    assert "deleted in another window; the answer is not kept" in unkept.error.message
    assert answered == ANSWERED
    session = Teller()
    with pytest.raises(QuireError, match="deleted in another window"):
        ask(recorder, session, "Why?", at)
    assert session.heard == []


def test_without_a_history_there_is_still_an_answer(recorder: Recorder) -> None:
    (paths.data_dir() / "history.sqlite").write_bytes(b"no database at all, and longer than its header" * 99)
    unkept, *told = ask(recorder, session := Teller())
    assert isinstance(unkept, Unkept)
    assert "damaged" in unkept.error.message
    assert tuple(told) == session.events


def turns_of(parents: Sequence[int]) -> list[Turn]:
    now = datetime.now(UTC)
    return [Turn(i, 1, parent, f"q{i}", "", "lost", (), UNMEASURED, "m", now) for i, parent in enumerate(parents, 1)]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=12))
def test_the_newest_leaf_is_below(choices: list[int]) -> None:
    parents = [choice % (number + 1) for number, choice in enumerate(choices)]
    tree = Tree(turns_of(parents))
    for turn in range(1, len(parents) + 1):
        assert turn in tree.siblings(turn)
        assert {parents[s - 1] for s in tree.siblings(turn)} == {parents[turn - 1]}
        through = [leaf for leaf in range(1, len(parents) + 1) if turn in [t.id for t in tree.line(leaf)]]
        assert tree.newest_below(turn) == max(through)
        assert tree.newest_below(turn) not in parents, "a leaf"
    assert tree.newest_below(ROOT) == len(parents)
    assert tree.line(ROOT) == []


def test_opening_a_branch_makes_it_the_place_to_go_on(recorder: Recorder) -> None:
    session = Teller()
    first = ask(recorder, session)[0]
    at = first.conversation, first.turn
    old, new = ask(recorder, session, "Why?", at)[0], ask(recorder, session, "Who?", at)[0]
    deep = ask(recorder, session, "When?", (first.conversation, old.turn))[0]
    with open_history() as history:
        line = open_line(history, first.conversation, new.turn)
        assert [t.question for t in line.turns] == ["How long?", "Who?"]
        assert line.siblings == ((first.turn,), (old.turn, new.turn))
        assert open_line(history, first.conversation) == line
        assert open_line(history, first.conversation, old.turn).turns[-1].id == deep.turn
        assert history.conversation(first.conversation).leaf == deep.turn


def test_a_question_without_an_answer_is_not_told_to_the_model() -> None:
    assert exchanges(turns_of([ROOT, 1])) == ()
