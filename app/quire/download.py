"""One large file from the web, whole or not there: it goes on where it stopped, and its checksum is checked.

The bytes gather in NAME.part beside the target, which appears when all of them are there and right. Asks Hugging Face
for the checksum, which it sends with the file. Knows addresses and bytes; that they are a model only by the first four.
"""

import errno
import fcntl
import hashlib
import http.client
import os
import re
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import IO, Any, Final
from urllib.parse import quote, urljoin, urlsplit

from quire import __version__
from quire_engine import records
from quire_engine.errors import Aborted, QuireError

_PIECE_BYTES = 1 << 18
_TIMEOUT_S = 30.0
_MOST_REDIRECTS = 8
_TRIES = 5  # in a row that bring nothing; a connection that breaks now and then is not given up
_PAUSE_S = 1.0  # before a server that is gone in the middle of a file is tried again; doubled each time
_POLL_S = 0.1
_SPARE_BYTES = 200_000_000  # that a disk keeps free
_SHA256 = re.compile(r'"?([0-9a-f]{64})"?')
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")
_HUB: Final = "https://huggingface.co"
_MAGIC = b"GGUF"


@dataclass(frozen=True)
class Fetching:
    """How far it is. total_bytes: 0 while unknown."""

    done_bytes: int
    total_bytes: int


def hub_address(repository: str, file: str) -> str:
    """Where Hugging Face, or the mirror that HF_ENDPOINT names, has a file of a repository."""
    return f"{_hub()}/{quote(repository)}/resolve/main/{quote(file)}"


def fetch(
    address: str,
    target: Path,
    progress: Callable[[Fetching], None],
    should_stop: Callable[[], bool],
    sha256: str = "",
) -> None:
    """Fetches the GGUF file at the address, into a folder that exists.

    sha256: what it must be, in hex; empty: what the server says it is, if it does. Raises Aborted soon after
    should_stop() turns true, and QuireError for what went wrong; what came until then is kept for the next time.
    should_stop is called from another thread too.
    """
    with _alone(target) as part:
        tries, at_first = 0, _size(part)
        while True:
            before = _size(part)
            try:
                _Attempt(address, target, part, sha256).run(progress, should_stop)
                return
            except (http.client.HTTPException, OSError) as error:
                if should_stop():
                    raise Aborted from error
                tries = 1 if _size(part) > before else tries + 1
                if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                    raise _no_space(target, 0) from error
                if tries >= _TRIES or isinstance(error, PermissionError):
                    raise _failed(target, error, address, anything=_size(part) > 0) from error
                if isinstance(error, urllib.error.URLError) and _size(part) > at_first:
                    _wait(_PAUSE_S * 2 ** (tries - 1), should_stop)  # a network that was there may come back


@dataclass
class _Attempt:
    """One connection."""

    address: str
    target: Path
    part: Path
    sha256: str

    def run(self, progress: Callable[[Fetching], None], should_stop: Callable[[], bool]) -> None:
        have = _size(self.part)
        response, promised = _open(self.address, have, self._tag if have else "")
        with response:
            start, total = _extent(response, have)
            self.sha256 = self.sha256 or promised
            self._note_tag(response.headers)
            self._check_space(total - start)
            with self.part.open("r+b") as out:
                out.truncate(start)
                digest = _digest_of(out, should_stop)
                progress(Fetching(start, total))
                with _hung_up(response, should_stop):
                    for piece in _pieces(response, first_bytes=0 if start else len(_MAGIC)):
                        if start == 0 and not piece.startswith(_MAGIC):
                            raise QuireError(f"{self.address} is no GGUF model.", "Name the .gguf file itself.")
                        out.write(piece)
                        digest.update(piece)
                        start += len(piece)
                        progress(Fetching(start, total))
                        if should_stop():
                            raise Aborted
                out.flush()
                os.fsync(out.fileno())
        if should_stop():
            raise Aborted
        if total and start != total:
            raise http.client.IncompleteRead(b"", total - start)
        self._finish(digest.hexdigest())

    def _finish(self, sha256: str) -> None:
        if self.sha256 and sha256 != self.sha256.lower():
            os.truncate(self.part, 0)
            raise QuireError(
                f"{self.target.name} did not arrive as it should be: its checksum is wrong.",
                "It was thrown away. Fetch it again.",
                f"expected {self.sha256}, got {sha256}",
            )
        os.replace(self.part, self.target)
        self._tag_file.unlink(missing_ok=True)

    def _check_space(self, needed: int) -> None:
        if needed > shutil.disk_usage(self.part.parent).free - _SPARE_BYTES:
            raise _no_space(self.target, needed)

    # What tells whether the file behind the address is still the one that was begun

    @property
    def _tag_file(self) -> Path:
        return self.part.with_suffix(".tag")

    @property
    def _tag(self) -> str:
        known = records.load(self._tag_file)
        return str(known.get("tag", "")) if known.get("address") == self.address else "none"

    def _note_tag(self, headers: Message) -> None:
        tag = headers.get("ETag") or headers.get("Last-Modified") or ""
        records.save(self._tag_file, {"address": self.address, "tag": tag})


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _open(address: str, have: int, tag: str) -> tuple[http.client.HTTPResponse, str]:
    """The response, and the checksum if one was sent, by whichever server sent it first.

    have: bytes that need not come again, as long as the file's tag is still this one.
    """
    opener, promised = urllib.request.build_opener(_NoRedirect), ""
    for _ in range(_MOST_REDIRECTS):
        if urlsplit(address).scheme not in ("http", "https"):
            raise QuireError(f"{address} cannot be fetched.", "Addresses begin with https://")
        request = urllib.request.Request(address, headers={"User-Agent": f"quire/{__version__}"})
        if have:
            request.add_header("Range", f"bytes={have}-")
            if tag:
                request.add_header("If-Range", tag if not tag.startswith("W/") else "none")
        if (token := os.environ.get("HF_TOKEN")) and urlsplit(address)[:2] == urlsplit(_hub())[:2]:
            request.add_header("Authorization", f"Bearer {token}")
        try:
            return (answer := opener.open(request, timeout=_TIMEOUT_S)), promised or _promised(answer.headers)
        except urllib.error.HTTPError as error:
            promised = promised or _promised(error.headers)
            if error.code in (301, 302, 303, 307, 308) and "Location" in error.headers:
                address = urljoin(address, error.headers["Location"])
            elif error.code == 416:  # nothing is left of it, or it has become shorter
                have = 0
            else:
                raise _refused(address, error.code) from error
    raise QuireError(f"{address} leads nowhere: too many redirections.", "Check the address.")


def _promised(headers: Message) -> str:
    """X-Linked-Etag: on Hugging Face the SHA-256 of a large file, where an ordinary ETag may be anything."""
    found = _SHA256.fullmatch(headers.get("X-Linked-Etag") or "")
    return found[1] if found else ""


def _extent(response: http.client.HTTPResponse, have: int) -> tuple[int, int]:
    """Where the coming bytes begin, and how many there are in all; 0 when the server does not say."""
    if response.status == 206 and (found := _RANGE.match(response.headers.get("Content-Range") or "")):
        if int(found[1]) != have:
            raise http.client.HTTPException("the server sent another part than asked for")
        return have, int(found[2])
    return 0, int(response.headers.get("Content-Length") or 0)


def _pieces(response: http.client.HTTPResponse, first_bytes: int) -> Iterator[bytes]:
    """The body as it comes, also where little comes at a time; the first piece has so many bytes, if there are."""
    if first := response.read(first_bytes):
        yield first
    yield from iter(lambda: response.read1(_PIECE_BYTES), b"")


@contextmanager
def _hung_up(response: http.client.HTTPResponse, should_stop: Callable[[], bool]) -> Iterator[None]:
    """Within the block the connection ends soon after should_stop() turns true, also where the server is silent."""
    done = threading.Event()
    with socket.socket(fileno=os.dup(response.fileno())) as connection:

        def watch() -> None:
            while not done.wait(_POLL_S):
                if should_stop():
                    with suppress(OSError):  # it has ended
                        connection.shutdown(socket.SHUT_RDWR)
                    return

        thread = threading.Thread(target=watch, name="quire-hang-up")
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def _wait(seconds: float, should_stop: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if should_stop():
            raise Aborted
        time.sleep(_POLL_S)


def _digest_of(file: IO[bytes], should_stop: Callable[[], bool]) -> Any:
    """Of what is there already, read from its beginning."""
    digest = hashlib.sha256()
    file.seek(0)
    for piece in iter(lambda: file.read(1 << 20), b""):
        digest.update(piece)
        if should_stop():
            raise Aborted
    return digest


@contextmanager
def _alone(target: Path) -> Iterator[Path]:
    """The file in which the bytes gather; no other process writes to it meanwhile."""
    part = target.with_name(f"{target.name}.part")
    try:
        file = part.open("ab")
    except OSError as error:
        raise QuireError(f"{part} cannot be written: {error.strerror}.", "Check the folder's permissions.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise QuireError(f"{target.name} is being fetched by another Quire.", "Wait until it is done.") from error
        try:
            yield part
        finally:
            if part.exists() and not _size(part):
                part.unlink()
                part.with_suffix(".tag").unlink(missing_ok=True)


def _hub() -> str:
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or _HUB


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _reason(error: Exception) -> str:
    if isinstance(error, http.client.IncompleteRead):
        return "the connection broke"
    cause = getattr(error, "reason", error)
    return str(getattr(cause, "strerror", None) or cause) or "the connection broke"


def _failed(target: Path, error: Exception, address: str, anything: bool) -> QuireError:
    if anything:
        hint = "What came is kept. Do the same again to go on from there."
        return QuireError(f"{target.name} could not be fetched whole: {_reason(error)}.", hint, address)
    hint = "Check the connection and the address. Models that are on this computer work without a network."
    return QuireError(f"{target.name} could not be fetched: {_reason(error)}.", hint, address)


def _refused(address: str, code: int) -> QuireError:
    if code in (401, 403):
        hint = "Accept the model's licence on its page, then set HF_TOKEN; or check the repository's name."
        return QuireError("The server does not give this file without permission.", hint, f"{code} {address}")
    if code in (404, 410):
        return QuireError(f"There is no file at {address}.", "Check the repository and the name of the file.")
    return QuireError(f"The server refused: status {code}.", "Try again later.", address)


def _no_space(target: Path, needed: int) -> QuireError:
    more = f": {needed / 1e9:.1f} GB more are needed" if needed else ""
    return QuireError(
        f"The disk has no room for {target.name}{more}.", "Free some space; what came is kept, the rest can follow."
    )
