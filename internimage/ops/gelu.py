# SPDX-License-Identifier: MIT
"""GELU for inference::

    torch.ops.internimage.gelu(input) = input * Phi(input)
    torch.ops.internimage.gelu_(input)    input <- the same

with the cumulative distribution function Phi of the normal distribution, as `torch.nn.GELU`. Half types are computed in
float32. Defined on every device and not differentiable. The output is contiguous; in place, the compiled CPU kernel
takes contiguous tensors only.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .registration import library

library.define("gelu(Tensor input) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
library.define("gelu_(Tensor(a!) input) -> ()", tags=torch.Tag.pt2_compliant_tag)


def _gelu(input: Tensor) -> Tensor:
    return F.gelu(input.contiguous())


def _gelu_(input: Tensor) -> None:
    input.copy_(F.gelu(input))


library.impl("gelu", _gelu, "CompositeExplicitAutograd")
library.impl("gelu_", _gelu_, "CompositeExplicitAutograd")


@torch.library.register_fake("internimage::gelu", lib=library)
def _fake(input: Tensor) -> Tensor:
    return torch.empty_like(input, memory_format=torch.contiguous_format)


@torch.library.register_fake("internimage::gelu_", lib=library)
def _fake_in_place(input: Tensor) -> None:
    pass
