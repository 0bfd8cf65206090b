"""Texts tokenized word by word have the ids of the whole text, or are tokenized as a whole.

With the vocabulary of SmolLM2, the default model; its weights are not loaded.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire import config
from quire.config_values import BUNDLED
from quire.model_files import model_file
from quire.session import Session
from quire_engine.runtimes import choose
from quire_engine.runtimes.choose import Vocabulary
from quire_engine.words import Words

PARTS = [
    *("the", "The", " lighthouse", "don't", "I'll", "1984", "12,000", "naïve", "über", "東京", "на", "é", "🙂"),
    *(" ", "  ", "\t", "\n", "\n\n", "\r\n", ".", ",", "—", "(", ")", "{", "_", "-", "/", "'", '"', "#", "```"),
    *("x" * 40, "camelCase", "snake_case", "3.14", "0x1f", "a", "s", "'s", "\u00a0", "\u200b", "\ufeff"),
    *("e\u0301", "<|im_end|>"),
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PARTS), max_size=30).map("".join) | st.text(max_size=200)


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return choose.vocabulary(model_file(BUNDLED))


@given(text=TEXTS)
def test_ids_are_those_of_the_whole_text(vocabulary: Vocabulary, text: str) -> None:
    assert Words(vocabulary).tokenize(text) == tuple(vocabulary.tokenize(text))


def test_known_words_are_not_tokenized_again(vocabulary: Vocabulary) -> None:
    counted = Counted(vocabulary)
    words = Words(counted)
    words.tokenize("The keeper lit the lamp of the harbour.")
    before = counted.calls
    words.tokenize("The lamp of the keeper lit the harbour.")
    assert counted.calls == before


def test_prose_of_the_sample_comes_out_the_same(vocabulary: Vocabulary) -> None:
    words = Words(vocabulary)
    files = sorted((Path(__file__).parents[2] / "assets" / "sample").rglob("*.md"))
    assert files
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert words.tokenize(text) == tuple(vocabulary.tokenize(text))


def test_a_vocabulary_that_merges_across_words_is_given_whole_texts() -> None:
    whole = Counted(AcrossWords())
    words = Words(whole)
    before = whole.calls
    assert words.tokenize("of the lamp of the keeper") == tuple(AcrossWords().tokenize("of the lamp of the keeper"))
    assert whole.calls == before + 1


def test_reading_a_folder_notes_addresses_with_the_tokens_it_has_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tower.md").write_text("# Tower\n\nThe keeper lit the lamp of the harbour.\n", encoding="utf-8")
    with Session(config.load({})) as session:
        engine, tokenized, tokenize = session.engine, list[str](), Words.tokenize

        def noticed(words: Words, text: str) -> tuple[int, ...]:
            tokenized.append(text)
            return tokenize(words, text)

        monkeypatch.setattr(Words, "tokenize", noticed)
        session.index([session.library.add_root(tmp_path)], lambda _: None)
        assert len(tokenized) == len(set(tokenized))
        texts = {chunk.id: chunk.text for chunk in session.library.all_chunks()}
        noted = session.library.addresses(engine.chunks.store.root.name)
        assert noted == {chunk: engine.address(text) for chunk, text in texts.items()}


class AcrossWords:
    """Has a token for "of the"."""

    def tokenize(self, text: str) -> list[int]:
        return [1000 if len(part) > 1 else ord(part) for part in _pieces(text)]


class Counted:
    def __init__(self, tokenizer: "Vocabulary | AcrossWords") -> None:
        self._tokenizer = tokenizer
        self.calls = 0

    def tokenize(self, text: str) -> list[int]:
        self.calls += 1
        return self._tokenizer.tokenize(text)


def _pieces(text: str) -> Sequence[str]:
    first, *others = text.split("of the")
    return [*first, *(piece for other in others for piece in ("of the", *other))]
