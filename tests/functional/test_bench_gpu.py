"""`python -m quire_engine.bench_gpu` with tiny shapes on the processor: every part runs, none breaks the others."""

import json
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from quire_engine.bench_gpu import correctness, kernels, library, model, parity, parts, stitching, throughput
from quire_engine.bench_gpu.__main__ import main
from quire_engine.bench_gpu.clock import Bench, Rates, Times
from quire_engine.bench_gpu.parts import PARTS, Part, Run
from quire_engine.runtimes.torch_feed import ForEach
from quire_kernels import device_attention, device_probe

# What a checkout on a machine with PyTorch alone does not have.
ABSENT = ("gguf", "llama_cpp", "tokenizers", "textual", "click", "watchdog", "platformdirs", "sqlite_utils", "lxml")
COMMAND = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({ABSENT}))
sys.argv[0] = "bench_gpu"
runpy.run_module("quire_engine.bench_gpu", run_name="__main__", alter_sys=True)
"""
HERE = Path(__file__).parents[2]


def run(tmp_path: Path, isolated: bool = False) -> Run:
    return Run("cpu", True, tmp_path, time.monotonic() + 60, isolated)


def bench(tmp_path: Path) -> Bench:
    return Bench(torch.device("cpu"), True, tmp_path, time.monotonic() + 60, Rates(1e9, 1e10, 1e9, 1e8, 1e9))


def test_everything_runs_with_pytorch_alone_and_json_comes_last(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = [sys.executable, "-c", COMMAND, "--quick", "--device", "cpu", "--minutes", "1", "--folder", str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    *progress, last = ended.stdout.splitlines()
    result = json.loads(last)
    found = result["parts"]
    assert list(found) == [part.name for part in PARTS]
    assert not any(part.get("error") or part.get("errors") for part in found.values())
    assert found["correctness"]["right"] == found["correctness"]["of"] > 20
    assert found["parity"]["right"] == found["parity"]["of"] >= 10
    for weights in ("16-bit", "Q4_K"):
        (row,) = found[f"first token, {weights} weights"]["lengths"]
        assert not row["errors"]
        assert row["full"]["runs"] == 1
        assert {(reuse["stored"], reuse["where"]) for reuse in row["reuse"]} == {
            (stored, where) for stored in library.KINDS for where in library.PLACES
        }
        assert all(reuse["bound"] > 0 and reuse["bytes"] > 0 for reuse in row["reuse"])
    assert len(found["decoding"]["decoding"]) == 4
    assert any("256 tokens, packed, cold file, r 0.16" in line for line in progress)
    assert not list(folder.iterdir()), "what it wrote for itself is gone"


def test_a_part_that_fails_says_so_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(bench: Bench) -> parts.Result:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(
        parts, "PARTS", (Part("first", 0.5, fail), Part("second", 0.5, lambda bench: {"quick": bench.quick}))
    )
    found = parts.measure(run(tmp_path), ["first", "second"])
    assert found["first"]["error"] == "RuntimeError: an illegal memory access was encountered"
    assert found["second"]["quick"] is True


def test_a_part_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As such a process does it, but in this one: starting PyTorch takes long."""

    def started(command: list[str], timeout: float, check: bool) -> subprocess.CompletedProcess[bytes]:
        assert command[:3] == [sys.executable, "-m", "quire_engine.bench_gpu"]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", command[2:])
            return subprocess.CompletedProcess(command, main())

    starting = SimpleNamespace(run=started, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(parts, "subprocess", starting)  # others start processes too
    found = parts.measure(run(tmp_path, isolated=True), ["machine", "kernels"])
    assert found["machine"]["title"] == "processor"
    assert all(kernel["floor_ms"] > 0 for kernel in found["kernels"]["kernels"])  # type: ignore[attr-defined]


def test_a_process_that_dies_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    found = parts.measure(run(tmp_path, isolated=True), ["machine", "parity"])
    assert [part["error"] for part in found.values()] == ["its process ended with 1 and without a result"] * 2


def test_one_that_never_ends_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "GRACE", 0.0)
    monkeypatch.setattr(parts, "PARTS", (PARTS[0],))
    found = parts.measure(replace(run(tmp_path, isolated=True), until=time.monotonic() + 0.2), ["machine"])
    assert "was ended" in str(found["machine"]["error"])


def test_a_kernel_that_is_wrong_is_called_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = device_probe.mass
    monkeypatch.setattr(device_probe, "mass", lambda q, k: 1.001 * right(q, k))
    monkeypatch.setattr(device_attention, "attend", lambda q, at, k, v: torch.full_like(q, torch.nan))
    found = correctness.measure(bench(tmp_path))
    wrong = {check["kernel"] for check in found["checks"] if not check["right"]}  # type: ignore[attr-defined]
    assert wrong == {"probe", *(f"selective attention, {kind}" for kind in ("float32", "bfloat16", "float16"))}


def test_a_runtime_that_is_wrong_is_called_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the values is lost above the first layer where bytes were there already."""
    whole = library.ResidentPlacer.load

    def load(self: library.ResidentPlacer, layer: int, for_each: ForEach) -> list[int]:
        damaged = whole(self, layer, for_each)
        if layer:
            self._kv.v[layer][:64] = 0
        return damaged

    monkeypatch.setattr(library.ResidentPlacer, "load", load)
    found = parity.measure(bench(tmp_path))
    wrong = {check["what"] for check in found["checks"] if not check["right"]}  # type: ignore[attr-defined]
    assert wrong == {"reuse, packed, pinned", "reuse, 16 bits, pinned"}


def test_questions_together_get_the_scores_that_each_gets_alone(tmp_path: Path) -> None:
    here = bench(tmp_path)
    passages = library.make(here, "packed", 256)
    transformer = model.make(here, "bf16")
    prompts = [passages.prompt(here, 256, seed) for seed in range(3)]
    runtime = library.BenchRuntime(transformer)
    alone = []
    for prompt in prompts:
        stitching.reuse(runtime, partial(passages.placements, prompt), prompt, throughput.RATIO)
        runtime.rewind(prompt.context_tokens)
        alone.append(runtime.extend(prompt.question.tokens))
    with ExitStack() as held:
        placements = passages.placements(prompts[0], held)
        layers = runtime.bytes_of(placements, on_device=False)
        together = throughput.Batch(transformer, prompts, placements, layers).answer().numpy()
    np.testing.assert_allclose(together, np.stack(alone), atol=0.02 * np.abs(together).max())
    assert np.abs(together[0] - together[1]).max() > 0.5


def test_floors_are_the_slower_of_bytes_and_operations(tmp_path: Path) -> None:
    here = bench(tmp_path)
    assert kernels._floor_ms(kernels.Work("copy", lambda: None, bytes=10**6), here) == pytest.approx(1)
    assert kernels._floor_ms(kernels.Work("both", lambda: None, 10**6, 3 * 10**7), here) == pytest.approx(3)


def test_the_first_run_warms_up() -> None:
    assert Times.of([9.0, 1.0, 3.0, 2.0]) == Times(3, 2.0, 1.0, 3.0)
    assert Times.of([9.0]) == Times(1, 9.0, 9.0, 9.0)
