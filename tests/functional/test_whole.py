"""Whole-folder questions, with a tiny model whose words mean nothing: every passage read, all accounted for."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from command_line import TEXT, json_of, run
from quire import config
from quire.session import Session
from quire.whole import Account, Part, Plan, WholeFolder
from quire_engine.errors import QuireError
from quire_engine.types import Text

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
    events = list(WholeFolder(session).ask(QUESTION))
    plan, account = events[0], events[-1]
    assert isinstance(plan, Plan)
    assert isinstance(account, Account)
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
    assert not account.stopped


def test_only_what_was_asked_about_is_read(session: Session, folder: Path) -> None:
    events = list(WholeFolder(session).ask(f"@bob.md {QUESTION}"))
    assert isinstance(events[-1], Account)
    assert states(events[-1]).keys() == {"bob.md"}


def test_stopped_it_says_what_was_not_reached(session: Session) -> None:
    asked = WholeFolder(session).ask(QUESTION, should_stop=lambda: stopping)
    stopping = False
    for event in asked:
        stopping = stopping or isinstance(event, Part)
    assert isinstance(event, Account)
    assert event.stopped
    assert event.count("not reached")
    assert event.count("unreadable") == 1


@pytest.mark.parametrize("count", [0, 1, 2, 9])
def test_partial_answers_become_one(session: Session, count: int) -> None:
    session.settings = dataclasses.replace(session.settings, context_tokens=100)
    whole = WholeFolder(session)
    partials = [f"{number} {TEXT[:60]}" for number in range(count)]
    text = "".join(event.text for event in whole._together(QUESTION, partials, lambda: False))
    assert text
    if count < 2:
        assert text == (partials[0] if partials else "The documents say nothing about it.")


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
    told = run("ask", "Who is named in all files?", "--in", "inner/cid.md", *small)
    assert told.exit_code == 0, told.output
    assert "inner/cid.md" in told.stdout.splitlines()[-1]
