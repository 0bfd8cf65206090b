"""What the engine asks of a runtime. One conversation at a time, one thread at a time.

A runtime holds the live sequence (what has been said, exact or stitched) and beside it the placed rows (stored KV at
final positions, before any of it was recomputed).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from quire_engine.kv.transfer import Placement
from quire_engine.plan import StitchPlan
from quire_engine.types import Float16, Float32, ModelShape


class Runtime(Protocol):
    name: str
    shape: ModelShape
    tile_tokens: int  # tokens that are computed together: a few more than a multiple of it cost as much as all

    def reserve(self, tokens: int) -> None:
        """Makes room for a prompt, its scratch copies and its answer together; forgets the live sequence."""

    def encode(self, guard: Sequence[int], tokens: Sequence[int], layers: int | None = None) -> tuple[Float16, Float16]:
        """K before RoPE and V of `tokens` read behind `guard`: two [layers, tokens, kv_heads, dim] arrays.

        layers: only the first so many, computed alone.  Forgets the live sequence.
        """

    def place(self, placements: Sequence[Placement]) -> None:
        """Loads stored rows, rotates K to final positions and keeps them beside the live sequence, which is
        forgotten. Raises DamagedPlacements when stored bytes are wrong."""

    def probe(self, question: Sequence[int], position: int) -> Float32:
        """Attention mass [position] that the question's tokens give to every placed row before them."""

    def execute(self, plan: StitchPlan) -> None:
        """Makes the live sequence of everything before the question; placed rows are used up."""

    def extend(self, tokens: Sequence[int]) -> Float32:
        """Appends tokens to the live sequence; scores of the next token [vocabulary]."""

    def abortable(self, should_stop: Callable[[], bool]) -> AbstractContextManager[None]:
        """Within the block, computations raise Aborted soon after should_stop() turns true."""
