"""Watching real folders: what is handed over, and what is not."""

import errno
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from watchdog.observers import Observer

from quire.watcher import Pace, Watcher, network_mount

PATIENCE_S = 10.0


class Heard:
    """What a watcher said."""

    def __init__(self) -> None:
        self.batches: list[frozenset[Path]] = []
        self.unwatched: list[tuple[Path, str]] = []

    @property
    def paths(self) -> set[Path]:
        return {path for batch in self.batches for path in batch}

    def changed(self, paths: frozenset[Path]) -> None:
        self.batches.append(paths)

    def not_watched(self, path: Path, reason: str) -> None:
        self.unwatched.append((path, reason))

    def wait(self, true: Callable[[], Any]) -> None:
        end = time.monotonic() + PATIENCE_S
        while not true():
            assert time.monotonic() < end, (self.batches, self.unwatched)
            time.sleep(0.01)


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def watcher(heard: Heard) -> Iterator[Watcher]:
    with Watcher(heard.changed, heard.not_watched, Pace(settled=0.1, rescan=0.3)) as watcher:
        yield watcher
    assert not [t for t in threading.enumerate() if t.name == "quire-watcher"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root" / "sub").mkdir(parents=True)
    return tmp_path / "root"


def test_new_changed_and_deleted_files(watcher: Watcher, heard: Heard, root: Path) -> None:
    (root / "old.md").write_text("old")
    (root / "gone.md").write_text("gone")
    watcher.watch([root])
    (root / "sub" / "new.md").write_text("new")
    (root / "old.md").write_text("changed")
    (root / "gone.md").unlink()
    expected = {root / "sub" / "new.md", root / "old.md", root / "gone.md"}
    heard.wait(lambda: heard.paths >= expected)
    assert heard.paths == expected
    assert heard.unwatched == []


def test_reading_a_file_is_no_change(watcher: Watcher, heard: Heard, root: Path) -> None:
    (root / "a.md").write_text("a")
    watcher.watch([root])
    assert (root / "a.md").read_text() == "a"
    os.listdir(root / "sub")
    (root / "b.md").write_text("b")
    heard.wait(lambda: heard.paths)
    assert heard.paths == {root / "b.md"}


def test_an_editor_that_saves_by_renaming_is_one_change(watcher: Watcher, heard: Heard, root: Path) -> None:
    file = root / "report.md"
    file.write_text("before")
    watcher.watch([root])
    (root / ".report.md.swp").write_text("swap")
    (root / "report.md.new").write_text("after")
    file.rename(root / "report.md~")
    (root / "report.md.new").rename(file)
    (root / "report.md~").unlink()
    heard.wait(lambda: file in heard.paths)
    assert len(heard.batches) == 1
    assert root / ".report.md.swp" not in heard.paths


def test_folders_that_come_move_and_go(watcher: Watcher, heard: Heard, root: Path, tmp_path: Path) -> None:
    watcher.watch([root])
    made = tmp_path / "made"
    made.mkdir()
    (made / "inside.md").write_text("text")
    made.rename(root / "made")
    heard.wait(lambda: root / "made" in heard.paths)
    (root / "made" / "inside.md").write_text("a folder that moved in is watched too")
    heard.wait(lambda: root / "made" / "inside.md" in heard.paths)
    heard.batches.clear()
    (root / "made").rename(root / "sub" / "moved")
    heard.wait(lambda: {root / "made", root / "sub" / "moved"} <= heard.paths)
    heard.batches.clear()
    shutil.rmtree(root / "sub")
    heard.wait(lambda: root / "sub" in heard.paths)


def test_what_is_never_read_is_not_told(watcher: Watcher, heard: Heard, root: Path) -> None:
    (root / ".git").mkdir()
    (root / "node_modules" / "x").mkdir(parents=True)
    watcher.watch([root])
    for name in (".git/index", ".hidden.md", "node_modules/x/readme.md", "sub/.a.md.swp", "b.md"):
        (root / name).write_text("x")
    heard.wait(lambda: heard.paths)
    assert heard.paths == {root / "b.md"}


def test_a_single_file_is_watched_through_its_folder(watcher: Watcher, heard: Heard, root: Path) -> None:
    one, two, other = root / "one.md", root / "two.md", root / "other.md"
    for file in (one, two, other):
        file.write_text("x")
    watcher.watch([one, two])
    watcher.watch([one])
    for file in (two, other, one):
        (root / "temporary").write_text("y")
        (root / "temporary").rename(file)
    heard.wait(lambda: heard.paths)
    assert heard.paths == {one}


def test_a_file_that_never_rests_is_told_of_all_the_same(
    heard: Heard, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quire.watcher._LATEST_SECONDS", 0.4)
    stop = threading.Event()

    def write() -> None:
        while not stop.wait(0.02):
            (root / "log.md").write_text(str(time.monotonic()))

    writer = threading.Thread(target=write)
    with Watcher(heard.changed, heard.not_watched, Pace(settled=0.2)) as watcher:
        watcher.watch([root])
        writer.start()
        try:
            heard.wait(lambda: len(heard.batches) >= 2)
        finally:
            stop.set()
            writer.join()


def test_of_very_many_changes_the_whole_folder_is_told(
    watcher: Watcher, heard: Heard, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quire.watcher._MOST_PATHS", 10)
    watcher.watch([root])
    for i in range(50):
        (root / f"{i}.md").write_text("x")
    heard.wait(lambda: root in heard.paths)


def test_links_in_circles_end(watcher: Watcher, heard: Heard, root: Path) -> None:
    (root / "sub" / "up").symlink_to(root)
    (root / "self").symlink_to(root / "self")
    watcher.watch([root])
    (root / "sub" / "a.md").write_text("x")
    heard.wait(lambda: root / "sub" / "a.md" in heard.paths)


def test_a_folder_that_cannot_be_watched_is_said_so_once_and_looked_through(
    watcher: Watcher, heard: Heard, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def full(*_: Any, **__: Any) -> None:
        tried.append(1)
        raise OSError(errno.ENOSPC, "inotify watch limit reached")

    monkeypatch.setattr(Observer, "schedule", full)
    watcher.watch([root])
    watcher.watch([root])
    heard.wait(lambda: len(heard.batches) >= 2)
    assert heard.unwatched == [(root, "inotify watch limit reached")]
    assert heard.paths == {root}
    assert len(tried) == 1, "each failure costs watches"


def test_a_folder_that_comes_back_is_watched_again(watcher: Watcher, heard: Heard, root: Path) -> None:
    watcher.watch([root])
    away = root.with_name("away")
    root.rename(away)
    heard.wait(lambda: root in heard.paths)  # no event tells so
    time.sleep(0.7)  # two looks
    assert len(heard.batches) == 1, "once"
    heard.batches.clear()
    away.rename(root)
    heard.wait(lambda: root in heard.paths)
    heard.batches.clear()
    (root / "sub" / "a.md").write_text("x")
    heard.wait(lambda: root / "sub" / "a.md" in heard.paths)


def test_a_folder_that_is_not_there_yet(watcher: Watcher, heard: Heard, root: Path) -> None:
    late = root / "late"
    watcher.watch([late])
    assert heard.unwatched == [(late, "no such file or directory")]
    late.mkdir()
    heard.wait(lambda: late in heard.paths)
    (late / "a.md").write_text("x")
    heard.wait(lambda: late / "a.md" in heard.paths)


def test_what_was_removed_is_not_told_of(watcher: Watcher, heard: Heard, root: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    watcher.watch([root, other])
    watcher.watch([other])
    (root / "a.md").write_text("x")
    (other / "b.md").write_text("x")
    heard.wait(lambda: heard.paths)
    assert heard.paths == {other / "b.md"}


def test_nothing_is_said_after_closing(heard: Heard, root: Path) -> None:
    watcher = Watcher(heard.changed, heard.not_watched, Pace(settled=0.1))
    watcher.watch([root])
    (root / "a.md").write_text("x")
    watcher.close()
    time.sleep(0.3)
    assert heard.batches == []
    Watcher(heard.changed, heard.not_watched).close()  # one that never watched anything


def test_network_mounts_are_known_by_their_kind(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "21 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
        "30 21 0:30 / /home/me/My\\040Server rw,relatime shared:1 - nfs4 server:/x rw\n"
        "31 30 8:2 / /home/me/My\\040Server/disk rw - ext4 /dev/sdb1 rw\n"
    )
    assert network_mount(Path("/home/me/My Server/notes"), mounts) == "nfs4"
    assert network_mount(Path("/home/me/My Server/disk/notes"), mounts) == ""
    assert network_mount(Path("/home/me/notes"), mounts) == ""
    assert network_mount(Path("/home/me"), tmp_path / "nothing") == ""


def test_ignored_files_are_not_told_and_ignore_files_stand_for_their_folder(
    watcher: Watcher, heard: Heard, root: Path
) -> None:
    (root / ".gitignore").write_text("build/\n*.log\n")
    (root / "build").mkdir()
    watcher.watch([root])
    for name in ("build/x.md", "a.log", "b.md"):
        (root / name).write_text("x")
    heard.wait(lambda: root / "b.md" in heard.paths)
    assert heard.paths <= {root / "b.md", root / "build"}, "of a folder itself only its name is known"
    heard.batches.clear()
    (root / "sub" / ".quireignore").write_text("c.md\n")
    heard.wait(lambda: root / "sub" in heard.paths)
    heard.batches.clear()
    (root / ".gitignore").write_text("")
    heard.wait(lambda: root in heard.paths)
    (root / "build" / "x.md").write_text("told from now on")
    heard.wait(lambda: root / "build" / "x.md" in heard.paths)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_is_closed_and_opened_again(watcher: Watcher, heard: Heard, root: Path) -> None:
    watcher.watch([root])
    for mode in (0o000, 0o755):
        heard.batches.clear()
        (root / "sub").chmod(mode)
        heard.wait(lambda: root / "sub" in heard.paths)


def test_permissions_of_a_file_are_a_change(watcher: Watcher, heard: Heard, root: Path) -> None:
    (root / "a.md").write_text("a")
    watcher.watch([root])
    (root / "a.md").chmod(0o000)
    heard.wait(lambda: heard.paths)
    assert heard.paths == {root / "a.md"}


def test_links_in_a_loop(watcher: Watcher, heard: Heard, root: Path) -> None:
    (root / "sub" / "up").symlink_to(root)
    watcher.watch([root])
    (root / "sub" / "self").symlink_to(root / "sub")
    (root / "sub" / "a.md").write_text("a")
    heard.wait(lambda: root / "sub" / "a.md" in heard.paths)
    assert heard.paths <= {root / "sub" / "a.md", root / "sub" / "self"}
    assert heard.unwatched == []


def test_what_events_did_not_tell_is_looked_for_now_and_then(heard: Heard, root: Path) -> None:
    with Watcher(heard.changed, heard.not_watched, Pace(settled=0.05, glance=0.05, sweep=0.2)) as watcher:
        watcher.watch([root])
        heard.wait(lambda: len(heard.batches) >= 2)
    assert heard.paths == {root}


@pytest.mark.skipif(not shutil.which("git"), reason="Git is not installed")
def test_another_branch_is_checked_out(watcher: Watcher, heard: Heard, root: Path) -> None:
    def git(*words: str) -> None:
        who = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        subprocess.run(["git", "-C", root, *who, *words], check=True, capture_output=True)

    git("init", "-b", "main")
    for branch, names in (("main", "ab"), ("other", "bc")):
        git("checkout", "-B", branch)
        for old in root.glob("*.md"):
            old.unlink()
        for name in names:
            (root / f"{name}.md").write_text(f"{name} of {branch}")
        git("add", "-A")
        git("commit", "-m", branch)
    watcher.watch([root])
    git("checkout", "main")
    heard.wait(lambda: heard.paths >= {root / f"{name}.md" for name in "abc"})
    assert not [path for path in heard.paths if ".git" in path.parts]
