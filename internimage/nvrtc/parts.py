# SPDX-License-Identifier: MIT
"""What compiling at run time takes: NVRTC and CUDA's headers, from torch's own packages, and the kernels' sources."""

import functools
import hashlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parents[1]
_CUDA_HEADERS = ("cuda_fp16.h", "cuda_bf16.h")


class Missing(Exception):
    """What is missing; on one line, and begins in lower case."""


@dataclass(frozen=True)
class Parts:
    """Paths of what is needed."""

    library: Path  #: NVRTC
    include: Path  #: CUDA's headers
    sources: Path  #: the folder csrc


def find() -> Parts:
    """Where everything is. Only looks at files.

    Raises:
        Missing: Something is not there.
    """
    version = torch.version.cuda
    if version is None:
        raise Missing(f"this torch has no CUDA ({torch.__version__})")
    major = version.split(".")[0]
    folders = _package_folders(major)
    library = _first(folders, "lib", f"libnvrtc.so.{major}") or _first([Path(torch.__file__).parent], *_in_torch(major))
    if library is None:
        package = "nvidia-cuda-nvrtc" if int(major) >= 13 else f"nvidia-cuda-nvrtc-cu{major}"
        raise Missing(f"NVRTC {major} is not in torch's packages ({package} has it)")
    headers = [path.parent for name in _CUDA_HEADERS if (path := _first(folders, "include", name)) is not None]
    if len(headers) < len(_CUDA_HEADERS):
        package = "nvidia-cuda-runtime" if int(major) >= 13 else f"nvidia-cuda-runtime-cu{major}"
        raise Missing(f"cuda_fp16.h and cuda_bf16.h are not in torch's packages ({package} has them)")
    return Parts(library, headers[0], find_sources())


def find_sources() -> Path:
    """The folder csrc: in the package, or beside it in a checkout; there is one of them.

    Raises:
        Missing: There is none.
    """
    for folder in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc"):
        if (folder / "cuda" / "gather").is_dir():
            return folder
    raise Missing("the package was installed without the sources of the CUDA kernels")


def source_files(folder: Path) -> list[Path]:
    """The files of csrc that a kernel is compiled from, and that a wheel therefore contains."""
    fixed = [folder / "common.h", *(folder / "cuda" / name for name in ("mma.cuh", "storage.cuh", "types.h"))]
    return [*fixed, *sorted((folder / "cuda" / "gather").glob("*.*h"))]


@functools.cache
def fingerprint(parts: Parts) -> str:
    """Changes with any byte of the sources and of the headers for half types."""
    digest = hashlib.sha256()
    for path in (*source_files(parts.sources), *sorted(parts.include.glob("cuda_[bf]*16.h*"))):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _package_folders(major: str) -> list[Path]:
    """Folders of NVIDIA's packages that torch depends on: one for all from CUDA 13 on, one each before."""
    spec = importlib.util.find_spec("nvidia")
    roots = [] if spec is None else [Path(path) for path in spec.submodule_search_locations or ()]
    return [root / name for root in roots for name in (f"cu{major}", "cuda_nvrtc", "cuda_runtime")]


def _in_torch(major: str) -> tuple[str, str]:
    """Where torch's Windows packages have NVRTC."""
    return ("lib", f"nvrtc64_{major}0_0.dll" if sys.platform == "win32" else f"libnvrtc.so.{major}")


def _first(folders: list[Path], *names: str) -> Path | None:
    return next((path for folder in folders if (path := folder.joinpath(*names)).is_file()), None)
