"""Indexing real folders, and caching with an engine that only takes notes."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from quire.config import Settings
from quire.indexer import IndexProgress, IndexReport, index_roots
from quire.library import Library

SETTINGS = Settings(chunk_tokens=32)


class Folder:
    """A folder with its index; counts how many texts the tokenizer was given."""

    def __init__(self, base: Path) -> None:
        self.root = base / "root"
        self.root.mkdir()
        self.library = Library(base / "index.sqlite")
        self.library.add_root(self.root)
        self.counted = 0

    def count_tokens(self, text: str) -> int:
        self.counted += 1
        return len(text.split())

    def write(self, name: str, text: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.stat().st_mtime_ns if path.exists() else 0
        path.write_text(text)
        if path.stat().st_mtime_ns <= before:
            os.utime(path, ns=(before + 1, before + 1))
        return path

    def index(self, settings: Settings = SETTINGS, tokenizer: str = "t") -> IndexReport:
        self.counted = 0
        roots = self.library.roots()
        return index_roots(self.library, roots, self.count_tokens, tokenizer, settings, lambda _: None)

    def kinds(self, report: IndexReport) -> list[tuple[str, str]]:
        return [(change.path.name, change.kind) for change in report.changes]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def prose(seed: int, paragraphs: int = 12) -> str:
    return "\n\n".join(f"Paragraph {seed} {i} " + "word " * 15 for i in range(paragraphs))


def test_the_first_pass_adds_and_the_second_reads_nothing(folder: Folder) -> None:
    folder.write("a.md", prose(1))
    folder.write("sub/b.py", prose(2))
    report = folder.index()
    assert folder.kinds(report) == [("a.md", "added"), ("b.py", "added")]
    assert report.chunks_new == report.chunks_total == len(folder.library.all_chunks()) > 4
    report = folder.index()
    assert (report.changes, report.unchanged, folder.counted) == ((), 2, 0)


def test_a_changed_file_costs_its_changed_chunks(folder: Folder) -> None:
    folder.write("a.md", prose(1))
    folder.index()
    folder.write("a.md", prose(1).replace("Paragraph 1 6", "Changed 1 6"))
    report = folder.index()
    [change] = report.changes
    assert change.kind == "changed"
    assert 1 <= change.chunks_new <= 3 < change.chunks_total


def test_a_touched_file_is_unchanged_and_is_not_read_again(folder: Folder) -> None:
    path = folder.write("a.md", prose(1))
    folder.index()
    os.utime(path, ns=(1, 1))
    report = folder.index()
    assert (report.changes, report.unchanged, folder.counted) == ((), 1, 0)
    assert folder.library.documents()[0].mtime_ns == 1


def test_a_moved_file_costs_nothing(folder: Folder) -> None:
    path = folder.write("a.md", prose(1))
    folder.index()
    before = folder.library.all_chunks()
    path.rename(folder.root / "b.md")
    report = folder.index()
    assert folder.kinds(report) == [("b.md", "moved")]
    assert (report.chunks_new, folder.counted) == (0, 0)
    assert folder.library.all_chunks() == before
    assert [document.path.name for document in folder.library.documents()] == ["b.md"]


def test_a_copied_file_costs_nothing(folder: Folder) -> None:
    folder.write("a.md", prose(1))
    folder.index()
    folder.write("b.md", prose(1))
    report = folder.index()
    assert folder.kinds(report) == [("b.md", "added")]
    assert (report.chunks_new, folder.counted) == (0, 0)


def test_a_file_renamed_to_another_markup_is_cut_again(folder: Folder) -> None:
    path = folder.write("a.txt", "# Title\n\nbody")
    folder.index()
    path.rename(folder.root / "a.md")
    assert folder.kinds(folder.index()) == [("a.md", "moved")]
    assert folder.library.chunks_of(folder.root / "a.md")[0].heading == "Title"


def test_a_deleted_file_is_forgotten(folder: Folder) -> None:
    folder.write("a.md", prose(1)).unlink()
    folder.write("b.md", prose(2))
    folder.write("c.md", prose(2))
    folder.index()
    (folder.root / "b.md").unlink()
    assert folder.kinds(folder.index()) == [("b.md", "removed")]
    assert [document.path.name for document in folder.library.documents()] == ["c.md"]
    assert folder.library.search("paragraph", 3)


def test_one_of_two_equal_vanished_files_is_moved_the_other_removed(folder: Folder) -> None:
    for name in ("a.md", "b.md"):
        folder.write(name, prose(1))
    folder.index()
    (folder.root / "a.md").rename(folder.root / "c.md")
    (folder.root / "b.md").unlink()
    assert sorted(kind for _, kind in folder.kinds(folder.index())) == ["moved", "removed"]


def test_another_tokenizer_or_chunk_size_cuts_again(folder: Folder) -> None:
    folder.write("a.md", prose(1))
    folder.index()
    assert folder.kinds(folder.index(tokenizer="u")) == [("a.md", "cut anew")]
    report = folder.index(replace(SETTINGS, chunk_tokens=64), tokenizer="u")
    assert folder.kinds(report) == [("a.md", "cut anew")]
    assert report.chunks_new > 0


def test_unreadable_files_are_listed_each_time_and_come_in_once_readable(folder: Folder) -> None:
    folder.write("paper.doc", "x")
    folder.write("empty.txt", "")
    for _ in range(2):
        report = folder.index()
        assert [(s.path.name, s.reason) for s in report.skipped] == [
            ("empty.txt", "empty"),
            ("paper.doc", "not supported: .doc"),
        ]
        assert all(skipped.remedy for skipped in report.skipped)
    assert [document.state for document in folder.library.documents()] == ["skipped", "skipped"]
    folder.write("empty.txt", "text at last")
    assert folder.kinds(folder.index()) == [("empty.txt", "added")]
    folder.write("empty.txt", "now\0binary")
    assert folder.index().skipped[0].reason == "a binary file"
    assert folder.library.all_chunks() == []


def test_the_limit_on_file_size_comes_from_the_settings(folder: Folder) -> None:
    folder.write("a.txt", ("word " * 40 + "\n") * 7_000)
    assert "too large" in folder.index(Settings(max_file_mb=1)).skipped[0].reason
    assert folder.kinds(folder.index(Settings(max_file_mb=2))) == [("a.txt", "added")]


def test_a_name_that_is_not_utf8_is_listed(folder: Folder) -> None:
    Path(os.fsdecode(os.fsencode(folder.root) + b"/caf\xe9.txt")).write_text("x")
    assert "name" in folder.index().skipped[0].reason


def test_a_missing_root_keeps_its_documents(folder: Folder) -> None:
    folder.write("a.md", prose(1))
    folder.index()
    folder.root.rename(folder.root.with_name("away"))
    report = folder.index()
    assert (report.changes, [s.path for s in report.skipped]) == ((), [folder.root])
    assert len(folder.library.documents()) == 1


def test_a_folder_that_refuses_to_be_listed_keeps_its_documents(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.write("closed/a.md", prose(1))
    folder.index()
    listing = os.scandir

    def scandir(path: str) -> object:
        if path.endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return listing(path)

    monkeypatch.setattr(os, "scandir", scandir)
    report = folder.index()
    assert report.changes == ()
    assert [skipped.path.name for skipped in report.skipped] == ["closed"]
    assert folder.library.all_chunks()
    monkeypatch.undo()
    assert folder.index().changes == ()
    assert [document.path.name for document in folder.library.documents()] == ["a.md"]


def test_indexing_one_root_leaves_the_others_alone(folder: Folder, tmp_path: Path) -> None:
    inner = folder.root / ".notes"
    folder.write(".notes/n.md", prose(3))
    folder.write("a.md", prose(1))
    folder.library.add_root(inner)
    folder.index()
    assert len(folder.library.documents()) == 2
    report = index_roots(folder.library, [folder.root], folder.count_tokens, "t", SETTINGS, lambda _: None)
    assert report.changes == ()
    assert len(folder.library.documents()) == 2


def test_progress_counts_up_to_all_files(folder: Folder) -> None:
    for i in range(5):
        folder.write(f"{i}.md", prose(i))
    seen: list[IndexProgress] = []
    index_roots(folder.library, [folder.root], folder.count_tokens, "t", SETTINGS, seen.append)
    assert [(p.done, p.total, p.path.name) for p in seen] == [(i + 1, 5, f"{i}.md") for i in range(5)]


def test_new_chunks_are_told_file_by_file(folder: Folder) -> None:
    told: list[Mapping[str, str]] = []

    def index() -> list[frozenset[str]]:
        told.clear()
        index_roots(folder.library, [folder.root], len, "t", SETTINGS, lambda _: None, told.append)
        texts = {chunk.id: chunk.text for chunk in folder.library.all_chunks()}
        assert all(texts[chunk] == text for new in told for chunk, text in new.items())
        return [frozenset(new) for new in told]

    folder.write("a.md", prose(1))
    folder.write("b.md", prose(2))
    first = index()
    assert [bool(new) for new in first] == [True, True]
    assert frozenset().union(*first) == folder.library.tokens().keys()
    assert index() == []
    folder.write("b.md", prose(2) + "\n\nOne more.")
    [new] = index()
    assert new
    assert new.isdisjoint(frozenset().union(*first))


# Named paths


def index_paths(folder: Folder, *names: str) -> IndexReport:
    paths = [folder.root / name for name in names]
    return index_roots(folder.library, paths, folder.count_tokens, "t", SETTINGS, lambda _: None)


def test_only_the_named_paths_are_looked_at(folder: Folder) -> None:
    for name in ("a.md", "sub/b.md", "sub/deep/c.md", "other/d.md"):
        folder.write(name, prose(len(name)))
    folder.index()
    folder.write("a.md", prose(50))
    folder.write("sub/deep/c.md", prose(51))
    folder.write("sub/new.md", prose(52))
    (folder.root / "other" / "d.md").unlink()
    report = index_paths(folder, "sub")
    assert sorted(folder.kinds(report)) == [("c.md", "changed"), ("new.md", "added")]
    assert report.unchanged == 1
    assert folder.kinds(index_paths(folder, "a.md")) == [("a.md", "changed")]
    assert folder.kinds(index_paths(folder, "other/d.md", "never/was.md")) == [("d.md", "removed")]
    assert folder.index().changes == ()


def test_what_a_change_costs(folder: Folder) -> None:
    folder.write("a.md", prose(1))
    before = {chunk.id for chunk in (folder.index(), folder.library.all_chunks())[1]}
    folder.write("a.md", prose(1).replace("Paragraph 1 6", "Changed 1 6"))
    [change] = index_paths(folder, "a.md").changes
    new = [chunk for chunk in folder.library.all_chunks() if chunk.id not in before]
    assert change.new == {chunk.id for chunk in new}
    assert (change.chunks_new, change.tokens_new) == (len(new), sum(chunk.tokens for chunk in new))


def test_a_renamed_folder_is_found_by_its_two_names(folder: Folder) -> None:
    folder.write("old/a.md", prose(1))
    folder.index()
    (folder.root / "old").rename(folder.root / "new")
    report = index_paths(folder, "old", "new")
    assert (folder.kinds(report), report.chunks_new) == ([("a.md", "moved")], 0)
    assert [document.path for document in folder.library.documents()] == [folder.root / "new" / "a.md"]


def test_a_named_path_that_the_walk_leaves_out_stays_out(folder: Folder) -> None:
    for name in (".git/config", ".hidden.md", "node_modules/x/r.md", "env/pyvenv.cfg", "env/lib/x.py"):
        folder.write(name, "text")
    (folder.root / "up").symlink_to(folder.root)
    folder.write("a.md", "text")
    names = [".git/config", ".hidden.md", "node_modules/x/r.md", "node_modules", "env", "env/lib/x.py", "up", "up/a.md"]
    report = index_paths(folder, *names)
    assert (report.changes, report.skipped) == ((), ())


def test_a_named_path_of_a_root_that_is_away_keeps_its_document(folder: Folder) -> None:
    folder.write("a.md", prose(1))
    folder.index()
    folder.root.rename(folder.root.with_name("away"))
    report = index_paths(folder, "a.md")
    assert (report.changes, [s.path for s in report.skipped]) == ((), [folder.root])


def test_a_named_path_does_not_touch_another_root_inside(folder: Folder) -> None:
    inner = folder.root / "sub" / ".notes"
    folder.write("sub/.notes/n.md", prose(3))
    folder.library.add_root(inner)
    folder.index()
    assert index_paths(folder, "sub").changes == ()
    (inner / "n.md").unlink()
    assert folder.kinds(index_paths(folder, "sub", "sub/.notes/n.md")) == [("n.md", "removed")]


def test_a_document_that_cannot_be_read_any_more_is_lost(folder: Folder) -> None:
    folder.write("a.md", prose(1))
    folder.index()
    folder.write("a.md", "now\0binary")
    for lost in (True, False):
        assert [s.lost for s in index_paths(folder, "a.md").skipped] == [lost]
