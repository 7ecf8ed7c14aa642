# SPDX-License-Identifier: MIT
"""When a layer may take a shorter way that only inference has."""

import torch
from torch import Tensor


def runs_plainly(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether x is an ordinary tensor on the CPU, and nothing records what is done with it.

    Not so for gradients, autocast, torch.compile, export, tracing of any kind and torch.func; nor where a parameter has
    another dtype than x.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not Tensor:
        return False
    tensors = [x, *(p for p in parameters if p is not None)]
    return (
        x.device.type == "cpu"
        and all(t.dtype == x.dtype and not t.is_meta for t in tensors)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        and not torch.is_autocast_enabled("cpu")
        and torch._C._functorch.maybe_current_level() is None
    )
