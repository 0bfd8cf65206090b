"""Finding: rankings fused, near copies told apart, ties by what is cached, neighbours, and bounded work."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from quire import retrieval, whole, word_search
from quire.chunking import Passage
from quire.commands.search import snippet
from quire.library import Chunk, Hit, Library, StoredDocument, Within
from quire.retrieval import Retriever, fused, told_apart

LONG = " ".join(f"{a}{b}" for a in "bcdfghjk" for b in ("alder", "birch", "cedar", "elm", "fir"))


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path / "index.sqlite")


def add(library: Library, path: str, *texts: str) -> None:
    passages = [Passage(text, len(text.split()), i + 1, i + 1, "") for i, text in enumerate(texts)]
    library.replace_document(StoredDocument(Path(path), 1, 1, path, "s"), passages)


def hit(text: str, score: float = 1.0) -> Hit:
    return Hit(text, text, 1, Path("/d/a.md"), 1, 1, "", score)


def names(hits: Sequence[Hit]) -> list[str]:
    return [hit.text for hit in hits]


def test_fusing_prefers_what_two_rankings_agree_on() -> None:
    a, b, c = hit("a"), hit("b"), hit("c")
    found = fused([[a, b], [c, b]])
    assert names(found) == ["b", "a", "c"]
    assert found[0].score == pytest.approx(2 / 62)
    assert names(fused([[a, b, c]])) == ["a", "b", "c"]


def test_another_ranking_brings_what_words_do_not_find(library: Library) -> None:
    add(library, "/d/a.md", "the cat sat")
    add(library, "/d/b.md", "a feline rested")

    class Meaning:
        def nearest(self, question: str, limit: int, within: Within) -> Sequence[Hit]:
            [other] = library.search("feline", 1)
            return [other]

    assert names(Retriever(library, [Meaning()]).search("cat", 5).hits) == ["the cat sat", "a feline rested"]


def test_near_copies_come_last_and_numbers_tell_apart() -> None:
    copy, later = hit(f"{LONG} oak"), hit(f"{LONG} 2027")
    hits, repeats = told_apart([hit(LONG), copy, later, hit("something else")], 9)
    assert (names(hits), names(repeats)) == ([LONG, later.text, "something else"], [copy.text])
    assert names(told_apart([hit(LONG), copy, later], 1)[0]) == [LONG]


def test_copies_do_not_crowd_out_others(library: Library) -> None:
    for number, ending in enumerate(("oak", "yew", "ash")):
        add(library, f"/d/{number}.md", f"kiwi {LONG} {ending}")
    add(library, "/d/other.md", f"kiwi {' '.join(reversed(LONG.split()))}")
    found = Retriever(library).search("kiwi", 2)
    assert {found.hits[0].path.name, found.hits[1].path.name} & {"other.md"}
    assert len(found.in_order) == len({hit.chunk_id for hit in found.in_order})


def test_what_is_cached_goes_first_among_equals_only(library: Library) -> None:
    add(library, "/d/a.md", "kiwi plum one")
    add(library, "/d/b.md", "kiwi plum two")
    add(library, "/d/c.md", "kiwi and much else that is longer than the others here")
    plain = Retriever(library).search("kiwi plum", 5)
    assert (names(plain.hits)[:2], plain.cached_first) == (["kiwi plum one", "kiwi plum two"], 0)
    cached = Retriever(library, is_cached=lambda text: text != "kiwi plum one").search("kiwi plum", 5)
    assert (names(cached.hits)[:2], cached.cached_first) == (["kiwi plum two", "kiwi plum one"], 1)
    assert cached.hits[2].path.name == "c.md"  # stored too, but not as good
    everything = Retriever(library, is_cached=lambda _: True).search("kiwi plum", 5)
    assert (everything.hits, everything.cached_first) == (plain.hits, 0)


def test_a_short_passage_brings_its_neighbours(library: Library) -> None:
    add(library, "/d/a.md", "before", "the kiwi", "after", "far away")
    found = Retriever(library).search("kiwi", 5)
    assert (names(found.hits), names(found.neighbours)) == (["the kiwi"], ["before", "after"])
    assert names(found.in_order) == ["the kiwi", "before", "after"]
    add(library, "/d/a.md", "before", "kiwi " * 200, "after")
    assert Retriever(library).search("kiwi", 5).neighbours == ()


def test_nothing_is_found_for_nothing(library: Library) -> None:
    add(library, "/d/a.md", "the kiwi")
    assert Retriever(library).search("?!", 5).in_order == []
    assert library.search("kiwi", 5, []) == []


@pytest.fixture
def crowded(library: Library, monkeypatch: pytest.MonkeyPatch) -> Library:
    """A library in which only five places may be scored."""
    monkeypatch.setattr(word_search, "_MOST_SCORED", 5)
    monkeypatch.setattr(word_search, "_MOST_JUDGED", 3)
    for number in range(20):
        add(library, f"/d/{number:02}.md", f"river boat {'engine' if number % 2 else 'sail'} number{number}")
    add(library, "/e/last.md", "river engine heron")
    add(library, "/e/first.md", "heron stands far away")
    return library


def test_common_words_only_decide_among_what_rare_ones_find(crowded: Library) -> None:
    found = crowded.search("Is there a heron by the river with an engine?", 9)
    assert [hit.path.name for hit in found] == ["last.md", "first.md"]
    assert found[0].score > found[1].score


def test_common_words_alone_have_to_stand_together(crowded: Library) -> None:
    found = crowded.search("river heron9 engine", 30)
    assert found
    assert all("river" in hit.text and "engine" in hit.text for hit in found)
    assert crowded.search("river", 3)


def test_a_word_that_is_rare_elsewhere_does_not_hide_what_a_folder_has(crowded: Library) -> None:
    assert crowded.search("heron river", 30, Path("/d"))


@pytest.mark.parametrize("question", ["river AND", 'a "b', "NEAR(river)", "*", "", "-river", "ri\0ver"])
def test_a_question_is_never_syntax(crowded: Library, question: str) -> None:
    crowded.search(question, 5)


def test_a_snippet_is_one_line_around_the_word() -> None:
    text = "filler\n" * 100 + "the kiwi \x1b[31mis red\n" + "more words\n" * 100
    line = snippet(text, ["kiwi"])
    assert "kiwi" in line
    assert not any(ord(character) < 32 for character in line)
    assert line.startswith("… ")
    assert line.endswith(" …")
    assert snippet("short text", ["none"]) == "short text"


@pytest.mark.parametrize(
    ("answer", "given"),
    [
        ("The boiler was serviced by Ann.", {"ann"}),
        ("Nothing.", set()),
        ("nothing is said about it", set()),
        ("The documents do not mention it.", set()),
        ("It is purple.", set()),
        ("Ann and Bob, plumbers", {"ann", "bob"}),
    ],
)
def test_who_an_answer_comes_from(answer: str, given: set[str]) -> None:
    part = [Chunk("ann", "Ann serviced the boiler.", 5), Chunk("bob", "Bob paints houses.", 4)]
    assert whole.drawn_from(answer, "Who serviced the boiler?", part) == given


def test_questions_that_ask_for_all() -> None:
    assert whole.asks_for_all("Which names stand in all my files?")
    assert whole.asks_for_all("Compare prices across all documents")
    assert not whole.asks_for_all("Are all files important?")
    assert whole.asks_for_all(" /all  Who?")
    assert not whole.asks_for_all("/allow it?")
    assert [whole.bare(text) for text in (" /all  Who? ", "Who, in all files?")] == ["Who?", "Who, in all files?"]


def test_as_good_is_measured_from_the_best() -> None:
    falling = [replace(hit(str(n)), score=1 - 0.004 * n) for n in range(4)]
    assert [len(group) for group in retrieval._as_good(falling)] == [2, 2]
