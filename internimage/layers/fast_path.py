# SPDX-License-Identifier: MIT
"""When layers may take the fast paths of a CPU."""

import torch
from torch import Tensor, nn

from ..ops.transforms import is_transformed

# A subclass of tensors, such as a quantized weight, may have no memory that kernels can read, and decides itself what
# an operator of torch does with it.
PLAIN_TYPES = (Tensor, nn.Parameter)


def is_plain(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether x is a plain CPU tensor and no autocast, compilation, export, tracing or torch.func is active.

    Also False if a parameter is a tensor of another class than `PLAIN_TYPES`, is on another device, or has another
    dtype than x.
    """
    # called by every layer, so it may take only microseconds: no generators, and the cheapest checks first
    if torch.compiler.is_compiling() or type(x) is not Tensor or not x.is_cpu or torch.jit.is_tracing():
        return False
    for parameter in parameters:
        if parameter is None:
            continue
        if type(parameter) not in PLAIN_TYPES or parameter.dtype != x.dtype or not parameter.is_cpu:
            return False
    return not torch.is_autocast_enabled("cpu") and not is_transformed()


def use_fast_path(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether this is inference on a CPU: `is_plain`, and no autograd is active."""
    if torch.is_grad_enabled():
        if type(x) is not Tensor or x.requires_grad:
            return False
        for parameter in parameters:
            if parameter is not None and parameter.requires_grad:
                return False
    return is_plain(x, *parameters)


def has_hooks(*modules: nn.Module) -> bool:
    """Whether a module has forward hooks, its own or global ones, which run only if the module is called.

    So does a `forward` that was set on the module itself, which is how some libraries hook into it.
    """
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            return True
    return bool(nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks)
