# SPDX-License-Identifier: MIT
"""When a layer may take an inference-only fast path."""

import torch
from torch import Tensor

from ..ops.transforms import is_transformed


def use_fast_path(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether x is a plain CPU tensor, and there is no autograd, autocast, compilation, export, tracing or torch.func.

    False also where a parameter has another dtype than x.
    """
    # a few microseconds with every layer: no loop over generators, and first what is decided soonest
    if torch.compiler.is_compiling() or type(x) is not Tensor or not x.is_cpu or torch.jit.is_tracing():
        return False
    records = torch.is_grad_enabled()
    if records and x.requires_grad:
        return False
    for parameter in parameters:
        if parameter is not None and (
            parameter.dtype != x.dtype or not parameter.is_cpu or (records and parameter.requires_grad)
        ):
            return False
    return not torch.is_autocast_enabled("cpu") and not is_transformed()


def has_hooks(*modules: torch.nn.Module) -> bool:
    """Whether a module has hooks, its own or global ones, so that it must be called by itself."""
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks:
            return True
    return bool(torch.nn.modules.module._global_forward_hooks or torch.nn.modules.module._global_forward_pre_hooks)
