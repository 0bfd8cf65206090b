"""`quire models` and `quire config`: with generated models, and a web server on this machine."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from file_server import FileServer, serving
from quire import config, model_files
from quire.cli import main
from tiny_gguf import write_tiny_gguf


def quire(*words: str, code: int = 0) -> Result:
    ran = CliRunner().invoke(main, words)
    assert ran.exit_code == code, (ran.output, ran.exception)
    return ran


def test_models_in_words_and_as_json() -> None:
    write_tiny_gguf(model_files.models_dir() / "odd.gguf", "gemma")
    text = quire("models").stdout
    assert "* bundled" in text
    assert "To fetch: quire models pull NAME" in text
    assert "Fetched models take" in text
    listed = {model["name"]: model for model in json.loads(quire("models", "--json").stdout)["models"]}
    assert listed["bundled"]["in_use"]
    assert "gemma" in listed["odd"]["problem"]
    assert not listed["qwen3-4b"]["here"]


def test_pull_use_and_remove(tmp_path: Path) -> None:
    data = write_tiny_gguf(tmp_path / "x.gguf", metadata={"general.name": "Pulled"}).read_bytes()
    with serving(FileServer({"new.gguf": data})) as server:
        assert "Use it: quire models use new" in quire("models", "pull", f"{server.address}/new.gguf").stdout
    path = model_files.models_dir() / "new.gguf"
    assert path.read_bytes() == data
    assert quire("models", "use", "new").stdout.startswith("From now on: Pulled.")
    assert config.load().model == path
    assert "in use" in quire("models", "remove", "new", code=1).stderr
    quire("models", "use", "bundled")
    assert config.load() == config.Settings()
    assert "Deleted Pulled" in quire("models", "remove", "new").stdout
    assert not path.exists()
    elsewhere = tmp_path / "x.gguf"
    quire("models", "use", str(elsewhere))
    assert str(elsewhere) in quire("models", "--json").stdout
    quire("models", "use", "bundled")
    assert "Forgot" in quire("models", "remove", "x").stdout
    assert elsewhere.exists()


def test_switching_says_what_it_costs(tmp_path: Path) -> None:
    for name, kind in (("a", "llama"), ("b", "qwen2")):
        write_tiny_gguf(model_files.models_dir() / f"{name}.gguf", kind)
    (tmp_path / "notes.md").write_text("# Rain\n\nThe barrel holds 200 litres.\n")
    quire("models", "use", "a")
    quire("add", str(tmp_path / "notes.md"))
    said = quire("models", "use", "b").stdout
    assert "Invalidates" in said
    assert "caching again takes" in said
    assert "Everything is cached for it already" in quire("models", "use", "a").stdout


def test_a_missing_model_does_not_lock_anybody_out() -> None:
    for name in ("a", "b"):
        write_tiny_gguf(model_files.models_dir() / f"{name}.gguf")
    quire("models", "use", "a")
    (model_files.models_dir() / "a.gguf").unlink()
    assert "quire models" in quire("status", code=1).stderr
    quire("models", "use", "b")
    quire("status")


def test_a_model_that_cannot_be_opened_is_not_switched_to() -> None:
    (model_files.models_dir() / "broken.gguf").write_bytes(b"GGUF")
    quire("models", "use", "broken", code=1)
    assert not config.config_file().exists()


def test_ctrl_c_keeps_what_came(tmp_path: Path) -> None:
    data = b"GGUF" + os.urandom(1 << 20)
    target = model_files.models_dir() / "big.gguf"
    with serving(FileServer({"big.gguf": data})) as server:
        server.gate.clear()
        words = ("models", "pull", f"{server.address}/big.gguf")
        running = subprocess.Popen([sys.executable, "-m", "quire", *words], stderr=subprocess.PIPE)
        end = time.monotonic() + 60
        while not server.asked:
            assert time.monotonic() < end
            time.sleep(0.02)
        running.send_signal(signal.SIGINT)
        server.gate.set()
        assert running.wait(60) == 130
        assert b"The same command goes on from here" in running.communicate()[1]
        assert not target.exists()
        quire(*words)
        assert target.read_bytes() == data


def test_settings_in_words_and_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIRE_THREADS", "3")
    quire("config", "set", "dial", "fast")
    text = quire("config").stdout
    assert str(config.config_file()) in text
    state = json.loads(quire("config", "--json").stdout)
    assert state["dial"] == {"value": "fast", "from": "file"}
    assert state["threads"] == {"value": 3, "from": "environment"}
    assert state["model"] == {"value": None, "from": "default"}
    assert state["animations"] == {"value": True, "from": "default"}
    assert "QUIRE_THREADS in the environment still outranks it" in quire("config", "set", "threads", "2").stderr
    quire("config", "unset", "dial")
    assert json.loads(quire("config", "--json").stdout)["dial"]["from"] == "default"


def test_wrong_settings_are_refused_by_name() -> None:
    ran = quire("config", "set", "dail", "fast", code=1)
    assert "Did you mean dial?" in ran.stderr
    assert "one of fast, balanced, exact" in quire("config", "set", "dial", "quick", code=1).stderr
    assert not config.config_file().exists()
