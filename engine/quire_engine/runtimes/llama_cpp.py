"""The llama.cpp runtime: stitches stored KV into a prompt on CPU, Metal or Vulkan with the stock library.

llama.cpp cannot rewrite the middle of its cache, but cells can belong to several sequences. So all stored rows are
written once, at their final positions, into one sequence (PLACED). Every span that is to be recomputed gets a sequence
of its own that shares the cells before it; all spans are decoded in one batch; their rows are read back and written
again together with the stored ones, which are corrected by what they reveal (drift.py); then the live sequence takes
them over. Spans see stale copies of one another, which costs little accuracy and saves most of the time
(docs/decisions/llama_cpp_spans.md).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np

from quire_engine.kv import drift, transfer
from quire_engine.kv.transfer import Placement
from quire_engine.plan import Prompt, Span, StitchPlan
from quire_engine.runtimes import llama_state
from quire_engine.runtimes.llama_context import LlamaContext, LlamaModel
from quire_engine.selection import probe as attention
from quire_engine.selection.selectors import SPAN_TOKENS
from quire_engine.types import Float16, Float32, ModelShape
from quire_kernels import rope

LIVE, PLACED, SCRATCH, FIRST_GUARD = 0, 1, 2, 3
_GUARDS = 4  # texts behind which passages are read: the preamble, and a few for measuring
FIRST_SPAN = FIRST_GUARD + _GUARDS
MAX_SPANS = 96  # sequences decoded in one batch; more spans take another batch
_SEQUENCES = FIRST_SPAN + MAX_SPANS
_CELL_STEP = 1024


class LlamaCppRuntime:
    """Executes plans with llama.cpp. One conversation at a time, not thread-safe."""

    name = "llama.cpp"
    tile_tokens = 64  # queries that its CPU flash attention takes at once
    span_tokens = SPAN_TOKENS

    def __init__(self, model: LlamaModel, shape: ModelShape, threads: int, stitching: bool = True) -> None:
        """stitching: off for models that can only be prefilled; recurrent ones pay for every sequence."""
        self.model = model
        self.shape = shape
        self._threads = threads
        self._sequences = _SEQUENCES if stitching else 1
        self._context = LlamaContext(model, _CELL_STEP, self._sequences, threads)
        self._guards: dict[tuple[int, ...], int] = {}  # guard tokens -> sequence that holds their KV
        self._placed: llama_state.SequenceState | None = None
        self._live_tokens = 0
        self._should_stop: Callable[[], bool] | None = None

    @property
    def live_tokens(self) -> int:
        return self._live_tokens

    def reserve(self, tokens: int) -> None:
        tokens += sum(map(len, self._guards))
        if tokens > self._context.cells:
            live = self._context.read_state(LIVE) if self._live_tokens else None
            self._context.close()
            cells = -(-tokens // _CELL_STEP) * _CELL_STEP
            self._context = LlamaContext(self.model, cells, self._sequences, self._threads)
            self._context.abort_when(self._should_stop)
            self._guards, self._placed = {}, None
            if live is not None:
                self._context.write_state(LIVE, live)

    def rewind(self, tokens: int) -> int:
        for sequence in (PLACED, SCRATCH, *range(FIRST_SPAN, self._sequences)) if self._sequences > 1 else ():
            self._context.remove(sequence)
        self._placed = None
        if tokens == 0:
            self._context.remove(LIVE)
        elif not self._context.remove(LIVE, tokens):  # a recurrent model has no way back
            self._context.remove(LIVE)
            tokens = 0
        self._live_tokens = min(tokens, self._live_tokens)
        return self._live_tokens

    def close(self) -> None:
        self._context.close()

    @contextmanager
    def abortable(self, should_stop: Callable[[], bool]) -> Iterator[None]:
        self._should_stop = should_stop
        self._context.abort_when(should_stop)
        try:
            yield
        finally:
            self._should_stop = None
            self._context.abort_when(None)  # which may be another context than at the beginning

    # Encoding

    def encode(self, guard: Sequence[int], tokens: Sequence[int], layers: int | None = None) -> tuple[Float16, Float16]:
        layers = layers or self.shape.layers
        behind = len(guard)
        sequence = self._guard_sequence(tuple(guard), room=len(tokens))
        try:
            with self._context.stopping_after(layers) if layers < self.shape.layers else nullcontext():
                self._context.decode(tokens, behind + np.arange(len(tokens)), sequence)
            return self._rows(sequence, behind, len(tokens), layers)
        finally:
            self._context.remove(sequence, behind)

    def _guard_sequence(self, guard: tuple[int, ...], room: int) -> int:
        """The sequence that holds a guard's KV and nothing else, computed once for many chunks."""
        if guard not in self._guards and len(self._guards) == _GUARDS:
            for sequence in self._guards.values():
                self._context.remove(sequence)
            self._guards = {}
        self.reserve(self._live_tokens + len(guard) + room)  # which may forget the guards
        if guard not in self._guards:
            sequence = FIRST_GUARD + len(self._guards)
            self._context.remove(sequence)  # what an aborted reading left
            self._context.decode(guard, np.arange(len(guard)), sequence)
            self._guards[guard] = sequence
        return self._guards[guard]

    def _rows(self, sequence: int, start: int, count: int, layers: int) -> tuple[Float16, Float16]:
        """K before RoPE and V of `count` positions from `start` in the first layers of one sequence."""
        state = llama_state.parse(self._context.read_state(sequence), self.shape)
        order = np.argsort(state.positions, kind="stable")
        rows = order[np.searchsorted(state.positions, start, sorter=order) :][:count]
        cos, sin = transfer.angles(np.arange(start, start + count), self.shape.rope)
        k_pre = np.empty((layers, count, self.shape.kv_heads, self.shape.key_dim), np.float16)
        v = np.empty((layers, count, self.shape.kv_heads, self.shape.value_dim), np.float16)
        for layer in range(layers):
            k_rot = state.k_rot[layer][rows].reshape(k_pre.shape[1:])
            k_pre[layer] = rope.unrotate(k_rot, cos, sin, self.shape.rope.layout)
            v[layer] = state.v[layer][rows].reshape(v.shape[1:])
        return k_pre, v

    # One question

    def place(self, placements: Sequence[Placement]) -> None:
        first, stop = self._live_tokens, max(placement.stop for placement in placements)
        self._context.remove(PLACED)
        magic = llama_state.magic_of(self._context.read_state(PLACED))  # also of a sequence that holds nothing yet
        state = llama_state.empty(self.shape, stop - first, magic)
        state.positions[:] = np.arange(first, stop)
        transfer.place(placements, self.shape.rope, state.k_rot, state.v, first)
        self._context.write_state(PLACED, state.blob)
        self._placed = state

    def probe(self, question: Sequence[int], position: int) -> Float32:
        assert self._placed is not None, "place() comes before probe()"
        layers = attention.probed_layers(self.shape.layers)
        self._context.copy(LIVE, SCRATCH, 0, self._live_tokens)
        self._context.copy(PLACED, SCRATCH, self._live_tokens, position)
        with self._context.capturing_queries(layers) as captured:
            self._context.decode(question, position + np.arange(len(question)), SCRATCH)
        self._context.remove(SCRATCH)
        queries = {layer: np.concatenate(parts) for layer, parts in captured.items()}
        return attention.mass(queries, self._placed.k_rot, self.shape, position - self._live_tokens)

    def adopt(self) -> None:
        assert self._placed is not None, "place() comes before adopt()"
        stop = self._live_tokens + len(self._placed.positions)
        self._context.copy(PLACED, LIVE, self._live_tokens, stop)
        self._context.remove(PLACED)
        self._placed, self._live_tokens = None, stop

    def execute(self, plan: StitchPlan) -> None:
        prompt = plan.prompt
        if self._placed is None:  # nothing stored was wanted: full prefill
            first, stop = self._live_tokens, prompt.context_tokens
            tokens = prompt.tokens[first - prompt.position : stop - prompt.position]
            self._context.decode(tokens, np.arange(first, stop), LIVE)
            self._live_tokens = stop
            return
        for batch in range(0, len(plan.recomputed), MAX_SPANS):
            self._recompute(prompt, plan.recomputed[batch : batch + MAX_SPANS])
        if plan.recomputed:
            self._settle(plan, self._placed)
        self.adopt()

    def _recompute(self, prompt: Prompt, spans: Sequence[Span]) -> None:
        """Decodes spans in one batch, each over the rows before it, and hands them to the scratch sequence."""
        owners = range(FIRST_SPAN, FIRST_SPAN + len(spans))
        for owner, span in zip(owners, spans, strict=True):
            self._context.copy(LIVE, owner, 0, self._live_tokens)
            self._context.copy(PLACED, owner, self._live_tokens, span.start)
        positions = np.concatenate([np.arange(span.start, span.stop) for span in spans])
        lengths = [len(span) for span in spans]
        tokens = np.asarray(prompt.tokens)[positions - prompt.position]
        self._context.decode(tokens.tolist(), positions, np.repeat(owners, lengths))
        for owner, span in zip(owners, spans, strict=True):
            self._context.copy(owner, SCRATCH, span.start, span.stop)
            self._context.remove(owner)

    def _settle(self, plan: StitchPlan, state: llama_state.SequenceState) -> None:
        """Writes the placed rows again: the recomputed ones as they are now, the others corrected by their drift."""
        fresh = llama_state.parse(self._context.read_state(SCRATCH), self.shape)
        order = np.argsort(fresh.positions, kind="stable")
        fresh_k_rot, fresh_v = ([rows[order] for rows in layers] for layers in (fresh.k_rot, fresh.v))
        drift.correct(plan, self.shape, state.k_rot, state.v, fresh_k_rot, fresh_v)
        rows = fresh.positions[order] - self._live_tokens
        for layer in range(self.shape.layers):
            state.k_rot[layer][rows] = fresh_k_rot[layer]
            state.v[layer][rows] = fresh_v[layer]
        self._context.remove(SCRATCH)
        self._context.remove(PLACED)  # there is no room for two
        self._context.write_state(PLACED, state.blob)

    def extend(self, tokens: Sequence[int]) -> Float32:
        return self._append(tokens, scored=1).ravel()

    def scores(self, tokens: Sequence[int]) -> Float32:
        return self._append(tokens, scored=len(tokens))

    def _append(self, tokens: Sequence[int], scored: int) -> Float32:
        self._context.decode(tokens, self._live_tokens + np.arange(len(tokens)), LIVE, scored)
        self._live_tokens += len(tokens)
        return self._context.scores(scored)

    def rows(self, start: int, stop: int) -> tuple[Float16, Float16]:
        return self._rows(LIVE, start, stop - start, self.shape.layers)
