# SPDX-License-Identifier: MIT
"""CUDA kernels without a CUDA toolkit: compiled when they are first needed, by the NVRTC of torch's own packages.

The sources are those of `csrc/cuda`, which nvcc compiles too. `csrc/cuda/driver`, a part of the compiled module for the
CPU, chooses a kernel, asks for it by `torch.ops.internimage.cuda_kernel` and launches it; this package compiles it and
keeps the result.

    parts.py     where NVRTC, CUDA's headers and the sources are, or what is missing
    compiler.py  NVRTC, called by ctypes
    cache.py     the compiled kernels, on disk
    kernels.py   the operator: from a kernel's name to an image that the driver can load
    serving.py   whether these kernels serve CUDA, and what is said about it
"""

from .kernels import cuda_kernel
from .serving import RUN_TIME_KERNELS

__all__ = ["RUN_TIME_KERNELS", "cuda_kernel"]
