"""Where the tests of Triton's kernels run: interpreted on the CPU, or with TRITON_INTERPRET=0 on a graphics device."""

from quire_kernels import dispatch

DEVICE = "cpu" if dispatch.interpreted() else "cuda"
