"""The address of a chunk: it changes with everything that its numbers depend on."""

from dataclasses import replace

from quire_engine.chunks import identity
from quire_engine.types import BitPlan

PLAN = BitPlan.uniform(2, 4, 3)
BASE = identity(b"model", (1, 2, 3), PLAN)
# The same widths of one layer or the other, and for both.
WIDTHS = ((b"\4\1", b""), (b"", b"\4\1"), (b"", b"\1\4"), (b"\4\1", b"\4\1"))


def test_the_same_model_preamble_and_plan_share_one_identity() -> None:
    assert identity(b"model", [1, 2, 3], BitPlan((4, 4), (3, 3), "midrise", 4)) == BASE
    assert len(BASE) == 32


def test_anything_else_has_another() -> None:
    others = [
        identity(b"other", (1, 2, 3), PLAN),
        identity(b"model", (1, 2), PLAN),
        identity(b"model", (1, 2, 4), PLAN),
        identity(b"model", (1, 2, 3), BitPlan.uniform(2, 3, 4)),
        identity(b"model", (1, 2, 3), BitPlan((4, 3), (4, 3))),
        identity(b"model", (1, 2, 3), replace(PLAN, grid="minmax")),
        identity(b"model", (1, 2, 3), replace(PLAN, sinks=0)),
        identity(b"model", (1, 2, 3), replace(PLAN, sinks=40)),
        *(identity(b"model", (1, 2, 3), replace(PLAN, k_widths=widths)) for widths in WIDTHS),
        *(identity(b"model", (1, 2, 3), replace(PLAN, v_by_channel=layers)) for layers in ((0,), (1,), (0, 1))),
    ]
    assert len({BASE, *others}) == 1 + len(others)
