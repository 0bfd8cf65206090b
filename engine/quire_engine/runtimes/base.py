"""What the engine asks of a runtime. One conversation at a time, one thread at a time.

A runtime holds the live sequence (what has been said, exact or stitched) and behind it the placed rows (stored KV at
final positions, before any of it was recomputed).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from quire_engine.generate import Candidates
from quire_engine.kv.transfer import Placement
from quire_engine.plan import StitchPlan
from quire_engine.types import Float16, Float32, ModelShape

SCRATCH_TOKENS = 512  # room beside a prompt for the probe's copy of the question and for rounding to whole spans


class Runtime(Protocol):
    name: str
    shape: ModelShape
    tile_tokens: int  # tokens that are computed together: a few more than a multiple of it cost as much as all

    @property
    def live_tokens(self) -> int:
        """Tokens of the live sequence."""

    def reserve(self, tokens: int) -> None:
        """Makes room for so many tokens together: live sequence, placed rows, scratch copies and answer."""

    def rewind(self, tokens: int) -> int:
        """Cuts the live sequence to its first so many tokens and forgets placed rows and whatever an abort left.

        Returns the tokens that are left: none where a model cannot go back.
        """

    def encode(self, guard: Sequence[int], tokens: Sequence[int], layers: int | None = None) -> tuple[Float16, Float16]:
        """K before RoPE and V of `tokens` read behind `guard`: two [layers, tokens, kv_heads, dim] arrays.

        layers: only the first so many, computed alone.
        """

    def place(self, placements: Sequence[Placement]) -> None:
        """Loads stored rows, rotates K to final positions and keeps them behind the live sequence, gapless.

        Raises DamagedPlacements when stored bytes are wrong. A runtime that reads on in the background may raise it
        later, from what needs the rows, and has forgotten all placed rows then.
        """

    def probe(self, question: Sequence[int], position: int) -> Float32:
        """Attention mass [position - live tokens] that the question's tokens give to every placed row before them."""

    def adopt(self) -> None:
        """Appends the placed rows to the live sequence as they are."""

    def execute(self, plan: StitchPlan) -> None:
        """Appends everything before the plan's question to the live sequence; placed rows are used up."""

    def extend(self, tokens: Sequence[int]) -> Float32:
        """Appends tokens to the live sequence; scores of the next token [vocabulary]."""

    def scores(self, tokens: Sequence[int]) -> Float32:
        """As extend, in one batch: scores after each of the tokens [tokens, vocabulary]."""

    def rows(self, start: int, stop: int) -> tuple[Float16, Float16]:
        """K before RoPE and V of live positions start..stop, as `encode` gives them."""

    def abortable(self, should_stop: Callable[[], bool]) -> AbstractContextManager[None]:
        """Within the block, computations raise Aborted soon after should_stop() turns true; rewind afterwards."""


@runtime_checkable
class Picking(Protocol):
    """What a runtime has beside where it computes on a device of its own: few numbers leave it for each token."""

    def likeliest(self, tokens: Sequence[int], count: int) -> Candidates:
        """As extend, but of the next token's scores the highest alone."""


def likeliest(runtime: Runtime, tokens: Sequence[int], count: int) -> Candidates:
    """Appends tokens to the live sequence; the likeliest next ones, picked by the runtime if it can."""
    if isinstance(runtime, Picking):
        return runtime.likeliest(tokens, count)
    return Candidates.of(runtime.extend(tokens), count)
