# SPDX-License-Identifier: MIT
"""Whether kernels that are compiled at run time serve CUDA, and what is said about it."""

import os
import warnings

import torch

from . import cache, kernels
from .compiler import load
from .parts import Missing, find

VARIABLE = kernels.VARIABLE


class RunTimeKernels:
    """The `extension.RunTimeKernels` of this package; there is one."""

    def __init__(self) -> None:
        self.serves = False

    def is_preferred(self) -> bool:
        """Whether it should serve although the module that nvcc compiled is installed: if that is asked for, or if
        variants of the kernels are, which the module does not have. Warns of an invalid variable."""
        if error := kernels.option_error():
            warnings.warn(f"internimage: {error}", RuntimeWarning, stacklevel=3)
        return os.environ.get(VARIABLE) == "1" or bool(os.environ.get(kernels.VARIANTS))

    def serve(self) -> bool:
        """Register the kernels under the CUDA key, if there is what it takes; returns whether they serve."""
        if not self.serves and not self.why_not():
            torch.ops.internimage.serve_cuda()
            self.serves = True
        return self.serves

    def why_not(self) -> str:
        """Why they cannot serve; empty if they can."""
        if os.environ.get(VARIABLE) == "0":
            return f"{VARIABLE} is 0"
        if not torch._C._dispatch_has_kernel_for_dispatch_key("internimage::serve_cuda", "CompositeExplicitAutograd"):
            return "the compiled module for the CPU, which launches them, is missing"
        try:
            find()
        except Missing as missing:
            return str(missing)
        return ""

    def problem(self) -> str:
        """Why plain torch serves in spite of `serve`, as far as calls have shown; empty if it does not."""
        return kernels.option_error() or "; ".join(dict.fromkeys(kernels.problems.values()))

    def note(self) -> str:
        """NVRTC's version, the cache, and the oldest GPU, for `internimage info`."""
        try:
            nvrtc = load(find().library)
        except Missing as missing:
            return f"none: {missing}"
        oldest, place = "{}.{}".format(*divmod(nvrtc.supported[0], 10)), cache.folder()
        kept = "kept nowhere" if place is None else f"kept in '{place}', which has {cache.entries()}"
        note = f"compiled by NVRTC {nvrtc.version} when they are first needed, and {kept}"
        return f"{note}; for compute capability {oldest} and newer"

    def can_serve(self, capability: tuple[int, int]) -> bool:
        """Whether NVRTC compiles for a GPU."""
        try:
            return load(find().library).target(capability) is not None
        except Missing:
            return False


RUN_TIME_KERNELS = RunTimeKernels()
