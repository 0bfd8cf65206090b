"""What a command loads: `quire --help` nothing heavy, and llama.cpp only where a model is opened.

Every question is put to a process of its own, since this one has loaded all of it.
"""

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "llama_cpp", "textual", "numpy", "sqlite_utils", "jinja2", "quire_engine.engine")
_REPORT = "\nimport atexit, json, sys\natexit.register(lambda: sys.stderr.write(json.dumps(sorted(sys.modules))))\n"


def loaded_by(code: str) -> tuple[set[str], str]:
    """The modules in memory when a process that runs this code ends, and what it printed. It has to end well."""
    done = subprocess.run([sys.executable, "-c", _REPORT + code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.splitlines()[-1])), done.stdout


def heavy(modules: set[str]) -> set[str]:
    return modules & set(HEAVY)


def as_command(*words: str) -> str:
    return f"import runpy\nsys.argv = {['quire', *words]!r}\nrunpy.run_module('quire', run_name='__main__')\n"


@pytest.mark.parametrize("words", [("--help",), ("--version",), ("ask", "--help"), ("bench", "ttft", "--help")])
def test_help_and_version_load_nothing_heavy(words: tuple[str, ...]) -> None:
    modules, printed = loaded_by(as_command(*words))
    assert "quire.cli" in modules
    assert "quire" in printed
    assert heavy(modules) == set()


def test_help_lists_every_command() -> None:
    _, printed = loaded_by(as_command("--help"))
    for command in ("add", "ask", "status", "cache", "remove", "bench"):
        assert f"\n  {command} " in printed


def test_the_session_opens_no_runtime() -> None:
    modules, _ = loaded_by("import quire.session")
    # The other names prove that these tests would see a heavy module: a misspelt one is never loaded.
    assert heavy(modules) == {"numpy", "sqlite_utils", "jinja2", "quire_engine.engine"}


def test_only_a_runtime_loads_llama_cpp() -> None:
    modules, _ = loaded_by("import quire_engine.runtimes.choose")
    assert "llama_cpp" not in modules
    modules, _ = loaded_by("import quire_engine.runtimes.llama_context")
    assert "llama_cpp" in modules
    assert "torch" not in modules
