# SPDX-License-Identifier: MIT
"""Which dtypes tensors have in a checkpoint and in a model: one table, for what is read, filled and converted to.

float8 and types of less than a byte are not in it: such weights go with scales, which no InternImage checkpoint has,
and no operator of the models computes in them.
"""

import torch

from ..ops.arguments import FLOATING

# values of a kind convert to each other, and to no other kind
_KINDS = {
    "weights": FLOATING,
    "counts": (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
    "flags": (torch.bool,),
}
_KIND_OF = {dtype: kind for kind, dtypes in _KINDS.items() for dtype in dtypes}


def name_of(dtype: torch.dtype) -> str:
    """Such as "float32"."""
    return str(dtype).removeprefix("torch.")


def problem_of(dtype: torch.dtype) -> str:
    """What is wrong with a tensor of this dtype, for messages; empty for one of the table."""
    if dtype in _KIND_OF:
        return ""
    *names, last = map(name_of, FLOATING)
    return f"{name_of(dtype)}; weights are {', '.join(names)} or {last}"


def is_weights(dtype: object) -> bool:
    """Whether weights may have this dtype."""
    return dtype in FLOATING


def same_kind(one: torch.dtype, other: torch.dtype) -> bool:
    """Whether values of two dtypes of the table convert to each other."""
    return _KIND_OF.get(one) == _KIND_OF.get(other)
