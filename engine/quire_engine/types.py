"""The values that cross the engine's borders. Frozen, plain, without behaviour beyond their own arithmetic.

Knows nothing of files, models or runtimes. Arrays are NumPy; shapes are written beside them.
`k_pre` means keys before RoPE, `k_rot` keys after it.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float16 = npt.NDArray[np.float16]
GridName = Literal["midrise", "minmax"]


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of one model.

    layout: which channels form a pair; GGUF llama rotates (0,1),(2,3)..., qwen2 rotates (0,d/2),(1,d/2+1)...
    dims: rotated channels per head; the rest passes through.  base: theta.  scale: position multiplier
    (1 unless linearly scaled).  factors: per-pair frequency divisors (Llama 3), empty when there are none.
    """

    layout: Literal["adjacent", "halves"]
    dims: int
    base: float
    scale: float = 1.0
    factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class ModelShape:
    """What the KV of a model looks like."""

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    context_tokens: int
    rope: Rope

    @property
    def values_per_token(self) -> int:
        """K and V values that one token adds over all layers."""
        return self.layers * self.kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True)
class BitPlan:
    """How precisely a chunk is stored: bits per value, one entry per layer; 16 stores float16 as it is.

    grid: the numbers that codes stand for, see quire_kernels.grids; "minmax" is KVmix's.
    sinks: first tokens of a chunk that are stored exactly, 0..255.
    k_widths: for every layer the bits of each key channel, 0..8, of which k_bits is the largest; no bytes where all
    have k_bits, and nothing at all where that holds for every layer.
    v_by_channel: layers whose values form groups along tokens, as keys do; those of others along channels.
    """

    k_bits: tuple[int, ...]
    v_bits: tuple[int, ...]
    grid: GridName = "midrise"
    sinks: int = 4
    k_widths: tuple[bytes, ...] = ()
    v_by_channel: tuple[int, ...] = ()

    @classmethod
    def uniform(cls, layers: int, k_bits: int, v_bits: int) -> "BitPlan":
        return cls((k_bits,) * layers, (v_bits,) * layers)

    @classmethod
    def exact(cls, layers: int) -> "BitPlan":
        """Float16 as it is."""
        return cls.uniform(layers, 16, 16)


@dataclass(frozen=True)
class ChunkKV:
    """Keys before RoPE and values of one chunk, all layers, and the scores computed while encoding it.

    scores: name -> float [tokens], the higher the more a token deserves to be recomputed.
    """

    k_pre: Float16  # [layers, tokens, kv_heads, key_dim]
    v: Float16  # [layers, tokens, kv_heads, value_dim]
    scores: dict[str, Float32]

    @property
    def tokens(self) -> int:
        return int(self.k_pre.shape[1])


@dataclass(frozen=True)
class Limits:
    """What fits: the model's context divided between passages, question and answer."""

    chunk_tokens: int
    context_tokens: int
    answer_tokens: int


@dataclass(frozen=True)
class Exchange:
    """A finished turn of a conversation, as the model read it. passages: in the order of its prompt."""

    passages: tuple[str, ...]
    question: str
    answer: str


@dataclass(frozen=True)
class Forecast:
    """What a question will cost, before it is asked.

    ratio: share of passage tokens computed again; 1 is full prefill.  missing_tokens: of passages that are not
    stored yet.  reason: why full prefill was chosen although reuse was asked for; empty otherwise.
    Times are predictions in milliseconds and leave out the search; 0 when nothing was ever measured. Full prefill is
    that of the whole context, earlier turns included.
    kept_tokens: of earlier turns, in memory or on disk.  dropped: passages of earlier turns that had to make room.
    """

    context_tokens: int
    missing_tokens: int
    ratio: float
    reason: str
    first_token_ms: float
    full_prefill_ms: float
    kept_tokens: int = 0
    dropped: int = 0


@dataclass(frozen=True)
class TokenCounts:
    """Where the KV of each prompt token came from; context + question = kept + reused + recomputed + fresh.

    All zero but context when it was stopped before the first token.

    context: tokens before the question.  reused: stored KV as it was.  recomputed: stored KV replaced.
    fresh: the question, and passages that were not stored.  generated: tokens of the answer.  kept: earlier turns,
    from memory or disk.
    """

    context: int
    reused: int
    recomputed: int
    fresh: int
    generated: int
    kept: int = 0


@dataclass(frozen=True)
class Timings:
    """Milliseconds of one answer. first_token_ms spans everything before the first token; the parts before it are
    resume (earlier turns that were not in memory), encode (passages that were not stored), load, probe, recompute and
    question."""

    encode_ms: float
    load_ms: float
    probe_ms: float
    recompute_ms: float
    question_ms: float
    first_token_ms: float
    decode_ms: float
    resume_ms: float = 0.0


@dataclass(frozen=True)
class Text:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True)
class Answered:
    """The answer is complete, or was stopped. ending: "end" by the model, "length" by the limit, "stopped"."""

    tokens: TokenCounts
    timings: Timings
    ratio: float
    ending: Literal["end", "length", "stopped"]


Event = Forecast | Text | Answered
