"""What every Triton kernel takes of every device that we name: registers, spills, shared memory.

    python packaging/kernel_figures.py            the table in docs/decisions/kernels.md
    python packaging/kernel_figures.py --json [MODULE]

Compiled ahead of time: no such device need be here. TRITON_INTERPRET must not be set.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "kernels"))

from quire_kernels import ahead  # noqa: E402

PAGE = ROOT / "docs" / "decisions" / "kernels.md"
BEGIN, END = "<!-- figures: packaging/kernel_figures.py -->\n", "<!-- end of figures -->\n"


def measured(modules: tuple[str, ...]) -> dict[str, dict[str, ahead.Figures]]:
    """Build -> target -> figures."""
    return {
        build.name: {target: ahead.compile_for(build, target) for target in ahead.TARGETS}
        for build in ahead.builds(modules)
    }


def table(found: dict[str, dict[str, ahead.Figures]]) -> str:
    lines = [f"| kernel | {' | '.join(ahead.TARGETS)} |", "|---" * (1 + len(ahead.TARGETS)) + "|"]
    lines += [f"| {name} | {' | '.join(_cell(targets[t]) for t in ahead.TARGETS)} |" for name, targets in found.items()]
    return "\n".join(lines) + "\n"


def _cell(figures: ahead.Figures) -> str:
    spilled = f" **+{figures.spilled_bytes} B**" if figures.spilled_bytes else ""
    shared = f", {figures.shared_bytes / 1024:.3g} K" if figures.shared_bytes else ""
    return f"{figures.registers}{spilled}{shared}"


def main(words: list[str]) -> None:
    if words[:1] == ["--json"]:
        found = measured(tuple(words[1:]) or ahead.MODULES)
        print(json.dumps({name: {t: asdict(f) for t, f in targets.items()} for name, targets in found.items()}))
        return
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    PAGE.write_text(before + BEGIN + table(measured(ahead.MODULES)) + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
