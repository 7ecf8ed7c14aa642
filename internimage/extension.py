# SPDX-License-Identifier: MIT
"""The compiled kernels: finding and loading them, and which backend serves DCNv3 on each device.

Importing never fails for want of a kernel: the plain-torch reference serves then, and the reason is kept.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent
_KEYS = {"cpu": "CPU", "cuda": "CUDA", "mps": "MPS", "xpu": "XPU"}
_failure = ""  # why a module that is there could not be loaded


@dataclass(frozen=True)
class Backend:
    """What serves a kind of device."""

    device: str
    name: str
    reason: str  # why not a faster one; empty for a compiled kernel


def load() -> None:
    """Load the compiled kernels, if they are there; keeps the reason if they are and cannot be loaded."""
    global _failure
    for path in sorted(_FOLDER.glob("_C.*so")):
        try:
            torch.ops.load_library(path)
            return
        except OSError as error:
            _failure = f"'{path.name}' could not be loaded: {error}"


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


def backend(device: str) -> Backend:
    """The backend of a kind of device, as the dispatcher sees it."""
    key = _KEYS.get(device)
    if key is not None and torch._C._dispatch_has_kernel_for_dispatch_key("internimage::dcnv3", key):
        detail = f", {torch.ops.internimage.cpu_capability()} instructions" if device == "cpu" else ""
        return Backend(device, f"compiled kernel{detail}", "")
    if device != "cpu":
        return Backend(device, "plain torch", f"this version of internimage has no compiled kernel for {device}")
    reason = _failure or build_facts().get("reason") or "the package was installed without its compiled module"
    return Backend(device, "plain torch", reason)
