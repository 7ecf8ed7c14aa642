# SPDX-License-Identifier: MIT
"""The compiled kernels: finding and loading them, and which backend serves an operator on each device.

Importing never fails for want of a kernel: the plain-torch reference serves then, and the reason is kept.
"""

import json
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent
_KEYS = {"cpu": "CPU", "cuda": "CUDA", "mps": "MPS", "xpu": "XPU"}
CAPABILITIES = ("default", "avx2", "avx512")  # what INTERNIMAGE_CPU_CAPABILITY may be, from the slowest
_MODULES = {"cpu": "_C", "cuda": "_C_cuda"}
_failures: dict[str, str] = {}  # device -> why its module, which is there, could not be loaded


@dataclass(frozen=True)
class Backend:
    """What serves a kind of device."""

    device: str
    name: str
    reason: str  # why not a faster one; empty for a compiled kernel


def load() -> None:
    """Load the compiled kernels, if they are there; keeps the reason if they are and cannot be loaded.

    Warns of an `INTERNIMAGE_CPU_CAPABILITY` that is none.
    """
    wish = os.environ.get("INTERNIMAGE_CPU_CAPABILITY", "")
    if wish and wish not in CAPABILITIES:
        warnings.warn(f"internimage: {_unknown(wish)}", RuntimeWarning, stacklevel=2)
    for device, module in _MODULES.items():
        if device == "cuda" and torch.version.cuda is None:
            continue  # it needs libraries that only a CUDA build of torch has
        for path in sorted(_FOLDER.glob(f"{module}.*so")):
            if device == "cuda" and (reason := _other_cuda()):  # two CUDA runtimes in one process, if there are two
                _failures[device] = f"'{path.name}' was not loaded: {reason}"
                continue
            try:
                torch.ops.load_library(path)
                _failures.pop(device, None)
                break
            except OSError as error:
                _failures[device] = f"'{path.name}' could not be loaded: {error}"


def _other_cuda() -> str:
    """That the CUDA kernels are for another major version of CUDA than torch; empty if not, or if nothing is known."""
    built, there = build_facts().get("cuda", {}).get("toolkit"), torch.version.cuda
    if not built or not there or built.split(".")[0] == there.split(".")[0]:
        return ""
    versions = f"it was built with CUDA {built}, but torch {torch.__version__} has CUDA {there}"
    return f"{versions}; the major versions must be the same"


def _unknown(wish: str) -> str:
    *first, last = CAPABILITIES
    return f"INTERNIMAGE_CPU_CAPABILITY is '{wish}' and has no effect; it can be {', '.join(first)} or {last}"


def cpu_capability() -> str | None:
    """The instruction set in use by the CPU kernels, one of `CAPABILITIES`; None without compiled kernels."""
    return torch.ops.internimage.cpu_capability() if has_kernel("dcnv3", "cpu") else None


def capability_note() -> str:
    """Why `INTERNIMAGE_CPU_CAPABILITY` has not the effect that it asks for; empty where it has, or is not set."""
    wish, used = os.environ.get("INTERNIMAGE_CPU_CAPABILITY", ""), cpu_capability()
    if not wish:
        return ""
    if wish not in CAPABILITIES:
        return _unknown(wish)
    if used is None:
        return f"INTERNIMAGE_CPU_CAPABILITY is '{wish}' and has no effect: there are no compiled kernels"
    if wish != used:  # it can only lower, and is read once
        return f"INTERNIMAGE_CPU_CAPABILITY is '{wish}', but the best that this processor has is {used}"
    return ""


def build_facts() -> dict:
    """What the package was built with, as setup.py wrote it down; empty if it did not."""
    path = _FOLDER / "_build.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def devices() -> list[str]:
    """The kinds of device torch can use here."""
    kinds = ["cpu"]
    if torch.accelerator.is_available():
        kinds.append(torch.accelerator.current_accelerator().type)
    return kinds


def has_kernel(op: str, device: str) -> bool:
    """Whether a compiled kernel serves `torch.ops.internimage.OP` on a kind of device."""
    key = _KEYS.get(device)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(f"internimage::{op}", key)


def backend(op: str, device: str) -> Backend:
    """The backend of an operator on a kind of device, as the dispatcher sees it."""
    if has_kernel(op, device):
        detail = f", {cpu_capability()} instructions" if device == "cpu" else ""
        return Backend(device, f"compiled kernel{detail}", "")
    return Backend(device, "plain torch", _reason(device))


def _reason(device: str) -> str:
    """Why no compiled kernel serves a kind of device."""
    if device not in _MODULES or (device == "cuda" and torch.version.hip):
        return f"this version of internimage has no compiled kernel for {'ROCm' if device == 'cuda' else device}"
    facts = build_facts() if device == "cpu" else build_facts().get("cuda", {})
    missing = "the package was installed without its compiled module"
    return _failures.get(device) or facts.get("reason") or (f"{missing} for CUDA" if device == "cuda" else missing)


def cuda_note() -> str:
    """What there is of CUDA kernels, and why not more; also where no GPU is."""
    if has_kernel("dcnv3", "cuda"):
        facts = build_facts().get("cuda", {})
        if not facts.get("toolkit"):
            return "loaded"
        return f"loaded; built with CUDA {facts['toolkit']} for {', '.join(facts['architectures'])}{_unserved(facts)}"
    if torch.version.cuda is None and any(_FOLDER.glob("_C_cuda.*so")):
        return f"there, but not loaded under a torch without CUDA ({torch.__version__})"
    return f"none: {_reason('cuda')}"


def _unserved(facts: dict) -> str:
    """Names the GPUs here that the CUDA kernels were not compiled for; on them, the operator raises."""
    if not torch.cuda.is_available():
        return ""
    gpus = {
        torch.cuda.get_device_name(i): torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())
    }
    names = [
        f"{name} (compute capability {major}.{minor})"
        for name, (major, minor) in gpus.items()
        if not any(_runs_on(architecture, (major, minor)) for architecture in facts["architectures"])
    ]
    return f", but not for {', '.join(names)}: build with TORCH_CUDA_ARCH_LIST" if names else ""


def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for "sm_90" or the like runs on a GPU; "compute_90" is translated for all that are newer."""
    kind, major, minor, feature = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture).groups()
    own = int(major), int(minor)
    if feature == "a":
        return own == capability
    return own <= capability and (kind == "compute" and not feature or own[0] == capability[0])
