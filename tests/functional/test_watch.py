"""`quire watch` as a process of its own, with a generated model: kept folders, kills, signals, and the service."""

import json
import os
import plistlib
import random
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from quire import service
from quire.cli import main
from quire.library import Library
from quire_engine.kv.catalogue import Catalogue
from tiny_gguf import write_tiny_gguf

PATIENCE_S = 90.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", metadata={"general.name": "Tiny"})


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    folder.mkdir()
    for number in range(120):
        write(folder / f"{number}.md", f"{number}word")
    return folder


def write(file: Path, word: str) -> None:
    shelves = "".join(f"\n## Shelf {i} of {word}\n\nThere are {i} jars of plum jam and {word}.\n" for i in range(6))
    file.write_text(f"# About {word}\n{shelves}")


class Watching:
    """The process, and what it said."""

    def __init__(self, home: Path, model: Path, *words: str) -> None:
        own = {name: value for name, value in os.environ.items() if not name.startswith("QUIRE_")}
        own |= {f"QUIRE_{kind}_DIR": str(home / kind.lower()) for kind in ("DATA", "CACHE", "CONFIG", "LOG")}
        own |= {"QUIRE_MODEL": str(model), "QUIRE_THREADS": "1", "QUIRE_CONSIDERATE": "off"}
        self.home, self.environment = home, own
        self.process = subprocess.Popen(
            [sys.executable, "-m", "quire", "watch", "--json", *words],
            env=own,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.events: list[dict[str, Any]] = []
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.events.append(json.loads(line))

    def lines(self) -> list[str]:
        return [line for event in list(self.events) for line in event["lines"]]

    def complete(self) -> int:
        """How often it said that everything is cached."""
        return sum(event["event"] == "complete" for event in list(self.events))

    def until(self, true: Callable[[], Any]) -> None:
        end = time.monotonic() + PATIENCE_S
        while not true():
            assert time.monotonic() < end, self.events
            assert self.process.poll() is None, self.process.stderr and self.process.stderr.read()
            time.sleep(0.02)

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        code = self.process.wait(PATIENCE_S)
        self._thread.join()
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe
            pipe.close()
        return code

    def finds(self, word: str) -> set[str]:
        with Library(self.home / "data" / "index.sqlite") as library:
            return {hit.path.name for hit in library.search(word, 20)}


@pytest.fixture
def start(tmp_path: Path, model: Path) -> Iterator[Callable[..., Watching]]:
    started: list[Watching] = []

    def begin(*words: str) -> Watching:
        started.append(Watching(tmp_path / "home", model, *words))
        return started[-1]

    yield begin
    for watching in started:
        if watching.process.poll() is None:
            watching.end(signal.SIGKILL)


def stored(home: Path) -> tuple[int, int]:
    """Bytes of KV on disk, and bytes that were ever written."""
    on_disk = sum(path.stat().st_size for path in (home / "cache" / "kv").rglob("*.kv"))
    return on_disk, sum(store.total_written_bytes() for store in Catalogue.of(home / "cache").stores())


def test_a_folder_is_kept_until_the_process_is_told_to_end(start: Callable[..., Watching], notes: Path) -> None:
    watching = start(str(notes))
    watching.until(watching.complete)
    assert [line for line in watching.lines() if line.startswith("Indexed: 120 added; ")]
    assert re.fullmatch(r"All \d+ passages are cached\.", watching.lines()[-1])
    write(notes / "7.md", "zebra")
    write(notes / "new.md", "moose")
    (notes / "8.md").unlink()
    (notes / "9.md").rename(notes / "moved.md")
    watching.until(lambda: watching.finds("zebra") and watching.finds("moose") and not watching.finds("8word"))
    watching.until(lambda: watching.finds("9word") == {"moved.md"})
    (notes / ".gitignore").write_text("new.md\n")
    watching.until(lambda: not watching.finds("moose"))
    assert watching.end(signal.SIGTERM) == 0
    on_disk, written = stored(watching.home)
    assert on_disk == written, "what only moved is not computed again"


def test_killed_again_and_again_it_does_nothing_twice(start: Callable[..., Watching], notes: Path) -> None:
    """Every kill comes at another moment of reading or caching."""
    moments = random.Random(1)
    for kill in range(4):
        watching = start(str(notes))
        cache, index = watching.home / "cache" / "kv", watching.home / "data" / "index.sqlite"
        had = len(list(cache.rglob("*.kv")))
        if kill == 0:
            watching.until(index.exists)
        else:
            watching.until(lambda cache=cache, had=had: len(list(cache.rglob("*.kv"))) > had)  # type: ignore[misc]
        time.sleep(moments.uniform(0, 0.1))
        watching.end(signal.SIGKILL)
        assert not watching.complete(), "otherwise nothing was interrupted"
    watching = start(str(notes))
    watching.until(watching.complete)
    assert watching.end(signal.SIGINT) == 0
    with sqlite3.connect(watching.home / "data" / "index.sqlite") as db:
        [passages] = db.execute("SELECT count(*) FROM chunks").fetchone()
    db.close()
    files = list((watching.home / "cache" / "kv").rglob("*.kv"))
    assert len(files) == passages + 1, "every passage, and the prompt's opening"
    on_disk, written = stored(watching.home)
    assert written <= on_disk, "a kill may lose the count of what it interrupted, but nothing was written twice"


def test_another_process_adds_a_folder_and_asks(start: Callable[..., Watching], notes: Path) -> None:
    watching = start(str(notes))
    asked = [sys.executable, "-m", "quire", "ask", "--json", "--max-tokens", "2", "Where is 7word?"]
    watching.until(lambda: (watching.home / "data" / "index.sqlite").exists() and watching.finds("7word"))
    answer = subprocess.run(asked, env=watching.environment, capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout)["sources"][0]["path"] == str(notes / "7.md")
    watching.until(watching.complete)
    assert watching.end(signal.SIGTERM) == 0
    assert not [event for event in watching.events if event["event"] == "failed"]


def test_without_a_folder_it_says_what_to_do(model: Path) -> None:
    ran = CliRunner().invoke(main, ["watch", "--model", str(model)])
    assert ran.exit_code == 1
    assert "quire watch ~/notes" in ran.output


# The service


def test_the_service_is_written_and_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config home"))
    monkeypatch.setattr(sys, "platform", "linux")
    where = service.of_this_system("linux").file
    installed = CliRunner().invoke(main, ["watch", "--install"])
    assert installed.exit_code == 0, installed.output
    assert "systemctl --user enable --now quire" in installed.output
    text = where.read_text()
    assert f'ExecStart="{sys.executable}" "-P" "-m" "quire" "watch"\n' in text
    assert f'Environment="QUIRE_DATA_DIR={os.environ["QUIRE_DATA_DIR"]}"\n' in text
    assert "@" not in text
    assert CliRunner().invoke(main, ["watch", "--uninstall"]).output.startswith("Deleted")
    assert not where.exists()
    assert CliRunner().invoke(main, ["watch", "--uninstall"]).output.startswith("There is no")
    assert CliRunner().invoke(main, ["watch", "--install", "--uninstall"]).exit_code == 1


def test_strange_paths_in_a_service(tmp_path: Path) -> None:
    command = ('/opt/100% "new"/python', "a\\b", "$HOME")
    unit = service.Service(tmp_path / "x" / "q.service", "quire.service.in", "", "")
    unit.install(command, {"QUIRE_MODEL": "/m/50%.gguf", "HOME": "/h"})
    text = unit.file.read_text()
    assert 'ExecStart="/opt/100%% \\"new\\"/python" "a\\\\b" "$$HOME"\n' in text
    assert 'Environment="QUIRE_MODEL=/m/50%%.gguf"\n' in text
    assert "HOME=" not in text
    agent = service.Service(tmp_path / "x" / "q.plist", "quire.plist.in", "", "")
    agent.install(("/A & B/<python>", "watch"), {"QUIRE_MODEL": "/m/&.gguf"})
    read = plistlib.loads(agent.file.read_bytes())
    assert read["ProgramArguments"] == ["/A & B/<python>", "watch"]
    assert read["EnvironmentVariables"] == {"QUIRE_MODEL": "/m/&.gguf"}
    assert read["KeepAlive"] == {"SuccessfulExit": False}
    agent.install(("quire",), {})
    assert plistlib.loads(agent.file.read_bytes())["EnvironmentVariables"] == {}
