"""Reading and finding documents, with real files of every troublesome kind."""

import codecs
import hashlib
import os
import socket
from pathlib import Path

import pytest

from quire import documents
from quire.documents import Document, document_of, markup_of, read_file, rules_of, walk
from quire.formats.base import Unreadable
from quire.parsing import Parser

LIMIT_BYTES = 1_000_000


def read_document(path: Path, max_bytes: int) -> Document:
    return document_of(read_file(path, max_bytes), Parser())


def reason(path: Path, max_bytes: int = LIMIT_BYTES) -> str:
    with pytest.raises(Unreadable) as caught:
        read_document(path, max_bytes)
    assert caught.value.remedy
    assert caught.value.message == caught.value.reason
    return caught.value.reason


def names(root: Path) -> list[str]:
    return [str(path.relative_to(root)) for path in walk(root)]


def test_a_text_file_is_read_with_its_identity(tmp_path: Path) -> None:
    file = tmp_path / "a.md"
    file.write_bytes(b"# A\r\nb\rc\n")
    read = read_file(file, LIMIT_BYTES)
    assert read_document(file, LIMIT_BYTES).text == "# A\nb\nc\n"
    assert read.sha256 == hashlib.sha256(b"# A\r\nb\rc\n").hexdigest()
    assert (read.size_bytes, read.mtime_ns) == (9, file.stat().st_mtime_ns)


@pytest.mark.parametrize(
    ("name", "markup"),
    [
        ("a.md", "markdown"), ("A.MD", "markdown"), ("a.rst", "rst"), ("a.py", "plain"), ("Makefile", "plain"),
        ("a.csv", "csv"), ("a.PDF", "markdown"), ("a.html", "markdown"),
    ],
)  # fmt: skip
def test_the_name_tells_the_markup(name: str, markup: str) -> None:
    assert markup_of(Path(name)) == markup


def test_what_a_parser_reads_is_read_again_when_parsers_change() -> None:
    assert rules_of(Path("a.txt")) == "plain"
    assert rules_of(Path("a.pdf")) != rules_of(Path("a.docx")) != rules_of(Path("a.md"))


@pytest.mark.parametrize(
    "data",
    [
        "grüße".encode(),
        codecs.BOM_UTF8 + "grüße".encode(),
        codecs.BOM_UTF16_LE + "grüße".encode("utf-16-le"),
        codecs.BOM_UTF16_BE + "grüße".encode("utf-16-be"),
        codecs.BOM_UTF32_LE + "grüße".encode("utf-32-le"),
    ],
)
def test_encodings(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "notes.of.2024"
    file.write_bytes(data)
    assert read_document(file, LIMIT_BYTES).text == "grüße"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty"),
        (b" \n\t\n", "empty"),
        (codecs.BOM_UTF8, "empty"),
        (b"ab\0cd", "binary"),
        (b"a" * 9000 + b"\0", "binary"),
        (b"caf\xe9", "not valid UTF-8"),
        (codecs.BOM_UTF16_LE + b"a", "not valid UTF-16"),
        (b"x" * 101, "too large"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, data: bytes, expected: str) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(data)
    assert expected in reason(file, 100 if expected == "too large" else LIMIT_BYTES)


def test_a_file_of_exactly_the_limit_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100)
    assert len(read_document(tmp_path / "a", 100).text) == 100


def test_more_text_than_any_book_has_is_refused_whatever_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "MOST_CHARACTERS", 10)
    file = tmp_path / "log.txt"
    file.write_text("ä" * 10)  # 20 bytes
    assert read_document(file, LIMIT_BYTES).text == "ä" * 10
    file.write_text("x" * 11)
    assert "million characters" in reason(file)
    monkeypatch.setattr(documents, "_MOST_BYTES_OF_TEXT", 40)
    file.write_bytes(b"\xff" * 41)  # before it is read, and decoded
    assert "million characters" in reason(file)
    file.with_suffix(".pdf").write_bytes(b"%PDF" + b" " * 100)  # whose pictures say nothing of its text
    assert len(read_file(file.with_suffix(".pdf"), LIMIT_BYTES).data) == 104


def test_what_is_no_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert reason(tmp_path / "fifo") == "not a regular file"
    assert "link to a file that does not exist" in reason(tmp_path / "link")
    assert "cannot be read" in reason(tmp_path / "loop")
    assert reason(tmp_path / "gone.txt") == "it is gone"
    assert "folder" in reason(tmp_path)
    assert reason(tmp_path / "old.DOC") == "not supported: .doc"
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        assert reason(tmp_path / "socket") == "not a regular file"


def test_permission_denied_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.txt"
    file.write_text("secret")
    file.chmod(0)
    if os.geteuid() == 0:  # root may read everything

        def deny(*_: object) -> int:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(os, "open", deny)
    assert reason(file) == "permission denied"


def test_a_name_that_is_not_utf8_is_explained(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    Path(os.fsdecode(name)).write_text("x")
    [found] = list(walk(tmp_path))[-1:]
    assert "name" in reason(found)


def test_walk_is_sorted_and_leaves_out_what_is_not_the_persons(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in (
        "b.md", "a/z.txt", "a/b/c.py", "Z.txt", "photo.jpg", ".hidden.md", ".git/config", "node_modules/x.js",
        "a/__pycache__/x.pyc", "env/pyvenv.cfg", "env/lib/x.py", "venv/x.py",
    ):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    assert names(root) == ["Z.txt", "a/b/c.py", "a/z.txt", "b.md", "photo.jpg"]


def test_walk_never_leaves_the_folder(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "sub").mkdir(parents=True)
    outside.mkdir()
    (outside / "secret.txt").write_text("x")
    (root / "sub" / "a.txt").write_text("x")
    (root / "to_file").symlink_to(outside / "secret.txt")
    (root / "to_folder").symlink_to(outside)
    (root / "sub" / "up").symlink_to(root)
    (root / "inner").symlink_to(root / "sub" / "a.txt")
    (root / "broken").symlink_to(root / "nothing")
    assert names(root) == ["broken", "inner", "sub/a.txt"]


def test_walk_of_a_file_is_the_file_and_a_hidden_root_is_entered(tmp_path: Path) -> None:
    root = tmp_path / ".notes"
    root.mkdir()
    (root / "a.txt").write_text("x")
    assert list(walk(root)) == [root / "a.txt"]
    assert list(walk(root / "a.txt")) == [root / "a.txt"]


def test_a_folder_that_cannot_be_listed_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    (root / "closed").mkdir(parents=True)
    (root / "open.txt").write_text("x")
    listing = os.scandir

    def scandir(path: str) -> object:
        if path.endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return listing(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert names(root) == ["closed", "open.txt"]
    assert "folder that cannot be opened" in reason(root / "closed")


def test_a_very_deep_folder_is_walked(tmp_path: Path) -> None:
    deep = tmp_path / "root"
    for _ in range(300):
        deep = deep / "d"
    deep.mkdir(parents=True)
    (deep / "a.txt").write_text("x")
    assert list(walk(tmp_path / "root")) == [deep / "a.txt"]
