# SPDX-License-Identifier: MIT
"""The official DCNv3 and DCNv4 operators, built from the user's own checkouts to be measured beside ours.

Neither builds with a torch of today. Copies are made below `build/peers`, which git ignores, and changed there as
`PATCHES` says; the checkouts stay as they are, and nothing of theirs becomes a part of this project. The copies are
compiled by torch's own builder and not by their setup.py, which asks for a visible GPU.
"""

import importlib
import re
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).resolve().parent.parent / "build" / "peers"

# pattern, replacement, why; in C++ and CUDA sources
PATCHES = [
    (r"\.type\(\)\.is_cuda\(\)", ".is_cuda()", "Tensor.type() is deprecated"),
    (r"\b(input|value)\.type\(\)", r"\1.scalar_type()", "dispatch takes a scalar type, no longer Tensor.type()"),
    (r"\.data<", ".data_ptr<", "Tensor.data<T>() is deprecated"),
    (r"#include <THC/THCAtomics\.cuh>", "#include <ATen/cuda/Atomic.cuh>", "THC is gone"),
    (r"\bAT_ASSERTM\(", "TORCH_CHECK(", "AT_ASSERTM is deprecated"),
    (r"\bAT_ERROR\(", "TORCH_CHECK(false, ", "AT_ERROR is deprecated"),
]
NO_SETUP = "compiled by torch.utils.cpp_extension.load: setup.py raises without a visible GPU"


class PeerError(Exception):
    """A checkout that is none, or does not build."""


def copy_and_patch(checkout: Path, part: str, name: str) -> tuple[Path, list[str]]:
    """A fresh, patched copy of a folder of the checkout, and what was changed in it."""
    source = checkout / part
    if not source.is_dir():
        raise PeerError(f"'{checkout}' has no folder {part}")
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    counts = dict.fromkeys(range(len(PATCHES)), 0)
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".cpp", ".cu", ".cuh", ".h")):
        text = path.read_text()
        for i, (pattern, replacement, _) in enumerate(PATCHES):
            text, count = re.subn(pattern, replacement, text)
            counts[i] += count
        path.write_text(text)
    changes = [
        f"`{pattern}` -> `{replacement}` ({counts[i]} places): {why}"
        for i, (pattern, replacement, why) in enumerate(PATCHES)
        if counts[i]
    ]
    return folder, [*changes, NO_SETUP]


def compile_copy(folder: Path, module: str, sources: list[str], flags: list[str]) -> None:
    """Build `module` into `folder`, for this GPU, or for those of TORCH_CUDA_ARCH_LIST."""
    from torch.utils.cpp_extension import load

    output = folder / "built"
    output.mkdir()
    # the headers of the libraries that came with torch, after all others: a small toolkit has none of its own
    wheels = [path for root in sys.path for path in Path(root).glob("nvidia/*/include")]
    behind = [flag for path in wheels for flag in ("-Xcompiler", f"-idirafter,{path}")]
    try:
        load(
            name=module,
            sources=[str(folder / s) for s in sources],
            extra_include_paths=[str(folder / "src")],
            extra_cflags=["-O3", "-DWITH_CUDA", "-w", *(f"-idirafter{path}" for path in wheels)],
            extra_cuda_cflags=["-O3", "-DWITH_CUDA", "-w", *flags, *behind],
            build_directory=str(output),
            with_cuda=True,
            is_python_module=False,
        )
    except (RuntimeError, OSError) as error:
        raise PeerError(f"{module} does not build: {error}") from error
    sys.path.insert(0, str(output))


class OfficialDCNv3:
    """OpenGVLab/InternImage's operator, 3x3 with padding 1. float32 and float16."""

    name = "official DCNv3"

    def __init__(self, checkout: Path) -> None:
        folder, self.changes = copy_and_patch(checkout, "classification/ops_dcnv3", "dcnv3")
        compile_copy(folder, "DCNv3", ["src/vision.cpp", "src/cuda/dcnv3_cuda.cu", "src/cpu/dcnv3_cpu.cpp"], [])
        self.module = importlib.import_module("DCNv3")

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor, groups: int) -> Tensor:
        """The mask holds factors."""
        return self.module.dcnv3_forward(input, offset, mask, *self._geometry(input, groups), 1.0, 256, 0)

    def backward(self, grad: Tensor, input: Tensor, offset: Tensor, mask: Tensor, groups: int) -> list[Tensor]:
        return self.module.dcnv3_backward(input, offset, mask, *self._geometry(input, groups), 1.0, grad, 256, 0)

    @staticmethod
    def _geometry(input: Tensor, groups: int) -> tuple[int, ...]:
        return 3, 3, 1, 1, 1, 1, 1, 1, groups, input.shape[3] // groups


class DCNv4:
    """OpenGVLab/DCNv4's operator with its own table of launch settings, 3x3 with padding 1."""

    name = "DCNv4"

    def __init__(self, checkout: Path) -> None:
        folder, self.changes = copy_and_patch(checkout, "DCNv4_op", "dcnv4")
        sources = ["src/vision.cpp", "src/cuda/dcnv4_cuda.cu", "src/cuda/flash_deform_attn_cuda.cu"]
        defined = ["CUDA_HAS_FP16=1", *(f"__CUDA_NO_HALF_{x}__" for x in ("OPERATORS", "CONVERSIONS"))]
        compile_copy(folder, "ext", sources, [f"-D{name}" for name in (*defined, "__CUDA_NO_HALF2_OPERATORS__")])
        self.module = importlib.import_module("ext")
        package = types.ModuleType("DCNv4")
        package.__path__ = [str(folder / "DCNv4")]
        package.ext = self.module
        sys.modules |= {"DCNv4": package, "DCNv4.ext": self.module}
        functions = types.ModuleType("DCNv4.functions")  # without its __init__, which imports all
        functions.__path__ = [str(folder / "DCNv4" / "functions")]
        sys.modules["DCNv4.functions"] = functions
        self.settings = importlib.import_module("DCNv4.functions.dcnv4_func")

    @staticmethod
    def pack(offset: Tensor, mask: Tensor, groups: int) -> Tensor:
        """Its one tensor of offsets and factors: group by group, and filled up to a multiple of 8 channels."""
        n, h, w, _ = mask.shape
        both = torch.cat([offset.view(n, h, w, groups, 18), mask.view(n, h, w, groups, 9)], dim=-1).flatten(3)
        return torch.nn.functional.pad(both, (0, -both.shape[-1] % 8)).contiguous()

    def forward(self, input: Tensor, packed: Tensor, groups: int) -> Tensor:
        n, h, w, c = input.shape
        spec = self.settings.findspec(n, h, w, groups, c // groups)
        return self.module.dcnv4_forward(input, packed, *self._geometry(input, groups), 1.0, 256, 0, *spec, False)

    def backward(self, grad: Tensor, input: Tensor, packed: Tensor, groups: int) -> list[Tensor]:
        n, h, w, c = input.shape
        spec = self.settings.find_spec_bwd(n, h, w, groups, c // groups)
        return self.module.dcnv4_backward(
            input, packed, *self._geometry(input, groups), 1.0, 256, grad, 0, *spec, False
        )

    @staticmethod
    def _geometry(input: Tensor, groups: int) -> tuple[int, ...]:
        return 3, 3, 1, 1, 1, 1, 1, 1, groups, input.shape[3] // groups


def build(kind: Callable, checkout: Path | None) -> tuple[object | None, str]:
    """The peer, or None and why there is none."""
    if checkout is None:
        return None, "no checkout was given"
    try:
        return kind(checkout), ""
    except PeerError as error:
        return None, str(error)
