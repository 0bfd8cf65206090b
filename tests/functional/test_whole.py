"""Whole-folder questions, with a tiny model whose words mean nothing: every passage read, all accounted for."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from command_line import TEXT, json_of, run
from quire import config
from quire.conversation import Kept, Recorder, open_history
from quire.session import Session
from quire.whole import Account, Part, Plan, WholeFolder, _SoFar
from quire_engine.errors import QuireError
from quire_engine.types import Answered, Text, Timings, TokenCounts

QUESTION = "Who kept the light?"
Tiny = Callable[[str], Path]
NAMES = ("ann", "bob", "cid", "dee")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "notes"
    (place / "inner").mkdir(parents=True)
    for name in NAMES:
        (place / "inner" / f"{name}.md").write_text(f"{name} kept it. {TEXT}")
    (place / "copy.md").write_text(f"ann kept it. {TEXT}")
    (place / "bad.pdf").write_bytes(b"%PDF-1.4 broken")
    return place


@pytest.fixture
def session(tiny: Tiny, folder: Path, one_thread: None) -> Iterator[Session]:
    settings = config.load({"model": str(tiny("llama")), "context_tokens": "300", "max_tokens": "12"})
    with Session(settings) as session:
        session.index([session.library.add_root(folder)], lambda _: None)
        yield session


def states(account: Account) -> dict[str, str]:
    return {document.path.name: document.state for document in account.documents}


def test_every_passage_is_read_and_every_document_accounted_for(session: Session, folder: Path) -> None:
    whole = WholeFolder(session)
    events = list(whole.ask(QUESTION))
    plan, account, answered = events[0], events[-2], events[-1]
    assert isinstance(plan, Plan)
    assert isinstance(account, Account)
    assert isinstance(answered, Answered)
    assert dataclasses.replace(whole.weigh(QUESTION), least_ms=0.0) == dataclasses.replace(plan, least_ms=0.0)
    assert answered.tokens.context >= plan.tokens
    assert 0 < answered.timings.first_token_ms <= account.took_ms
    assert plan.leaves == ""
    parts = [event for event in events if isinstance(event, Part)]
    assert plan.parts == len(parts) == account.parts > 1
    assert plan.passages == account.passages == len(NAMES)  # the copy is not read twice
    assert [part.done for part in parts] == list(range(1, plan.parts + 1))
    assert parts[-1].left_ms == 0
    assert "".join(event.text for event in events if isinstance(event, Text))
    assert states(account).keys() == {"bad.pdf", "copy.md", *(f"{name}.md" for name in NAMES)}
    assert states(account)["copy.md"] == states(account)["ann.md"]
    assert (states(account)["bad.pdf"], account.count("unreadable")) == ("unreadable", 1)
    assert next(document.reason for document in account.documents if document.reason).startswith("damaged")
    assert {"contributed", "nothing", "unreadable"} >= set(states(account).values())
    contributed = {name for name, state in states(account).items() if state == "contributed"}
    assert {source.path.name for source in account.sources} <= contributed
    assert bool(account.sources) == bool(contributed)
    assert not account.stopped


def test_only_what_was_asked_about_is_read(session: Session, folder: Path) -> None:
    events = list(WholeFolder(session).ask(f"@bob.md {QUESTION}"))
    assert isinstance(events[-2], Account)
    assert states(events[-2]).keys() == {"bob.md"}


def test_stopped_it_says_what_was_not_reached(session: Session) -> None:
    asked = WholeFolder(session).ask(QUESTION, should_stop=lambda: stopping)
    stopping, heard = False, []
    for event in asked:
        heard.append(event)
        stopping = stopping or isinstance(event, Part)
    account, answered = heard[-2], heard[-1]
    assert isinstance(account, Account)
    assert isinstance(answered, Answered)
    assert (account.stopped, answered.ending) == (True, "stopped")
    assert account.count("not reached")
    assert account.count("unreadable") == 1


@pytest.mark.parametrize("count", [0, 1, 2, 9])
def test_partial_answers_become_one(session: Session, count: int) -> None:
    session.settings = dataclasses.replace(session.settings, context_tokens=100)
    whole = WholeFolder(session)
    partials = [f"{number} {TEXT[:60]}" for number in range(count)]
    text = "".join(event.text for event in whole._together(QUESTION, _SoFar(answers=partials), lambda: False))
    assert text
    if count < 2:
        assert text == (partials[0] if partials else "The documents say nothing about it.")


def test_an_error_after_something_was_found_costs_only_the_rest(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, parts = WholeFolder._answer, itertools.count()

    def break_at_the_second(*arguments: Any) -> str:
        if next(parts):
            raise QuireError("The server is gone.", "Is it running?")
        return f"{read(*arguments)} the keeper"

    monkeypatch.setattr(WholeFolder, "_answer", break_at_the_second)
    *_, told, account, answered = WholeFolder(session).ask(QUESTION)
    assert isinstance(told, Text)
    assert told.text.endswith("the keeper")
    assert isinstance(account, Account)
    assert isinstance(answered, Answered)
    assert (account.stopped, answered.ending) == (True, "stopped")
    unread = [document for document in account.documents if document.state == "not reached"]
    assert {document.reason for document in unread} == {"The server is gone. Is it running?"}
    with pytest.raises(QuireError, match="is gone"):
        list(WholeFolder(session).ask(QUESTION))


def test_stopped_before_it_is_put_together_all_that_was_found_is_told(session: Session) -> None:
    found = _SoFar(answers=["Ann kept it.", "Bob\nkept it."])
    [text] = WholeFolder(session)._together(QUESTION, found, lambda: True)
    assert text.text == "- Ann kept it.\n- Bob kept it."
    assert list(WholeFolder(session)._together(QUESTION, _SoFar(), lambda: True)) == []
    cut = Answered(TokenCounts(1, 0, 0, 1, 1), Timings(0, 0, 0, 0, 0, 1, 1), 1.0, "length")
    assert _SoFar(costs=[cut]).cost(0.0, 0.0, stopped=False).ending == "end", "a part that was cut gave nothing"


def test_it_is_kept_like_any_other_answer_and_what_follows_reads_its_words(session: Session) -> None:
    with Recorder() as recorder:
        events = list(recorder.ask(session, f"/all {QUESTION}"))
        kept, account = events[0], events[-2]
        assert isinstance(kept, Kept)
        assert isinstance(account, Account)
        [past] = recorder.past(kept.turn)
        assert (past.passages, past.question) == ((), QUESTION)
        following = list(recorder.ask(session, QUESTION, kept.conversation, kept.turn))
        assert isinstance(following[-1], Answered)
    with open_history() as history:
        turn, _ = history.turns(kept.conversation)
        assert (turn.question, turn.answer) == (f"/all {QUESTION}", past.answer)
        assert turn.documents == account.documents
        assert [source.text for source in turn.sources] == [source.text for source in account.sources]
        again = history.turns(history.import_json(history.export_json(kept.conversation)))[0]
        assert again.documents == account.documents
        assert "bad.pdf `: unreadable (damaged" in history.export_markdown(kept.conversation)


def test_an_answer_too_long_for_its_group_still_ends(session: Session) -> None:
    session.settings = dataclasses.replace(session.settings, context_tokens=64)
    groups = WholeFolder(session)._groups([TEXT, TEXT * 2, TEXT])
    assert list(itertools.chain(*groups)) == [TEXT, TEXT * 2, TEXT]
    assert len(groups) == 2


def test_there_has_to_be_a_question_and_something_to_read(session: Session, tmp_path: Path) -> None:
    with pytest.raises(QuireError, match="no question"):
        next(WholeFolder(session).ask(" "))
    with pytest.raises(QuireError, match="nothing to read"):
        next(WholeFolder(session).ask(QUESTION, tmp_path / "elsewhere"))


def test_what_json_gives_is_documented(session: Session, tiny: Tiny) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "cli.md").read_text()
    found, state = json_of("search", "bob kept"), json_of("status", "--model", tiny("llama"))
    for command, keys in {"search": {*found, *found["hits"][0]}, "status": {*state, *state["skipped"][0]}}.items():
        section = page.partition(f"## quire {command}\n")[2].partition("\n## ")[0]
        assert [key for key in keys if not re.search(rf"\b{key}\b", section)] == [], command


def test_the_command_line_searches_and_asks_all(
    session: Session, folder: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    found = json_of("search", "bob kept", "--in", "inner")
    assert Path(found["hits"][0]["path"]).name == "bob.md"
    shown = run("search", "bob kept", "-n", "1")
    assert shown.exit_code == 0
    assert "inner/bob.md:1-1" in shown.stdout
    assert "Nothing was found" in run("search", "xylophone").stdout
    small = ("--model", tiny("llama"), "--context-tokens", "300", "--max-tokens", "8")
    answer = json_of("ask", "--all", QUESTION, *small)
    assert len(answer["documents"]) == len(NAMES) + 2
    assert answer["passages_read"] == answer["passages"] == len(NAMES)
    assert {"answer", "sources", "parts", "took_ms", "stopped", "tokens", "predicted", "leaves", "model"} <= set(answer)
    told = run("ask", "Who is named in all files?", "--in", "inner/cid.md", *small)
    assert told.exit_code == 0, told.output
    assert "inner/cid.md" in told.stdout.splitlines()[-1]
