# SPDX-License-Identifier: MIT
"""The official DCNv3 and DCNv4 operators, built from the user's own checkouts for benchmarks.

Neither builds with a current torch. They are copied to `build/peers`, which git ignores, and patched there (`PATCHES`);
the checkouts stay unchanged, and none of their code is part of this project. torch's own builder compiles the copies,
since their setup.py needs a visible GPU.
"""

import argparse
import hashlib
import importlib
import json
import os
import re
import shutil
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import toolkit
import torch
from torch import Tensor

FOLDER = Path(__file__).resolve().parents[2] / "build" / "peers"

# pattern, replacement, why; in C++ and CUDA sources
PATCHES = [
    (r"\.type\(\)\.is_cuda\(\)", ".is_cuda()", "Tensor.type() is deprecated"),
    (r"\b(input|value)\.type\(\)", r"\1.scalar_type()", "dispatch takes a scalar type instead of Tensor.type()"),
    (r"\.data<", ".data_ptr<", "Tensor.data<T>() is deprecated"),
    (r"#include <THC/THCAtomics\.cuh>", "#include <ATen/cuda/Atomic.cuh>", "THC was removed"),
    (r"\bAT_ASSERTM\(", "TORCH_CHECK(", "AT_ASSERTM is deprecated"),
    (r"\bAT_ERROR\(", "TORCH_CHECK(false, ", "AT_ERROR is deprecated"),
]
BINDINGS = {
    "dcnv4": """#include <torch/extension.h>
#include "cuda/dcnv4_cuda.h"
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("dcnv4_forward", &dcnv4_cuda_forward);
  m.def("dcnv4_backward", &dcnv4_cuda_backward);
}
"""
}
NO_SETUP = "compiled by torch.utils.cpp_extension.load: setup.py raises without a visible GPU"


class PeerError(Exception):
    """A checkout that is not one of the project, or does not build, or has not been built."""


@dataclass(frozen=True)
class Checkout:
    """Where the sources are, and whether they may be compiled now, which takes minutes."""

    path: Path
    may_build: bool = True


def prepare(given: Checkout, part: str, name: str, module: str, sources: list[str], flags: Sequence[str] = ()):
    """Copy a folder of the checkout, patch it, build and import `module`; returns folder, changes and module.

    Reuses the build of an earlier call if nothing has changed, and it is for this GPU.
    """
    checkout = given.path
    source = checkout / part
    if not source.is_dir():
        raise PeerError(f"'{checkout}' has no folder {part}")
    files = sorted(path for path in source.rglob("*") if path.suffix in (".cpp", ".cu", ".cuh", ".h", ".py"))
    python = sys.implementation.cache_tag
    digest = hashlib.sha256(repr((torch.__version__, python, sources, flags, PATCHES, BINDINGS)).encode())
    for path in files:
        digest.update(path.read_bytes())
    folder = FOLDER / name
    stamp = folder / "stamp.json"
    before = json.loads(stamp.read_text()) if stamp.is_file() else {}
    changes = before.get("changes", [])
    if before.get("digest") != digest.hexdigest() or not serves(before.get("architectures", ""), wanted()):
        if not given.may_build:
            raise PeerError("it has not been built")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        changes = patch(folder, name)
        compile_copy(folder, module, sources, flags)
        facts = {"digest": digest.hexdigest(), "architectures": wanted(), "changes": changes}
        stamp.write_text(json.dumps(facts))
    sys.path.insert(0, str(folder / "built"))
    try:
        return folder, changes, importlib.import_module(module)
    except ImportError as error:
        raise PeerError(f"{module} does not load: {error}") from error


def wanted() -> str:
    """The compute capabilities that torch's builder compiles for: those asked for, or this GPU's, or (empty) all."""
    here = "{}.{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else ""
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or here


def serves(built: str, wanted: str) -> bool:
    """Whether a build for some compute capabilities ("8.0;9.0+PTX") runs where others are wanted."""
    there, asked = ([(*map(int, v.split(".")), p) for v, p in _entry.findall(text)] for text in (built, wanted))
    return (
        built == wanted
        or bool(asked)
        and all(
            any((major == a and minor <= b) or (bool(ptx) and (major, minor) <= (a, b)) for major, minor, ptx in there)
            for a, b, _ in asked
        )
    )


_entry = re.compile(r"(\d+\.\d+)[af]?(\+PTX)?")


def patch(folder: Path, name: str) -> list[str]:
    counts = [0] * len(PATCHES)
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".cpp", ".cu", ".cuh", ".h")):
        text = path.read_text()
        for i, (pattern, replacement, _) in enumerate(PATCHES):
            text, count = re.subn(pattern, replacement, text)
            counts[i] += count
        path.write_text(text)
    changes = [
        f"`{pattern}` -> `{replacement}` ({count} places): {why}"
        for (pattern, replacement, why), count in zip(PATCHES, counts)
        if count
    ]
    if name in BINDINGS:
        (folder / "src" / "binding.cpp").write_text(BINDINGS[name])
        changes.append("a binding of the measured operator only: the others take minutes to compile")
    return [*changes, NO_SETUP]


def compile_copy(folder: Path, module: str, sources: Sequence[str], flags: Sequence[str]) -> None:
    """Build `module` into `folder`, for this GPU, or for those of TORCH_CUDA_ARCH_LIST."""
    from torch.utils import cpp_extension

    output = folder / "built"
    output.mkdir()
    # headers of the libraries that came with torch, with the lowest priority: a minimal toolkit lacks them
    headers = [path for root in sys.path for path in Path(root).glob("nvidia/*/include")]
    libraries = [path for root in sys.path for path in Path(root).glob("nvidia/*/lib")]
    if not (os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")):
        kit = toolkit.find()
        if kit is None:
            raise PeerError(f"{module} is not built: there is no nvcc")
        # torch takes the folder above that of the nvcc on the PATH, which may be a script
        os.environ["CUDA_HOME"] = cpp_extension.CUDA_HOME = str(kit.home)
        os.environ.setdefault("PYTORCH_NVCC", kit.nvcc)
        headers, libraries = [*kit.includes, *headers], [*kit.libraries, *libraries]
    behind = [flag for path in headers for flag in ("-Xcompiler", f"-idirafter,{path}")]
    try:
        cpp_extension.load(
            name=module,
            sources=[str(folder / s) for s in sources],
            extra_include_paths=[str(folder / "src")],
            extra_cflags=["-O3", "-DWITH_CUDA", "-w", *(f"-idirafter{path}" for path in headers)],
            extra_cuda_cflags=["-O3", "-DWITH_CUDA", "-w", *flags, *behind],
            extra_ldflags=[f"-L{path}" for path in [*libraries, unversioned_runtime(output / "links", libraries)]],
            build_directory=str(output),
            with_cuda=True,
            is_python_module=False,
        )
    except (RuntimeError, OSError) as error:
        raise PeerError(f"{module} does not build: {error}") from error


def unversioned_runtime(folder: Path, libraries: list[Path]) -> Path:
    """A folder where -lcudart finds the runtime, if the others have it under a name with a version only."""
    folder.mkdir()
    versioned = [path for library in libraries for path in sorted(library.glob("libcudart.so.*"))]
    if versioned and not any((library / "libcudart.so").exists() for library in libraries):
        (folder / "libcudart.so").symlink_to(versioned[0])
    return folder


class OfficialDCNv3:
    """OpenGVLab/InternImage's operator, 3x3 with padding 1. float32 and float16."""

    name = "official DCNv3"

    def __init__(self, checkout: Checkout) -> None:
        sources = ["src/vision.cpp", "src/cuda/dcnv3_cuda.cu", "src/cpu/dcnv3_cpu.cpp"]
        _, self.changes, self.module = prepare(checkout, "classification/ops_dcnv3", "dcnv3", "DCNv3", sources)

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor, groups: int) -> Tensor:
        """Without softmax: the mask holds weights."""
        return self.module.dcnv3_forward(input, offset, mask, *self._geometry(input, groups), 1.0, 256, 0)

    def backward(self, grad: Tensor, input: Tensor, offset: Tensor, mask: Tensor, groups: int) -> list[Tensor]:
        return self.module.dcnv3_backward(input, offset, mask, *self._geometry(input, groups), 1.0, grad, 256, 0)

    @staticmethod
    def _geometry(input: Tensor, groups: int) -> tuple[int, ...]:
        return 3, 3, 1, 1, 1, 1, 1, 1, groups, input.shape[3] // groups


class DCNv4:
    """OpenGVLab/DCNv4's operator with its own table of launch settings, 3x3 with padding 1."""

    name = "DCNv4"

    def __init__(self, checkout: Checkout) -> None:
        defined = ["CUDA_HAS_FP16=1", *(f"__CUDA_NO_HALF{x}__" for x in ("_OPERATORS", "_CONVERSIONS", "2_OPERATORS"))]
        flags = [f"-D{name}" for name in defined]  # those of its setup.py
        sources = ["src/binding.cpp", "src/cuda/dcnv4_cuda.cu"]
        folder, self.changes, self.module = prepare(checkout, "DCNv4_op", "dcnv4", "ext", sources, flags)
        package = types.ModuleType("DCNv4")
        package.__path__ = [str(folder / "DCNv4")]
        package.ext = self.module
        sys.modules |= {"DCNv4": package, "DCNv4.ext": self.module}
        functions = types.ModuleType("DCNv4.functions")  # without its __init__, which imports everything
        functions.__path__ = [str(folder / "DCNv4" / "functions")]
        sys.modules["DCNv4.functions"] = functions
        self.settings = importlib.import_module("DCNv4.functions.dcnv4_func")

    @staticmethod
    def pack(offset: Tensor, mask: Tensor, groups: int) -> Tensor:
        """Offsets and mask in one tensor: group by group, padded to a multiple of 8 channels."""
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


def build(kind: Callable, checkout: Path | None, may_build: bool = True) -> tuple[object | None, str]:
    """The operator, or None and why it is not available."""
    if checkout is None:
        return None, "no checkout was given"
    try:
        return kind(Checkout(checkout, may_build)), ""
    except PeerError as error:
        return None, str(error)


def main() -> None:
    """Build in advance of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, help="checkout of OpenGVLab/InternImage")
    parser.add_argument("--dcnv4", type=Path, help="checkout of OpenGVLab/DCNv4")
    arguments = parser.parse_args()
    for kind, checkout in ((OfficialDCNv3, arguments.official), (DCNv4, arguments.dcnv4)):
        if checkout is None:
            continue
        peer, reason = build(kind, checkout)
        print(f"{kind.name}: {reason or 'built'}", flush=True)
        for change in peer.changes if peer is not None else []:
            print(f"- {change}")


if __name__ == "__main__":
    main()
