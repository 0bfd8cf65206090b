"""One prompt, from stored KV to the scores of the first token, and the account of where every token came from.

Knows nothing of which ratio or selector is wise; the engine decides that.
"""

from dataclasses import replace

import numpy as np

from quire_engine import plan
from quire_engine.chunks import ChunkCache
from quire_engine.clock import Clock
from quire_engine.errors import DamagedChunk, MissingChunk, UnwritableStore
from quire_engine.generate import Ending
from quire_engine.kv.transfer import DamagedPlacements
from quire_engine.plan import Prompt, Span, StitchPlan
from quire_engine.runtimes.base import Runtime
from quire_engine.selection import deviation, selectors
from quire_engine.selection.selectors import Evidence, Selector
from quire_engine.types import Answered, Float32, Timings, TokenCounts


class Prefill:
    """The work on one turn: `run` once, then `report`. ratio 1 is full prefill.

    The runtime's live sequence holds the earlier turns, up to the prompt's position. computed: how many of their tokens
    were not there before.  clock: of the time spent on that.  lead: how many of the first passages are computed while
    the others are read from a slow disk.
    """

    def __init__(
        self,
        runtime: Runtime,
        chunks: ChunkCache,
        prompt: Prompt,
        ratio: float,
        clock: Clock,
        computed: int = 0,
        lead: int = 0,
    ) -> None:
        self._runtime = runtime
        self._chunks = chunks
        self._prompt = prompt
        self._ratio = ratio
        self._computed = computed
        self._lead = lead
        self._led: tuple[Span, ...] = ()
        self._stitched: StitchPlan | None = None
        self._encoded: frozenset[str] = frozenset()
        self._first_token_ms = 0.0
        self.clock = clock

    def run(self, selector: Selector) -> Float32:
        """Everything up to the scores of the first token [vocabulary]."""
        if self._ratio < 1 and self._prompt.chunks:
            try:
                made = self._stitch(selector)
                with self.clock.step("recompute"):
                    self._runtime.execute(made)
                self._stitched = made
            except (DamagedChunk, MissingChunk, UnwritableStore) as error:
                # The disk takes or gives nothing: an answer does without it.
                self._ratio = 1.0
                for key in error.keys if isinstance(error, DamagedPlacements) else ():
                    self._chunks.store.remove(key)  # found while the runtime read on behind `place`
        if self._stitched is None:
            with self.clock.step("recompute"):
                self._runtime.execute(plan.compute_all(self._prompt))
        with self.clock.step("question"):
            logits = self._runtime.extend(self._prompt.question.tokens)
        self._first_token_ms = self.clock.elapsed_ms()
        return logits

    def _stitch(self, selector: Selector) -> StitchPlan:
        """Loads the chunks, asks what the question looks at, and decides which tokens to compute again."""
        prompt, runtime = self._prompt, self._runtime
        with self.clock.step("encode"):
            self._encoded = self._chunks.complete(runtime, prompt, selector.stored_scores)
        if self._lead:
            prompt = self._lead_in(prompt)
        elif not prompt.opening.key:
            with self.clock.step("recompute"):
                runtime.extend(prompt.opening.tokens)
        mass = moved = np.zeros(0, dtype=np.float32)
        if selector.compares_values:
            with self.clock.step("probe"):
                moved = self._value_deviation()
        with self.clock.step("load"):
            stored_scores, repaired = self._chunks.place(runtime, prompt, selector.stored_scores)
            self._encoded |= repaired
        if selector.knows_prompt and prompt.intact == len(prompt.chunks):
            return plan.stitch(prompt, [np.zeros(len(chunk), dtype=bool) for chunk in prompt.chunks])
        if selector.asks_question:
            with self.clock.step("probe"):
                mass = runtime.probe(prompt.question.tokens, prompt.context_tokens)
        exact = prompt.starts[1] - prompt.stored_start
        ends = np.cumsum([len(chunk) for chunk in prompt.chunks])[:-1]
        evidence = [
            Evidence(len(chunk), scores, looked, changed, intact=number < prompt.intact)
            for number, (chunk, scores, looked, changed) in enumerate(
                zip(prompt.chunks, stored_scores, np.split(mass[exact:], ends), np.split(moved, ends), strict=True)
            )
        ]
        masks = selectors.choose(selector, evidence, self._ratio, runtime.tile_tokens)
        return plan.stitch(prompt, masks)

    def _lead_in(self, prompt: Prompt) -> Prompt:
        """Computes the first passages, as full prefill does, while the others are read; what is left of the prompt."""
        rest, first = plan.behind(prompt, self._lead), prompt.starts[1]
        stored = replace(prompt, chunks=()).stored
        self._chunks.prefetch([*stored, *reversed(rest.chunks)])
        if stored:
            with self.clock.step("load"):
                _, repaired = self._chunks.place(self._runtime, replace(prompt, chunks=()))
                self._runtime.adopt()
            self._encoded |= repaired
            self._led = (Span(prompt.position, first, reuse=True),)
        with self.clock.step("lead"):
            start = self._runtime.live_tokens - prompt.position
            self._runtime.extend(prompt.tokens[start : rest.position - prompt.position])
        self._led += (Span(first, rest.position, reuse=False),)
        return rest

    def _value_deviation(self) -> Float32:
        """Of all passages' stored values from those that they have behind each other [tokens]."""
        chunks, runtime = self._prompt.chunks, self._runtime
        layers = deviation.compared_layers(runtime.shape.layers)
        together = [token for chunk in chunks for token in chunk.tokens]
        _, fresh = runtime.encode(self._chunks.preamble.tokens, together, layers)
        stored = np.concatenate([self._chunks.values(chunk, layers) for chunk in chunks], axis=1)
        return deviation.score(fresh, stored)

    def report(self, generated: int, ending: Ending, decode_ms: float = 0.0) -> Answered:
        """The truth about this answer."""
        prompt, made = self._prompt, self._stitched
        if made and self._led:
            made = StitchPlan(prompt, (*self._led, *made.spans))
        reused = made.reused_tokens if made else 0
        recomputed = made.recomputed_tokens if made else 0
        just_read = sum(
            made.reused_within(start, start + len(segment))
            for segment, start in prompt.places
            if made and segment.key in self._encoded
        )
        tokens = TokenCounts(
            prompt.context_tokens,
            reused - just_read,
            recomputed,
            fresh=len(prompt.tokens) - reused - recomputed + just_read + self._computed,
            generated=generated,
            kept=prompt.position - self._computed,
        )
        clock = self.clock
        return Answered(
            tokens,
            Timings(
                encode_ms=clock["encode"],
                load_ms=clock["load"],
                probe_ms=clock["probe"],
                recompute_ms=clock["recompute"] + clock["lead"],
                question_ms=clock["question"],
                first_token_ms=self._first_token_ms,
                decode_ms=decode_ms,
                resume_ms=clock["resume"],
            ),
            self._ratio,
            ending,
        )
