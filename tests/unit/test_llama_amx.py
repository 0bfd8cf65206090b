"""llama.cpp's AMX kernels are left out where it means to use them."""

from collections.abc import Iterator

import llama_cpp.llama_cpp as c
import pytest

from quire_engine.runtimes.llama_amx import avoid_amx


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    usual = c.llama_model_params(use_extra_bufts=True)
    monkeypatch.setattr(c, "llama_model_default_params", lambda: usual)
    avoid_amx.cache_clear()
    yield
    avoid_amx.cache_clear()


@pytest.mark.parametrize(
    ("processor", "left"), [(b"CPU : AVX512 = 1 | AMX_INT8 = 1 | ", False), (b"CPU : AVX512 = 1 | REPACK = 1 | ", True)]
)
def test_weights_are_laid_out_for_a_processor_unless_that_has_amx(
    processor: bytes, left: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(c, "llama_print_system_info", lambda: processor)
    for _ in range(2):
        avoid_amx()
        assert c.llama_model_default_params().use_extra_bufts is left
