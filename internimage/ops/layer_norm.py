# SPDX-License-Identifier: MIT
"""Layer norm over the last axis for inference, fused with the scale and the sum of a residual block::

    torch.ops.internimage.layer_norm(input, weight, bias, eps, residual=None, scale=None)
        = residual + scale * layer_norm(input)
    torch.ops.internimage.add_layer_norm_(residual, input, weight, bias, eps, scale=None)
        residual <- the same
    torch.ops.internimage.norm_of_sum_(input, addend, weight, bias, eps)
        input <- input + addend, and returns layer_norm(input)

`weight`, `bias` and `scale` have shape (C,) and `input`'s dtype; `residual` has `input`'s shape and dtype. The compiled
kernel rounds once, at the end. Defined on every device and not differentiable; faster than torch's operators only with
the compiled CPU kernel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import check_one_device
from .registration import library

library.define(
    "layer_norm(Tensor input, Tensor weight, Tensor bias, float eps, Tensor? residual=None, Tensor? scale=None) "
    "-> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
library.define(
    "add_layer_norm_(Tensor(a!) residual, Tensor input, Tensor weight, Tensor bias, float eps, Tensor? scale=None) "
    "-> ()",
    tags=torch.Tag.pt2_compliant_tag,
)
library.define(
    "norm_of_sum_(Tensor(a!) input, Tensor addend, Tensor weight, Tensor bias, float eps) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def _layer_norm(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    output = F.layer_norm(input, weight.shape, weight, bias, eps)
    if scale is not None:
        output = output * scale
    return output if residual is None else residual + output


def _add_layer_norm_(
    residual: Tensor, input: Tensor, weight: Tensor, bias: Tensor, eps: float, scale: Tensor | None = None
) -> None:
    residual.copy_(_layer_norm(input, weight, bias, eps, residual, scale))


def _norm_of_sum_(input: Tensor, addend: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return _layer_norm(input.add_(addend), weight, bias, eps)


library.impl("norm_of_sum_", _norm_of_sum_, "CompositeExplicitAutograd")
library.impl("layer_norm", _layer_norm, "CompositeExplicitAutograd")
library.impl("add_layer_norm_", _add_layer_norm_, "CompositeExplicitAutograd")


@torch.library.register_fake("internimage::layer_norm", lib=library)
def _fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    others = {"weight": weight, "bias": bias, "residual": residual, "scale": scale}
    check_one_device({"input": input} | {name: tensor for name, tensor in others.items() if tensor is not None})
    return torch.empty_like(input, memory_format=torch.contiguous_format)


@torch.library.register_fake("internimage::add_layer_norm_", lib=library)
def _fake_in_place(
    residual: Tensor, input: Tensor, weight: Tensor, bias: Tensor, eps: float, scale: Tensor | None = None
) -> None:
    pass


@torch.library.register_fake("internimage::norm_of_sum_", lib=library)
def _fake_of_sum(input: Tensor, addend: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    check_one_device({"input": input, "addend": addend, "weight": weight, "bias": bias})
    return torch.empty_like(input, memory_format=torch.contiguous_format)
