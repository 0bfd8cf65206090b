"""Before stored KV is trusted: does this runtime, with this model, stitch to the same answer as full prefill?

Three checks, each against the runtime's own noise (the same tokens in other batch shapes): RoPE is what the model file
says; exact rows written back give full prefill's logits; recomputing everything through the stitched path does too.
The same runs are timed, which gives the first cost estimates. Knows nothing of documents.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from quire_engine import costs, plan, records
from quire_engine.costs import Costs
from quire_engine.kv import codec
from quire_engine.kv.format import ChunkReader, to_bytes
from quire_engine.kv.memory import MemorySource
from quire_engine.kv.transfer import Placement
from quire_engine.plan import Prompt, Segment
from quire_engine.runtimes.base import Runtime
from quire_engine.types import BitPlan, ChunkKV, Float32

# Batch shape alone moves llama.cpp's logits by KL .004 on average and .017 in the worst percentile (SmolLM2, Q4_1).
TOLERATED_KL = 0.05
TOLERATED_ROPE_ERROR = 0.02
_TOKENS = 192
_LONG_TOKENS = 1536


@dataclass(frozen=True)
class Verdict:
    """reason: why stored KV must not be used with this model; empty when all checks passed.
    noise_kl, exact_rows_kl, recomputed_kl: KL to full prefill.  rope_error: relative, of layer 0's keys."""

    reason: str
    noise_kl: float
    exact_rows_kl: float
    recomputed_kl: float
    rope_error: float
    costs: Costs


def check(runtime: Runtime, text: Sequence[int]) -> Verdict:
    """Runs all checks on some ordinary text of at least 64 tokens; a few seconds on a small model."""
    room = min(_TOKENS, runtime.shape.context_tokens // 2, len(text))
    body, question = tuple(text[: room * 2 // 3]), tuple(text[room * 2 // 3 : room])
    prompt = Prompt(Segment(()), (Segment(body, "body"),), Segment(question))
    runtime.reserve(4 * _LONG_TOKENS)
    full = _full(runtime, prompt, (question,))
    noise = _kl(full, _full(runtime, prompt, (question[:8], question[8:])))
    rope_error = _rope_error(runtime, guard=question, body=body)
    chunk = _exact_chunk(runtime, body)

    _place(runtime, prompt, chunk)
    runtime.adopt()
    exact_rows = _kl(full, runtime.extend(question))
    _place(runtime, prompt, chunk)
    runtime.execute(plan.stitch(prompt, [np.ones(len(body), dtype=bool)]))
    recomputed = _kl(full, runtime.extend(question))
    reason = _reason(rope_error, max(exact_rows, recomputed), max(TOLERATED_KL, 4 * noise))
    return Verdict(reason, noise, exact_rows, recomputed, rope_error, _measure(runtime, prompt, chunk))


def save(verdict: Verdict, path: Path) -> None:
    records.save(path, asdict(verdict))


def load(path: Path) -> Verdict | None:
    """A saved verdict; None when there is none that can be read: the checks run again."""
    fields = records.load(path)
    try:
        return Verdict(**{**fields, "costs": Costs(**fields["costs"])})
    except (TypeError, KeyError):
        return None


def _reason(rope_error: float, kl: float, tolerated: float) -> str:
    if not rope_error <= TOLERATED_ROPE_ERROR:
        return f"its position encoding is not the one its file describes (error {rope_error:.3f})"
    if not kl <= tolerated:
        return f"stitched and full prefill disagree (KL {kl:.3f}, tolerated {tolerated:.3f})"
    return ""


def _full(runtime: Runtime, prompt: Prompt, question: Sequence[Sequence[int]]) -> Float32:
    runtime.rewind(0)
    runtime.execute(plan.compute_all(prompt))
    for part in question:
        logits = runtime.extend(part)
    return logits


def _rope_error(runtime: Runtime, guard: Sequence[int], body: Sequence[int]) -> float:
    """Layer 0's keys before RoPE depend on the token alone: reading them at other positions must not change them."""
    here, _ = runtime.encode((), body)
    there, _ = runtime.encode(guard, body)
    first, second = here[0].astype(np.float32), there[0].astype(np.float32)
    return float(np.linalg.norm(first - second) / max(float(np.linalg.norm(first)), 1e-12))


def _exact_chunk(runtime: Runtime, body: Sequence[int]) -> ChunkReader:
    k_pre, v = runtime.encode((), body)
    exact = BitPlan.uniform(runtime.shape.layers, 16, 16)
    packed = codec.encode(ChunkKV(k_pre, v, {}), exact, codec.text_order(len(body)))
    return ChunkReader(MemorySource(to_bytes(packed, bytes(32))))


def _place(runtime: Runtime, prompt: Prompt, chunk: ChunkReader) -> None:
    runtime.rewind(0)
    runtime.place([Placement("body", chunk, start) for start in prompt.starts[1:-1]])


def _measure(runtime: Runtime, prompt: Prompt, chunk: ChunkReader) -> Costs:
    """Times the question behind a short and a long context; the long one repeats the same rows."""
    copies = max(1, min(_LONG_TOKENS, runtime.shape.context_tokens // 2) // len(prompt.chunks[0]))
    long = Prompt(prompt.opening, prompt.chunks * copies, prompt.question)
    question = len(prompt.question)
    short_ms, _ = _time(runtime, prompt, chunk)
    long_ms, load_ms = _time(runtime, long, chunk)
    if copies == 1:
        return Costs(short_ms / question, 0.0, load_ms / long.context_tokens)
    return costs.from_measurements(
        (question, prompt.context_tokens, short_ms),
        (question, long.context_tokens, long_ms),
        load_ms / long.context_tokens,
    )


def _time(runtime: Runtime, prompt: Prompt, chunk: ChunkReader) -> tuple[float, float]:
    """Milliseconds of the question and of placing what stands before it, each the better of two runs."""
    question_ms, load_ms = [], []
    for _ in range(2):
        started = time.perf_counter()
        _place(runtime, prompt, chunk)
        load_ms.append(1000 * (time.perf_counter() - started))
        runtime.adopt()
        started = time.perf_counter()
        runtime.extend(prompt.question.tokens)
        question_ms.append(1000 * (time.perf_counter() - started))
    return min(question_ms), min(load_ms)


def _kl(reference: Float32, other: Float32) -> float:
    """KL divergence of two next-token distributions given by their logits, in nats."""
    p, q = _log_softmax(reference), _log_softmax(other)
    return float(np.sum(np.exp(p) * (p - q)))


def _log_softmax(logits: Float32) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - float(logits.max())
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))
