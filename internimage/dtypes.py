# SPDX-License-Identifier: MIT
"""The dtypes that tensors have in files and in models: one table of their names, and what is asked of it.

Nothing here imports torch before it is needed, since options and settings are checked before torch is loaded.

float8 and types of less than a byte are not in the table: such weights go with scales, which no checkpoint of this
package's models has, and no operator of the models computes in them.
"""

from typing import TYPE_CHECKING

from .values import Choice

if TYPE_CHECKING:
    import torch

FLOATING = ("float64", "float32", "bfloat16", "float16")  # of weights, and of what operators compute in
# values of a kind convert to each other, and to no other kind
_KINDS = {
    "weights": FLOATING,
    "counts": ("int64", "int32", "int16", "int8", "uint8"),
    "flags": ("bool",),
}
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names}

SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # accepted everywhere; the long names are printed
NAMES = tuple(SHORT.values())  # that models run in
DTYPE = Choice(NAMES, SHORT)
FILE_DTYPE = Choice(("float32", "float16"), {"fp32": "float32", "fp16": "float16"})  # that models are exported in


def torch_dtype(name: str) -> "torch.dtype":
    """The dtype of a name of the table, long or short."""
    import torch

    name = SHORT.get(name, name)
    if name not in _KIND_OF:
        raise ValueError(f"there is no dtype '{name}'; there are {', '.join(_KIND_OF)}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def name_of(dtype: "torch.dtype") -> str:
    """Such as "float32"."""
    return str(dtype).removeprefix("torch.")


def problem_of(dtype: "torch.dtype") -> str:
    """Why tensors of this dtype cannot be used, for messages; empty for one of the table."""
    if name_of(dtype) in _KIND_OF:
        return ""
    return f"{name_of(dtype)}; weights are {', '.join(FLOATING[:-1])} or {FLOATING[-1]}"


def is_weights(dtype: object) -> bool:
    """Whether it is a dtype that weights may have."""
    import torch

    return isinstance(dtype, torch.dtype) and name_of(dtype) in FLOATING


def same_kind(one: "torch.dtype", other: "torch.dtype") -> bool:
    """Whether values of two dtypes of the table convert to each other."""
    return _KIND_OF.get(name_of(one)) == _KIND_OF.get(name_of(other))
