"""The parser process: `python -m quire.formats.child` reads bytes from its input and writes text to its output.

A request is one line of JSON, {"format", "size_bytes", "cpu_s"}, and the file's bytes; the reply is one line of JSON,
{"text", "marks"} or {"reason", "remedy", "ends"}; ends: what comes next needs a fresh process. It may neither open a
file outside of Python's own, nor write one, nor connect, nor start anything; it may not grow beyond its memory nor
compute longer than it is told. Ends with its input.
"""

import importlib
import json
import mimetypes
import os
import sys
from contextlib import suppress
from dataclasses import astuple
from typing import IO, Any

from quire.formats.base import Parsed, Unreadable

_PARSERS = {
    "pdf": "pdf.parse",
    "docx": "word.parse",
    "pptx": "slides.parse",
    "xlsx": "sheets.parse",
    "html": "web.parse",
    "epub": "book.parse",
    "eml": "mail.parse",
    "mbox": "mail.parse_mailbox",
    "ipynb": "notebook.parse",
}
_REFUSED = ("os.", "socket.", "subprocess.", "shutil.", "tempfile.", "urllib.")  # kinds of events; see PEP 578
_NEEDED = ("os.listdir", "os.scandir", "os.putenv", "os.unsetenv")  # to import modules
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_SLOWER = 5  # how far it stands back for everything else
NO_LIBRARY = 3  # what it ends with when a library cannot be imported


def main(memory_bytes: int) -> None:
    """Answers requests until there are none. memory_bytes: the most address space, where the system limits it."""
    requests, replies = _channels()
    _restrict(memory_bytes)
    while line := requests.readline():
        request = json.loads(line)
        data = requests.read(request["size_bytes"])
        _limit_time(request["cpu_s"])
        reply = answer(request["format"], data)
        replies.write(json.dumps(reply, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        replies.flush()
        if reply.get("ends"):
            return


def answer(format: str, data: bytes) -> dict[str, Any]:
    """The reply to one request."""
    module, _, function = _PARSERS[format].partition(".")
    try:
        parse = getattr(importlib.import_module(f"quire.formats.{module}"), function)
        parsed: Parsed = parse(data)
        return {"text": parsed.text, "marks": [astuple(mark) for mark in parsed.marks]}
    except Unreadable as error:
        return {"reason": error.reason, "remedy": error.remedy, "ends": False}
    except ImportError:
        sys.exit(NO_LIBRARY)
    except RecursionError:
        failure = Unreadable("too deeply nested", "Save it in a simpler form, for example as text.")
    except MemoryError:
        failure = Unreadable("needs too much memory", "Split it, or save it as text.")
    except Exception as error:  # a parser's own mistake; the person needs to hear of the file, not of it
        failure = Unreadable(f"damaged ({type(error).__name__})", "Open it in its own program and save it anew.")
    return {"reason": failure.reason, "remedy": failure.remedy, "ends": True}


def _channels() -> tuple[IO[bytes], IO[bytes]]:
    """Input and output; what a library prints goes nowhere near them."""
    replies = os.fdopen(os.dup(1), "wb")
    requests = os.fdopen(os.dup(0), "rb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    return requests, replies


def _restrict(memory_bytes: int) -> None:
    sys.dont_write_bytecode = True
    mimetypes.knownfiles.clear()  # openpyxl uses it, and it would read files of the system
    if hasattr(os, "nice"):
        os.nice(_SLOWER)
    try:
        import resource
    except ImportError:  # Windows: time is limited from outside, memory is not
        pass
    else:
        _lower(resource.RLIMIT_AS, memory_bytes)
        _lower(resource.RLIMIT_FSIZE, 0)
        _lower(resource.RLIMIT_CORE, 0)
    own = [os.path.realpath(place) for place in (sys.prefix, sys.base_prefix, *sys.path) if place]
    sys.addaudithook(lambda event, arguments: _watch(event, arguments, own))


def _lower(limit: int, value: int) -> None:
    import resource

    hard = resource.getrlimit(limit)[1]
    bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
    with suppress(ValueError, OSError):  # macOS knows RLIMIT_AS and refuses to set it
        resource.setrlimit(limit, (bound, bound))


def _watch(event: str, arguments: tuple[Any, ...], own: list[str]) -> None:
    if event.startswith(_REFUSED) and event not in _NEEDED:
        raise PermissionError(event)
    if event == "open" and isinstance(arguments[0], str | bytes):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        inside = any(path == place or path.startswith(place + os.sep) for place in own)
        if arguments[2] & _WRITING or not inside:
            raise PermissionError(path)


def _limit_time(cpu_s: float) -> None:
    """From now on. It ends the process even where nobody waits for it any more."""
    try:
        import resource
    except ImportError:
        return
    usage = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(usage.ru_utime + usage.ru_stime + cpu_s) + 1, hard))


if __name__ == "__main__":
    main(int(sys.argv[1]))
