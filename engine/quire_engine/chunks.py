"""Passages as stored KV: their addresses, their making, and their way into a prompt.

A chunk's address covers everything its numbers depend on: model file, tokenizer and RoPE (all in the model's
fingerprint), preamble, chunk tokens, bit plan, file format. So the same passage in two files is stored once, in any
prompt and at any place. Knows nothing of questions or documents.
"""

import hashlib
import struct
import time
from collections.abc import Iterable, Sequence, Set
from contextlib import ExitStack

import numpy as np

from quire_engine.errors import DamagedChunk, MissingChunk
from quire_engine.kv import codec, format
from quire_engine.kv.format import ChunkReader
from quire_engine.kv.store import KVStore
from quire_engine.kv.transfer import DamagedPlacements, Placement
from quire_engine.plan import Prompt, Segment
from quire_engine.runtimes.base import Runtime
from quire_engine.selection import sensitivity, spectral
from quire_engine.types import BitPlan, ChunkKV, Float16, Float32

_ENCODING = b"behind the preamble; 1"  # part of every address: bump when it changes
USUAL_SCORES = frozenset({"spectral"})
"""What every chunk is stored with; other scores are measured when a selector first asks for them."""

_SENSITIVITY = "sensitivity"
_ATTEMPTS = 3  # at reading back what was damaged and written again


def identity(fingerprint: bytes, preamble: Sequence[int], plan: BitPlan) -> bytes:
    """32 bytes that all chunks stored for one model, preamble and bit plan share."""
    digest = hashlib.sha256(_ENCODING)
    digest.update(fingerprint)
    digest.update(struct.pack("<II", format.VERSION, len(preamble)))
    digest.update(np.asarray(preamble, dtype="<u4").tobytes())
    digest.update(f"{plan.grid}; {plan.sinks} sinks".encode())
    digest.update(bytes(plan.k_bits) + bytes(plan.v_bits))
    digest.update(bytes(layer in plan.v_by_channel for layer in range(len(plan.v_bits))))
    digest.update(b"".join(bytes([len(widths) > 0]) + widths for widths in plan.k_widths))
    return digest.digest()


class ChunkCache:
    """The stored chunks of one identity, and the runtime that makes and places them."""

    def __init__(
        self,
        store: KVStore,
        identity: bytes,
        plan: BitPlan,
        preamble: tuple[int, ...],
        unrelated: tuple[int, ...],
    ) -> None:
        """unrelated: tokens of some other text, read before a chunk to measure its sensitivity."""
        self.store = store
        self._identity = identity
        self.preamble = self.segment(preamble)
        self._plan = plan
        self.unrelated = unrelated

    def segment(self, tokens: tuple[int, ...]) -> Segment:
        """A passage with its address."""
        ids = np.asarray(tokens, dtype="<u4").tobytes()
        return Segment(tokens, hashlib.sha256(self._identity + ids).hexdigest())

    def has(self, segment: Segment) -> bool:
        return not segment.tokens or self.store.has(segment.key)

    def prefetch(self, segments: Sequence[Segment]) -> None:
        """Begins to read them into memory, in the background and as far as there is room."""
        self.store.prefetch([segment.key for segment in segments if segment.tokens])

    def missing(self, segments: Iterable[Segment]) -> tuple[Segment, ...]:
        """Those that are not stored, each once."""
        return tuple({s.key: s for s in segments if not self.has(s)}.values())

    def encode(self, runtime: Runtime, segment: Segment, scores: Set[str] = USUAL_SCORES) -> None:
        """Reads a segment behind the preamble, scores its tokens, packs and stores it.

        scores: which ones; `sensitivity` takes a second reading.
        """
        with self.store.claimed(segment.key):  # whoever needs it at once does not wait for another process
            self._encode(runtime, segment, scores)

    def encode_ahead(self, runtime: Runtime, segment: Segment) -> bool:
        """As encode, unless another process is at it: then False. One that is stored already stays as it is."""
        with self.store.claimed(segment.key) as mine:
            if mine and not self.store.has(segment.key):
                self._encode(runtime, segment, USUAL_SCORES)
            return mine

    def _encode(self, runtime: Runtime, segment: Segment, scores: Set[str]) -> None:
        began = time.perf_counter()
        if segment == self.preamble:
            kv = ChunkKV(*runtime.encode((), segment.tokens), scores={})
            plan = BitPlan.exact(runtime.shape.layers)
        else:
            kv, plan = self._read(runtime, segment.tokens, scores), self._plan
        data = format.encoded(kv, plan, segment.key)
        self.store.write(segment.key, data, time.perf_counter() - began)

    def _read(self, runtime: Runtime, tokens: tuple[int, ...], scores: Set[str]) -> ChunkKV:
        """The chunk's KV behind the preamble, and the scores that selectors want later."""
        k_pre, v = runtime.encode(self.preamble.tokens, tokens)
        found = {name: spectral.named(name, k_pre, v) for name in sorted(scores - {_SENSITIVITY})}
        if _SENSITIVITY in scores:
            elsewhere = (*self.preamble.tokens, *self.unrelated)
            moved = runtime.encode(elsewhere, tokens, sensitivity.early_layers(runtime.shape.layers))
            found[_SENSITIVITY] = sensitivity.score((k_pre, v), moved)
        return ChunkKV(k_pre, v, found)

    def complete(self, runtime: Runtime, prompt: Prompt, scores: Set[str] = frozenset()) -> frozenset[str]:
        """Encodes what the prompt needs and the store does not hold; the keys that were encoded.

        scores: chunks stored without all of these are encoded again, and keep what they have.
        """
        wanted = dict.fromkeys(self.missing(prompt.stored), USUAL_SCORES | scores)
        for chunk in prompt.chunks if scores else ():
            held = self._stored_scores(chunk)
            if not scores <= held:
                wanted[chunk] = USUAL_SCORES | scores | held
        for segment, names in wanted.items():
            self.encode(runtime, segment, names)
        return frozenset(segment.key for segment in wanted)

    def _stored_scores(self, segment: Segment) -> frozenset[str]:
        try:
            with self._open(segment) as reader:
                return frozenset(reader.scores)
        except (MissingChunk, DamagedChunk):
            return frozenset()

    def values(self, segment: Segment, layers: int) -> Float16:
        """Stored V of the first layers: [layers, tokens, kv_heads, dim]. Raises MissingChunk, or
        DamagedChunk, and then drops the chunk."""
        try:
            with self._open(segment) as reader:
                return np.stack([codec.decode_layer(reader.layer(layer))[1] for layer in range(layers)])
        except DamagedChunk:
            self.store.remove(segment.key)
            raise

    def place(
        self, runtime: Runtime, prompt: Prompt, scores: Set[str] = frozenset()
    ) -> tuple[list[dict[str, Float32]], frozenset[str]]:
        """Loads preamble and chunks into the runtime, at their places.

        Returns the stored scores of each chunk, and the keys of those that had to be encoded again because their
        bytes were gone or damaged, or lacked one of `scores`. Raises DamagedChunk when what was just written cannot be
        read either.
        """
        repaired: frozenset[str] = frozenset()
        for attempt in range(_ATTEMPTS):
            try:
                with ExitStack() as files:
                    placements = [
                        Placement(segment.key, files.enter_context(self._open(segment)), start)
                        for segment, start in prompt.places
                        if segment.tokens
                    ]
                    stored = [placement.chunk.scores for placement in placements[-len(prompt.chunks) :]]
                    if all(scores <= of_one.keys() for of_one in stored):  # another process may have written it anew
                        runtime.place(placements)
                        return stored, repaired
            except DamagedPlacements as damaged:
                for key in damaged.keys:
                    self.store.remove(key)
            except (MissingChunk, DamagedChunk):
                for segment in prompt.stored:
                    self._drop_if_unreadable(segment)
            if attempt < _ATTEMPTS - 1:
                repaired |= self.complete(runtime, prompt, scores)
        raise DamagedChunk("Stored passages cannot be read back from the disk.", "Check the disk.")

    def _open(self, segment: Segment) -> ChunkReader:
        """Raises DamagedChunk when the file is sound but another's."""
        reader = self.store.open(segment.key)
        if reader.header.key.hex() != segment.key:
            reader.close()
            raise DamagedChunk("A stored passage is not the one its name says.")
        return reader

    def _drop_if_unreadable(self, segment: Segment) -> None:
        try:
            self._open(segment).close()
        except MissingChunk:
            pass
        except DamagedChunk:
            self.store.remove(segment.key)
