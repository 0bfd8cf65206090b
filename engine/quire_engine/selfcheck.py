"""Before stored KV is trusted: does this runtime, with this model, stitch to the same answer as full prefill?

Three checks, each against the runtime's own noise (the same tokens in other batch shapes): RoPE is what the model file
says; exact rows written back give full prefill's logits; recomputing everything through the stitched path does too.
The same runs are timed, which gives the first cost estimates. Knows nothing of documents.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt

from quire_engine import costs, plan, records
from quire_engine.costs import Costs, Rate
from quire_engine.errors import QuireError
from quire_engine.kv import codec
from quire_engine.kv.format import ChunkReader, to_bytes
from quire_engine.kv.memory import MemorySource
from quire_engine.kv.store import KVStore
from quire_engine.kv.transfer import Placement
from quire_engine.plan import Prompt, Segment
from quire_engine.runtimes.base import Runtime
from quire_engine.types import BitPlan, ChunkKV, Float32

# Batch shape alone moves llama.cpp's logits by KL .004 on average and .017 in the worst percentile (SmolLM2, Q4_1).
TOLERATED_KL = 0.05
TOLERATED_ROPE_ERROR = 0.02
_TOKENS = 192
_LONG_TOKENS = 1536
_QUESTION_TOKENS, _SPAN_TOKENS = 32, 16


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


def check(runtime: Runtime, text: Sequence[int], bits: BitPlan, folder: Path) -> Verdict:
    """Runs all checks on some ordinary text of at least 64 tokens; a few seconds on a small model.

    bits: how chunks will be stored.  folder: on the disk where they will lie; made if needed.
    """
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
    return Verdict(reason, noise, exact_rows, recomputed, rope_error, _measure(runtime, prompt, bits, folder))


def save(verdict: Verdict, path: Path) -> None:
    records.save(path, asdict(verdict))


def load(path: Path) -> Verdict | None:
    """A saved verdict; None when there is none that can be read: the checks run again."""
    fields = records.load(path)
    try:
        return Verdict(**{**fields, "costs": costs.of_record(fields["costs"])})
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
    exact = BitPlan.exact(runtime.shape.layers)
    packed = codec.encode(ChunkKV(k_pre, v, {}), exact, codec.text_order(len(body)))
    return ChunkReader(MemorySource(to_bytes(packed, bytes(32))))


def _place(runtime: Runtime, prompt: Prompt, chunk: ChunkReader) -> None:
    runtime.rewind(0)
    runtime.place([Placement("body", chunk, start) for start in prompt.starts[1:-1]])


def _measure(runtime: Runtime, prompt: Prompt, bits: BitPlan, folder: Path) -> Costs:
    """Times every kind of step behind a short and a long context; the long one repeats the same rows."""
    body, question = prompt.chunks[0], prompt.question.tokens[:_QUESTION_TOKENS]
    copies = max(2, min(_LONG_TOKENS, runtime.shape.context_tokens // 2) // len(body))
    short, long = (Prompt(Segment(()), (body,) * many, Segment(question)) for many in (2, copies))
    kv = ChunkKV(*runtime.encode((), body.tokens), {})
    data = to_bytes(codec.encode(kv, bits, codec.text_order(len(body))), bytes(32))
    chunk = ChunkReader(MemorySource(data))
    few, many = (tokens // _SPAN_TOKENS * _SPAN_TOKENS for tokens in (max(_SPAN_TOKENS, len(body) // 2), 2 * len(body)))
    sizes = [context.context_tokens for context in (short, long)]
    asked = [min(_question_ms(runtime, context, chunk) for _ in range(2)) for context in (short, long)]
    again = [min(_spans_ms(runtime, context, chunk, few) for _ in range(2)) for context in (short, long)]
    more_ms = max(0.0, _spans_ms(runtime, long, chunk, many) - again[1])
    assemble_ms = max(0.0, again[1] - few * more_ms / (many - few)) / sizes[1]
    read_ms = _timed(lambda: _read(runtime, short))
    _place(runtime, long, chunk)
    probe_ms = _timed(lambda: runtime.probe(question, sizes[1]))
    spans = costs.rate(*((few, size / 2, ms - assemble_ms * size) for size, ms in zip(sizes, again, strict=True)))
    attention_ms = spans.attention_ms * sizes[0] / 2000
    return Costs(
        Rate(max(read_ms / sizes[0] - attention_ms, 1e-3), spans.attention_ms),
        costs.rate(*((len(question), size + len(question) / 2, ms) for size, ms in zip(sizes, asked, strict=True))),
        spans,
        probe_ms / asked[1],
        assemble_ms,
        _load_ms(runtime, long, chunk, data, folder),
        runtime.tile_tokens,
    )


def _read(runtime: Runtime, prompt: Prompt) -> None:
    runtime.rewind(0)
    runtime.execute(plan.compute_all(prompt))


def _question_ms(runtime: Runtime, prompt: Prompt, chunk: ChunkReader) -> float:
    _place(runtime, prompt, chunk)
    runtime.adopt()
    return _timed(lambda: runtime.extend(prompt.question.tokens))


def _spans_ms(runtime: Runtime, prompt: Prompt, chunk: ChunkReader, tokens: int) -> float:
    """Computing so many tokens again, in short spans all over the context."""
    _place(runtime, prompt, chunk)
    spans, every = tokens // _SPAN_TOKENS, prompt.context_tokens // _SPAN_TOKENS
    chosen = np.zeros(prompt.context_tokens, dtype=bool)
    for number in range(spans):
        start = (2 * number + 1) * every // (2 * spans) * _SPAN_TOKENS
        chosen[start : start + _SPAN_TOKENS] = True
    stitched = plan.stitch(prompt, np.split(chosen, len(prompt.chunks)))
    return _timed(lambda: runtime.execute(stitched))


def _load_ms(runtime: Runtime, prompt: Prompt, chunk: ChunkReader, data: bytes, folder: Path) -> dict[str, float]:
    """Per token from every pool. A disk that takes nothing is not read from either."""
    memory = min(_timed(lambda: _place(runtime, prompt, chunk)) for _ in range(2)) / prompt.context_tokens
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with TemporaryDirectory(prefix="reading-", dir=folder) as place, ExitStack() as files:
            store = KVStore(Path(place))
            keys = [f"{number:08x}" for number in range(len(prompt.chunks))]
            for key in keys:
                store.write(key, data)
            store.drop_from_memory(keys)

            def place_all() -> None:
                runtime.rewind(0)
                chunks = [files.enter_context(store.open(key)) for key in keys]
                runtime.place([Placement(*one) for one in zip(keys, chunks, prompt.starts[1:-1], strict=True)])

            disk = _timed(place_all) / prompt.context_tokens
    except (OSError, QuireError):
        disk = memory
    return {costs.MEMORY: memory, costs.DISK: max(memory, disk)}


def _timed(work: Callable[[], object]) -> float:
    """Milliseconds."""
    started = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - started)


def _kl(reference: Float32, other: Float32) -> float:
    """KL divergence of two next-token distributions given by their logits, in nats."""
    p, q = _log_softmax(reference), _log_softmax(other)
    return float(np.sum(np.exp(p) * (p - q)))


def _log_softmax(logits: Float32) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - float(logits.max())
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))
