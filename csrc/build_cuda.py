# SPDX-License-Identifier: MIT
"""Builds the CUDA kernels, `internimage/_C_cuda.abi3.so`; setup.py asks here whether and how.

INTERNIMAGE_BUILD_CUDA: `auto` (the default) builds if torch is a CUDA build and there is a CUDA toolkit of the same
major version; `0` never; `1` always, and stops where it cannot. Whether a GPU is there is never asked. torch is read,
not imported, and may be a CPU-only build with `1`: its headers are the same, and an empty stand-in for
`libtorch_cuda.so` serves the linker.

CUDA_HOME (or CUDA_PATH, or nvcc on the PATH) is the toolkit. TORCH_CUDA_ARCH_LIST chooses compute capabilities as it
does for torch's own extensions ("8.0;9.0+PTX"); the default is all from 7.5 to 12.0 that the toolkit knows, and PTX of
the newest for those to come. MAX_JOBS is how many of them are compiled at a time.
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
    """The installed torch, as its files tell."""

    folder: Path
    version: str
    cuda: str | None  # of the toolkit that it was built with

    @classmethod
    def find(cls) -> "Torch":
        spec = importlib.util.find_spec("torch")
        file = Path(spec.origin).parent / "version.py" if spec is not None and spec.origin else None
        if file is None or not file.is_file():
            raise CannotBuild("torch was not there when the package was built")
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
                raise CannotBuild("no CUDA toolkit was found: neither CUDA_HOME nor an nvcc on the PATH")
        try:
            printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        except OSError as error:
            raise CannotBuild(f"'{nvcc}' does not run ({error})") from error
        found = re.search(r"release (\d+\.\d+)", printed)
        if found is None:
            raise CannotBuild(f"'{nvcc} --version' does not tell a version")
        return cls(nvcc, found.group(1))

    def knows(self, architecture: str) -> bool:
        """Whether it compiles for a compute capability."""
        printed = subprocess.run([self.nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout
        return f"sm_{architecture.replace('.', '')}" in printed.split()


def gencode(toolkit: Toolkit) -> list[str]:
    """nvcc's flags for TORCH_CUDA_ARCH_LIST or the default."""
    wish = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not wish:
        wish = [a for a in ARCHITECTURES if toolkit.knows(a)]
        wish[-1:] = [f"{wish[-1]}+PTX"] if wish else []
    flags = []
    for entry in wish:
        found = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", entry)
        if found is None:
            raise CannotBuild(f"TORCH_CUDA_ARCH_LIST must be like '8.0;9.0+PTX', got '{entry}'")
        number = "".join(found.groups()[:3])
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if found.group(4):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class CudaExtension(Extension):
    """`internimage._C_cuda`, which `build` makes instead of setuptools."""

    def __init__(self, torch: Torch, toolkit: Toolkit, target: str) -> None:
        folder = Path("csrc")
        found = (*folder.glob("*.h"), *(folder / "cuda").rglob("*"))
        files = sorted(path.as_posix() for path in found if path.is_file())
        super().__init__("internimage._C_cuda", sources=[], depends=files, py_limited_api=True)
        self.torch, self.toolkit, self.torch_target, self.gencode = torch, toolkit, target, gencode(toolkit)

    def build(self, library: Path) -> None:
        """Compile and link; raises CannotBuild."""
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as stand_ins:
            if not (self.torch.folder / "lib" / "libtorch_cuda.so").exists():
                name = "libtorch_cuda.so"
                link = ["-shared", "-x", "c", os.devnull, f"-Wl,-soname,{name}", "-o", str(Path(stand_ins) / name)]
                self._run([os.environ.get("CXX") or HOST_COMPILER, *link])
            self._run(self.command(library, stand_ins))

    def command(self, library: Path, stand_ins: str) -> list[str]:
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        return [
            self.toolkit.nvcc,
            *("-shared", "-std=c++17", "-O3", "-cudart=shared", f"--threads={jobs}"),
            *("-Xcompiler=-fPIC,-fvisibility=hidden", "-Xlinker=--no-as-needed"),
            *("-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={self.torch_target}"),
            *self.gencode,
            f"-I{self.torch.folder / 'include'}",
            str(Path("csrc") / "cuda" / "dcnv3" / "dcnv3.cu"),
            *(f"-L{self.torch.folder / 'lib'}", f"-L{stand_ins}", "-ltorch_cpu", "-ltorch_cuda"),
            *("-o", str(library)),
        ]

    @staticmethod
    def _run(command: list[str]) -> None:
        print(shlex.join(command), flush=True)
        try:
            result = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise CannotBuild(f"'{command[0]}' does not run ({error})") from error
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

    What is there is taken if it is from these sources, and does not stay where it is not, or where none is wanted. A
    failure ends the build only with `1`.
    """
    library, facts = folder / LIBRARY, folder / "_build.json"
    if extension is None:
        library.unlink(missing_ok=True)
        return {"reason": reason}
    before = json.loads(facts.read_text()).get("cuda") if facts.is_file() else None
    sources = [Path(__file__), *map(Path, extension.depends)]
    old = not library.is_file() or any(s.stat().st_mtime > library.stat().st_mtime for s in sources)
    if not old and before == extension.facts():
        return before
    library.unlink(missing_ok=True)
    try:
        extension.build(library)
    except CannotBuild as error:
        if wanted() == "1":
            sys.exit(f"INTERNIMAGE_BUILD_CUDA=1, but {error}")
        print(f"internimage: {error}\ninternimage: installing without them", file=sys.stderr)
        return {"reason": str(error)}
    return extension.facts()


def wanted() -> str:
    """INTERNIMAGE_BUILD_CUDA: auto, 0 or 1."""
    wish = os.environ.get("INTERNIMAGE_BUILD_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        sys.exit(f"INTERNIMAGE_BUILD_CUDA must be auto, 0 or 1, got '{wish}'")
    return wish


def cuda_extension(torch_target: str) -> tuple[CudaExtension | None, str]:
    """The extension, or None and the reason why there is none; with `1` that ends the build.

    Args:
        torch_target: Value of TORCH_TARGET_VERSION: the oldest torch that the binary is to run on.
    """
    wish = wanted()
    if wish == "0":
        return None, "INTERNIMAGE_BUILD_CUDA was 0 when the package was built"
    try:
        if sys.platform == "win32":
            raise CannotBuild("building the CUDA kernels on Windows is not provided for")
        torch = Torch.find()
        if torch.cuda is None and wish == "auto":
            raise CannotBuild(
                f"the package was built against a CPU-only torch ({torch.version}); with INTERNIMAGE_BUILD_CUDA=1 the "
                "CUDA kernels are built all the same"
            )
        toolkit = Toolkit.find()
        if torch.cuda is not None and torch.cuda.split(".")[0] != toolkit.version.split(".")[0]:
            raise CannotBuild(
                f"the CUDA toolkit is {toolkit.version} ('{toolkit.nvcc}'), but torch {torch.version} was built with "
                f"CUDA {torch.cuda}; the major versions must be the same (CUDA_HOME chooses the toolkit)"
            )
        return CudaExtension(torch, toolkit, torch_target), ""
    except CannotBuild as error:
        if wish == "1":
            sys.exit(f"INTERNIMAGE_BUILD_CUDA=1, but the CUDA kernels cannot be built: {error}")
        return None, str(error)
