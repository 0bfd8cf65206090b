"""The index on a real SQLite file: storing, forgetting, searching, two processes, damage."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import sqlite_utils
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.chunking import Passage
from quire.library import Library, StoredDocument
from quire_engine.errors import QuireError


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path / "index.sqlite")


def passages(*texts: str, heading: str = "") -> list[Passage]:
    return [Passage(text, len(text.split()), i + 1, i + 1, heading) for i, text in enumerate(texts)]


def document(path: str, content: str = "c", signature: str = "s") -> StoredDocument:
    return StoredDocument(Path(path), 10, 20, content, signature)


def found(library: Library, question: str, **limits: Path | list[Path]) -> list[str]:
    return [hit.text for hit in library.search(question, 10, **limits)]


def sound(library: Library) -> bool:
    """Whether the full-text index agrees with the passages, and no chunk is an orphan."""
    db = sqlite_utils.Database(library.path)
    db.execute("INSERT INTO words (words) VALUES ('integrity-check')")
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert db.execute("PRAGMA foreign_key_check").fetchall() == []
    orphans = db.execute("SELECT count(*) FROM chunks WHERE id NOT IN (SELECT chunk FROM passages)").fetchone()
    db.close()
    return bool(orphans == (0,))


def test_what_was_stored_comes_back_after_reopening(tmp_path: Path) -> None:
    stored = document("/d/a.md")
    skipped = StoredDocument(Path("/d/b.pdf"), 0, 0, "", "", "skipped", "not supported yet: .pdf", "Save as text.")
    with Library(tmp_path / "i.sqlite") as library:
        assert len(library.replace_document(stored, passages("alpha", "beta", heading="G > W"))) == 2
        library.replace_document(skipped, [])
    with Library(tmp_path / "i.sqlite") as library:
        assert library.documents() == [stored, skipped]
        assert library.chunks_of(stored.path) == passages("alpha", "beta", heading="G > W")
        assert library.chunks_of(skipped.path) == []
        assert [(c.text, c.tokens) for c in library.all_chunks()] == [("alpha", 1), ("beta", 1)]


def test_the_same_text_in_two_files_is_one_chunk(library: Library) -> None:
    assert len(library.replace_document(document("/d/a.md"), passages("shared words", "mine"))) == 2
    assert len(library.replace_document(document("/d/b.md"), passages("shared words", "yours"))) == 1
    assert [chunk.text for chunk in library.all_chunks()] == ["shared words", "mine", "yours"]
    hits = library.search("shared", 10)
    assert [(hit.text, hit.path) for hit in hits] == [("shared words", Path("/d/a.md"))]
    library.forget(Path("/d/a.md"))
    assert [(hit.text, hit.path) for hit in library.search("shared", 10)] == [("shared words", Path("/d/b.md"))]
    assert sound(library)


def test_replacing_keeps_what_stays_and_drops_what_is_gone(library: Library) -> None:
    library.replace_document(document("/d/a.md"), passages("one", "two", "three"))
    assert len(library.replace_document(document("/d/a.md", "new"), passages("one", "deux", "three"))) == 1
    assert [chunk.text for chunk in library.all_chunks()] == ["one", "deux", "three"]
    assert found(library, "two") == []
    assert found(library, "deux") == ["deux"]
    assert sound(library)
    library.forget(Path("/d/a.md"))
    library.forget(Path("/d/never.md"))
    assert library.documents() == []
    assert library.all_chunks() == []
    assert sound(library)


def test_a_text_may_stand_twice_in_one_document(library: Library) -> None:
    assert len(library.replace_document(document("/d/a.md"), passages("x", "y", "x"))) == 2
    assert [passage.text for passage in library.chunks_of(Path("/d/a.md"))] == ["x", "y", "x"]
    assert len(library.all_chunks()) == 2


def test_a_failed_replacement_changes_nothing(library: Library) -> None:
    library.replace_document(document("/d/a.md"), passages("one"))
    broken = [*passages("two"), Passage("three", None, 1, 1, "")]  # type: ignore[arg-type]
    with pytest.raises(QuireError):
        library.replace_document(document("/d/a.md", "new"), broken)
    assert [chunk.text for chunk in library.all_chunks()] == ["one"]
    assert found(library, "one two") == ["one"]
    assert sound(library)


def test_another_tokenizer_updates_the_counts(library: Library) -> None:
    library.replace_document(document("/d/a.md"), [Passage("one", 1, 1, 1, "")])
    assert len(library.replace_document(document("/d/a.md", signature="t"), [Passage("one", 7, 1, 1, "")])) == 0
    assert library.all_chunks()[0].tokens == 7


def test_passages_are_found_by_content_and_signature(library: Library) -> None:
    library.replace_document(document("/d/a.md", "sha", "sig"), passages("one", "two"))
    assert library.passages_of_content("sha", "sig") == passages("one", "two")
    assert library.passages_of_content("sha", "other") == []
    assert library.passages_of_content("other", "sig") == []


def test_restamp_changes_the_stamp_alone(library: Library) -> None:
    library.replace_document(document("/d/a.md"), passages("one"))
    library.restamp(Path("/d/a.md"), 10, 99)
    assert library.documents() == [StoredDocument(Path("/d/a.md"), 10, 99, "c", "s")]
    assert found(library, "one") == ["one"]


def test_roots(library: Library, tmp_path: Path) -> None:
    (tmp_path / "a" / "inner").mkdir(parents=True)
    (tmp_path / "b.md").touch()
    assert library.add_root(tmp_path / "a" / ".." / "a") == tmp_path / "a"
    library.add_root(tmp_path / "a")
    library.add_root(tmp_path / "b.md")
    assert library.roots() == [tmp_path / "a", tmp_path / "b.md"]
    with pytest.raises(QuireError, match="no file or folder"):
        library.add_root(tmp_path / "missing")
    with pytest.raises(QuireError, match="was not added") as caught:
        library.remove_root(tmp_path / "a" / "inner")
    assert str(tmp_path / "a") in caught.value.hint
    with pytest.raises(QuireError, match="was not added"):
        library.remove_root(tmp_path / "other")


def test_removing_a_root_forgets_its_documents_but_not_those_of_another(library: Library, tmp_path: Path) -> None:
    inner = tmp_path / "a" / "inner"
    inner.mkdir(parents=True)
    for root in (tmp_path / "a", inner):
        library.add_root(root)
    for path in (tmp_path / "a" / "x.md", inner / "y.md", tmp_path / "ab.md"):
        library.replace_document(document(str(path)), passages(path.name, "common"))
    assert library.remove_root(tmp_path / "a") == 1
    assert [stored.path.name for stored in library.documents()] == ["y.md", "ab.md"]
    assert library.roots() == [inner]
    assert sound(library)


def test_search_ranks_stems_and_limits(library: Library) -> None:
    library.replace_document(
        document("/d/a.md"),
        passages("The cat sat on the mat.", "Cats, cats and a cat!", "Dogs were running.", "Über Café"),
    )
    assert found(library, "What about the cats?")[0] == "Cats, cats and a cat!"
    assert found(library, "run dog") == ["Dogs were running."]
    assert found(library, "uber cafe") == ["Über Café"]
    assert found(library, "unicorn") == []
    assert len(library.search("cat", 1)) == 1
    assert library.search("cat", 0) == []
    scores = [hit.score for hit in library.search("cat sat dogs", 10)]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > 0


def test_stopwords_are_dropped_unless_nothing_is_left(library: Library) -> None:
    library.replace_document(document("/d/a.md"), passages("to be or not to be", "what is the tax rate"))
    assert found(library, "what is the tax") == ["what is the tax rate"]
    assert "to be or not to be" in found(library, "to be")


def test_heading_and_file_name_are_searched(library: Library) -> None:
    library.replace_document(document("/d/a.md"), passages("nothing here", heading="Guide > Widgets"))
    library.replace_document(document("/d/tax_2024.md"), passages("other text"))
    assert found(library, "widget") == ["nothing here"]
    assert found(library, "tax") == ["other text"]


def test_a_search_can_be_limited_to_a_file_or_folder(library: Library) -> None:
    for path in ("/d/a.md", "/d/sub/b.md", "/d/sub2/c.md", "/d/%_/e.md"):
        library.replace_document(document(path), passages(f"word in {path}"))
    assert len(found(library, "word")) == 4
    assert found(library, "word", within=Path("/d/a.md")) == ["word in /d/a.md"]
    assert found(library, "word", within=Path("/d/sub")) == ["word in /d/sub/b.md"]
    assert found(library, "word", within=Path("/d/%_")) == ["word in /d/%_/e.md"]
    assert len(found(library, "word", within=Path("/"))) == 4
    assert found(library, "word", within=Path("/d/none")) == []
    both = [Path("/d/a.md"), Path("/d/sub")]
    assert sorted(found(library, "word", within=both)) == ["word in /d/a.md", "word in /d/sub/b.md"]
    assert len(found(library, "word", within=[Path(f"/d/{i}") for i in range(3000)] + both)) == 2


@pytest.mark.parametrize(
    "question",
    ['"', '""', "'", "NEAR(a b)", "a AND", "NOT", "OR OR", "text:cat", "cat*", "^cat", "(", "-cat", "{a b}:c",
     "\0cat", "cat\ud800", "?", "", "漢字", "e\u0301", "a" * 100_000,
     " ".join(f"w{i}" for i in range(20_000))],
)  # fmt: skip
def test_no_question_is_a_syntax_error(library: Library, question: str) -> None:
    library.replace_document(document("/d/a.md"), passages("the cat"))
    library.search(question, 5)


def test_operators_are_words_like_any_other(library: Library) -> None:
    library.replace_document(document("/d/a.md"), passages("the cat", "logical not gate"))
    assert found(library, '"cat" NOT (dog*') == ["the cat"]
    assert found(library, "C++/cat-like?") == ["the cat"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_any_text_can_be_asked(library: Library, question: str) -> None:
    library.search(question, 5)


def test_two_processes_start_and_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite"
    program = (
        "import sys; from pathlib import Path; from quire.library import Library, StoredDocument;"
        "from quire.chunking import Passage; library = Library(Path(sys.argv[1]));"
        "[library.replace_document(StoredDocument(Path(f'/{sys.argv[2]}/{i}'), 1, 1, 's', 's'),"
        " [Passage('shared', 1, 1, 1, ''), Passage(f'{sys.argv[2]} {i}', 2, 2, 2, '')]) for i in range(40)]"
    )
    environment = {"PYTHONPATH": ":".join(sys.path)}
    processes = [subprocess.Popen([sys.executable, "-c", program, str(path), name], env=environment) for name in "abc"]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
    with Library(path) as library:
        assert len(library.documents()) == 120
        assert len(library.all_chunks()) == 121
        assert sound(library)


def test_reading_goes_on_while_another_writes(tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite"
    failures: list[BaseException] = []

    def write(name: str) -> None:
        try:
            with Library(path) as library:
                for i in range(30):
                    library.replace_document(document(f"/{name}/{i % 5}"), passages(f"{name} word {i}"))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    with Library(path) as library:
        while any(thread.is_alive() for thread in threads):
            library.search("word", 5)
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("damage", ["garbage", "middle", "truncated"])
def test_damage_is_explained(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "index.sqlite"
    with Library(path) as library:
        library.replace_document(document("/a"), passages(*(f"word {i} " * 50 for i in range(200))))
    data = bytearray(path.read_bytes())
    if damage == "garbage":
        data = bytearray(b"this is no database" * 500)
    elif damage == "middle":
        data[4096:] = b"\xff" * (len(data) - 4096)
    else:
        del data[5000:]
    path.write_bytes(data)

    def use() -> None:
        with Library(path) as library:
            library.search("word", 5)
            library.all_chunks()
            library.replace_document(document("/b"), passages("x"))

    with pytest.raises(QuireError, match="damaged") as caught:
        use()
    assert caught.value.message == f"The index {path} is damaged."
    assert "Delete it" in caught.value.hint


def test_text_that_is_not_utf8_any_more_is_damage(library: Library) -> None:
    library.replace_document(document("/d/a.md"), passages("one"))
    db = sqlite_utils.Database(library.path)
    db.execute("UPDATE documents SET reason = CAST(x'ff' AS TEXT)")
    db.close()
    with pytest.raises(QuireError, match="damaged"):
        library.documents()


def test_what_cannot_be_opened_is_explained(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing" / "index.sqlite"):
        with pytest.raises(QuireError, match=f"The index {path} cannot be used") as caught:
            Library(path)
        assert "it is made again" in caught.value.hint


def test_an_index_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    Library(tmp_path / "i.sqlite").close()
    db = sqlite_utils.Database(tmp_path / "i.sqlite")
    db.table("_sqlite_migrations").insert({"migration_set": "quire.library", "name": "from_tomorrow", "applied_at": ""})
    db.close()
    with pytest.raises(QuireError, match=f"The index {tmp_path / 'i.sqlite'} belongs to a newer Quire"):
        Library(tmp_path / "i.sqlite")


def test_a_name_that_is_not_utf8_is_an_error_not_a_crash(library: Library) -> None:
    with pytest.raises(QuireError, match="UTF-8"):
        library.replace_document(document("/d/caf\udce9.txt"), passages("x"))
    assert library.documents() == []


def test_pins_are_kept_and_go_with_their_folder(library: Library, tmp_path: Path) -> None:
    root = library.add_root(tmp_path)
    (tmp_path / "sub").mkdir()
    inner = library.add_root(tmp_path / "sub")
    for path in (root / "a.md", inner / "b.md", root / "a.md"):
        library.pin(path)
    assert library.pins() == [root / "a.md", inner / "b.md"]
    library.remove_root(root)
    assert library.pins() == [inner / "b.md"]
    library.unpin(inner / "b.md")
    assert library.pins() == []


def test_contents_tokens_and_texts(library: Library) -> None:
    library.replace_document(document("/d/b.md"), passages("two", "one", "two"))
    library.replace_document(document("/d/a.md"), passages("one"))
    ids = {chunk.text: chunk.id for chunk in library.all_chunks()}
    assert library.contents() == {Path("/d/a.md"): (ids["one"],), Path("/d/b.md"): (ids["two"], ids["one"])}
    assert library.tokens() == {chunk.id: chunk.tokens for chunk in library.all_chunks()}
    assert library.texts([ids["two"], "gone"]) == {ids["two"]: "two"}
    assert library.texts([f"{i}" for i in range(40_000)]) == {}


def test_addresses_go_with_their_chunks(library: Library) -> None:
    library.replace_document(document("/d/a.md"), passages("one", "two"))
    one, two = (chunk.id for chunk in library.all_chunks())
    library.note_addresses("model", {one: "aa", two: "bb", "gone": "cc"})
    library.note_addresses("other", {one: "dd"})
    assert library.addresses("model") == {one: "aa", two: "bb"}
    library.replace_document(document("/d/a.md", "new"), passages("one"))
    assert (library.addresses("model"), library.addresses("other")) == ({one: "aa"}, {one: "dd"})
