"""`quire doctor`: what it says where all is well, and of every thing that can be wrong, one at a time."""

import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from command_line import run
from quire import config, doctor, paths
from quire.doctor import Finding
from quire.session import Session
from quire.watcher import network_mount
from quire_engine.kv.catalogue import Catalogue
from quire_engine.selection.ratio import Tuned
from tiny_gguf import write_tiny_gguf

NAMES = [
    "config",
    "directories",
    "index",
    "conversations",
    "watches",
    "model",
    "finding",
    "runtime",
    "pytorch",
    "kernels",
    "ratio",
    "disk",
    "space",
    "cache",
]


@pytest.fixture(autouse=True)
def _small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model, a small trial of the disk, and no other limit to the disk than the test's own."""
    monkeypatch.setenv("QUIRE_MODEL", str(write_tiny_gguf(tmp_path / "tiny.gguf")))
    monkeypatch.setenv("QUIRE_CACHE_GB", "0")
    monkeypatch.setenv("QUIRE_THREADS", "1")
    monkeypatch.setattr(doctor, "_TRIAL_BYTES", 1 << 20)
    monkeypatch.setattr(doctor, "_SLOW_BYTES_PER_SECOND", 1.0)
    monkeypatch.setattr(doctor, "_SPARE_BYTES", 1.0)


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "rain.md").write_text("# Rain\n\nThe barrel holds 200 litres.\n")
    return folder


def findings() -> dict[str, Finding]:
    return {finding.check: finding for finding in doctor.look({})}


def only(state: str) -> list[Finding]:
    return [finding for finding in findings().values() if finding.state == state]


def test_all_well(notes: Path) -> None:
    assert run("add", "--no-cache", notes).exit_code == 0
    done = run("doctor", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert [check["check"] for check in told["checks"]] == NAMES
    assert {check["state"] for check in told["checks"]} == {"ok"} == {told["state"]}
    numbers = {check["check"]: check["numbers"] for check in told["checks"]}
    assert numbers["index"] == {"documents": 1, "skipped": 0, "passages": 1}
    assert numbers["watches"]["folders"] == 1
    assert numbers["disk"]["read_bytes_per_second"] > 0
    assert list(paths.data_dir().glob("doctor-*")) == []


def test_how_passages_are_found(tmp_path: Path) -> None:
    assert "by words alone" in findings()["finding"].found
    chat = write_tiny_gguf(tmp_path / "chat.gguf")
    config.save({"embedder": str(chat)})
    [warned] = only("warn")
    assert (warned.check, "chat model" in warned.remedy) == ("finding", True)
    made: dict[str, str | int] = {"general.name": "nomic-embed-text-v1.5", "pooling_type": 1}
    config.save({"embedder": str(write_tiny_gguf(tmp_path / "made.gguf", metadata=made))})
    found = findings()["finding"]
    assert (found.state, 'questions begin with "search_query: "' in found.found) == ("ok", True)
    config.save({"embedder": str(tmp_path / "gone.gguf")})
    [failed] = only("fail")
    assert (failed.check, bool(failed.remedy)) == ("finding", True)


def test_in_words() -> None:
    told = run("doctor").stdout.splitlines()
    assert [line.split()[1] for line in told] == NAMES
    assert told[0].startswith("ok ")


def test_a_mistake_in_the_settings_hides_nothing_else() -> None:
    config.config_file().write_text('dail = "fast"\n')
    done = run("doctor")
    assert done.exit_code == 1
    assert "-> Did you mean dial?" in done.stdout
    assert [finding.check for finding in only("fail")] == ["config"]


def _garbage(index: Path) -> None:
    index.write_bytes(b"not a database" * 100)


def _damaged_within(index: Path) -> None:
    with index.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(index.stat().st_size - 4096))


@pytest.mark.parametrize("damage", [_garbage, _damaged_within])
def test_a_damaged_index(damage: Callable[[Path], None], notes: Path) -> None:
    assert run("add", "--no-cache", notes).exit_code == 0
    damage(paths.data_dir() / "index.sqlite")
    [found] = only("fail")
    assert found.check == "index"
    assert "damaged" in found.found
    assert "Delete it" in found.remedy


def test_a_missing_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QUIRE_MODEL", str(tmp_path / "gone.gguf"))
    failed = only("fail")
    assert [finding.check for finding in failed] == ["model", "runtime"]
    assert "quire models" in failed[0].remedy


def test_a_model_that_is_not_stitched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QUIRE_MODEL", str(write_tiny_gguf(tmp_path / "odd.gguf", "gemma")))
    [warned] = only("warn")
    assert (warned.check, "gemma" in warned.found) == ("model", True)
    assert "quire models recommend" in warned.remedy


def test_how_much_is_computed_again() -> None:
    assert findings()["ratio"].found == "50% of a question's passages are computed again"
    with Session(config.load({})) as session:
        assert session.engine.costs is not None
        transfer = session.engine.costs.transfers()["disk"]
        session.engine.ratios.keep("disk", Tuned(0.6, 0.6, transfer))
        assert "60% from disk is faster" in findings()["ratio"].found
        session.engine.ratios.keep("disk", Tuned(0.6, 0.6, 2 * transfer))
    [warned] = only("warn")
    assert (warned.check, warned.remedy) == ("ratio", "Measure it again: quire bench ratio")
    config.save({"dial": "exact"})
    assert findings()["ratio"].numbers["ratio"] == 1


def test_a_folder_that_went_away(notes: Path, tmp_path: Path) -> None:
    named = notes.rename(tmp_path / "no\x1b[31mtes")
    assert run("add", "--no-cache", named).exit_code == 0
    named.rename(tmp_path / "elsewhere")
    [warned] = only("warn")
    assert warned.check == "watches"
    assert "quire remove" in warned.remedy
    assert "\x1b" not in warned.found + warned.remedy


def test_damaged_kv_is_named_and_stays() -> None:
    catalogue = Catalogue.of(paths.cache_dir())
    catalogue.store("0123456789abcdef").write("ab" * 32, bytes(1000))
    catalogue.close()
    [failed] = only("fail")
    assert (failed.check, failed.numbers["damaged"]) == ("cache", 1)
    assert "quire cache verify" in failed.remedy
    assert run("cache", "verify").exit_code == 1
    assert findings()["cache"].state == "ok"


def test_others_can_look_in() -> None:
    paths.data_dir().chmod(0o755)
    [warned] = only("warn")
    assert (warned.check, warned.remedy) == ("directories", f"chmod 700 {paths.data_dir()}")


def test_what_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(**_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    failed = {finding.check: finding.found for finding in only("fail")}
    assert "Read-only file system" in failed["directories"]
    assert "Read-only file system" in failed["disk"]


def test_disks_that_are_slow_or_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_SLOW_BYTES_PER_SECOND", 1e15)
    monkeypatch.setenv("QUIRE_CACHE_GB", "1000000")
    slow, small = only("warn")
    assert (slow.check, "SSD" in slow.remedy) == ("disk", True)
    assert (small.check, "quire cache" in small.remedy) == ("space", True)


def test_a_misspelt_wish_for_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIRE_KERNELS", "tritn")
    [failed] = only("fail")
    assert (failed.check, failed.remedy) == ("kernels", "Unset QUIRE_KERNELS.")


def test_a_check_that_breaks_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> str:
        raise RuntimeError("no mounts\x07")

    monkeypatch.setattr(doctor, "network_mount", broken)
    found = findings()
    assert list(found) == NAMES
    assert found["directories"].found == "RuntimeError: no mounts"
    assert network_mount(Path("/")) == ""


@pytest.fixture
def trial(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "trial"
    folder.mkdir()
    yield folder
    assert list(folder.iterdir()) == []


def test_the_disk_is_measured_without_a_trace(trial: Path) -> None:
    speed = doctor.disk_speed(trial, 3 << 20)
    assert speed.read > 0
    assert speed.write > 0
