"""`quire cache` and its commands, with a generated model; and that nothing about the catalogue stops an answer."""

import errno
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from quire import config, paths
from quire.cli import main
from quire.session import Session
from quire_engine.kv.catalogue import Catalogue
from tiny_gguf import write_tiny_gguf

ASK = ("ask", "--json", "--max-tokens", "4", "Which jar stands on shelf 3word?")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", metadata={"general.name": "Tiny"})


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("notes")
    for number in range(12):
        text = f"# Shelf {number}word\n\nOn the shelf {number}word there are {number} jars of plum jam.\n"
        (folder / f"{number}.md").write_text(text)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model: Path, notes: Path) -> Path:
    """A home where everything is cached. Not for writing."""
    home = tmp_path_factory.mktemp("made")
    done = subprocess.run(
        [sys.executable, "-m", "quire", "add", notes], env=environment(home, model), capture_output=True, timeout=120
    )
    assert b"Cached 12 of 12" in done.stdout, done.stderr
    return home


def environment(home: Path, model: Path) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("QUIRE_")}
    own |= {f"QUIRE_{kind}_DIR": str(home / kind.lower()) for kind in ("DATA", "CACHE", "CONFIG", "LOG")}
    return own | {"QUIRE_MODEL": str(model), "QUIRE_THREADS": "1"}


@pytest.fixture
def cache(made: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of stores of a copy of that home, which the commands use."""
    home = Path(os.environ["HOME"])
    for part in ("data", "cache"):
        shutil.copytree(made / part, home / part, dirs_exist_ok=True)
    monkeypatch.setenv("QUIRE_MODEL", str(model))
    monkeypatch.setenv("QUIRE_THREADS", "1")
    assert paths.cache_dir() == home / "cache"
    return home / "cache" / "kv"


def quire(*words: str, code: int = 0) -> Result:
    ran = CliRunner().invoke(main, words)
    assert ran.exit_code == code, (ran.output, ran.exception)
    return ran


def said(*words: str, code: int = 0) -> Any:
    return json.loads(quire("cache", *words, "--json", code=code).stdout)


def files(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.kv"))


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def test_status(cache: Path) -> None:
    state = said("status")
    [tiny] = state["each"]
    assert (tiny["model"], tiny["chunks"], tiny["turns"]) == ("Tiny", 13, 0)
    assert (
        tiny["size_bytes"]
        == state["size_bytes"]
        == state["written_bytes"]
        == sum(f.stat().st_size for f in files(cache))
    )
    assert state["limit_bytes"] == 20e9
    assert 8 < tiny["bits_per_value"] < 32, "small chunks: exact tokens, headers and padding are counted too"
    assert tiny["seconds"] > 0
    assert tiny["tokens"] > 13
    words = quire("cache", "status").stdout
    assert "Tiny\n  13 chunks" in words
    assert "bits per value" in words
    assert "of at most 20.0 GB" in words
    assert "by this computer so far" in words


def test_conversations_and_other_models_are_counted_too(cache: Path) -> None:
    catalogue = Catalogue(cache)
    catalogue.store("turns-" + said("status")["each"][0]["stores"][0], "Tiny").write("ab" * 32, bytes(1000))
    catalogue.store("0123456789abcdef", "Large\x1b[31m").write("cd" * 32, bytes(50_000_000))
    catalogue.store("fedcba9876543210").write("ef" * 32, bytes(10))
    each = said("status")["each"]
    assert [(h["model"][:5], h["chunks"], h["turns"]) for h in each] == [
        ("Large", 1, 0),
        ("Tiny", 14, 1),
        ("a mod", 1, 0),
    ]
    words = quire("cache", "status").stdout
    assert "1 turn of conversations among them" in words
    assert "\x1b" not in words


def test_status_of_nothing() -> None:
    assert said("status")["each"] == []
    assert said("verify") == {"chunks": 0, "size_bytes": 0, "damaged": [], "complete": True}
    assert "nothing to delete" in quire("cache", "clear").stdout


def test_verify(cache: Path) -> None:
    assert "Checked 13 files" in quire("cache", "verify").stdout
    spoilt = {file.stem for file in files(cache)[:2]}
    for file in files(cache)[:2]:
        spoil(file)
    kept = quire("cache", "verify", "--keep", code=1).stdout
    assert "2 damaged" in kept
    assert kept.count("It stays.") == 2
    report = said("verify", code=1)
    assert report["complete"]
    assert {damaged["key"] for damaged in report["damaged"]} == spoilt
    assert all(damaged["removed"] for damaged in report["damaged"])
    assert len(files(cache)) == 11
    assert "all sound" in quire("cache", "verify").stdout
    assert "Cached 12 of 12" in quire("cache").stdout
    assert len(files(cache)) == 13


def test_clear_asks_first(cache: Path) -> None:
    refused = quire("cache", "clear", code=1)
    assert "13 files of cached KV" in refused.stderr
    assert "--yes" in refused.stderr
    assert "--yes" in quire("cache", "clear", "--json", code=1).stderr
    assert len(files(cache)) == 13
    freed = sum(file.stat().st_size for file in files(cache))
    assert said("clear", "--yes") == {"chunks": 13, "freed_bytes": freed}
    assert files(cache) == []
    assert said("status")["written_bytes"] == freed, "what was written stays counted"


def test_clear_some(cache: Path) -> None:
    Catalogue(cache).store("0123456789abcdef", "Large").write("cd" * 32, bytes(1000))
    assert said("clear", "--unused-days", "3", "--yes")["chunks"] == 0
    with sqlite3.connect(cache / "catalogue.sqlite") as db:
        db.execute("UPDATE chunks SET used_at = used_at - 4 * 86400 WHERE key = ?", (files(cache)[-1].stem,))
    db.close()
    assert said("clear", "--unused-days", "3", "--yes")["chunks"] == 1
    assert said("clear", "--model", "others", "--yes") == {"chunks": 1, "freed_bytes": 1000}
    assert "There is: Tiny" in quire("cache", "clear", "--model", "Large", "--yes", code=1).stderr
    assert said("clear", "--model", "tiny", "--yes")["chunks"] == 12
    assert "--unused-days" in quire("cache", "clear", "--unused-days", "-1", code=2).stderr


def test_budget(cache: Path) -> None:
    used = sum(file.stat().st_size for file in files(cache))
    assert said("budget") == {"limit_bytes": 20_000_000_000, "used_bytes": used}
    assert "at most 5.0 GB" in quire("cache", "budget", "5").stdout
    assert config.load().cache_gb == 5
    assert "as much as there is" in quire("cache", "budget", "0").stdout
    assert "worth least goes" in quire("cache", "budget", "0.00001").stdout
    for wrong in ("lots", "1e9", "nan"):
        assert "cache_gb" in quire("cache", "budget", wrong, code=1).stderr
    assert "used up" in quire("cache").stdout
    assert sum(file.stat().st_size for file in files(cache)) <= 10_000


def test_a_misspelt_command_is_named(cache: Path) -> None:
    assert "stats" in quire("cache", "stats", code=2).stderr


# The catalogue stops nobody


def lock_out(cache: Path) -> None:
    """As on a disk that can be read only, for the catalogue."""
    (cache / "catalogue.sqlite").unlink()
    (cache / "catalogue.sqlite").mkdir()


TROUBLE: dict[str, Callable[[Path], None]] = {
    "none": lambda cache: None,
    "deleted": lambda cache: (cache / "catalogue.sqlite").unlink(),
    "damaged": lambda cache: os.truncate(cache / "catalogue.sqlite", 5000),
    "in the way": lock_out,
}


@pytest.mark.parametrize("trouble", TROUBLE)
def test_an_answer_comes_whatever_happened_to_the_catalogue(
    cache: Path, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Session.request  # full prefill is as fast with so small a model, but here stored KV is meant
    monkeypatch.setattr(Session, "request", lambda *of: replace(request(*of), insist=True))
    TROUBLE[trouble](cache)
    answer = json.loads(quire(*ASK).stdout)
    assert answer["tokens"]["reused"] > 0
    files(cache)[3].unlink()
    files(cache)[7].unlink()
    again = json.loads(quire(*ASK, "--context-tokens", "2000").stdout)
    # in another order: of equally good ones those that are cached go first
    assert {of["path"] for of in again["sources"]} == {of["path"] for of in answer["sources"]}
    status = quire("status", "--json")
    assert json.loads(status.stdout)["passages"] == 12
    assert "Cached 12 of 12" in quire("cache").stdout
    assert len(files(cache)) == 13
    assert said("status")["each"][0]["chunks"] == 13


def test_a_read_only_cache_still_answers(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the system says on a disk that is read-only, since a test may run as root, who may write anywhere."""
    spoil(files(cache)[2])
    files(cache)[5].unlink()
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    connect = sqlite3.connect

    def connect_read_only(path: str, **options: Any) -> sqlite3.Connection:
        if str(cache) in str(path):
            raise sqlite3.OperationalError("attempt to write a readonly database")
        connection: sqlite3.Connection = connect(path, **options)
        return connection

    for module, name in ((tempfile, "mkstemp"), (os, "utime"), (os, "replace"), (Path, "unlink"), (Path, "mkdir")):
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(paths, "_directory", lambda variable, _: Path(os.environ[variable]))
    monkeypatch.setattr(sqlite3, "connect", connect_read_only)
    for number in (1, 3, 5, 7):
        answer = json.loads(
            quire("ask", "--json", "--max-tokens", "4", f"Which jar stands on shelf {number}word?").stdout
        )
        assert answer["sources"]
    assert json.loads(quire("status", "--json").stdout)["cached"] == 11
    assert "1 damaged" in quire("cache", "verify", code=1).stdout
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before


def test_two_processes_share_the_work(notes: Path, model: Path, tmp_path: Path) -> None:
    """Of one folder, at the same time: every chunk is computed once, by one of them."""
    home = tmp_path / "shared"
    words = [sys.executable, "-m", "quire"]
    subprocess.run([*words, "add", "--no-cache", notes], env=environment(home, model), check=True, timeout=120)
    running = [
        subprocess.Popen([*words, "cache"], env=environment(home, model), stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in running:
        out, _ = process.communicate(timeout=120)
        assert (process.returncode, "Cached 12 of 12 passages" in out) == (0, True)
    [folder] = (path for path in (home / "cache" / "kv").iterdir() if path.is_dir())
    store = Catalogue(home / "cache" / "kv").store(folder.name)
    assert len(store.keys()) == 13
    assert store.total_written_bytes() == store.size_bytes()
