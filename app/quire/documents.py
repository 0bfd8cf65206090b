"""Finds the files of a folder and reads one as text, or says why it cannot be read and what would help.

Knows file names, encodings and kinds of files; knows nothing of models or the index. Text is decoded here; everything
that needs a parser goes to the parser process. Files whose kind is not listed here are read when they turn out to be
text: notes often have no suffix, or one of their own.
"""

import codecs
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from quire.chunking import Passage
from quire.formats import base as formats
from quire.formats.base import MOST_CHARACTERS, Mark, TooMuchText, Unreadable, place
from quire.outline import Markup
from quire.parsing import Parser

_MARKDOWN = {".md", ".markdown", ".mdown", ".mkd", ".mdx", ".qmd", ".rmd"}
_RST = {".rst", ".rest"}
_CSV = {".csv", ".tsv"}
_FORMATS = {  # by suffix: what the parser process reads, under its name for it
    ".pdf": "pdf", ".docx": "docx", ".docm": "docx", ".pptx": "pptx", ".pptm": "pptx", ".xlsx": "xlsx",
    ".xlsm": "xlsx", ".html": "html", ".htm": "html", ".xhtml": "html", ".epub": "epub", ".eml": "eml", ".mbox": "mbox",
    ".ipynb": "ipynb",
}  # fmt: skip
# Told by name, because some of these would pass as text and would be nonsense as such.
_UNSUPPORTED = re.compile(
    r"\.(?:"
    r"ps|eps|djvu|mobi|azw3|chm|doc|odt|rtf|pages|ppt|odp|key|xls|"
    r"ods|numbers|png|jpg|jpeg|gif|bmp|tif|tiff|webp|heic|avif|ico|svg|psd|xcf|"
    r"mp3|m4a|aac|flac|ogg|opus|wav|mp4|m4v|mov|avi|mkv|webm|zip|gz|tgz|bz2|xz|"
    r"zst|7z|rar|tar|jar|war|whl|deb|rpm|apk|dmg|iso|img|exe|dll|so|dylib|a|o|"
    r"lib|class|pyc|pyo|wasm|bin|db|sqlite|sqlite3|parquet|feather|arrow|npy|npz|"
    r"pkl|pickle|pt|pth|onnx|safetensors|gguf|ggml|h5|hdf5|ttf|otf|woff|woff2|eot|msg|"
    r"pst"
    r")"
)
_REMEDIES = (
    (re.compile(r"\.(doc|odt|rtf|pages)"), "Save it as .docx or PDF."),
    (re.compile(r"\.(ppt|odp|key)"), "Save it as .pptx or PDF."),
    (re.compile(r"\.(xls|ods|numbers)"), "Save it as .xlsx or .csv."),
    (re.compile(r"\.(ps|eps|djvu|mobi|azw3|chm)"), "Convert it to PDF or EPUB."),
    (re.compile(r"\.(zip|gz|tgz|bz2|xz|zst|7z|rar|tar|jar|war|whl|deb|rpm|apk|dmg|iso|img)"), "Unpack it."),
    (re.compile(r"\.(png|jpg|jpeg|gif|bmp|tif|tiff|webp|heic|avif)"), "If it shows text, run OCR over it."),
    (re.compile(r"\.(msg|pst)"), "Export it as .eml or .mbox."),
)
_SKIPPED_FOLDERS = {"node_modules", "__pycache__", "site-packages", "venv", "virtualenv"}
_BYTE_ORDER_MARKS = (  # the longer ones first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_HEAD_BYTES = 8192  # enough to tell a binary file before reading the rest
_MOST_BYTES_OF_TEXT = 4 * (MOST_CHARACTERS + 1)  # no character takes more, nor does a byte order mark


@dataclass(frozen=True)
class File:
    """A file's bytes, read once. sha256: of them.  changed_ns: when anything about the file was last changed, which
    unlike mtime_ns nobody can set."""

    path: Path
    data: bytes
    sha256: str
    size_bytes: int
    mtime_ns: int
    changed_ns: int


@dataclass(frozen=True)
class Document:
    """What a file says. text: newlines are "\\n".  marks: where its parts stand in the file; none where the text is
    the file's own, line by line."""

    text: str
    markup: Markup
    marks: tuple[Mark, ...] = ()

    def located(self, passage: Passage) -> Passage:
        """A passage of the text with its place in the file."""
        found = place(self.marks, passage.start_line, passage.end_line)
        if isinstance(found, str):
            return replace(passage, place=found)
        return replace(passage, start_line=found.start, end_line=found.end)


def rules_of(path: Path) -> str:
    """Names what decides, besides a file's bytes, which text it gives."""
    suffix = path.suffix.lower()
    return f"{_FORMATS[suffix]}{formats.VERSION}" if suffix in _FORMATS else markup_of(path)


def markup_of(path: Path) -> Markup:
    """The markup of the text that a file's name promises."""
    suffix = path.suffix.lower()
    if suffix in _MARKDOWN or suffix in _FORMATS:
        return "markdown"
    return "rst" if suffix in _RST else "csv" if suffix in _CSV else "plain"


def has_lines(path: Path) -> bool:
    """Whether a text editor shows it as it was read, and not a viewer."""
    return _FORMATS.get(path.suffix.lower(), "html") == "html"


def document_of(file: File, parser: Parser, waiting: Callable[[], None] = lambda: None) -> Document:
    """What a file says: by the parser process, or here where it is text, in UTF-8, or in UTF-16 or UTF-32 with a byte
    order mark. waiting: see Parser.parse. Raises Unreadable."""
    markup = markup_of(file.path)
    if format := _FORMATS.get(file.path.suffix.lower()):
        parsed = parser.parse(format, file.data, waiting)
        return Document(parsed.text, markup, parsed.marks)
    text = _decode(file.data)
    if len(text) > MOST_CHARACTERS:
        raise TooMuchText
    if not text.strip():
        raise Unreadable("empty", "Nothing to do: it holds no text.")
    return Document(text, markup)


def read_file(path: Path, max_bytes: int) -> File:
    """Reads a file of a kind that can be used. Raises Unreadable."""
    suffix = path.suffix.lower()
    if _UNSUPPORTED.fullmatch(suffix):
        raise Unreadable(f"not supported: {suffix}", _remedy(suffix))
    try:
        str(path).encode("utf-8")
        data, status = _read_bytes(path, max_bytes)
    except UnicodeEncodeError as error:
        raise Unreadable("its name is not valid UTF-8", "Rename the file.") from error
    except FileNotFoundError as error:
        if path.is_symlink():
            raise Unreadable(
                "a link to a file that does not exist", "Delete the link or restore its target."
            ) from error
        raise Unreadable("it is gone", "Nothing to do if it was deleted on purpose.") from error
    except PermissionError as error:
        raise Unreadable("permission denied", "Give yourself the right to read it.") from error
    except OSError as error:
        raise Unreadable(f"cannot be read: {error.strerror or error}", "Check the disk and the file.") from error
    return File(path, data, hashlib.sha256(data).hexdigest(), status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _remedy(suffix: str) -> str:
    fitting = (remedy for pattern, remedy in _REMEDIES if pattern.fullmatch(suffix))
    return next(fitting, "Nothing to do: it holds no text that Quire could use.")


def _read_bytes(path: Path, max_bytes: int) -> tuple[bytes, os.stat_result]:
    # Not blocking: opening a FIFO would wait for a writer that may never come.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    _refuse_special(os.stat(path))  # before opening too: opening a device can have effects
    with open(os.open(path, flags), "rb") as file:
        status = os.fstat(file.fileno())
        _refuse_special(status)
        if status.st_size > max_bytes:
            raise _too_large(status.st_size, max_bytes)
        head = file.read(_HEAD_BYTES)
        if path.suffix.lower() not in _FORMATS:
            if _is_binary(head):
                raise Unreadable("a binary file", "Only text can be used.")
            if status.st_size > _MOST_BYTES_OF_TEXT:
                raise TooMuchText
        data = head + file.read(max_bytes + 1 - len(head))  # it may have grown since
    if len(data) > max_bytes:
        raise _too_large(len(data), max_bytes)
    return data, status


def _refuse_special(status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise Unreadable("a folder that cannot be opened", "Give yourself the right to read and enter it.")
    if not stat.S_ISREG(status.st_mode):
        raise Unreadable("not a regular file", "Pipes, sockets and devices hold no document.")


def _too_large(size_bytes: int, max_bytes: int) -> Unreadable:
    return Unreadable(
        f"too large: {size_bytes / 1e6:.1f} MB, the limit is {max_bytes / 1e6:g} MB",
        "Raise max_file_mb or split the file.",
    )


def _is_binary(data: bytes) -> bool:
    return b"\0" in data and not data.startswith(tuple(mark for mark, _ in _BYTE_ORDER_MARKS))


def _decode(data: bytes) -> str:
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise Unreadable(f"not valid {encoding.upper().removesuffix('-SIG')}", "Save it as UTF-8.") from error
    if "\0" in text:
        raise Unreadable("a binary file", "Only text can be used.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def walk(root: Path, keeps: Callable[[os.DirEntry[str]], bool] = lambda _: True) -> Iterator[Path]:
    """The files of a folder, sorted by name within each folder; root itself when it is a file.

    keeps: whether a file, or a folder with all that is in it, is wanted.

    Hidden files and folders, virtual environments and folders of installed packages are left out. Links to
    folders are not followed, links to files only within root. Yielded although they cannot be read, so that
    somebody hears of them: unsupported kinds, special files, broken links, and folders that refuse to be
    listed.
    """
    if not root.is_dir():
        yield root
        return
    yield from _walk(root, root, keeps)


def walk_below(root: Path, path: Path, keeps: Callable[[os.DirEntry[str]], bool] = lambda _: True) -> Iterator[Path]:
    """What walk(root, keeps) yields of one path below it: a file, or the files of a folder; or nothing."""
    place = root
    inside = os.path.realpath(root) + os.sep
    for name in path.relative_to(root).parts:
        try:
            entry = next(entry for entry in os.scandir(place) if entry.name == name)
        except (OSError, StopIteration):  # gone meanwhile, or nobody may look
            return
        if not (_belongs(entry, inside) and keeps(entry)):
            return
        place /= name
    yield from _walk(root, path, keeps)


def left_out(root: Path, path: Path) -> bool:
    """Whether its name alone says that walk(root) does not come there. The path need not exist."""
    names = path.relative_to(root).parts
    return any(name.startswith(".") for name in names) or not _SKIPPED_FOLDERS.isdisjoint(names[:-1])


def _walk(root: Path, start: Path, keeps: Callable[[os.DirEntry[str]], bool]) -> Iterator[Path]:
    inside = os.path.realpath(root) + os.sep
    pending = [str(start)]
    while pending:
        path = pending.pop()
        if not os.path.isdir(path) or (os.path.islink(path) and path != str(root)):
            yield Path(path)
            continue
        try:
            entries = sorted(os.scandir(path), key=lambda entry: entry.name, reverse=True)
        except OSError:
            yield Path(path)
            continue
        pending.extend(entry.path for entry in entries if _belongs(entry, inside) and keeps(entry))


def _belongs(entry: os.DirEntry[str], inside: str) -> bool:
    if entry.name.startswith("."):
        return False
    if entry.is_symlink():
        target = os.path.realpath(entry.path)
        return not os.path.isdir(target) and (target.startswith(inside) or not os.path.lexists(target))
    if entry.is_dir(follow_symlinks=False):
        return entry.name not in _SKIPPED_FOLDERS and not os.path.exists(os.path.join(entry.path, "pyvenv.cfg"))
    return True
