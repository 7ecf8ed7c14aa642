# SPDX-License-Identifier: MIT
"""Builds the CPU and CUDA kernels where possible; the metadata is in pyproject.toml.

The modules have no symbol of Python's: torch loads them. So a wheel serves every Python (py3-none), also free-threaded
ones, and a module has the same file name everywhere. The compiler is GCC or Clang, on Windows clang-cl.

INTERNIMAGE_BUILD_CPU: `auto` (the default) builds the kernels if it can, and otherwise records the reason, which
`internimage info` prints; `0` never builds them; `1` fails where it cannot. INTERNIMAGE_BUILD_CUDA does the same for
the CUDA kernels: csrc/build_cuda.py.
"""

import json
import os
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

sys.path.insert(0, "csrc")
import build_cuda  # noqa: E402

# The oldest torch that the binary runs on; it may be built with any newer one (LibTorch stable ABI).
TORCH_TARGET, TORCH_TARGET_NAME = "0x020a000000000000ULL", "2.10"
SCHEMA = "csrc/schema.cpp"  # a module of its own: csrc/schema.cpp says why
SOURCES = sorted({path.as_posix() for path in Path("csrc").rglob("*.cpp")} - {SCHEMA})  # the same binary everywhere
# what the CUDA kernels are compiled from at run time; a wheel has a copy, an editable installation reads csrc itself
KERNEL_SOURCES = ["common.h", "cuda/mma.cuh", "cuda/storage.cuh", "cuda/types.h", "cuda/gather/*"]
HEADERS = sorted(path.as_posix() for path in Path("csrc").rglob("*.h"))

option = os.environ.get("INTERNIMAGE_BUILD_CPU", "auto")
if option not in ("auto", "0", "1"):
    sys.exit(f"INTERNIMAGE_BUILD_CPU must be auto, 0 or 1, got '{option}'")


def compiler_flags():
    """For GCC and Clang, or for clang-cl."""
    if sys.platform == "win32":
        return ["/std:c++17", "/EHsc", "/clang:-O3", "-Wno-psabi"]
    # these flags come last and would override a level in CXXFLAGS
    level = [] if "-O" in os.environ.get("CXXFLAGS", "") else ["-O3"]
    return [*level, "-std=c++17", "-fvisibility=hidden", "-Wno-psabi"]


def cpu_extensions():
    """The kernels and the schemas, or why there are none."""
    if option == "0":
        return [], "INTERNIMAGE_BUILD_CPU was 0 when the package was built"
    if sys.platform == "win32" and shutil.which("clang-cl") is None:
        return [], "there was no clang-cl on the PATH; MSVC lacks the vector extensions that the kernels use"
    try:
        from torch.utils.cpp_extension import CppExtension
    except ImportError as error:
        return [], f"torch could not be imported when the package was built ({error})"
    flags = [*compiler_flags(), f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    options = {"extra_compile_args": {"cxx": flags}, "py_limited_api": True}
    kernels = CppExtension("internimage._C", SOURCES, depends=HEADERS, **options)
    return [kernels, CppExtension("internimage._schema", [SCHEMA], **options)], ""


cpu, reason = cpu_extensions()
if option == "1" and not cpu:
    sys.exit(f"INTERNIMAGE_BUILD_CPU=1, but the CPU kernels cannot be built: {reason}")
cuda, cuda_reason = build_cuda.cuda_extension(TORCH_TARGET)
if not cpu:
    base = build_ext
else:
    from torch.utils.cpp_extension import BuildExtension

    base = BuildExtension.with_options(use_ninja=False) if sys.platform == "win32" else BuildExtension  # it runs cl


def write_facts(folder, facts):
    """For `internimage info`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_build.json").write_text(json.dumps(facts) + "\n")


class BuildPackage(build_py):
    """Adds the sources of the CUDA kernels.

    Also records why there is no extension if there is none, as setuptools does not run build_ext then.
    """

    def run(self):
        super().run()
        inplace = getattr(self, "editable_mode", False)
        folder = Path("internimage") if inplace else Path(self.build_lib) / "internimage"
        if not inplace:
            shutil.rmtree(folder / "csrc", ignore_errors=True)  # of an earlier build
            for source in (path for pattern in KERNEL_SOURCES for path in Path("csrc").glob(pattern)):
                (folder / source).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, folder / source)
        if not cpu and cuda is None:
            write_facts(folder, {"reason": reason, "cuda": build_cuda.build_into(folder, None, cuda_reason)})


class BuildKernels(base):
    """Builds the extensions and records how. A failure is an error only if the build was required (`1`)."""

    def run(self):
        # setuptools resets `inplace` while it builds, and does not put it back after a failure
        inplace = self.inplace
        folder = Path("internimage") if inplace else Path(self.build_lib) / "internimage"
        # separately from `extensions`: a failure of one must not affect the other
        self.extensions = [e for e in self.extensions if e is not cuda]
        cuda_facts = build_cuda.build_into(folder, cuda, cuda_reason)
        facts = {"reason": reason}
        try:
            if cpu:
                import torch

                facts = {"torch": torch.__version__, "oldest_torch": TORCH_TARGET_NAME, "reason": ""}
            super().run()
        except Exception as error:
            if option == "1":
                raise
            facts = {"reason": f"building the CPU kernels failed: {' '.join(str(error).split())[:500]}"}
            self.inplace = inplace
            for failed in self.extensions:  # libraries of an earlier build are not from these sources
                Path(self.get_ext_fullpath(failed.name)).unlink(missing_ok=True)
            print(f"internimage: {facts['reason']}\ninternimage: installing without them", file=sys.stderr)
        write_facts(folder, {**facts, "cuda": cuda_facts})

    def build_extensions(self):
        if sys.platform == "win32" and self.extensions:
            self.compiler.initialize()  # finds Visual Studio's headers and linker
            self.compiler.cc = shutil.which("clang-cl")
        super().build_extensions()

    def get_ext_filename(self, fullname):  # also on Windows and on free-threaded Pythons, which have other suffixes
        return f"{fullname.replace('.', os.sep)}.abi3.so"

    def get_outputs(self):  # a failed build has none
        outputs = {*super().get_outputs(), str(Path(self.build_lib) / "internimage" / build_cuda.LIBRARY)}
        return sorted(file for file in outputs if Path(file).exists())


class BuildWheel(bdist_wheel):
    """A wheel with kernels is for every Python of a platform."""

    def get_tag(self):
        platform = super().get_tag()[2]
        return "py3", "none", platform


extensions = [*cpu, *([] if cuda is None else [cuda])]
setup(
    ext_modules=extensions,
    cmdclass={"build_py": BuildPackage, "build_ext": BuildKernels, "bdist_wheel": BuildWheel},
)
