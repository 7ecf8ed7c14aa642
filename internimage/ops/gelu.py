# SPDX-License-Identifier: MIT
"""GELU and its gradient::

    torch.ops.internimage.gelu(input) = input * Phi(input)
    torch.ops.internimage.gelu_(input)    input <- the same
    torch.ops.internimage.gelu_backward(grad_output, input) = grad_output * (Phi(input) + input * phi(input))

with the cumulative distribution function Phi and the density phi of the normal distribution, as `torch.nn.GELU`. Half
types are computed in float32. Defined on every device and not differentiable. The output is contiguous; in place, the
compiled CPU kernel takes contiguous tensors only.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import check_one_device
from .registration import library

library.define("gelu(Tensor input) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
library.define("gelu_backward(Tensor grad_output, Tensor input) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
library.define("gelu_(Tensor(a!) input) -> ()", tags=torch.Tag.pt2_compliant_tag)


def _gelu(input: Tensor) -> Tensor:
    return F.gelu(input.contiguous())


def _gelu_(input: Tensor) -> None:
    input.copy_(F.gelu(input))


def _gelu_backward(grad_output: Tensor, input: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(grad_output.contiguous(), input.contiguous())


library.impl("gelu_backward", _gelu_backward, "CompositeExplicitAutograd")
library.impl("gelu", _gelu, "CompositeExplicitAutograd")
library.impl("gelu_", _gelu_, "CompositeExplicitAutograd")


@torch.library.register_fake("internimage::gelu", lib=library)
def _fake(input: Tensor) -> Tensor:
    return torch.empty_like(input, memory_format=torch.contiguous_format)


@torch.library.register_fake("internimage::gelu_backward", lib=library)
def _fake_backward(grad_output: Tensor, input: Tensor) -> Tensor:
    check_one_device({"input": input, "grad_output": grad_output})
    return torch.empty_like(input, memory_format=torch.contiguous_format)


@torch.library.register_fake("internimage::gelu_", lib=library)
def _fake_in_place(input: Tensor) -> None:
    pass
