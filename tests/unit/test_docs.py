"""The documentation says what the code says: the generated page of the command line, and README's map of files."""

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from quire.cli import main
from quire.config import explained

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "packaging" / "cli_reference.py"


def commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if isinstance(command, click.Group):
        for part, inner in command.commands.items():
            yield from commands(inner, f"{name} {part}")


COMMANDS = dict(commands(main, "quire"))


def test_the_page_of_the_command_line_is_current() -> None:
    check = subprocess.run([sys.executable, REFERENCE, "--check"], capture_output=True, text=True, timeout=60)
    assert check.returncode == 0, check.stderr


def test_a_stale_page_is_noticed_and_written_anew(tmp_path: Path) -> None:
    script = tmp_path / "packaging" / "cli_reference.py"
    script.parent.mkdir()
    script.write_bytes(REFERENCE.read_bytes())
    page = tmp_path / "docs" / "cli.md"

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, script, *words], capture_output=True, text=True, timeout=60)

    missing = run("--check")
    assert (missing.returncode, page.exists()) == (1, False)
    assert run().returncode == run("--check").returncode == 0
    page.write_text(page.read_text().replace("--ratio", "--ration"))
    stale = run("--check")
    assert stale.returncode == 1
    assert "cli_reference.py" in stale.stderr
    assert "--ration" in page.read_text(), "--check must not write"


def test_the_page_names_every_command_option_and_setting() -> None:
    page = (ROOT / "docs" / "cli.md").read_text()
    for name, command in COMMANDS.items():
        assert f"## {name}\n" in page
        section = page.partition(f"## {name}\n")[2].partition("\n## ")[0]
        for option in (p for p in command.params if isinstance(p, click.Option)):
            assert all(spelling in section for spelling in option.opts), (name, option.opts)
    for setting in explained():
        assert f"| `{setting.name}` | `QUIRE_{setting.name.upper()}` |" in page


def test_the_commands_are_those_that_were_promised() -> None:
    promised = ["quire", "add", "ask", "status", "cache", "remove", "bench"]
    assert {name.split()[-1] for name in COMMANDS if name.count(" ") <= 1} >= set(promised)
    assert {"quire bench ttft", "quire bench answers"} <= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_has_a_help_text(name: str) -> None:
    command = COMMANDS[name]
    assert re.match(r"[A-Z].+\.$", (command.help or "").strip(), re.DOTALL), "a sentence says what it does"
    for option in (parameter for parameter in command.params if isinstance(parameter, click.Option)):
        assert option.help, option.opts
        assert re.match(r"[A-Z].+(\.|\.\.\.)$", option.help), option.help


def test_readme_maps_every_file_once() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^#+ File map\s*$(.*?)(?=^#{1,6} |\Z)", readme, re.MULTILINE | re.DOTALL)
    assert section, "README has no section 'File map'"
    listed = Counter(re.findall(r"`((?:app|engine|kernels)/[^`\s]+\.py)`", section[1]))
    files = {
        str(file.relative_to(ROOT))
        for top in ("app", "engine", "kernels")
        for file in (ROOT / top).rglob("*.py")
        if "__pycache__" not in file.parts
    }
    assert sorted(files - set(listed)) == [], "not in README's file map"
    assert sorted(set(listed) - files) == [], "in README's file map, but not there"
    assert [path for path, times in listed.items() if times > 1] == [], "more than one line"
