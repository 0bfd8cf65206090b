"""Which files are left out, against Git's own opinion where Git is there."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from quire import config
from quire.documents import walk, walk_below
from quire.ignore import Rules
from quire_engine.errors import QuireError

FILES = ("a.md", "b.log", "keep.log", "build/x.md", "sub/build/y.md", "sub/c.md", "sub/deep/d.md", "docs/e.md", "F.txt")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in FILES:
        file = tmp_path / "root" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    return tmp_path / "root"


def kept(root: Path, include: str = "") -> set[str]:
    return {str(path.relative_to(root)) for path in walk(root, Rules(root, include).keeps)}


def without(*names: str) -> set[str]:
    return set(FILES) - set(names)


def test_without_ignore_files_everything_is_kept(root: Path) -> None:
    assert kept(root) == set(FILES)


@pytest.mark.skipif(not shutil.which("git"), reason="Git is not installed")
@pytest.mark.parametrize(
    ("top", "below"),
    [
        ("*.log\n!keep.log\nbuild/\n", ""),
        ("/build\n# a comment\n\n*.txt  \n", "*\n!deep/\n!deep/d.md\n"),
        ("sub/*\n!sub/deep\n", "deep/*.md\n"),
        ("**/deep/\n\\!odd\n[a-c].md\n!\n", "!c.md\n"),
        ("*\n!*/\n!*.md\n", "/c.md\n"),
        ("sub/deep\n!deep/\nbuild\n!sub/build\n", "build/y.*\n"),
        ("doc?/**\n*.[lt]*\n\\#x\n", "**/d.md\n"),
    ],
)
def test_it_leaves_out_what_git_leaves_out(root: Path, top: str, below: str) -> None:
    (root / ".gitignore").write_text(top)
    (root / "sub" / ".gitignore").write_text(below)
    subprocess.run(["git", "init", "-q", root], check=True)
    listed = subprocess.run(
        ["git", "-C", root, "-c", "core.excludesFile=/dev/null", "ls-files", "-o", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert kept(root) == {name for name in listed if not name.endswith(".gitignore")} != set(FILES)


def test_our_own_file_outranks_gits(root: Path) -> None:
    (root / "sub" / ".gitignore").write_text("deep/\n")
    (root / ".quireignore").write_text("!deep/\na.md\n")
    assert kept(root) == without("a.md")


def test_one_path_is_judged_as_the_walk_does(root: Path) -> None:
    (root / ".gitignore").write_text("build/\n*.log\n")
    rules = Rules(root)
    left_out = {name for name in FILES if rules.leaves_out(root / name)}
    assert left_out == set(FILES) - kept(root) == {"build/x.md", "sub/build/y.md", "b.log", "keep.log"}
    assert rules.leaves_out(root / "build" / "not" / "there.md")
    assert not rules.leaves_out(root)
    for name in FILES:
        assert [str(p.relative_to(root)) for p in walk_below(root, root / name, rules.keeps)] == [name] * (
            name not in left_out
        )
    assert list(walk_below(root, root / "build", rules.keeps)) == []


def test_the_files_are_read_again_when_forgotten(root: Path) -> None:
    rules = Rules(root)
    assert not rules.leaves_out(root / "a.md")
    (root / ".gitignore").write_text("a.md\n")
    assert not rules.leaves_out(root / "a.md")
    rules.forget()
    assert rules.leaves_out(root / "a.md")


@pytest.mark.parametrize(
    ("include", "names"),
    [
        ("*.md", {name for name in FILES if name.endswith(".md")}),
        (" docs/** , *.txt,", {"docs/e.md", "F.txt"}),
        ("/a.md", {"a.md"}),
        ("*.md, !c.md", {name for name in FILES if name.endswith(".md") and name != "sub/c.md"}),
    ],
)
def test_only_what_is_included(root: Path, include: str, names: set[str]) -> None:
    assert kept(root, include) == names


def test_a_file_that_was_added_itself_is_always_kept(root: Path) -> None:
    assert list(walk(root / "b.log", Rules(root / "b.log", "*.md").keeps)) == [root / "b.log"]


@pytest.fixture(params=["a link out", "a pipe", "a folder", "bytes", "unreadable lines"])
def strange(request: pytest.FixtureRequest, root: Path, tmp_path: Path) -> str:
    file = root / ".gitignore"
    (tmp_path / "outside").write_text("a.md\n")
    match request.param:
        case "a link out":
            file.symlink_to(tmp_path / "outside")
        case "a pipe":
            os.mkfifo(file)
        case "a folder":
            file.mkdir()
        case "bytes":
            file.write_bytes(b"\xff\xfe\x00\x80" * 100)
        case _:
            file.write_text("!\n///\n[\n")
    return str(request.param)


def test_strange_ignore_files_do_no_harm(root: Path, strange: str) -> None:
    assert kept(root) == set(FILES)


def test_the_setting_is_checked() -> None:
    assert config.load({"include": " *.md, docs/** "}, {}).include == "*.md, docs/**"
    assert config.load({}, {}).include == ""
    with pytest.raises(QuireError, match="include"):
        config.load({"include": "*.md, !"}, {})
