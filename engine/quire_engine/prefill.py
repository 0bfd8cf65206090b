"""One prompt, from stored KV to the scores of the first token, and the account of where every token came from.

Knows nothing of which ratio or selector is wise; the engine decides that.
"""

import numpy as np

from quire_engine import plan
from quire_engine.chunks import ChunkCache
from quire_engine.clock import Clock
from quire_engine.errors import DamagedChunk, UnwritableStore
from quire_engine.generate import Ending
from quire_engine.plan import Prompt, StitchPlan
from quire_engine.runtimes.base import Runtime
from quire_engine.selection import selectors
from quire_engine.selection.selectors import Evidence, Selector
from quire_engine.types import Answered, Float32, Timings, TokenCounts


class Prefill:
    """The work on one prompt: `run` once, then `report`. ratio 1 is full prefill."""

    def __init__(self, runtime: Runtime, chunks: ChunkCache, prompt: Prompt, ratio: float) -> None:
        self._runtime = runtime
        self._chunks = chunks
        self._prompt = prompt
        self._ratio = ratio
        self._plan = StitchPlan(prompt, ())
        self._encoded: frozenset[str] = frozenset()
        self._first_token_ms = 0.0
        self.clock = Clock()

    def run(self, selector: Selector) -> Float32:
        """Everything up to the scores of the first token [vocabulary]."""
        if self._ratio < 1:
            try:
                self._plan = self._stitch(selector)
            except (DamagedChunk, UnwritableStore):  # the disk takes or gives nothing: an answer does without it
                self._ratio = 1.0
        if self._ratio >= 1:
            self._plan = plan.compute_all(self._prompt)
        with self.clock.step("recompute"):
            self._runtime.execute(self._plan)
        with self.clock.step("question"):
            logits = self._runtime.extend(self._prompt.question.tokens)
        self._first_token_ms = self.clock.elapsed_ms()
        return logits

    def _stitch(self, selector: Selector) -> StitchPlan:
        """Loads the chunks, asks what the question looks at, and decides which tokens to compute again."""
        prompt, runtime = self._prompt, self._runtime
        with self.clock.step("encode"):
            self._encoded = self._chunks.complete(runtime, prompt, selector.wants_sensitivities)
        with self.clock.step("load"):
            stored_scores, repaired = self._chunks.place(runtime, prompt, selector.wants_sensitivities)
            self._encoded |= repaired
        mass = np.zeros(0, dtype=np.float32)
        if selector.asks_question:
            with self.clock.step("probe"):
                mass = runtime.probe(prompt.question.tokens, prompt.context_tokens)
        evidence = [
            Evidence(len(chunk), scores, mass[start : start + len(chunk)])
            for chunk, scores, start in zip(prompt.chunks, stored_scores, prompt.starts[1:], strict=False)
        ]
        return plan.stitch(prompt, selectors.choose(selector, evidence, self._ratio, runtime.tile_tokens))

    def report(self, generated: int, ending: Ending, decode_ms: float = 0.0) -> Answered:
        """The truth about this answer."""
        reused, fresh = self._plan.reused_tokens, len(self._prompt.question)
        for segment, start in zip(self._prompt.stored, self._prompt.starts, strict=False):
            if segment.key in self._encoded:
                just_read = self._plan.reused_within(start, start + len(segment))
                reused, fresh = reused - just_read, fresh + just_read
        recomputed = self._plan.recomputed_tokens
        if self._ratio >= 1:
            recomputed, fresh = 0, fresh + recomputed
        clock = self.clock
        return Answered(
            TokenCounts(self._prompt.context_tokens, reused, recomputed, fresh, generated),
            Timings(
                encode_ms=clock["encode"],
                load_ms=clock["load"],
                probe_ms=clock["probe"],
                recompute_ms=clock["recompute"],
                question_ms=clock["question"],
                first_token_ms=self._first_token_ms,
                decode_ms=decode_ms,
            ),
            self._ratio,
            ending,
        )
