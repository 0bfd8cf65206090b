"""Books (epub): their parts in reading order, marked by section. Protected ones are refused."""

import posixpath
from urllib.parse import unquote
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from quire.formats import web
from quire.formats.archive import Archive, damaged
from quire.formats.base import Parsed, Unreadable, Writer

_CONTAINER = "META-INF/container.xml"
_ENCRYPTION = "META-INF/encryption.xml"
_FONTS = ("http://www.idpf.org/2008/embedding", "http://ns.adobe.com/pdf/enc#RC")  # fonts alone are obfuscated


def parse(data: bytes) -> Parsed:
    archive = Archive(data)
    names = set(archive.names)
    if _CONTAINER not in names:
        raise Unreadable("not an EPUB book, whatever its name says", "Give it the ending of what it is.")
    if _ENCRYPTION in names and not _only_fonts(_xml(archive, _ENCRYPTION)):
        raise Unreadable("protected against copying (DRM)", "Only a copy without protection can be read.")
    writer = Writer()
    for number, name in enumerate(_spine(archive), 1):
        if name in names:
            writer.mark("section", number)
            web.write(writer, web.decoded(archive.read(name)))
    if writer.empty:
        raise Unreadable("no text; its pages are pictures", "Run OCR over it.")
    return writer.parsed()


def _spine(archive: Archive) -> list[str]:
    """The names of the parts in reading order."""
    root = next((e.get("full-path", "") for e in _all(_xml(archive, _CONTAINER), "rootfile")), "")
    package = _xml(archive, root)
    folder = posixpath.dirname(root)
    items = {e.get("id", ""): e.get("href", "") for e in _all(package, "item")}
    found = [items.get(e.get("idref", ""), "") for e in _all(package, "itemref")]
    return [posixpath.normpath(posixpath.join(folder, unquote(href))) for href in dict.fromkeys(found) if href]


def _xml(archive: Archive, name: str) -> Element:
    data = archive.read(name)
    if b"<!ENTITY" in data.replace(b"\0", b"").upper():
        raise Unreadable("declares XML entities, as attacks do", "Convert it to EPUB anew.")
    try:
        return ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise damaged() from error


def _all(element: Element, name: str) -> list[Element]:
    return [e for e in element.iter() if isinstance(e.tag, str) and e.tag.rpartition("}")[2] == name]


def _only_fonts(encryption: Element) -> bool:
    return all(e.get("Algorithm") in _FONTS for e in _all(encryption, "EncryptionMethod"))
