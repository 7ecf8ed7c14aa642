# SPDX-License-Identifier: MIT
"""Layer norm for inference: `torch.ops.internimage.layer_norm(input, weight, bias, eps)`, over the last axis.

`weight` and `bias` are vectors of its size and of `input`'s dtype. Defined on every device, without gradients; only the
compiled CPU kernel makes it worth calling.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_library = torch.library.Library("internimage", "FRAGMENT")
_library.define(
    "layer_norm(Tensor input, Tensor weight, Tensor bias, float eps) -> Tensor", tags=torch.Tag.pt2_compliant_tag
)


def _layer_norm(input: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(input, weight.shape, weight, bias, eps)


_library.impl("layer_norm", _layer_norm, "CompositeExplicitAutograd")


@torch.library.register_fake("internimage::layer_norm", lib=_library)
def _fake(input: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def has_layer_norm_kernel() -> bool:
    """Whether the compiled kernel for CPUs is there."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("internimage::layer_norm", "CPU")
