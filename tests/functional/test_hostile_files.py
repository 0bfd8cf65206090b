"""A folder of files that were made to do harm, in every format: each is listed with its reason, and the rest is read.

Nothing crashes, hangs, or lets out of the folder what lies beside it.
"""

import gzip
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import file_makers as make
from quire import indexer
from quire.config import Settings
from quire.indexer import IndexReport, index_roots
from quire.library import Library
from quire.parsing import Limits, Parser

SECRET = "the-treasure-lies-under-the-oak"
SETTINGS = Settings(chunk_tokens=64, max_file_mb=8)
GOOD = "Words that anybody may read."


class Folder:
    """A folder of files with an index."""

    def __init__(self, base: Path) -> None:
        self.root = base / "root"
        self.root.mkdir()
        self.secret = base / "secret.txt"
        self.secret.write_text(SECRET)
        self.library = Library(base / "index.sqlite")
        self.library.add_root(self.root)

    def write(self, name: str, data: bytes | str) -> None:
        (self.root / name).write_bytes(data.encode() if isinstance(data, str) else data)

    def index(self) -> IndexReport:
        roots = self.library.roots()
        return index_roots(self.library, roots, lambda text: len(text) // 4 + 1, "t", SETTINGS, lambda _: None)

    def skipped(self) -> dict[str, str]:
        return {skipped.path.name: skipped.reason for skipped in self.index().skipped}

    def text(self) -> str:
        return "\n".join(chunk.text for chunk in self.library.all_chunks())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Folder]:
    # Short limits: what runs into them here would run into longer ones too.
    monkeypatch.setattr(indexer, "Parser", lambda: Parser(Limits(cpu_s=4, wall_s=60, memory_bytes=1 << 30)))
    folder = Folder(tmp_path)
    yield folder
    folder.library.close()


def _deep_json() -> bytes:
    return b'{"cells": ' + b"[" * 500_000 + b"]" * 500_000 + b"}"


def _deep_mail() -> bytes:
    parts = b"".join(b'Content-Type: multipart/mixed; boundary="%d"\n\n--%d\n' % (i, i) for i in range(3000))
    return b"Subject: deep\n" + parts + b"Content-Type: text/plain\n\nx"


def _bomb(name: str, megabytes: int = 64) -> bytes:
    return make.zipped({name: b"0" * (megabytes << 20)})


def _with_part(document: bytes, name: str, data: bytes | str) -> bytes:
    return make.zipped({**make.unzipped(document), name: data})


def _huge_row() -> bytes:
    """A sheet whose only row says that it is the last one there can be."""
    data = make.unzipped(make.sheets({"A": [["x"]]}))
    sheet = data["xl/worksheets/sheet1.xml"].replace(b'r="1"', b'r="1048576"').replace(b'"A1"', b'"XFD1048576"')
    return make.zipped({**data, "xl/worksheets/sheet1.xml": sheet})


def _pdf_bomb() -> bytes:
    """A page whose text is a stream that unpacks to very much more."""
    packed = zlib.compress(b"(x) Tj\n" * 12_000_000, 9)
    head = b"%PDF-1.4\n1 0 obj\n<< /Type /Catalog /Pages 2 0 R >>\nendobj\n"
    head += b"2 0 obj\n<< /Type /Pages /Kids [3 0 R] /Count 1 >>\nendobj\n"
    head += b"3 0 obj\n<< /Type /Page /Parent 2 0 R /MediaBox [0 0 9 9] /Contents 4 0 R >>\nendobj\n"
    head += b"4 0 obj\n<< /Length %d /Filter /FlateDecode >>\nstream\n" % len(packed)
    return head + packed + b"\nendstream\nendobj\ntrailer\n<< /Root 1 0 R /Size 5 >>\n%%EOF\n"


def _looping_pdf() -> bytes:
    """Pages that are their own parents."""
    data = make.pdf([[(700, 11, "x")]])
    return data.replace(b"/Kids [4 0 R]", b"/Kids [2 0 R]")


def _entity(target: str) -> str:
    return f'<!DOCTYPE x [<!ENTITY e SYSTEM "{target}">]>'


LAUGHING = "<w:p><w:r><w:t>&l11;</w:t></w:r></w:p>"
OUTSIDE = "<w:p><w:r><w:t>&e;</w:t></w:r></w:p>"
WORD = make.word([("Normal", GOOD)])
SHEET = make.sheets({"A": [[GOOD]]})
SHOW = make.slides([(GOOD, "text", "")])
BOOK = make.book([f"<p>{GOOD}</p>"])
LOCKED = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + "EncryptedPackage".encode("utf-16-le")

# What each file is, and what its reason says. Empty: it may be read or refused, as long as nothing else happens.
HARMFUL: dict[str, tuple[Callable[[], bytes], str]] = {
    "encrypted.pdf": (make.encrypted_pdf, "encrypted"),
    "scanned.pdf": (lambda: make.pdf([[], [], []]), "scanned"),
    "cut.pdf": (lambda: make.prose_pages(3)[:400], "damaged"),
    "looping.pdf": (_looping_pdf, ""),
    "bomb.pdf": (_pdf_bomb, ""),
    "empty.pdf": (lambda: b"", "damaged"),
    "page.pdf": (lambda: b"<html>not found</html>", "damaged"),
    "encrypted.docx": (lambda: LOCKED, "encrypted"),
    "old.docx": (lambda: b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 500, "before 2007"),
    "cut.docx": (lambda: WORD[: len(WORD) // 2], "damaged"),
    "laughs.docx": (lambda: make.word_of(LAUGHING, make.laughs()), "entities"),
    "utf16.docx": (
        lambda: _with_part(
            WORD, "word/document.xml", f'<?xml version="1.0" encoding="UTF-16"?>{make.laughs()}<a/>'.encode("utf-16")
        ),
        "entities",
    ),
    "bomb.docx": (lambda: _bomb("word/document.xml"), "bomb"),
    "lying.docx": (lambda: make.lying_zip("word/document.xml", 999_999, 32 << 20), "damaged"),
    "nested.docx": (lambda: make.zipped({"a.zip": make.zipped({"b.zip": _bomb("c", 4)})}), "not a Word document"),
    "many.docx": (lambda: make.zipped({f"{i}": "" for i in range(20_001)}), "bomb"),
    "wrong.docx": (lambda: SHEET, "not a Word document"),
    "hollow.docx": (lambda: make.zipped({"word/document.xml": "<a/>"}), "damaged"),
    "deep.docx": (lambda: make.word_of("<w:p>" * 30_000 + "</w:p>" * 30_000), ""),
    "laughs.xlsx": (
        lambda: _with_part(SHEET, "xl/sharedStrings.xml", f"{make.laughs()}<sst><si><t>&l11;</t></si></sst>"),
        "entities",
    ),
    "bomb.xlsx": (lambda: _bomb("xl/workbook.xml"), "bomb"),
    "huge.xlsx": (_huge_row, ""),
    "hollow.xlsx": (lambda: make.zipped({"xl/workbook.xml": "<workbook/>"}), "damaged"),
    "encrypted.xlsx": (lambda: LOCKED, "encrypted"),
    "bomb.pptx": (lambda: _bomb("ppt/presentation.xml"), "bomb"),
    "laughs.pptx": (lambda: _with_part(SHOW, "ppt/slides/slide1.xml", f"{make.laughs()}<a>&l11;</a>"), "entities"),
    "cut.pptx": (lambda: SHOW[:5000], "damaged"),
    "bomb.epub": (lambda: make.book([], {"OEBPS/x": b"0" * (64 << 20)}), "bomb"),
    "laughs.epub": (lambda: make.book([], {"OEBPS/p.opf": make.laughs() + "<a>&l11;</a>"}), "entities"),
    "locked.epub": (
        lambda: make.book(
            [GOOD], {"META-INF/encryption.xml": "<e><EncryptionMethod Algorithm='aes'/></e>"}
        ),
        "DRM",
    ),
    "cut.epub": (lambda: BOOK[:300], "damaged"),
    "deep.html": (lambda: b"<div><b><table><tr><td>" * 40_000 + b"x", ""),
    "attributes.html": (lambda: b"<p " + b"a=b " * 500_000 + b">x</p>", ""),
    "scripts.html": (lambda: b"<script>x</script>", "no text"),
    "binary.html": (lambda: bytes(range(256)) * 1000, ""),
    "deep.ipynb": (_deep_json, "too deeply nested"),
    "wrong.ipynb": (lambda: b"[]", "not a notebook"),
    "deep.eml": (_deep_mail, ""),
    "empty.eml": (lambda: b"", "no message"),
    "wrong.mbox": (lambda: b"Dear diary,", "not a mailbox"),
    "quotes.csv": (lambda: b'a,b\n"' + b"x,\n" * 100_000, ""),
    "wide.csv": (lambda: b"a," * 500_000 + b"\n" + b"1," * 500_000, ""),
    "packed.txt.gz": (lambda: gzip.compress(b"x"), "not supported"),
    "disk.txt": (lambda: b"\x7fELF" + struct.pack("<Q", 0) * 100, "binary"),
}  # fmt: skip


@pytest.mark.parametrize("name", HARMFUL)
def test_a_harmful_file_is_listed_and_its_neighbour_read(folder: Folder, name: str) -> None:
    make_file, expected = HARMFUL[name]
    folder.write(name, make_file())
    folder.write("zz.docx", WORD)  # read after it, by the same process
    report = folder.index()
    reasons = {skipped.path.name: skipped.reason for skipped in report.skipped}
    assert GOOD in folder.text()
    assert "zz.docx" not in reasons
    assert name in reasons or not expected
    assert expected in reasons.get(name, "")
    assert all(skipped.remedy for skipped in report.skipped)


def test_what_cannot_be_read_is_not_tried_again_until_it_changes(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.write("a.docx", make.word_of(LAUGHING, make.laughs()))
    first = folder.skipped()
    with monkeypatch.context() as broken:
        broken.setattr(indexer, "document_of", None)  # would fail if it were called
        assert folder.skipped() == first
        os.utime(folder.root / "a.docx", ns=(1, 1))
        assert folder.skipped() == first
    folder.write("a.docx", WORD)
    assert folder.skipped() == {}
    assert GOOD in folder.text()


def test_many_of_them_in_one_pass(folder: Folder) -> None:
    some = list(HARMFUL)[::3]
    for name in some:
        folder.write(name, HARMFUL[name][0]())
    folder.write("zz.pdf", make.prose_pages(2))
    skipped = folder.skipped()
    assert {name for name in some if HARMFUL[name][1]} <= set(skipped)
    assert "First paragraph 2" in folder.text()


def test_nothing_outside_of_the_folder_is_read(folder: Folder) -> None:
    there = str(folder.secret)
    uri = folder.secret.as_uri()
    spine = f"<package><manifest><item id='a' href='{there}'/><item id='b' href='{'../' * 20}{there[1:]}'/></manifest>"
    spine += "<spine><itemref idref='a'/><itemref idref='b'/></spine></package>"
    folder.write("entity.docx", make.word_of(OUTSIDE, _entity(uri)))
    folder.write(
        "entity.xlsx", _with_part(SHEET, "xl/sharedStrings.xml", f"{_entity(uri)}<sst><si><t>&e;</t></si></sst>")
    )
    folder.write("entity.epub", make.book([], {"OEBPS/p.opf": _entity(uri) + "<package>&e;</package>"}))
    folder.write("path.epub", make.book([], {"OEBPS/p.opf": spine}))
    folder.write("chapter.epub", make.book([f"<iframe src='{uri}'></iframe><object data='{there}'></object><p>x</p>"]))
    folder.write("slip.docx", _with_part(WORD, f"{'../' * 20}{there[1:]}", "overwritten"))
    folder.write("frame.html", f"<iframe src='{uri}'></iframe><link rel=import href='{uri}'><p>page</p>")
    folder.write("include.rst", f".. include:: {there}\n")
    folder.write(
        "body.eml", f"Subject: x\nContent-Type: message/external-body; access-type=local-file; name={there}\n\n"
    )
    folder.write("link.ipynb", json.dumps({"cells": [{"cell_type": "markdown", "source": f"![]({uri})"}]}))
    (folder.root / "link.txt").symlink_to(folder.secret)
    (folder.root / "link.docx").symlink_to(folder.secret)
    (folder.root / "folder").symlink_to(folder.secret.parent)
    folder.index()
    assert GOOD in folder.text()
    assert SECRET not in folder.text()
    assert folder.secret.read_text() == SECRET


def test_endless_locked_and_enormous_files(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    for suffix in ("txt", "pdf", "docx"):
        os.mkfifo(folder.root / f"fifo.{suffix}")
        (folder.root / f"zero.{suffix}").symlink_to("/dev/zero")
        (folder.root / f"loop.{suffix}").symlink_to(f"loop.{suffix}")
        with open(folder.root / f"huge.{suffix}", "wb") as file:
            file.truncate(2 << 30)
    folder.write("locked.pdf", make.prose_pages(1))
    (folder.root / "locked.pdf").chmod(0)
    really_open = os.open

    def deny(path: str, *rest: int) -> int:  # for those who may read everything
        if "locked.pdf" in str(path):
            raise PermissionError(13, "Permission denied")
        return really_open(path, *rest)

    monkeypatch.setattr(os, "open", deny)
    folder.write("good.docx", WORD)
    skipped = folder.skipped()
    for suffix in ("txt", "pdf", "docx"):
        assert skipped[f"fifo.{suffix}"] == "not a regular file"
        assert "too large: 2147.5 MB" in skipped[f"huge.{suffix}"]
        assert "cannot be read" in skipped[f"loop.{suffix}"]
        assert f"zero.{suffix}" not in skipped, "a link out of the folder is not followed"
    assert skipped["locked.pdf"] == "permission denied"
    assert folder.text() == GOOD


def test_questions_get_their_turn_while_a_file_is_parsed(folder: Folder) -> None:
    folder.write("deep.eml", _deep_mail())
    turns: list[int] = []
    roots = folder.library.roots()
    index_roots(folder.library, roots, len, "t", SETTINGS, lambda progress: turns.append(progress.done))
    assert turns.count(0) > 1, "before it is done"
    assert turns[-1] == 1


def test_what_was_no_fault_of_the_file_is_tried_again(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write("a.docx", WORD)
    with monkeypatch.context() as broken:
        broken.setattr("sys.executable", str(folder.root / "no-python"))
        assert "does not start" in folder.skipped()["a.docx"]
    assert folder.skipped() == {}
    assert folder.text() == GOOD
