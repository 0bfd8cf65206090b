"""The smallest kernel: whether Triton's compiler and the device work at all. Knows nothing of the other kernels."""

import torch
import triton
import triton.language as tl


@triton.jit
def _double(numbers, count, block: tl.constexpr):
    at = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(numbers + at, 2 * tl.load(numbers + at, mask=at < count), mask=at < count)


def run() -> None:
    """Raises whatever stands in the way, RuntimeError where the result is wrong."""
    numbers = torch.arange(100, dtype=torch.float32, device="cuda")
    _double[(1,)](numbers, 100, block=128)
    if numbers.tolist() != [2.0 * i for i in range(100)]:
        raise RuntimeError("wrong numbers")
