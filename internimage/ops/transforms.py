# SPDX-License-Identifier: MIT
"""Operators under `torch.func` and in forward mode.

The rules of `torch.library.register_autograd` cover `backward()`, `torch.compile` and `torch.export`. The transforms of
`torch.func` (`grad`, `vjp`, `jacrev`, ...) reject them (as of torch 2.15), and forward mode ignores them: the tangent
is silently zero. For both, torch documents `torch.autograd.Function`, and `as_function` makes one of the same rules.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

Rule = Callable[..., object]


def is_transformed() -> bool:
    """Whether a `torch.func` transform or forward-mode differentiation is active; False in a compiled graph."""
    if torch.compiler.is_compiling():  # dynamo handles transforms through the registered rules
        return False
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def as_function(
    op: Callable[..., Tensor | tuple[Tensor, ...]],
    tensors: int,
    setup_context: Rule,
    backward: Rule,
    vmap: Rule,
    jvp: Rule,
) -> type[torch.autograd.Function]:
    """An operator as an autograd function that composes with every transform of `torch.func`.

    Args:
        op: The operator.
        tensors: How many of its leading arguments are tensors.
        setup_context: As for `torch.library.register_autograd`.
        backward: (ctx, *grad_outputs) -> a gradient or None for each argument; itself differentiable under transforms.
        vmap: As for `torch.library.register_vmap`.
        jvp: (tensors, tangents, other arguments) -> tangents of the outputs. None as a tangent means zero.
    """

    def keep_for_both_modes(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
        setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:tensors])
        ctx.others = inputs[tensors:]

    rules = {
        "forward": staticmethod(lambda *arguments: op(*arguments)),
        "setup_context": staticmethod(keep_for_both_modes),
        "backward": staticmethod(backward),
        "vmap": staticmethod(vmap),
        "jvp": staticmethod(lambda ctx, *tangents: jvp(ctx.saved_tensors, tangents[:tensors], ctx.others)),
    }
    return type(f"{op}_function", (torch.autograd.Function,), rules)
