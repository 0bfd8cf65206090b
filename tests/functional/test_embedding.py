"""Vectors: made by llama.cpp from a tiny model, kept in the index, followed when passages come and go."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from command_line import json_of, run
from quire import config
from quire.embedding import Embedder, Vectors, Wording, embedder_of, wording_of
from quire.library import EVERYWHERE, Library
from quire.session import Session
from quire_engine import gguf
from quire_engine.errors import ModelError
from quire_engine.runtimes.llama_embed import LlamaEmbedder
from tiny_gguf import write_tiny_gguf

Tiny = Callable[[str], Path]
TEXTS = {"sea.md": "the heron hunted near the water", "hill.md": "an oven cooled in the bakery", "inn.md": "rooms"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "notes"
    place.mkdir()
    for name, text in TEXTS.items():
        (place / name).write_text(text)
    return place


def test_texts_become_vectors_of_length_one(tiny: Tiny) -> None:
    embedder = LlamaEmbedder(tiny("llama"), threads=1)
    vectors = embedder.embed([*TEXTS.values(), "", "long " * 2000])
    assert vectors.shape == (5, 64)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(5), abs=1e-5)
    again = embedder.embed([TEXTS["sea.md"]])[0]
    assert again @ vectors[0] == pytest.approx(1, abs=1e-4)
    assert again @ vectors[1] < 0.999
    assert embedder.id != LlamaEmbedder(tiny("qwen3"), threads=1).id


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "no.gguf").write_text("no model")
    with pytest.raises(ModelError):
        LlamaEmbedder(tmp_path / "no.gguf")


def test_vectors_follow_the_library(tiny: Tiny, folder: Path, one_thread: None) -> None:
    settings = config.load({"model": str(tiny("llama")), "embedder": str(tiny("qwen3"))})
    with Session(settings) as session:
        root = session.library.add_root(folder)
        session.index([root], lambda _: None)
        [vectors] = session.vectors
        assert vectors.nearest("heron", 5, EVERYWHERE) == []
        counts: list[int] = []
        vectors.complete(lambda done, _: counts.append(done), lambda: True)
        assert counts == []
        vectors.complete(lambda done, _: counts.append(done), lambda: False)
        assert counts == [3]
        [first, *others] = vectors.nearest(TEXTS["sea.md"], 5, EVERYWHERE)
        assert (first.path.name, len(others)) == ("sea.md", 2)
        assert first.score == pytest.approx(1, abs=1e-2)
        assert [hit.path.name for hit in vectors.nearest(TEXTS["sea.md"], 5, root / "inn.md")] == ["inn.md"]
        assert len(vectors.nearest("x", 1, EVERYWHERE)) == 1
        assert len(session.look("heron", EVERYWHERE, 5).hits) == 3  # by words it would be one
        (folder / "sea.md").unlink()
        (folder / "new.md").write_text("a new one")
        session.index([root], lambda _: None)
        vectors.complete(lambda *_: None, lambda: False)
        assert {hit.path.name for hit in vectors.nearest("x", 9, EVERYWHERE)} == {"hill.md", "inn.md", "new.md"}
        with Library(session.library.path) as library:
            other = Vectors(library, Embedder(LlamaEmbedder(tiny("llama"), 1)))
            assert other.nearest("x", 9, EVERYWHERE) == []  # vectors of another model are no help


def test_the_command_line_says_how_it_finds(tiny: Tiny, folder: Path, tmp_path: Path) -> None:
    assert run("add", folder, "--no-cache", "--model", tiny("llama")).exit_code == 0
    assert json_of("search", "heron")["by"] == "by words alone"
    assert json_of("status", "--model", tiny("llama"))["finding"] == "by words alone"
    data = tmp_path / "asked.json"
    qas = '[{"question": "Where did the heron hunt?"}]'
    data.write_text(f'{{"data": [{{"paragraphs": [{{"context": "{TEXTS["sea.md"]}", "qas": {qas}}}]}}]}}')
    words = ("bench", "retrieval", "--data", data, "--model", tiny("llama"))
    [row] = json_of(*words)["rows"]
    assert (row["first"], row["mrr"]) == (1.0, 1.0)
    rows = json_of(*words, "--embedder", tiny("qwen3"))["rows"]
    assert [row["method"] for row in rows] == ["words (BM25)", "vectors", "both (RRF)"]
    assert "not a question file" in run("bench", "retrieval", "--data", folder / "sea.md").output


def named(tmp_path: Path, name: str, file: str = "model.gguf") -> Path:
    return write_tiny_gguf(tmp_path / file, metadata={"general.name": name})


E5, NOMIC = Wording("query: ", "passage: "), Wording("search_query: ", "search_document: ")
BGE = Wording("Represent this sentence for searching relevant passages: ")


@pytest.mark.parametrize(
    ("name", "file", "wording"),
    [
        ("nomic-embed-text-v1.5", "model.gguf", NOMIC),
        ("Nomic Embed Text v2 MoE", "model.gguf", NOMIC),
        ("Multilingual E5 Small", "model.gguf", E5),
        ("intfloat", "e5-base-v2-q8_0.gguf", E5),
        ("bge-small-en-v1.5", "model.gguf", BGE),
        ("Bge M3", "model.gguf", Wording()),
        ("snowflake-arctic-embed-m-v1.5", "model.gguf", BGE),
        ("Snowflake Arctic Embed L v2.0", "model.gguf", Wording("query: ")),
        ("Embeddinggemma 300M", "model.gguf", Wording("task: search result | query: ", "title: none | text: ")),
        ("all-MiniLM-L6-v2", "model.gguf", Wording()),
        ("Qwen3 4B Instruct 2507", "model.gguf", Wording()),
    ],
)
def test_models_are_known_by_their_names(tmp_path: Path, name: str, file: str, wording: Wording) -> None:
    assert wording_of(gguf.read(named(tmp_path, name, file))) == wording


def test_instructions_stand_before_questions_alone(tmp_path: Path) -> None:
    for name in ("multilingual-e5-large-instruct", "Qwen3 Embedding 0.6B"):
        wording = wording_of(gguf.read(named(tmp_path, name)))
        assert (wording.question[:10], wording.passage) == ("Instruct: ", "")


def test_a_model_gets_the_words_that_it_wants(tmp_path: Path) -> None:
    file = named(tmp_path, "nomic-embed-text-v1.5")
    plain, embedder = LlamaEmbedder(file, 1), embedder_of(file, 1)
    text = TEXTS["sea.md"]
    for vector, words in (
        (embedder.question(text), f"search_query: {text}"),
        (embedder.passages([text])[0], f"search_document: {text}"),
    ):
        assert vector @ plain.embed([words])[0] == pytest.approx(1, abs=1e-5)
        assert vector @ plain.embed([text])[0] < 0.9999
    assert embedder.id != plain.id  # vectors of passages without those words are another model's
    assert Embedder(plain, BGE).id == plain.id  # while a question's words change no passage's


def test_status_says_what_stands_before_texts(tmp_path: Path, tiny: Tiny) -> None:
    words = ("status", "--model", tiny("llama"))
    config.save({"embedder": str(named(tmp_path, "Multilingual E5 Small\x1b[31m"))})
    told = run(*words).stdout
    assert "Finding    by words and meaning (Multilingual E5 Small: " in told
    assert 'questions begin with "query: ", passages with "passage: ")' in told
    assert "\x1b" not in told
    config.save({"embedder": str(tiny("qwen3"))})
    assert "texts as they are" in run(*words).stdout
    config.save({"embedder": str(tmp_path / "gone.gguf")})
    assert "gone.gguf, which cannot be opened" in run(*words).stdout
