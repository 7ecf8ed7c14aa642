# SPDX-License-Identifier: MIT
"""One table of dtypes: long and short names are accepted, the long ones are printed."""

import pytest
import torch

from internimage import dtypes
from internimage.ops.arguments import FLOATING


@pytest.mark.parametrize(
    ("names", "dtype"),
    [
        (("fp32", "float32"), torch.float32),
        (("bf16", "bfloat16"), torch.bfloat16),
        (("fp16", "float16"), torch.float16),
    ],
)
def test_short_and_long_names(names, dtype):
    short, long = names
    assert dtypes.torch_dtype(short) == dtypes.torch_dtype(long) == dtype
    assert dtypes.DTYPE.parse(short) == dtypes.DTYPE.parse(long) == dtypes.name_of(dtype) == long


def test_every_name_is_one_of_torch():
    table = ["float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]
    assert [dtypes.name_of(dtypes.torch_dtype(name)) for name in table] == table
    assert FLOATING == tuple(getattr(torch, name) for name in table[:4])
    for wrong in ("float8_e4m3fn", "double", "torch.float32", ""):
        with pytest.raises(ValueError, match=f"there is no dtype '{wrong}'; there are float64, "):
            dtypes.torch_dtype(wrong)


def test_kinds():
    assert dtypes.same_kind(torch.float64, torch.bfloat16) and dtypes.same_kind(torch.uint8, torch.int64)
    assert not dtypes.same_kind(torch.float32, torch.int32) and not dtypes.same_kind(torch.bool, torch.uint8)
    assert dtypes.is_weights(torch.float16)
    assert not any(map(dtypes.is_weights, (torch.int8, torch.float8_e5m2, "float32", "torch.float32", None)))
    assert dtypes.problem_of(torch.bool) == ""
    assert dtypes.problem_of(torch.complex64) == "complex64; weights are float64, float32, bfloat16 or float16"
