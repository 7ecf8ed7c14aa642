# SPDX-License-Identifier: MIT
"""The CUDA kernels on a CPU: csrc/cuda/gather/kernels.cuh compiled for the host (harness.cpp), called by ctypes."""

import ctypes
import itertools
import os
import shutil
import subprocess
import zlib
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from internimage import locks

FOLDER = Path(__file__).parent
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
LIBRARY = "INTERNIMAGE_TEST_CUDA_HOST"  # the variable that names a library that is already built
COMPUTE = {t: torch.float64 if t == torch.float64 else torch.float32 for t in DTYPES}


def build(library: Path, *flags: str) -> Path:
    command = [COMPILER, "-std=c++17", "-O1", "-g1", "-fPIC", "-shared", "-fno-strict-aliasing", "-Wno-unknown-pragmas"]
    subprocess.run([*command, *flags, str(FOLDER / "harness.cpp"), "-o", str(library), "-ldl"], check=True)
    return library


def in_turn(dtypes: Iterable, *choices: Iterable, each: int = 1) -> list[tuple]:
    """Every combination of the choices, and with it one dtype, or `each` of them, in turn: each dtype comes with each
    choice if the other choices are at least as many. For tests of what does not depend on all at once."""
    dtypes = list(dtypes)
    return [
        (*(value for _, value in combination), dtypes[(sum(i for i, _ in combination) + k) % len(dtypes)])
        for combination in itertools.product(*map(enumerate, choices))
        for k in range(each)
    ]


def shared(factory: pytest.TempPathFactory, *flags: str) -> Path:
    """A build with some flags, by one of the processes of the run for all its test files; or that of LIBRARY."""
    if built := os.environ.get(LIBRARY):
        return Path(built)
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cuda_host"
    folder.mkdir(exist_ok=True)
    library = folder / f"kernels{zlib.crc32(' '.join(flags).encode())}.so"
    with locks.turn(library.with_suffix(".lock")):
        if not library.exists():
            build(library.with_suffix(".new"), *flags).rename(library)
    return library


class UnitStrides(ctypes.Structure):
    """`UnitStrides` of csrc/common.h."""

    _fields_ = [("pixel", ctypes.c_int64), ("group", ctypes.c_int64)]


class Problem(ctypes.Structure):
    """`Problem` of csrc/common.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "height", "width", "channels", "out_height", "out_width")),
        *((f"{name}_{axis}", ctypes.c_int64) for name in ("kernel", "stride", "pad", "dilation") for axis in "hw"),
        *((name, ctypes.c_int64) for name in ("groups", "group_channels", "points")),
        ("offset_scale", ctypes.c_double),
        *((name, ctypes.c_bool) for name in ("remove_center", "softmax", "row_major", "y_first")),
        *((name, UnitStrides) for name in ("offset", "mask", "grad_offset", "grad_mask")),
    ]

    @classmethod
    def dense(cls, *sizes_and_options) -> "Problem":
        """From all before `row_major`: DCNv3's order, and tensors of offsets and masks alone."""
        problem = cls(*sizes_and_options)
        numbers = {"offset": 2 * problem.points, "mask": problem.points}  # of a unit
        for name, count in numbers.items():
            for tensor in (name, f"grad_{name}"):
                setattr(problem, tensor, UnitStrides(problem.groups * count, count))
        return problem


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    assert tensor is None or tensor.is_contiguous() or tensor.dim() == 5
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def unit_strides(tensor: Tensor, groups: int) -> UnitStrides:
    """Of offsets, masks or their gradients: (N, Ho, Wo, groups * numbers), dense, or (N, Ho, Wo, groups, numbers), with
    any strides of pixels and groups."""
    if tensor.dim() == 4:
        return UnitStrides(tensor.shape[3], tensor.shape[3] // groups)
    *images, pixel, group, number = tensor.stride()
    assert number == 1 and images == [pixel * tensor.shape[1] * tensor.shape[2], pixel * tensor.shape[2]]
    return UnitStrides(pixel, group)


class Host:
    """The kernels of one build; arguments as in the operator's schema. With LAYOUTS, offsets and masks and
    their gradients may be all that `unit_strides` takes."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        for name in ("launched", "forward", "backward"):
            getattr(self.library, name).restype = ctypes.c_char_p
        self.library.round_trip.restype = ctypes.c_float
        self.library.set_variants.restype = ctypes.c_bool
        self.kernels: list[str] = []  # of the last call
        self.row_major = self.y_first = False  # the order in the next calls

    def choose(self, variants: str = "") -> None:
        """Variants for the next calls, as in INTERNIMAGE_CUDA_VARIANTS."""
        assert self.library.set_variants(variants.encode())

    def shuffle(self, seed: int = 0) -> None:
        """Run blocks, their warps and the threads of these in another order for each seed; 0 is ascending."""
        self.library.set_order(ctypes.c_uint(seed))

    def problem(self, input: Tensor, geometry: tuple, offset: Tensor, mask: Tensor, *grads: Tensor | None) -> Problem:
        kernel, stride, padding, dilation, groups, offset_scale, remove_center, softmax = geometry
        n, height, width, channels = input.shape
        points = kernel[0] * kernel[1] - remove_center
        sizes = n, height, width, channels, *mask.shape[1:3], *kernel, *stride, *padding, *dilation
        problem = Problem.dense(*sizes, groups, channels // groups, points, offset_scale, remove_center, softmax)
        problem.row_major, problem.y_first = self.row_major, self.y_first
        for name, tensor in zip(("offset", "mask", "grad_offset", "grad_mask"), (offset, mask, *grads)):
            if tensor is not None:
                setattr(problem, name, unit_strides(tensor, groups))
        return problem

    def call(self, function, input: Tensor, *arguments) -> None:
        message = function(str(input.dtype).removeprefix("torch.").encode(), *arguments).decode()
        self.kernels = self.library.launched().decode().split(";")[:-1]
        if message:
            raise RuntimeError(message)

    def kernels_for(self, problem: Problem, dtype: str, direction: str, deterministic: bool = False) -> list[str]:
        """The kernels that would serve a problem, which may be of any size; none is run."""
        nothing = [pointer(None)] * 4
        self.library.set_runs_kernels(False)
        if direction == "forward":
            self.library.forward(dtype.encode(), ctypes.byref(problem), *nothing, False)
        else:
            something = [ctypes.c_void_p(32)] * 3  # the gradients that are wanted
            self.library.backward(dtype.encode(), ctypes.byref(problem), *nothing, *something, deterministic, False)
        self.library.set_runs_kernels(True)
        return self.library.launched().decode().split(";")[:-1]

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor, *geometry, wide: bool = False) -> Tensor:
        problem = self.problem(input, geometry, offset, mask)
        output = input.new_full((*mask.shape[:3], input.shape[3]), float("nan"))
        tensors = [pointer(t) for t in (input, offset, mask, output)]
        self.call(self.library.forward, input, ctypes.byref(problem), *tensors, wide)
        return output

    def backward(
        self,
        grad_output: Tensor,
        input: Tensor,
        offset: Tensor,
        mask: Tensor,
        *geometry,
        deterministic: bool = False,
        wanted: tuple[bool, bool] = (True, True),
        wide: bool = False,
        grad_input: Tensor | None = None,
        grad_points: tuple[Tensor, Tensor] | None = None,
    ) -> list[Tensor | None]:
        """Gradients in the order of the operator.

        Args:
            wanted: Whether to compute grad_input, and whether to compute grad_offset and grad_mask.
            grad_input: Zeros to add to; it is not returned then.
            grad_points: Where to write the gradients of offset and mask; else to new tensors.
        """
        given = grad_input is not None
        if grad_input is None and wanted[0]:
            grad_input = torch.zeros_like(input, dtype=COMPUTE[input.dtype])
        if grad_points is None:
            grad_points = torch.full_like(offset, float("nan")), torch.full_like(mask, float("nan"))
        grads = [grad_input, *(grad_points if wanted[1] else (None, None))]
        problem = self.problem(input, geometry, offset, mask, *grads[1:])
        tensors = [pointer(t) for t in (grad_output, input, offset, mask, *grads)]
        self.call(self.library.backward, input, ctypes.byref(problem), *tensors, deterministic, wide)
        returned = grads[1:] if given else grads
        return [None if g is None else g.to(input.dtype) for g in returned]
