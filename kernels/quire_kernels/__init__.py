"""Pure array functions. No models, no files.

In plain NumPy: the specification of every kernel. `device_*`: the same in PyTorch's operations, with checks, for any
device. `triton_*`: kernels for CUDA and ROCm devices, which `dispatch` chooses where they work.
"""
