# SPDX-License-Identifier: MIT
"""Products with a weight by oneDNN in CPU inference.

torch calls MKL in float32, which is slower for the shapes of linear layers on Intel's processors and more so on AMD's,
after it has written the bias to the whole output.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Operators behind torch.compile's fused linear layers. They are not public, so their schemas are checked.
_PRODUCT = (
    "mkldnn::_linear_pointwise(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm) -> Tensor Y"
)
_PACK = "mkldnn::_reorder_linear_weight(Tensor self, int? batch_size=None) -> Tensor Y"
MIN_ROWS = 8  # with fewer, reading the weight takes most of the time, and torch's product is as fast


def has_operator(name: str, schema: str) -> bool:
    """Whether `torch.ops.mkldnn` has an operator with this very schema."""
    try:
        return str(getattr(torch.ops.mkldnn, name).default._schema) == schema
    except (AttributeError, RuntimeError):
        return False


def _dtypes() -> frozenset[torch.dtype]:
    """The dtypes in which oneDNN's product is used."""
    if not has_operator("_linear_pointwise", _PRODUCT):
        return frozenset()
    has_bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return frozenset({torch.float32} | ({torch.bfloat16} if has_bfloat16 else set()))


_DTYPES = _dtypes()
CAN_PACK = bool(_DTYPES) and has_operator("_reorder_linear_weight", _PACK)


def has_product(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies matrices of a dtype on this processor."""
    return dtype in _DTYPES


def multiplied_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which matrices of a dtype are multiplied.

    Float32 for a half type that the processor has no products of: torch would emulate them, many times as slowly.
    """
    in_float = dtype.itemsize < 4 and not has_product(dtype) and has_product(torch.float32)
    return torch.float32 if in_float else dtype


def pack(weight: Tensor, rows: int) -> Tensor:
    """A copy of a linear layer's weight in oneDNN's own layout, which a product otherwise brings it into in every call.

    Args:
        weight: (out_features, in_features), of a dtype that `has_product`; requires `CAN_PACK`.
        rows: About how many rows inputs have.

    Returns:
        A tensor that is good for oneDNN's products only.
    """
    return torch.ops.mkldnn._reorder_linear_weight.default(weight.detach(), rows)


def product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` in inference on a CPU, by oneDNN where that is not slower.

    Args:
        input: (..., in_features).
        weight, bias: Of the layer.
    """
    if input.numel() < MIN_ROWS * input.shape[-1]:
        return F.linear(input, weight, bias)
    if has_product(input.dtype):
        return torch.ops.mkldnn._linear_pointwise.default(input, weight, bias, "none", [], "")
    if multiplied_in(input.dtype) != input.dtype:
        bias = None if bias is None else bias.float()
        wide = torch.ops.mkldnn._linear_pointwise.default(input.float(), weight.float(), bias, "none", [], "")
        return wide.to(input.dtype)
    return F.linear(input, weight, bias)
