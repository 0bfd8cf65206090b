"""`runtime = "openai"`: the same questions, answered by a server; here one on loopback that notes what it is sent."""

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from textual.widgets import Collapsible

from command_line import json_of, run
from driving import on_a_screen, running, shown, until
from quire import config, paths
from quire.cli import main
from quire.session import Found, Session
from quire.tui.app import QuireApp
from quire_engine.errors import QuireError
from quire_engine.runtimes.openai import Server
from quire_engine.types import Answered, Text
from tiny_gguf import write_tiny_gguf

KEY = "key-of-nobody"
WORDS = ("The barrel ", "holds 200 ", "litres.")


@dataclass
class Asked:
    """What the server was sent, and how it behaves. after: it says nothing more behind so many pieces until `gate`."""

    address: str = ""
    status: int = 200
    told: str = ""  # in place of pieces
    finish: str = "stop"
    gate: threading.Event = field(default_factory=threading.Event)
    after: int = 99
    requests: list[tuple[str, str, Any]] = field(default_factory=list)  # path, authorization, body


@pytest.fixture
def server() -> Iterator[Asked]:
    asked = Asked()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.requests.append((self.path, "", None))
            self._head(200)
            self.wfile.write(json.dumps({"data": [{"id": "first"}, {"id": "second"}]}).encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.requests.append((self.path, self.headers.get("Authorization", ""), body))
            self._head(asked.status)
            if asked.told:
                self.wfile.write(asked.told.encode())
                return
            for number, word in enumerate(WORDS):
                if number >= asked.after:
                    self.wfile.flush()
                    asked.gate.wait(20)
                self._event({"choices": [{"delta": {"content": word}}]})
            if asked.finish:
                self._event({"choices": [{"delta": {}, "finish_reason": asked.finish}]})
                usage = {"prompt_tokens": 90, "prompt_tokens_details": {"cached_tokens": 64}}
                self._event({"choices": [], "usage": usage})
                self.wfile.write(b": that is all\n\ndata: [DONE]\n\n")

        def _head(self, status: int) -> None:
            self.send_response(status)
            if status == 302:
                self.send_header("Location", "/elsewhere")
            self.end_headers()

        def _event(self, told: object) -> None:
            self.wfile.write(f"data: {json.dumps(told)}\n\n".encode())

        def log_message(self, *_: object) -> None: ...

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.daemon_threads = True
    thread = threading.Thread(target=listening.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    asked.address = f"http://127.0.0.1:{listening.server_port}/v1"
    yield asked
    asked.gate.set()
    listening.shutdown()
    listening.server_close()


@pytest.fixture(autouse=True)
def _settings(server: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A document that was added, and the server in the settings."""
    monkeypatch.setenv("QUIRE_MODEL", str(write_tiny_gguf(tmp_path / "tiny.gguf")))
    monkeypatch.setenv("QUIRE_OPENAI_KEY", KEY)
    monkeypatch.setenv("QUIRE_THREADS", "1")
    (tmp_path / "rain.md").write_text("# Rain\n\nThe barrel behind the shed holds rain, 200 litres.\n")
    config.save({"runtime": "openai", "openai_url": server.address, "openai_model": "large"})
    added = run("add", tmp_path / "rain.md")
    assert added.exit_code == 0, added.output
    assert "Nothing is cached" in added.stdout


def test_the_same_question_with_the_same_sources(server: Asked, tmp_path: Path) -> None:
    told = json_of("ask", "How much does the barrel hold?")
    [(path, authorization, body)] = server.requests
    assert (path, authorization) == ("/v1/chat/completions", f"Bearer {KEY}")
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert "holds rain, 200 litres" in body["messages"][1]["content"]
    assert body["messages"][1]["content"].endswith("How much does the barrel hold?")
    assert (body["model"], body["stream"], body["max_tokens"]) == ("large", True, config.Settings().max_tokens)
    assert told["answer"] == "".join(WORDS)
    assert [Path(source["path"]).name for source in told["sources"]] == ["rain.md"]
    assert (told["runtime"], told["ending"], told["ratio"]) == ("openai", "end", 1.0)
    assert (told["tokens"]["kept"], told["tokens"]["fresh"]) == (64, 26)
    assert told["model"] == f"large at {server.address.split('/')[2]}"
    assert "on this computer" in told["reason"]
    assert list((paths.cache_dir() / "kv").glob("*/??/*")) == []


def test_without_a_model_the_first_one_is_asked(server: Asked) -> None:
    config.unset("openai_model")
    json_of("ask", "How much does the barrel hold?")
    assert [path for path, _, _ in server.requests] == ["/v1/models", "/v1/chat/completions"]
    assert server.requests[1][2]["model"] == "first"


def test_a_conversation_is_sent_whole(server: Asked) -> None:
    server.finish = "length"
    lines = "How much does the barrel hold?\nWhere is the barrel?\n"
    done = CliRunner().invoke(main, ["chat", "--plain"], input=lines)
    assert done.exit_code == 0, done.output
    first, second = (body["messages"] for _, _, body in server.requests)
    assert second[:2] == first
    assert second[2] == {"role": "assistant", "content": "".join(WORDS)}
    assert second[3]["content"].endswith("Where is the barrel?")


def test_with_a_question_to_all_it_is_said_that_all_is_sent(server: Asked) -> None:
    told = json_of("ask", "/all How much does the barrel hold?")
    assert (told["answer"], told["passages_read"]) == ("".join(WORDS), 1)
    assert told["leaves"] == Server(server.address).statement_of_all
    [(_, _, body)] = server.requests
    assert "holds rain, 200 litres" in body["messages"][1]["content"]
    assert "/all" not in body["messages"][1]["content"]


def statement(server: Asked) -> str:
    return Server(server.address).statement


def says(app: QuireApp, text: str) -> bool:
    """Whether this stands on the screen, perhaps over several lines."""
    return text in " ".join(shown(app).split())


@on_a_screen
async def test_the_application_says_where_answers_come_from(server: Asked) -> None:
    server.after = 1
    async with running(lambda: Session(config.load()), (80, 24)) as (app, pilot):
        assert says(app, statement(server)), "before anything is loaded"
        assert "Nothing leaves" not in shown(app)
        await until(app, pilot, lambda: "a server answers: large at 127.0.0.1" in shown(app))
        await until(app, pilot, lambda: "Your folders" in shown(app))
        assert says(app, statement(server))
        app.chat.prompt.put("How much does the barrel hold?")
        await pilot.press("enter")
        await until(app, pilot, lambda: "The barrel" in shown(app) and WORDS[1] not in shown(app))
        await pilot.press("escape")
        await until(app, pilot, lambda: "Stopped." in shown(app))
        server.after = 99
        app.chat.prompt.put("How much does the barrel hold?")
        await pilot.press("enter")
        await until(app, pilot, lambda: "The barrel holds 200 litres." in shown(app))
        await until(app, pilot, lambda: shown(app).count("1 source: rain.md") == 2)
        for status, said in ((401, "QUIRE_OPENAI_KEY"), (404, "openai_model (F2)"), (400, "context_tokens (F2)")):
            server.status, server.told = status, "{}"
            app.chat.prompt.put("And the shed?")
            await pilot.press("enter")
            await until(app, pilot, partial(says, app, said))
            assert app.chat.prompt.text == "And the shed?", "it comes back"
            assert "quire config" not in shown(app)


@on_a_screen
async def test_going_over_to_a_server_is_said_where_a_conversation_goes_on(server: Asked) -> None:
    config.save({"runtime": "llama.cpp", "max_tokens": 2})
    async with running(lambda: Session(config.load())) as (app, pilot):
        await until(app, pilot, lambda: "Nothing leaves this computer" in shown(app))
        app.chat.prompt.put("How much does the barrel hold?")
        await pilot.press("enter")
        await until(app, pilot, lambda: app.chat.query(Collapsible))
        app.preferences.use("runtime", "openai")
        await until(app, pilot, lambda: says(app, statement(server)))
        await until(app, pilot, lambda: "a server answers: large" in shown(app))
        assert server.requests == []


def test_line_by_line_it_is_said_first(server: Asked) -> None:
    done = CliRunner().invoke(main, ["chat", "--plain"], input="")
    assert done.stderr == f"{statement(server)}\n"


def test_stopping_keeps_what_came(server: Asked) -> None:
    server.after = 1
    stop = threading.Event()
    with Session(config.load()) as session:
        said, ending = "", ""
        for event in session.ask("How much does the barrel hold?", should_stop=stop.is_set):
            match event:
                case Found():
                    assert event.sources
                case Text():
                    said += event.text
                    began = time.monotonic()
                    stop.set()
                case Answered():
                    ending = event.ending
    assert (said, ending) == (WORDS[0], "stopped")
    assert time.monotonic() - began < 15, "the server says nothing for 20 s, and is not waited for"


@pytest.mark.parametrize(
    ("status", "told", "words"),
    [
        (401, '{"error": {"message": "no such key\\u001b[31m"}}', "QUIRE_OPENAI_KEY"),
        (404, "", "openai_url"),
        (400, '{"error": "too long"}', "--context-tokens"),
        (503, "<html>busy</html>", "busy"),
        (302, "", "(302)"),
        (200, 'data: {"error": {"message": "out of memory"}}\n\n', "out of memory"),
        (200, "data: what?\n\n", "the connection broke"),
        (200, 'data: {"choices": [{"delta": {"content": "The"}}]}\n\n', "broke off"),
    ],
)
def test_what_goes_wrong_is_said(server: Asked, status: int, told: str, words: str) -> None:
    server.status, server.told = status, told or "{}"
    done = run("ask", "How much does the barrel hold?")
    assert done.exit_code == 1, done.output
    assert words in done.stderr
    assert "\x1b[31mno" not in done.stderr
    assert len(server.requests) == 1, "a redirection is not followed"


def test_a_server_that_is_not_there() -> None:
    config.save({"openai_url": "http://127.0.0.1:9/v1"})
    said = run("ask", "How much does the barrel hold?").stderr
    assert "does not answer" in said
    assert "quire config set runtime auto" in said


def test_a_server_that_was_not_named() -> None:
    config.unset("openai_url")
    assert "openai_url" in run("ask", "How much does the barrel hold?").stderr


def test_it_is_off_by_default_and_can_be_left_for_one_question(server: Asked) -> None:
    assert config.Settings().runtime == "auto"
    assert run("--runtime", "llama.cpp", "ask", "--max-tokens", "2", "How much does the barrel hold?").exit_code == 0
    assert server.requests == []


def test_measuring_needs_a_model_here() -> None:
    assert "nothing to compare" in run("compare", "How much does the barrel hold?").stderr
    with Session(config.load()) as session, pytest.raises(QuireError, match="computes on this computer"):
        _ = session.engine.runtime


def test_the_doctor_asks_the_server(server: Asked) -> None:
    checks = {check["check"]: check for check in json.loads(run("doctor", "--json").stdout)["checks"]}
    assert "first, second" in checks["runtime"]["found"]
    assert server.requests[-1][0] == "/v1/models"


@pytest.mark.parametrize("address", ["ftp://a/v1", "http://", "http://me:secret@a/v1", "a.example", "http://a:x/v1"])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(QuireError) as caught:
        config.save({"openai_url": address})
    assert "http://localhost:8000/v1" in caught.value.hint


def test_what_leaves_the_computer_is_said_plainly() -> None:
    said = {url: Server(f"{url}/v1").statement for url in ("http://[::1]:80", "http://10.0.0.2", "https://a.example")}
    assert [("leave this computer" in text, "unencrypted" in text) for text in said.values()] == [
        (False, False),
        (True, True),
        (True, False),
    ]
    assert KEY not in repr(Server("http://a", "", KEY))
