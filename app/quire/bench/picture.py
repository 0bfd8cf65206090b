"""Quality against speed as a picture: a line per selector, a point per ratio.

Knows only rows; matplotlib is loaded here alone, and only when somebody wants a picture.
"""

from collections.abc import Sequence
from pathlib import Path

from quire.bench.fidelity import FidelityReport
from quire_engine.errors import QuireError


def check() -> None:
    """Raises QuireError where pictures cannot be drawn: better before a long measurement than after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise QuireError(
            "Pictures need matplotlib, which is not installed here.",
            "Install it beside Quire (pip install 'quire[plots]'), or leave out --picture.",
            repr(error),
        ) from error


def draw(report: FidelityReport, file: Path) -> None:
    """Writes KL over speedup, both against full prefill of the same run; the format follows from the file's name."""
    check()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for selector, plan in dict.fromkeys((row.selector, row.plan) for row in report.rows):
        of_one = [row for row in report.rows if (row.selector, row.plan) == (selector, plan)]
        rows = sorted(of_one, key=lambda row: row.ratio)
        errors = [
            [row.kl - row.kl_interval[0] for row in rows],
            [row.kl_interval[1] - row.kl for row in rows],
        ]
        axes.errorbar(
            [row.speedup for row in rows],
            [row.kl for row in rows],
            yerr=errors,
            marker="o",
            capsize=2,
            label=_label(selector, plan, [row.plan for row in report.rows]),
        )
        for row in rows:
            place = (row.speedup, row.kl)
            axes.annotate(f"{row.ratio:g}", place, textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes.axhline(max(report.floor.kl, 0.0), color="grey", linestyle=":", label="noise of full prefill")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("times faster to the first token than full prefill")
    axes.set_ylabel("KL to full prefill, nats per token")
    title = f"{report.model}, {report.questions} questions over {report.context_tokens:.0f} tokens"
    axes.set_title(title.replace("$", r"\$"))  # of a model's name, where matplotlib would begin a formula
    axes.legend(fontsize=8)
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:
        raise QuireError(f"{file} cannot be written.", "Give a name that ends in .png or .svg.", repr(error)) from error


def _label(selector: str, plan: str, plans: Sequence[str]) -> str:
    return selector if len(set(plans)) == 1 else f"{selector}, {plan}"
