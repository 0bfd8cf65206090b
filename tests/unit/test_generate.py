"""The generating loop with a vocabulary and a model that follow a script."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from quire_engine.engine import never
from quire_engine.generate import Candidates, Piece, Sampling, generate
from quire_engine.types import Float32

END = 0


class Script:
    """A model that wants to say these pieces, one token each, then end; remembers what it was told."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.pieces = [b"<end>", *pieces]
        self.told: list[int] = []

    def piece(self, token: int) -> bytes:
        return self.pieces[token]

    def is_end(self, token: int) -> bool:
        return token == END

    def logits(self) -> Float32:
        scores = np.zeros(len(self.pieces), dtype=np.float32)
        scores[(len(self.told) + 1) % len(self.pieces)] = 5.0
        return scores

    def extend(self, token: int, count: int = 200) -> Candidates:
        self.told.append(token)
        return Candidates.of(self.logits(), count)

    def run(
        self, sampling: Sampling | None = None, max_tokens: int = 100, should_stop: Callable[[], bool] = never
    ) -> tuple[list[Piece], str]:
        """The pieces, and why it ended."""
        first = Candidates.of(self.logits(), 200)
        *pieces, ending = generate(first, self.extend, self, sampling or Sampling(), max_tokens, should_stop)
        assert isinstance(ending, str)
        assert all(isinstance(piece, Piece) for piece in pieces)
        return [piece for piece in pieces if isinstance(piece, Piece)], ending


def text(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def test_until_the_model_ends() -> None:
    script = Script([b"One", b" two", b"."])
    pieces, ending = script.run()
    assert (text(pieces), ending) == ("One two.", "end")
    assert [piece.token for piece in pieces] == script.told == [1, 2, 3]


def test_until_the_length_allowed() -> None:
    script = Script([b"a", b"b", b"c", b"d"])
    pieces, ending = script.run(max_tokens=2)
    assert (text(pieces), ending) == ("ab", "length")
    assert script.told == [1], "nothing is computed for a token that is not wanted"


@pytest.mark.parametrize("max_tokens", [0, -5])
def test_no_token_allowed(max_tokens: int) -> None:
    assert Script([b"a"]).run(max_tokens=max_tokens) == ([], "length")


def test_until_told_to_stop() -> None:
    answers: Iterator[bool] = iter([False, False, True])
    script = Script([b"a", b"b", b"c", b"d"])
    pieces, ending = script.run(should_stop=lambda: next(answers))
    assert (text(pieces), ending) == ("abc", "stopped")


def test_a_character_in_several_tokens() -> None:
    house, half = "🏠".encode(), "é".encode()
    script = Script([house[:1], house[1:3], house[3:] + b"!", half[:1], half[1:]])
    pieces, _ = script.run()
    assert [piece.text for piece in pieces] == ["", "", "🏠!", "", "é"]


def test_bytes_that_are_no_character_are_shown_as_such() -> None:
    pieces, ending = Script([b"a\xff", b"\xc3", b"b"]).run()
    assert (text(pieces), ending) == ("a\ufffd\ufffdb", "end")


def test_temperature_zero_takes_the_likeliest_whatever_the_seed() -> None:
    assert Script([b"x", b"y"]).run(Sampling(seed=1)) == Script([b"x", b"y"]).run(Sampling(seed=2))


def first_tokens(logits: Sequence[float], temperature: float, top_p: float, seeds: int = 400) -> list[int]:
    """The first token drawn with each of many seeds."""
    script = Script([bytes([65 + i]) for i in range(len(logits) - 1)])
    scores = np.array(logits, dtype=np.float32)
    drawn = []
    for seed in range(seeds):
        sampling = Sampling(temperature, top_p, seed)
        candidates = Candidates.of(scores, sampling.candidates)
        first = next(generate(candidates, script.extend, script, sampling, 1, never))
        drawn.append(first.token if isinstance(first, Piece) else END)
    return drawn


def test_the_same_seed_gives_the_same_answer() -> None:
    logits = [-9.0, 1.0, 1.0, 1.0, 1.0]
    assert first_tokens(logits, 1.0, 1.0) == first_tokens(logits, 1.0, 1.0)
    assert len(set(first_tokens(logits, 1.0, 1.0))) == 4


def test_shares_follow_softmax_and_temperature() -> None:
    logits = [-99.0, np.log(3.0), 0.0]
    for temperature in (1.0, 0.5):
        share = first_tokens(logits, temperature, 1.0).count(1) / 400
        odds = 3.0 ** (1 / temperature)
        assert share == pytest.approx(odds / (1 + odds), abs=0.06)


def test_top_p_keeps_the_likeliest_that_hold_it_together() -> None:
    logits = np.log([1e-9, 0.5, 0.3, 0.15, 0.05])
    assert set(first_tokens(logits.tolist(), 1.0, 0.4)) == {1}
    assert set(first_tokens(logits.tolist(), 1.0, 0.7)) == {1, 2}
    assert set(first_tokens(logits.tolist(), 1.0, 0.9)) == {1, 2, 3}


@pytest.mark.parametrize("temperature", [0.0, 0.01, 2.0])
def test_huge_logits(temperature: float) -> None:
    assert set(first_tokens([0.0, 1e6, -1e6], temperature, 0.95, seeds=20)) == {1}


@pytest.mark.parametrize("count", [1, 2, 7, 200, 500])
def test_candidates_are_the_likeliest_and_of_equals_the_first(count: int) -> None:
    """Scores in 16 bits are often equal."""
    scores = np.random.default_rng(count).integers(-9, 9, 300).astype(np.float32)
    found = Candidates.of(scores, count)
    expected = sorted(range(300), key=lambda token: (-scores[token], token))[:count]
    assert found.tokens.tolist() == expected
    assert found.scores.tolist() == scores[expected].tolist()
