# SPDX-License-Identifier: MIT
"""The compiled kernels: loading them, and which backend implements an operator on each device.

A missing kernel is never an import error: the plain-torch reference is used instead, and the reason is recorded.
"""

import json
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

_FOLDER = Path(__file__).parent
_KEYS = {"cpu": "CPU", "cuda": "CUDA", "mps": "MPS", "xpu": "XPU"}
CAPABILITIES = ("default", "avx2", "avx512")  # values of INTERNIMAGE_CPU_CAPABILITY, slowest first
_MODULES = {"cpu": "_C", "cuda": "_C_cuda"}
_failures: dict[str, str] = {}  # device type -> why its module, although installed, could not be loaded


@dataclass(frozen=True)
class Backend:
    """What implements an operator on a device type."""

    device: str  #: device type, such as cpu
    name: str  #: for people, such as 'compiled kernel, avx2 instructions'
    reason: str  #: why it is not a compiled kernel; empty if it is one


class RunTimeKernels(Protocol):
    """CUDA kernels that are compiled when they are first needed: `internimage.nvrtc`."""

    serves: bool

    def is_preferred(self) -> bool: ...

    def serve(self) -> bool: ...

    def why_not(self) -> str: ...

    def problem(self) -> str: ...

    def note(self) -> str: ...

    def can_serve(self, capability: tuple[int, int]) -> bool: ...


_run_time: RunTimeKernels | None = None


def load(run_time: RunTimeKernels | None = None) -> None:
    """Load the compiled kernels that are installed, and record the reason if one cannot be loaded.

    Warns if `INTERNIMAGE_CPU_CAPABILITY` or `INTERNIMAGE_NVRTC` has a value that does not exist.

    Args:
        run_time: Serves CUDA where that leaves it without kernels; the one of the call before if not given.
    """
    global _run_time
    _run_time = run_time or _run_time
    requested = os.environ.get("INTERNIMAGE_CPU_CAPABILITY", "")
    if requested and requested not in CAPABILITIES:
        warnings.warn(f"internimage: {_unknown_capability(requested)}", RuntimeWarning, stacklevel=2)
    prefers_run_time = _run_time is not None and _run_time.is_preferred()
    for device, module in _MODULES.items():
        if device == "cuda" and torch.version.cuda is None:
            continue  # the module needs libraries that only CUDA builds of torch have
        if device == "cuda" and prefers_run_time and _run_time is not None and _run_time.serve():
            continue
        for path in sorted(_FOLDER.glob(f"{module}.*so")):
            if device == "cuda" and (reason := _cuda_mismatch()):  # would load a second CUDA runtime
                _failures[device] = f"'{path.name}' was not loaded: {reason}"
                continue
            try:
                torch.ops.load_library(path)
                _failures.pop(device, None)
                if device == "cuda" and _run_time is not None:
                    _run_time.serves = False
                break
            except OSError as error:
                _failures[device] = f"'{path.name}' could not be loaded: {error}"
    if _run_time is not None and not has_kernel("dcnv3", "cuda"):
        _run_time.serve()


def _cuda_mismatch() -> str:
    """Why the CUDA kernels do not fit torch: another major version of CUDA. Empty if they fit, or that is unknown."""
    built, installed = build_facts().get("cuda", {}).get("toolkit"), torch.version.cuda
    if not built or not installed or built.split(".")[0] == installed.split(".")[0]:
        return ""
    versions = f"it was built with CUDA {built}, but torch {torch.__version__} has CUDA {installed}"
    return f"{versions}; the major versions must be the same"


def _unknown_capability(requested: str) -> str:
    *first, last = CAPABILITIES
    return f"INTERNIMAGE_CPU_CAPABILITY is '{requested}' and has no effect; it can be {', '.join(first)} or {last}"


def cpu_capability() -> str | None:
    """The instruction set that the CPU kernels use, one of `CAPABILITIES`; None without compiled kernels."""
    return torch.ops.internimage.cpu_capability() if has_kernel("dcnv3", "cpu") else None


def capability_note() -> str:
    """Why `INTERNIMAGE_CPU_CAPABILITY` does not have the requested effect; empty if it does, or is not set."""
    requested, used = os.environ.get("INTERNIMAGE_CPU_CAPABILITY", ""), cpu_capability()
    if not requested:
        return ""
    if requested not in CAPABILITIES:
        return _unknown_capability(requested)
    if used is None:
        return f"INTERNIMAGE_CPU_CAPABILITY is '{requested}' and has no effect: there are no compiled kernels"
    if requested != used:  # the variable can only lower the capability, and is read once
        return f"INTERNIMAGE_CPU_CAPABILITY is '{requested}', but the best that this processor supports is {used}"
    return ""


def build_facts() -> dict[str, Any]:
    """What the package was built with, as recorded by setup.py; empty if there is no record."""
    path = _FOLDER / "_build.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def devices() -> list[str]:
    """The device types that torch can use here."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


def has_kernel(op: str, device: str) -> bool:
    """Whether a compiled kernel implements `torch.ops.internimage.OP` on a device type."""
    key = _KEYS.get(device)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(f"internimage::{op}", key)


def backend(op: str, device: str) -> Backend:
    """The backend that the dispatcher selects for an operator on a device type."""
    if has_kernel(op, device):
        if device == "cuda" and _run_time is not None and _run_time.serves:
            if problem := _run_time.problem():
                return Backend(device, "plain torch", problem)
            return Backend(device, "compiled kernel, by NVRTC when it is first needed", "")
        detail = f", {cpu_capability()} instructions" if device == "cpu" else ""
        return Backend(device, f"compiled kernel{detail}", "")
    return Backend(device, "plain torch", _reason(device))


def _reason(device: str) -> str:
    """Why a device type has no compiled kernels."""
    if device not in _MODULES or (device == "cuda" and torch.version.hip):
        return f"this version of internimage has no compiled kernel for {'ROCm' if device == 'cuda' else device}"
    facts = build_facts() if device == "cpu" else build_facts().get("cuda", {})
    missing = "the package was installed without its compiled module"
    if device != "cuda":
        return _failures.get(device) or facts.get("reason") or missing
    installed = _failures.get(device) or facts.get("reason") or f"{missing} for CUDA"
    why_not = "" if _run_time is None else _run_time.why_not()
    return f"{installed}; and they cannot be compiled at run time: {why_not}" if why_not else installed


def cuda_note() -> str:
    """The state of the CUDA kernels, also without a GPU: loaded, for which GPUs, or why not."""
    if _run_time is not None and _run_time.serves:
        problem = _run_time.problem()
        return f"none: {problem}" if problem else f"{_run_time.note()}{_unsupported_gpus(_run_time.can_serve)}"
    if has_kernel("dcnv3", "cuda"):
        facts = build_facts().get("cuda", {})
        if not facts.get("toolkit"):
            return "loaded"
        architectures = ", ".join(facts["architectures"])
        hint = ": build with TORCH_CUDA_ARCH_LIST"

        def supported(capability: tuple[int, int]) -> bool:
            return any(_runs_on(architecture, capability) for architecture in facts["architectures"])

        return f"loaded; built with CUDA {facts['toolkit']} for {architectures}{_unsupported_gpus(supported, hint)}"
    if torch.version.cuda is None and any(_FOLDER.glob("_C_cuda.*so")):
        return f"installed, but not loaded: this torch has no CUDA ({torch.__version__})"
    return f"none: {_reason('cuda')}"


def _unsupported_gpus(supported: Callable[[tuple[int, int]], bool], hint: str = "") -> str:
    """Names the GPUs of this machine that there are no CUDA kernels for."""
    if not torch.cuda.is_available():
        return ""
    gpus = {
        torch.cuda.get_device_name(i): torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())
    }
    names = [
        f"{name} (compute capability {major}.{minor})"
        for name, (major, minor) in gpus.items()
        if not supported((major, minor))
    ]
    return f", but not for {', '.join(names)}{hint}" if names else ""


def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for an architecture runs on a GPU: "sm_90" is for one major version, "compute_90" also for newer."""
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)
    if match is None:
        return False
    kind, major, minor, feature = match.groups()
    own = int(major), int(minor)
    if feature == "a":
        return own == capability
    return own <= capability and (kind == "compute" and not feature or own[0] == capability[0])
