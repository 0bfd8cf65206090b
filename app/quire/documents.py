"""Finds the files of a folder and reads one as text, or says why it cannot be read and what would help.

Knows file names, encodings and kinds of files; knows nothing of chunks, models or the index. Files whose kind
is not listed here are read when they turn out to be text: notes often have no suffix, or one of their own.
"""

import codecs
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from quire_engine.errors import QuireError

Markup = Literal["markdown", "rst", "plain"]  # the same as chunking's, which this module must not know

_MARKDOWN = {".md", ".markdown", ".mdown", ".mkd", ".mdx", ".qmd", ".rmd"}
_RST = {".rst", ".rest"}
# Told by name, because some of these would pass as text and would be nonsense as such.
_UNSUPPORTED = re.compile(
    r"\.(?:"
    r"pdf|ps|eps|djvu|epub|mobi|azw3|chm|doc|docx|odt|rtf|pages|ppt|pptx|odp|key|xls|"
    r"xlsx|ods|numbers|png|jpg|jpeg|gif|bmp|tif|tiff|webp|heic|avif|ico|svg|psd|xcf|"
    r"mp3|m4a|aac|flac|ogg|opus|wav|mp4|m4v|mov|avi|mkv|webm|zip|gz|tgz|bz2|xz|"
    r"zst|7z|rar|tar|jar|war|whl|deb|rpm|apk|dmg|iso|img|exe|dll|so|dylib|a|o|"
    r"lib|class|pyc|pyo|wasm|bin|db|sqlite|sqlite3|parquet|feather|arrow|npy|npz|"
    r"pkl|pickle|pt|pth|onnx|safetensors|gguf|ggml|h5|hdf5|ttf|otf|woff|woff2|eot|msg|"
    r"pst"
    r")"
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


class Unreadable(QuireError):
    """A file that cannot become text. reason: why, a few words.  remedy: what would help."""

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(reason, remedy)
        self.reason = reason
        self.remedy = remedy


@dataclass(frozen=True)
class Document:
    """A file as it was read. text: newlines are "\\n".  sha256: of the file's bytes."""

    text: str
    markup: Markup
    sha256: str
    size_bytes: int
    mtime_ns: int


def markup_of(path: Path) -> Markup:
    """The markup that a file's name promises."""
    suffix = path.suffix.lower()
    return "markdown" if suffix in _MARKDOWN else "rst" if suffix in _RST else "plain"


def read_document(path: Path, max_bytes: int) -> Document:
    """Reads a text file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark. Raises Unreadable."""
    if _UNSUPPORTED.fullmatch(path.suffix.lower()):
        raise Unreadable(f"not supported yet: {path.suffix.lower()}", "Save it as text or Markdown to use it now.")
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
    text = _decode(data)
    if not text.strip():
        raise Unreadable("empty", "Nothing to do: it holds no text.")
    digest = hashlib.sha256(data).hexdigest()
    return Document(text, markup_of(path), digest, status.st_size, status.st_mtime_ns)


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
        if _is_binary(head):
            raise Unreadable("a binary file", "Only text can be used.")
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


def walk(root: Path) -> Iterator[Path]:
    """The files of a folder, sorted by name within each folder; root itself when it is a file.

    Hidden files and folders, virtual environments and folders of installed packages are left out. Links to
    folders are not followed, links to files only within root. Yielded although they cannot be read, so that
    somebody hears of them: unsupported kinds, special files, broken links, and folders that refuse to be
    listed.
    """
    if not root.is_dir():
        yield root
        return
    yield from _walk(root, root)


def walk_below(root: Path, path: Path) -> Iterator[Path]:
    """What walk(root) yields of one path below it: a file, or the files of a folder; nothing where it is left out."""
    place = root
    inside = os.path.realpath(root) + os.sep
    for name in path.relative_to(root).parts:
        try:
            entry = next(entry for entry in os.scandir(place) if entry.name == name)
        except (OSError, StopIteration):  # gone meanwhile, or nobody may look
            return
        if not _belongs(entry, inside):
            return
        place /= name
    yield from _walk(root, path)


def left_out(root: Path, path: Path) -> bool:
    """Whether its name alone says that walk(root) does not come there. The path need not exist."""
    names = path.relative_to(root).parts
    return any(name.startswith(".") for name in names) or not _SKIPPED_FOLDERS.isdisjoint(names[:-1])


def _walk(root: Path, start: Path) -> Iterator[Path]:
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
        pending.extend(entry.path for entry in entries if _belongs(entry, inside))


def _belongs(entry: os.DirEntry[str], inside: str) -> bool:
    if entry.name.startswith("."):
        return False
    if entry.is_symlink():
        target = os.path.realpath(entry.path)
        return not os.path.isdir(target) and (target.startswith(inside) or not os.path.lexists(target))
    if entry.is_dir(follow_symlinks=False):
        return entry.name not in _SKIPPED_FOLDERS and not os.path.exists(os.path.join(entry.path, "pyvenv.cfg"))
    return True
