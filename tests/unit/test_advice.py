"""Which model is recommended: by memory, and by the graphics device."""

import json

import pytest

from command_line import json_of, run
from quire import advice, models
from quire.advice import Machine
from tiny_gguf import write_tiny_gguf

GB = 1_000_000_000


@pytest.mark.parametrize(
    ("memory_gb", "device_gb", "best"),
    [
        (2, 0, None),
        (4, 0, "qwen2.5-1.5b"),
        (8, 0, "qwen3-4b"),
        (64, 0, "qwen3-4b"),  # larger ones fit and are slow
        (64, 24, "qwen2.5-7b"),
        (64, 12, "qwen3-4b"),
        (16, 4, "qwen3-4b"),  # the device is too small for it, the processor is not
        (4, 8, "qwen2.5-1.5b"),  # a larger one fits the device, but its licence forbids some uses
        (2, 6, "qwen2.5-1.5b"),
    ],
)
def test_the_largest_that_is_quick(memory_gb: int, device_gb: int, best: str | None) -> None:
    machine = Machine(memory_gb * GB, "Titan" if device_gb else "", device_gb * GB)
    told = advice.on(machine)
    assert told.as_json()["recommended"] == best
    assert json.dumps(told.as_json())
    last = told.lines()[-1]
    assert f"quire models pull {best}" in last if best else "None of them" in last


def test_a_device_that_keeps_blocks_holds_larger_ones() -> None:
    machine = Machine(64 * GB, "Titan", 12 * GB, keeps_blocks=True)
    assert advice.on(machine).as_json()["recommended"] == "qwen2.5-7b"


def test_without_a_device_it_is_what_the_welcome_says() -> None:
    for memory_gb in (3, 5, 8, 32):
        told, welcome = advice.on(Machine(memory_gb * GB)).best, models.recommended(memory_gb * GB)
        assert [suited.model for suited in told] == ([welcome] if welcome else [])


def test_what_each_one_needs() -> None:
    lines = {line.split()[0]: line for line in advice.on(Machine(4 * GB)).lines() if "Apache" in line}
    assert "needs 5.2 GB of memory: too large" in lines["qwen2.5-7b"]
    assert "slow" in next(line for line in advice.on(Machine(32 * GB)).lines() if "qwen2.5-7b" in line)


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advice, "this_machine", lambda: Machine(8 * GB, "Ti\x1b[31mtan", 24 * GB))
    assert json_of("models", "recommend")["device"] == {"title": "Ti\x1b[31mtan", "free_bytes": 24 * GB}
    best = next(model for model in models.known() if model.name == "qwen2.5-7b")
    assert "quire models pull qwen2.5-7b" in run("models", "recommend").stdout
    write_tiny_gguf(best.path)
    said = run("models", "recommend").stdout
    assert "quire models use qwen2.5-7b" in said
    assert "Titan with 24.0 GB free" in said


def test_this_machine() -> None:
    assert advice.this_machine().memory_bytes == models.memory_bytes()
    assert json_of("models", "list") == json_of("models")
