# SPDX-License-Identifier: MIT
"""Builds the CUDA kernels, `internimage/_C_cuda.abi3.so`, for setup.py.

INTERNIMAGE_BUILD_CUDA: `auto` (the default) builds if torch is a CUDA build and there is a CUDA toolkit of the same
major version; `0` never builds; `1` always does, and fails where that is impossible. No GPU is needed. torch is not
imported, only its files are read. With `1` it may be a CPU-only build: the headers are the same, and the kernels are
linked against an empty substitute for `libtorch_cuda.so`.

CUDA_HOME (or CUDA_PATH, or nvcc on the PATH) is the toolkit. TORCH_CUDA_ARCH_LIST selects compute capabilities as for
torch's own extensions ("8.0;9.0+PTX"); the default is all from 7.5 to 12.0 that the toolkit supports, and PTX of the
newest for later ones. MAX_JOBS is how many of them are compiled at a time.
"""

import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension

ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
HOST_COMPILER = "c++" if sys.platform == "darwin" else "g++"


class CannotBuild(Exception):
    """Why there will be no CUDA kernels."""


@dataclass(frozen=True)
class Torch:
    """The installed torch, according to its files."""

    folder: Path
    version: str
    cuda: str | None  # version of the toolkit that it was built with

    @classmethod
    def find(cls) -> "Torch":
        spec = importlib.util.find_spec("torch")
        file = Path(spec.origin).parent / "version.py" if spec is not None and spec.origin else None
        if file is None or not file.is_file():
            raise CannotBuild("torch was not installed when the package was built")
        facts = runpy.run_path(str(file))
        if facts.get("hip"):
            raise CannotBuild(f"the package was built against a torch for ROCm ({facts['__version__']})")
        return cls(file.parent, str(facts["__version__"]), facts.get("cuda"))


@dataclass(frozen=True)
class Toolkit:
    """The CUDA toolkit."""

    nvcc: str
    version: str

    @classmethod
    def find(cls) -> "Toolkit":
        variable = next((name for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)), None)
        if variable is not None:
            nvcc = str(Path(os.environ[variable]) / "bin" / "nvcc")
            if not os.access(nvcc, os.X_OK):
                raise CannotBuild(f"{variable} is '{os.environ[variable]}', which has no bin/nvcc")
        else:
            nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
            if nvcc is None:
                raise CannotBuild("no CUDA toolkit was found: CUDA_HOME is not set, and there is no nvcc on the PATH")
        try:
            printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        except OSError as error:
            raise CannotBuild(f"'{nvcc}' cannot be run ({error})") from error
        found = re.search(r"release (\d+\.\d+)", printed)
        if found is None:
            raise CannotBuild(f"'{nvcc} --version' prints no version")
        return cls(nvcc, found.group(1))

    def supports(self, architecture: str) -> bool:
        """Whether it compiles for a compute capability."""
        printed = subprocess.run([self.nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout
        return f"sm_{architecture.replace('.', '')}" in printed.split()


def gencode(toolkit: Toolkit) -> list[str]:
    """nvcc's flags for TORCH_CUDA_ARCH_LIST or the default."""
    requested = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not requested:
        requested = [a for a in ARCHITECTURES if toolkit.supports(a)]
        requested[-1:] = [f"{requested[-1]}+PTX"] if requested else []
    flags = []
    for entry in requested:
        found = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", entry)
        if found is None:
            raise CannotBuild(f"TORCH_CUDA_ARCH_LIST must be like '8.0;9.0+PTX', got '{entry}'")
        number = "".join(found.groups()[:3])
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if found.group(4):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class CudaExtension(Extension):
    """`internimage._C_cuda`, which is built by `build` and not by setuptools."""

    def __init__(self, torch: Torch, toolkit: Toolkit, target: str) -> None:
        folder = Path("csrc")
        found = (*folder.glob("*.h"), *(folder / "cuda").rglob("*"))
        files = sorted(path.as_posix() for path in found if path.is_file())
        super().__init__("internimage._C_cuda", sources=[], depends=files, py_limited_api=True)
        self.torch, self.toolkit, self.torch_target, self.gencode = torch, toolkit, target, gencode(toolkit)

    def build(self, library: Path) -> None:
        """Compile and link; raises CannotBuild."""
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as substitutes:
            if not (self.torch.folder / "lib" / "libtorch_cuda.so").exists():
                name = "libtorch_cuda.so"
                link = ["-shared", "-x", "c", os.devnull, f"-Wl,-soname,{name}", "-o", str(Path(substitutes) / name)]
                self._run([os.environ.get("CXX") or HOST_COMPILER, *link])
            self._run(self.command(library, substitutes))

    def command(self, library: Path, substitutes: str) -> list[str]:
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        return [
            self.toolkit.nvcc,
            *("-shared", "-std=c++17", "-O3", "-cudart=shared", f"--threads={jobs}"),
            *("-Xcompiler=-fPIC,-fvisibility=hidden", "-Xlinker=--no-as-needed"),
            *("-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={self.torch_target}"),
            *self.gencode,
            f"-I{self.torch.folder / 'include'}",
            str(Path("csrc") / "cuda" / "dcnv3" / "dcnv3.cu"),
            *(f"-L{self.torch.folder / 'lib'}", f"-L{substitutes}", "-ltorch_cpu", "-ltorch_cuda"),
            *("-o", str(library)),
        ]

    @staticmethod
    def _run(command: list[str]) -> None:
        print(shlex.join(command), flush=True)
        try:
            result = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise CannotBuild(f"'{command[0]}' cannot be run ({error})") from error
        print(result.stdout + result.stderr, end="", flush=True)
        if result.returncode != 0:
            lines = (result.stderr or result.stdout).strip().splitlines()
            errors = [line for line in lines if "error" in line] or lines
            raise CannotBuild(f"building the CUDA kernels failed: {' '.join(errors)[:500]}")

    def facts(self) -> dict[str, object]:
        """For `internimage info`."""
        names = (flag.rsplit("code=", 1)[1].strip("[]") for flag in self.gencode)
        return {
            "toolkit": self.toolkit.version,
            "architectures": list(names),
            "torch": self.torch.version,
            "reason": "",
        }


LIBRARY = "_C_cuda.abi3.so"


def build_into(folder: Path, extension: CudaExtension | None, reason: str) -> dict[str, object]:
    """Build into the package's folder; returns facts for `internimage info`.

    An existing library is kept if it was built from these sources and with these options, else it is removed. A failure
    ends the build only with INTERNIMAGE_BUILD_CUDA=1.
    """
    library, facts = folder / LIBRARY, folder / "_build.json"
    if extension is None:
        library.unlink(missing_ok=True)
        return {"reason": reason}
    before = json.loads(facts.read_text()).get("cuda") if facts.is_file() else None
    sources = [Path(__file__), *map(Path, extension.depends)]
    outdated = not library.is_file() or any(s.stat().st_mtime > library.stat().st_mtime for s in sources)
    if not outdated and before == extension.facts():
        return before
    library.unlink(missing_ok=True)
    try:
        extension.build(library)
    except CannotBuild as error:
        if build_option() == "1":
            sys.exit(f"INTERNIMAGE_BUILD_CUDA=1, but {error}")
        print(f"internimage: {error}\ninternimage: installing without them", file=sys.stderr)
        return {"reason": str(error)}
    return extension.facts()


def build_option() -> str:
    """INTERNIMAGE_BUILD_CUDA: auto, 0 or 1."""
    option = os.environ.get("INTERNIMAGE_BUILD_CUDA", "auto")
    if option not in ("auto", "0", "1"):
        sys.exit(f"INTERNIMAGE_BUILD_CUDA must be auto, 0 or 1, got '{option}'")
    return option


def cuda_extension(torch_target: str) -> tuple[CudaExtension | None, str]:
    """The extension, or None and the reason why there is none; INTERNIMAGE_BUILD_CUDA=1 ends the build instead.

    Args:
        torch_target: Value of TORCH_TARGET_VERSION: the oldest torch that the binary is to run on.
    """
    option = build_option()
    if option == "0":
        return None, "INTERNIMAGE_BUILD_CUDA was 0 when the package was built"
    try:
        if sys.platform == "win32":
            raise CannotBuild("building the CUDA kernels on Windows is not supported")
        torch = Torch.find()
        if torch.cuda is None and option == "auto":
            raise CannotBuild(
                f"the package was built against a CPU-only torch ({torch.version}); with INTERNIMAGE_BUILD_CUDA=1 the "
                "CUDA kernels are built anyway"
            )
        toolkit = Toolkit.find()
        if torch.cuda is not None and torch.cuda.split(".")[0] != toolkit.version.split(".")[0]:
            raise CannotBuild(
                f"the CUDA toolkit is {toolkit.version} ('{toolkit.nvcc}'), but torch {torch.version} was built with "
                f"CUDA {torch.cuda}; the major versions must be the same (CUDA_HOME selects the toolkit)"
            )
        return CudaExtension(torch, toolkit, torch_target), ""
    except CannotBuild as error:
        if option == "1":
            sys.exit(f"INTERNIMAGE_BUILD_CUDA=1, but the CUDA kernels cannot be built: {error}")
        return None, str(error)
