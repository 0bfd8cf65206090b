"""Opens zip files of documents (docx, pptx, xlsx, epub) without unpacking what was made to do harm.

Knows zip and XML declarations; knows nothing of what the parts say. Names inside an archive are never used as paths.
"""

import io
import re
import zipfile
import zlib

from quire.formats.base import Unreadable

_MOST_PARTS = 20_000
_MOST_BYTES = 400_000_000  # of all parts, unpacked
_MOST_RATIO = 200  # unpacked to packed; sheets of equal rows reach 17
_SMALL_BYTES = 2_000_000  # what can do no harm, however well it packs
_COMPOUND_FILE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"  # of old Office files, and of new ones with a password
# No Office program declares a document type; in XML it serves to blow up text or to read other files.
_DECLARATION = re.compile(rb"<!(?:DOCTYPE|ENTITY)", re.IGNORECASE)


class Archive:
    """A zip file in memory. Raises Unreadable where it is damaged, encrypted or a bomb."""

    def __init__(self, data: bytes) -> None:
        if data.startswith(_COMPOUND_FILE):
            if "EncryptedPackage".encode("utf-16-le") in data:
                raise Unreadable("encrypted: it needs a password", "Save it without a password.")
            raise Unreadable("an Office file of before 2007", "Open it and save it in the current format.")
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(data))
        except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, EOFError) as error:
            raise damaged() from error
        self._check()

    def _check(self) -> None:
        parts = self._zip.infolist()
        total = sum(part.file_size for part in parts)
        if len(parts) > _MOST_PARTS or total > _MOST_BYTES:
            raise _bomb(f"unpacks to {total / 1e6:,.0f} MB in {len(parts):,} parts")
        for part in parts:
            if part.flag_bits & 1:
                raise Unreadable("encrypted: it needs a password", "Save it without a password.")
            ratio = part.file_size / max(1, part.compress_size)
            if part.file_size > _SMALL_BYTES and ratio > _MOST_RATIO:
                raise _bomb(f"a part of it unpacks to {ratio:,.0f} times its size")

    @property
    def names(self) -> list[str]:
        return self._zip.namelist()

    def read(self, name: str) -> bytes:
        """One part. Raises Unreadable, also when it is not there."""
        try:
            return self._zip.read(name)
        except (KeyError, zipfile.BadZipFile, NotImplementedError, OSError, ValueError, EOFError, zlib.error) as e:
            raise damaged() from e

    def require(self, name: str, kind: str) -> None:
        """Refuses a file that is something else, and one whose XML declares entities."""
        if name not in self.names:
            raise Unreadable(f"not {kind}, whatever its name says", "Give it the ending of what it is.")
        for part in self.names:
            if part.endswith((".xml", ".rels")) and _DECLARATION.search(self.read(part).replace(b"\0", b"")):
                raise Unreadable("declares XML entities, as attacks do", "Open it and save it anew.")


def damaged() -> Unreadable:
    return Unreadable("damaged", "Open it in the program it was made with and save it anew.")


def _bomb(how: str) -> Unreadable:
    return Unreadable(f"{how}: it looks like a zip bomb", "If you trust it, save its text as another file.")
