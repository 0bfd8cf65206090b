"""Divergences from full prefill, summed up over questions: means, shares of one another, and how sure they are.

Intervals are the bootstrap's over questions, since these differ far more than anything else. Knows numbers alone; where
they come from is `fidelity`'s.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quire_engine.types import Float32

_RESAMPLES = 10_000

LogProbabilities = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Divergence:
    """One variant's answer to one question against full prefill's: for every token KL(full || variant) in nats, and
    whether both find the same token most likely."""

    kl: tuple[float, ...]
    agrees: tuple[bool, ...]

    @property
    def mean_kl(self) -> float:
        return float(np.mean(self.kl))


@dataclass(frozen=True)
class Fidelity:
    """Over questions: mean KL of an answer's tokens, of its first token, 99th percentile over all tokens, and the share
    of tokens whose most likely one is the same."""

    kl: float
    first_kl: float
    kl_p99: float
    top1: float


@dataclass(frozen=True)
class Added:
    """Mean KL that a variant has more than another one on the same questions, with its 95 % interval."""

    kl: float
    low: float
    high: float


@dataclass(frozen=True)
class Share:
    """A mean as a share of another one over the same questions, with its 95 % interval."""

    value: float
    low: float
    high: float


def fidelity(divergences: Sequence[Divergence]) -> Fidelity:
    tokens = np.concatenate([d.kl for d in divergences])
    return Fidelity(
        float(np.mean([d.mean_kl for d in divergences])),
        float(np.mean([d.kl[0] for d in divergences])),
        float(np.percentile(tokens, 99)),
        float(np.mean(np.concatenate([d.agrees for d in divergences]))),
    )


def added(divergences: Sequence[Divergence], to: Sequence[Divergence]) -> Added:
    """Paired by question; the interval is the bootstrap's over questions, the same at every call."""
    differences = [a.mean_kl - b.mean_kl for a, b in zip(divergences, to, strict=True)]
    return Added(float(np.mean(differences)), *interval(differences))


def share(of_questions: Sequence[float], of: Sequence[float]) -> Share:
    """The ratio of two means over the same questions, which are drawn together. The other one is positive."""
    ours, theirs = np.asarray(of_questions, dtype=np.float64), np.asarray(of, dtype=np.float64)
    drawn = _drawn(len(ours))
    low, high = np.percentile(ours[drawn].mean(axis=1) / theirs[drawn].mean(axis=1), [2.5, 97.5])
    return Share(float(ours.mean() / theirs.mean()), float(low), float(high))


def interval(of_questions: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a mean over questions."""
    values = np.asarray(of_questions, dtype=np.float64)
    low, high = np.percentile(values[_drawn(len(values))].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def _drawn(questions: int) -> npt.NDArray[np.int64]:
    """The bootstrap's samples, the same at every call."""
    return np.random.default_rng(0).integers(questions, size=(_RESAMPLES, questions))


def between(reference: Sequence[LogProbabilities], found: Sequence[LogProbabilities]) -> Divergence:
    """Token by token, of distributions before each."""
    pairs = list(zip(reference, found, strict=True))
    return Divergence(
        tuple(float(np.sum(np.exp(expected) * (expected - seen))) for expected, seen in pairs),
        tuple(bool(expected.argmax() == seen.argmax()) for expected, seen in pairs),
    )


def log_softmax(logits: Float32) -> LogProbabilities:
    shifted = logits.astype(np.float64) - float(logits.max())
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))
