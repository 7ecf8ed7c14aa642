# SPDX-License-Identifier: MIT
"""Which backend serves DCNv3 on each device, and why not a faster one."""

from dataclasses import dataclass

import torch

_KEYS = {"cpu": "CPU", "cuda": "CUDA", "mps": "MPS", "xpu": "XPU"}


@dataclass(frozen=True)
class Backend:
    """What serves a kind of device."""

    device: str
    name: str
    reason: str  # why not a faster one; empty for a compiled kernel


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
        return Backend(device, "compiled kernel", "")
    return Backend(device, "plain torch", f"this version of internimage has no compiled kernel for {device}")
