"""How many bits a model's keys and values need, measured: one tensor is rounded at a time, and the answers compared.

Two facts decide. Within a layer, rounding key channel c puts noise of step_c^2 * E[q_c^2] into every attention score,
which is far from equal over channels; so a layer's bits go where range and queries are large. Between layers, the KL
divergence of answers after rounding one tensor alone says what its bits are worth; a greedy search then spends a budget
(docs/decisions/precision_plans.md). The grid's axis for values, by token or by channel, is chosen by the same KL.

Knows nothing of documents, files or where a profile is kept.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from quire_engine.errors import Aborted
from quire_engine.kv import codec
from quire_engine.precision.profile import K_BITS, V_BITS, Case, Profile, k_widths, rope_pairs
from quire_engine.runtimes.transformer import Array, Transformer
from quire_engine.types import BitPlan, ChunkKV, Float16, Float32

ANSWER_TOKENS = 16
_GROUP = 64  # rows of which a channel's range is taken, as the codec does


@torch.no_grad()
def measure(
    model: Transformer,
    cases: Sequence[Case],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Profile:
    """Rounds every tensor of every layer at several widths, all else exact.

    on_progress: steps done, and all of them.  Raises Aborted soon after should_stop() turns true.
    """
    if not cases:
        raise ValueError("a profile needs at least one question")
    steps, done = len(cases) * (1 + model.shape.layers), 0

    def step() -> None:
        nonlocal done
        done += 1
        on_progress(done, steps)
        if should_stop():
            raise Aborted

    readings = []
    for case in cases:
        readings.append(_Reading(model, case))
        step()
    weights: Float32 = np.stack([reading.key_weights() for reading in readings]).mean(axis=0)
    k, v, v_by_channel = (np.zeros((model.shape.layers, len(bits)), np.float32) for bits in (K_BITS, V_BITS, V_BITS))
    for reading in readings:
        for layer in range(model.shape.layers):
            divergences = reading.divergences(layer, weights[layer])
            for total, found in zip((k, v, v_by_channel), divergences, strict=True):
                total[layer] += found / len(cases)
            step()
    return Profile(weights, k, v, v_by_channel)


class _Reading:
    """A case as the model reads it exactly: what every layer saw and said."""

    def __init__(self, model: Transformer, case: Case) -> None:
        self._model = model
        context = [*case.opening, *(token for passage in case.passages for token in passage)]
        bounds = np.cumsum([len(case.opening), *map(len, case.passages)]).tolist()
        self._passages = [slice(start, stop) for start, stop in pairwise(bounds)]
        self._positions = range(len(context))
        read = model.read(context)
        self._k_pre, self._v = ([layer[0] for layer in layers] for layers in (read.k_pre, read.v))
        self._past = model.place(self._k_pre, self._v, self._positions)
        tokens = list(case.question)
        for _ in range(ANSWER_TOKENS):
            hidden = model.read(tokens, self._past).hidden
            tokens.append(int(model.logits(hidden[0, -1]).argmax()))
        self._spoken = range(len(context), len(context) + len(tokens) - 1)
        self._inputs = [model.embed(tokens[:-1])]
        for layer in range(model.shape.layers):
            hidden = model.run(self._inputs[-1], self._spoken, self._past, first=layer, stop=layer + 1).hidden
            self._inputs.append(hidden)
        self._exact = self._log_probabilities(self._inputs[-1])

    def _log_probabilities(self, hidden: Tensor) -> Tensor:
        """Of every answer token, [batch, answer, vocabulary]."""
        return self._model.logits(hidden[:, -ANSWER_TOKENS:]).log_softmax(-1)

    def key_weights(self) -> Float32:
        """Mean square range of a group times mean square of the queries, summed over each RoPE pair [layers, pairs]."""
        shape = self._model.shape
        first, second = rope_pairs(shape)
        weights = np.empty((shape.layers, len(first)), np.float32)
        for index, layer in enumerate(self._model.layers):
            q = layer.attn_q(layer.attn_norm(self._inputs[index][0])).view(-1, shape.heads, shape.key_dim)
            by_group = layer.attn_q_norm(q).square().mean(0).view(shape.kv_heads, -1, shape.key_dim)
            asked = by_group.mean(1).reshape(-1).numpy()  # [kv_heads * key_dim]
            ranges = np.mean([np.square(np.ptp(rows, axis=0)) for rows in self._groups(index)], axis=0)
            # A rotation mixes both channels of a pair, so each meets the queries of both.
            weights[index] = (ranges[first] + ranges[second]) * (asked[first] + asked[second])
        return weights

    def _groups(self, layer: int) -> Iterator[Float32]:
        for passage in self._passages:
            rows = self._k_pre[layer][passage].flatten(1).numpy()
            for start in range(0, max(1, len(rows) - _GROUP // 2), _GROUP):
                yield rows[start : start + _GROUP]

    def divergences(self, layer: int, weights: Float32) -> tuple[Float32, Float32, Float32]:
        """KL to the exact answer of rounding this layer's keys at every K_BITS, and its values at every V_BITS, by
        token and by channel."""
        shape, exact_k, exact_v = self._model.shape, self._past.k_rot[layer], self._past.v[layer]
        trials: list[tuple[Array, Array]] = []
        for bits in K_BITS:
            widths = k_widths(weights, bits, shape)
            rounded, _ = self._rounded(layer, BitPlan((max(widths),), (16,), sinks=0, k_widths=(widths,)))
            trials.append((self._model.rotate(rounded, self._positions), exact_v))
        for by_channel in ((), (0,)):
            for bits in V_BITS:
                _, rounded = self._rounded(layer, BitPlan((16,), (int(bits),), sinks=0, v_by_channel=by_channel))
                trials.append((exact_k, torch.from_numpy(rounded)))
        keys, values = (
            torch.stack([torch.as_tensor(x, dtype=torch.float32) for x in side]) for side in zip(*trials, strict=True)
        )
        past = self._past.with_layer(layer, keys, values)
        answers = self._log_probabilities(self._model.run(self._inputs[layer], self._spoken, past, first=layer).hidden)
        kl = (self._exact.exp() * (self._exact - answers)).sum(-1).mean(-1).clamp(min=0).numpy()
        k, v, v_by_channel = np.split(kl, [len(K_BITS), len(K_BITS) + len(V_BITS)])
        return k, v, v_by_channel

    def _rounded(self, layer: int, plan: BitPlan) -> tuple[Float32, Float32]:
        """This layer's K before RoPE and V [tokens, kv_heads, dim] with every passage packed and unpacked by itself."""
        k_pre, v = self._k_pre[layer].numpy().copy(), self._v[layer].numpy().copy()
        for passage in self._passages:
            kv = ChunkKV(_half(k_pre[passage]), _half(v[passage]), {})
            packed = codec.encode(kv, plan, codec.text_order(kv.tokens))
            decoded = codec.decode(packed)
            k_pre[passage], v[passage] = decoded.k_pre[0], decoded.v[0]
        return k_pre, v


def _half(rows: Float32) -> Float16:
    """One layer [tokens, kv_heads, dim] as a chunk's [1, ...]."""
    return rows[None].astype(np.float16)
