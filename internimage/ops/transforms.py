# SPDX-License-Identifier: MIT
"""Operators under `torch.func` and in forward mode.

The autograd rules of `torch.library.register_autograd` serve `backward()`, `torch.compile` and `torch.export`. Under
`torch.func.grad`, `vjp`, `jacrev` and the like torch (seen in 2.15) refuses them, and in forward mode it ignores them:
a tangent is silently zero. There an operator is called as a `torch.autograd.Function` instead, torch's documented way
for both, made here of the same rules.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

Rule = Callable[..., object]


def is_transformed() -> bool:
    """Whether a `torch.func` transform or forward-mode differentiation is active; False in a compiled graph."""
    if torch.compiler.is_compiling():  # dynamo has ways of its own, through the registered rules
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
        tensors: How many of its arguments, the first ones, are tensors.
        setup_context: As for `torch.library.register_autograd`.
        backward: (ctx, *grad_outputs) -> a gradient or None for each argument, in functions that are differentiable
            under transforms themselves.
        vmap: As for `torch.library.register_vmap`.
        jvp: (tensors, tangents, other arguments) -> the outputs' tangents, where a tangent may be None for zero.
    """

    def keep(ctx, inputs, output) -> None:
        setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:tensors])
        ctx.others = inputs[tensors:]

    rules = {
        "forward": staticmethod(lambda *arguments: op(*arguments)),
        "setup_context": staticmethod(keep),
        "backward": staticmethod(backward),
        "vmap": staticmethod(vmap),
        "jvp": staticmethod(lambda ctx, *tangents: jvp(ctx.saved_tensors, tangents[:tensors], ctx.others)),
    }
    return type(f"{op}_function", (torch.autograd.Function,), rules)
