"""Measures a model's precision profile from beginning to end: loads its weights, reads some passages, keeps nothing.

Needs torch, and memory for all weights in float32. Knows nothing of where passages come from.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

from quire_engine import gguf
from quire_engine.errors import ModelError
from quire_engine.precision.profile import Case, Profile
from quire_engine.prompt import PromptWriter
from quire_engine.runtimes import choose

_USABLE_MEMORY = 0.8
_CASES, _CASE_PASSAGES, _PASSAGE_TOKENS, _QUESTION_WORDS = 4, 5, 200, 8


def run(
    model_file: Path,
    cases: Sequence[Case],
    on_progress: Callable[[int, int], None],
    should_stop: Callable[[], bool],
) -> Profile:
    """What rounding costs, and KVmix's importance, over the same passages.

    on_progress: steps done, and all of them.  Raises Aborted soon after should_stop() turns true, ModelError when the
    model does not fit the memory or is of an unknown kind, and where torch is not installed.
    """
    _check_memory(model_file)
    model = choose.reference(model_file)
    from quire_engine.precision import gradient, measured  # need torch, which takes its time to load

    prompts = [tuple(token for passage in case.passages for token in passage) for case in cases]
    done = 0

    def gradients_done(count: int, all_of_them: int) -> None:
        nonlocal done
        done = count
        on_progress(count, all_of_them + len(cases) * (1 + model.shape.layers))

    def rounding_done(count: int, all_of_them: int) -> None:
        on_progress(done + count, done + all_of_them)

    importance = gradient.importance(model, prompts, gradients_done, should_stop)
    profile = measured.measure(model, cases, rounding_done, should_stop)
    return replace(profile, k_importance=importance.k, v_importance=importance.v)


def cases(writer: PromptWriter, passages: Sequence[str]) -> tuple[Case, ...]:
    """Questions as people ask them, each over some passages from all over the text, about the first words of one."""
    count = min(_CASES, -(-len(passages) // _CASE_PASSAGES))
    made = []
    for number in range(count):
        some = [passages[(number + i * count) % len(passages)] for i in range(min(_CASE_PASSAGES, len(passages)))]
        about = " ".join(some[len(some) // 2].split()[:_QUESTION_WORDS])
        question = writer.question(f"What do the documents say about this: {about}?")
        made.append(Case(writer.preamble, tuple(writer.chunk(text)[:_PASSAGE_TOKENS] for text in some), question))
    return tuple(made)


def _check_memory(model_file: Path) -> None:
    header = gguf.read(model_file)
    needed = 4 * sum(prod(tensor.shape) for tensor in header.tensors.values())
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > _USABLE_MEMORY * there:
        raise ModelError(
            f"Measuring {header.name} takes {needed / 1e9:.0f} GB of memory, and this computer has {there / 1e9:.0f}.",
            "Its KV is stored with 8 bits per value until it was measured on a larger computer.",
        )
