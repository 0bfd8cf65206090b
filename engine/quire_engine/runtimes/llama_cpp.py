"""The llama.cpp runtime: stitches stored KV into a prompt on CPU, Metal or Vulkan with the stock library.

llama.cpp cannot compute the middle of a sequence again, but cells can belong to several sequences. So all stored rows
are written once, at their final positions, into one sequence (PLACED). Every span that is to be recomputed gets a
sequence of its own that shares the cells before it, and all spans are decoded in one batch. In every layer, between
writing the batch's keys and values and attending to them, the placed cells are put in order: spans' rows are replaced
by the fresh ones, so that spans see one another as they are, and the others are corrected by the drift that shows
(drift.py). In the end the live sequence takes over what the spans have seen (docs/decisions/llama_cpp_spans.md).
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial

import numpy as np

from quire_engine.kv import drift, transfer
from quire_engine.kv.transfer import Placement
from quire_engine.plan import Span, StitchPlan
from quire_engine.runtimes import llama_state
from quire_engine.runtimes.llama_context import LlamaContext, LlamaModel, Rows
from quire_engine.runtimes.llama_state import SequenceState
from quire_engine.selection import probe as attention
from quire_engine.types import Float16, Float32, ModelShape
from quire_kernels import rope

LIVE, PLACED, SCRATCH, FIRST_GUARD = 0, 1, 2, 3
_GUARDS = 4  # texts behind which passages are read: the preamble, and a few for measuring
FIRST_SPAN = FIRST_GUARD + _GUARDS
MAX_SPANS = 240  # sequences decoded in one batch, of llama.cpp's 256; more spans take another batch
_SEQUENCES = FIRST_SPAN + MAX_SPANS
_CELL_STEP = 1024
_MARK = 4  # 16-bit numbers of a key that mark a placed row


class LlamaCppRuntime:
    """Executes plans with llama.cpp. One conversation at a time, not thread-safe."""

    name = "llama.cpp"
    tile_tokens = 64  # queries that its CPU flash attention takes at once

    def __init__(self, model: LlamaModel, shape: ModelShape, threads: int, stitching: bool = True) -> None:
        """stitching: off for models that can only be prefilled; recurrent ones pay for every sequence."""
        self.model = model
        self.shape = shape
        self._threads = threads
        self._sequences = _SEQUENCES if stitching else 1
        self._context = LlamaContext(model, _CELL_STEP, self._sequences, threads)
        self._guards: dict[tuple[int, ...], int] = {}  # guard tokens -> sequence that holds their KV
        self._placed: SequenceState | None = None
        self._cells: Rows = np.arange(0)  # of the placed rows
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
        self._placed, self._cells = state, self._found(state)

    def _found(self, state: SequenceState) -> Rows:
        """Writes placed rows, and finds the cells that llama.cpp gives them, which it does not tell: the first layer's
        keys begin with marks meanwhile."""
        keys = state.k_rot[0].copy()
        marks = (int.from_bytes(os.urandom(4)) << 32) + np.arange(len(keys), dtype=np.uint64)
        state.k_rot[0].view(np.uint16)[:, :_MARK] = marks.view(np.uint16).reshape(-1, _MARK)
        self._context.write_state(PLACED, state.blob)
        state.k_rot[0][:] = keys
        everywhere = self._context.cell_rows("k", 0, np.arange(self._context.cells))
        found = np.ascontiguousarray(everywhere.view(np.uint16)[:, :_MARK]).view(np.uint64).ravel()
        order = np.argsort(found)
        cells = order[np.searchsorted(found, marks, sorter=order) % len(order)]
        if not np.array_equal(found[cells], marks):
            raise llama_state.unexpected("placed rows are not in the cells")
        self._context.set_cell_rows("k", 0, cells, keys)
        return cells

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
        fresh, settled = _Fresh(), plan.spans[0].start
        batches = _batches(plan.recomputed, self._context.batch_tokens, self.tile_tokens)
        for number, spans in enumerate(batches, start=1):
            stop = spans[-1].stop if number < len(batches) else prompt.context_tokens
            self._recompute(plan.until(spans[-1].stop), spans, fresh, slice(settled, stop))
            settled = stop
        self.adopt()

    def _recompute(self, plan: StitchPlan, spans: Sequence[Span], fresh: "_Fresh", part: slice) -> None:
        """Decodes spans, the plan's last ones, in one batch, each over the rows before it.

        fresh: of the plan's earlier spans; theirs are added.  part: the positions that no earlier batch has settled.
        """
        assert self._placed is not None
        placed, first = self._placed, plan.spans[0].start
        since = max(first, min(part.start, spans[0].start - drift.REACH_TOKENS))  # these can still learn from the spans
        likely = placed.k_rot[drift.middle(self.shape.layers)]
        correction = drift.Correction.of(plan, self.shape, likely, since, part.stop)
        again = np.concatenate([np.arange(span.start, span.stop) for span in plan.recomputed]) - first
        rows = slice(since - first, part.stop - first)

        def settle(layer: int, computed: Rows) -> None:
            """Puts the layer's rows in order before the spans attend: fresh ones where they are, others corrected."""
            list(pool.map(partial(settle_kind, layer, computed), "kv"))

        def settle_kind(layer: int, computed: Rows, kind: str) -> None:
            stored = (placed.k_rot if kind == "k" else placed.v)[layer]
            now = fresh.add(kind, layer, self._context.cell_rows(kind, layer, computed))
            settled = correction.settled(kind, stored, now) if correction else stored.copy()
            settled[again] = now
            self._context.set_cell_rows(kind, layer, self._cells[rows], settled[rows])

        owners = range(FIRST_SPAN, FIRST_SPAN + len(spans))
        for owner, span in zip(owners, spans, strict=True):
            self._context.copy(LIVE, owner, 0, self._live_tokens)
            self._context.copy(PLACED, owner, self._live_tokens, span.start)
        positions = np.concatenate([np.arange(span.start, span.stop) for span in spans])
        tokens = np.asarray(plan.prompt.tokens)[positions - plan.prompt.position]
        with ThreadPoolExecutor(max_workers=2) as pool, self._context.settling(settle, self.shape.layers):
            self._context.decode(tokens.tolist(), positions, np.repeat(owners, [len(span) for span in spans]))
        for owner in owners:
            self._context.remove(owner)

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


class _Fresh:
    """Keys and values of all tokens that were recomputed so far."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, int], Float16] = {}

    def add(self, kind: str, layer: int, rows: Float16) -> Float16:
        """With those of the next tokens: all of them."""
        if (before := self._rows.get((kind, layer))) is not None:
            rows = np.concatenate([before, rows])
        self._rows[kind, layer] = rows
        return rows


def _batches(spans: Sequence[Span], most: int, tile: int) -> list[list[Span]]:
    """In order, cut so that a batch has at most MAX_SPANS spans and `most` tokens, and all but the last whole tiles."""
    left, batches = list(spans), list[list[Span]]()
    while left:
        batch, room = list[Span](), most
        if sum(map(len, left)) > most or len(left) > MAX_SPANS:
            room = min(most, sum(map(len, left[:MAX_SPANS])))
            room -= room % tile if room > tile else 0
        while left and room:
            span = left.pop(0)
            stop = min(span.stop, span.start + room)
            batch.append(Span(span.start, stop, reuse=False))
            room -= stop - span.start
            if stop < span.stop:
                left.insert(0, Span(stop, span.stop, reuse=False))
        batches.append(batch)
    return batches
