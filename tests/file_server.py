"""A web server on this machine that hands out files as Hugging Face does: with ranges, tags, redirection, checksum."""

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class FileServer:
    """files: by path. breaks_after: every connection ends after so many bytes; 0: none does.  checksum: whether it is
    sent, and which (empty: the right one).  gate: holds every piece back until it is set.  port: 0 takes a free one."""

    files: dict[str, bytes]
    breaks_after: int = 0
    ranges: bool = True
    checksum: str = ""
    status: int = 0
    gate: threading.Event = field(default_factory=threading.Event)
    asked: list[tuple[str, str]] = field(default_factory=list)  # path and Range of every request
    tokens: list[str] = field(default_factory=list)  # as each of them brought it
    address: str = ""
    port: int = 0


@contextmanager
def serving(server: FileServer) -> Iterator[FileServer]:
    server.gate.set()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path, span = self.path, self.headers.get("Range", "")
            server.asked.append((path, span))
            server.tokens.append(self.headers.get("Authorization", ""))
            if server.status:
                return self._head(server.status)
            if "/resolve/" in path:  # as Hugging Face: the checksum, and the way to another server
                data = server.files.get(path.rsplit("/", 1)[1])
                if data is None:
                    return self._head(404)
                right = hashlib.sha256(data).hexdigest()
                location = f"/{path.rsplit('/', 1)[1]}?signed=1"
                return self._head(302, Location=location, **{"X-Linked-Etag": f'"{server.checksum or right}"'})
            data = server.files.get(path.lstrip("/").partition("?")[0])
            if data is None:
                return self._head(404)
            tag, start = f'"{hashlib.md5(data).hexdigest()}"', 0
            found = re.fullmatch(r"bytes=(\d+)-", span)
            if found and server.ranges and self.headers.get("If-Range", tag) == tag:
                start = int(found[1])
                if start >= len(data):
                    return self._head(416)
                span_sent = f"bytes {start}-{len(data) - 1}/{len(data)}"
                self._head(206, ETag=tag, **{"Content-Range": span_sent, "Content-Length": str(len(data) - start)})
            else:
                self._head(200, ETag=tag, **{"Content-Length": str(len(data))})
            end = min(len(data), start + server.breaks_after) if server.breaks_after else len(data)
            for at in range(start, end, 1 << 16):
                server.gate.wait(20)
                self.wfile.write(data[at : min(end, at + (1 << 16))])

        def _head(self, status: int, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            pass  # a client that hung up

    httpd = Quiet(("127.0.0.1", server.port), Handler)
    server.address = f"http://127.0.0.1:{httpd.server_port}"
    thread = threading.Thread(target=httpd.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.gate.set()
        httpd.shutdown()
        httpd.server_close()
        thread.join()
