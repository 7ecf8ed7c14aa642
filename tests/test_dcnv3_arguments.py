# SPDX-License-Identifier: MIT
"""Wrong arguments of the operator: the error messages, which are raised before anything is computed."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from internimage.extension import has_kernel
from internimage.ops import dcnv3


class NoKernel(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.namespace != "internimage", f"{func} was called"
        return func(*args, **(kwargs or {}))


def valid() -> dict:
    return {
        "input": torch.zeros(2, 5, 6, 4),
        "offset": torch.zeros(2, 5, 6, 36),
        "mask": torch.zeros(2, 5, 6, 18),
        "kernel_size": 3,
        "padding": 1,
        "groups": 2,
    }


def refused(exception: type[Exception], words: tuple, **changes) -> None:
    with NoKernel(), pytest.raises(exception) as error:
        dcnv3(**{**valid(), **changes})
    assert error.type is exception
    for word in words:
        assert word in str(error.value), f"{word!r} is not in {str(error.value)!r}"


def test_the_valid_arguments_are_valid():
    assert dcnv3(**valid()).shape == (2, 5, 6, 4)


@pytest.mark.parametrize("name", ["input", "offset", "mask"])
@pytest.mark.parametrize("value", [None, 1.0, [[1.0]], np.zeros((2, 5, 6, 36), np.float32), "tensor"], ids=repr)
def test_no_tensor(name, value):
    refused(TypeError, (name, "torch.Tensor", type(value).__name__), **{name: value})


@pytest.mark.parametrize("name", ["input", "offset", "mask"])
@pytest.mark.parametrize("shape", [(), (36,), (5, 6, 36), (2, 5, 6, 36, 1)], ids=str)
def test_wrong_rank(name, shape):
    words = (name, "4 dimensions", "(batch, height, width, channels)", f"got {len(shape)}", str(shape))
    refused(ValueError, words, **{name: torch.zeros(shape)})


@pytest.mark.parametrize("name", ["input", "offset", "mask"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_unsupported_dtype(name, dtype):
    words = (name, "float64, float32, bfloat16 or float16", str(dtype))
    refused(TypeError, words, **{name: valid()[name].to(dtype)})


@pytest.mark.parametrize("name", ["offset", "mask"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_mixed_dtypes(name, dtype):
    refused(TypeError, (name, "dtype of input", "torch.float32", str(dtype)), **{name: valid()[name].to(dtype)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_mixes_all_dtypes_but_float64(dtype):
    halves = {name: valid()[name].to(dtype) for name in ("offset", "mask")}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert dcnv3(**{**valid(), **halves}).dtype == torch.bfloat16
        for name in ("offset", "mask"):
            words = (name, "dtype of input", "torch.float32", "torch.float64")
            refused(TypeError, words, **{name: valid()[name].double()})
        words = ("offset", "dtype of input", "torch.float64", str(dtype))
        refused(TypeError, words, input=valid()["input"].double(), **halves)


@pytest.mark.parametrize("name, named", [("offset", "offset"), ("mask", "mask"), ("input", "offset")])
def test_other_device(name, named):
    refused(ValueError, (named, "device of input", "cpu", "meta"), **{name: valid()[name].to("meta")})


@pytest.mark.parametrize("name, channels, formula", [("offset", 36, "points * 2"), ("mask", 18, "groups * points")])
@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("step", [-1, 1])
def test_shape_that_does_not_fit(name, channels, formula, axis, step):
    shape = [2, 5, 6, channels]
    shape[axis] += step
    words = (name, f"(2, 5, 6, {channels})", formula, str(tuple(shape)))
    refused(ValueError, words, **{name: torch.zeros(shape)})


@pytest.mark.parametrize(
    "changes, shape",
    [
        ({"stride": 2}, (2, 3, 3, 36)),
        ({"stride": (1, 2)}, (2, 5, 3, 36)),
        ({"padding": (2, 0)}, (2, 7, 4, 36)),
        ({"dilation": 2}, (2, 3, 4, 36)),
        ({"kernel_size": (5, 3)}, (2, 3, 6, 60)),
        ({"groups": 1}, (2, 5, 6, 18)),
        ({"groups": 4}, (2, 5, 6, 72)),
        ({"remove_center": True}, (2, 5, 6, 32)),
    ],
    ids=str,
)
def test_shape_that_the_geometry_asks_for(changes, shape):
    refused(ValueError, ("offset", f"must have shape {shape}", "(2, 5, 6, 36)"), **changes)


NAN, INF = float("nan"), float("inf")
REFUSED = [
    (dict(groups=3), ValueError, ("groups", "divide the channels of input", "4 channels", "3 groups")),
    (dict(groups=8), ValueError, ("groups", "divide the channels of input", "4 channels", "8 groups")),
    (dict(groups=0), ValueError, ("groups", "at least 1", "0")),
    (dict(groups=-2), ValueError, ("groups", "at least 1", "-2")),
    *((dict(groups=value), TypeError, ("groups", "an int", repr(value))) for value in (True, 2.0, "2", None, (2, 2))),
    (dict(input=torch.zeros(2, 5, 6, 0)), ValueError, ("input", "at least 1 channel", "0")),
    *(
        (dict(offset_scale=value), TypeError, ("offset_scale", "a number", repr(value)))
        for value in ("1.0", b"1", None, (1.0, 1.0), 1j, torch.tensor(1.0))
    ),
    *((dict(offset_scale=value), ValueError, ("offset_scale", "finite", repr(value))) for value in (NAN, INF, -INF)),
    *(
        (dict(kernel_size=size, remove_center=True), ValueError, ("remove_center", "kernel_size", "odd", pair))
        for size, pair in ((2, "(2, 2)"), ((2, 3), "(2, 3)"), ((3, 4), "(3, 4)"))
    ),
    (dict(kernel_size=1, remove_center=True), ValueError, ("remove_center", "1x1", "kernel_size")),
    *(
        (changes, ValueError, ("input of 5 x 6 pixels", "smaller than the kernel", *words))
        for changes, *words in (
            (dict(kernel_size=9), "kernel_size (9, 9)", "padding (1, 1)"),
            (dict(kernel_size=(3, 9)), "kernel_size (3, 9)"),
            (dict(dilation=(3, 1), padding=0), "dilation (3, 1)", "padding (0, 0)"),
        )
    ),
]


@pytest.mark.parametrize("changes, exception, words", REFUSED, ids=lambda value: str(value)[:60])
def test_refused(changes, exception, words):
    refused(exception, words, **changes)


PAIRS = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(
    "value",
    [
        3.0, (3, 3.0), "3", "33", ("3", "3"), None, (3, None), True, (True, 3), torch.tensor(3.0), np.array([3, 3]),
        {3, 5},
    ],
    ids=repr,
)  # fmt: skip
def test_pairs_of_something_else(name, value):
    refused(TypeError, (name, "an int or a (height, width) pair", repr(value)), **{name: value})


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("value", [(3, 3, 3), [3], ()], ids=repr)
def test_pairs_of_another_length(name, value):
    refused(ValueError, (name, "pair", f"got {len(value)} values", repr(value)), **{name: value})


@pytest.mark.parametrize("name, minimum", PAIRS.items())
def test_pairs_that_are_too_small(name, minimum):
    for value in (minimum - 1, (minimum - 1, 1), [1, minimum - 1], -7):
        refused(ValueError, (name, f"at least {minimum}", repr(value)), **{name: value})


# ---- calls of the operator itself, which bypass the checking function


def operator_arguments(**changes) -> list:
    geometry = dict(
        kernel_size=[3, 3], stride=[1, 1], padding=[1, 1], dilation=[1, 1], groups=2, offset_scale=1.0,
        remove_center=False, softmax=False,
    )  # fmt: skip
    tensors = {name: valid()[name] for name in ("input", "offset", "mask")}
    return list({**tensors, **geometry, **changes}.values())


def both_ways(arguments: list) -> list:
    """Calls of the operator and of its backward pass."""
    grad_output = torch.zeros(2, 5, 6, 4)
    return [
        lambda: torch.ops.internimage.dcnv3(*arguments),
        lambda: torch.ops.internimage.dcnv3_backward(grad_output, *arguments, False, [True] * 3),
    ]


@pytest.mark.parametrize("elsewhere", [("input",), ("offset",), ("mask",), ("input", "mask"), ("offset", "mask")])
def test_the_operator_refuses_tensors_of_several_devices(elsewhere):
    """torch calls the shape function if one tensor is on the meta device; its result would have no data."""
    for call in both_ways(operator_arguments(**{name: valid()[name].to("meta") for name in elsewhere})):
        with pytest.raises(ValueError, match="must be on the device of input"):
            call()


def test_layer_norm_refuses_tensors_of_several_devices():
    x, row = torch.zeros(3, 4), torch.zeros(4)
    for arguments in ((x.to("meta"), row, row), (x, row.to("meta"), row), (x, row, row.to("meta"))):
        with pytest.raises(ValueError, match="must be on the device of input"):
            torch.ops.internimage.layer_norm(*arguments, 1e-6)
    with pytest.raises(ValueError, match="residual must be on the device of input"):
        torch.ops.internimage.layer_norm(x, row, row, 1e-6, x.to("meta"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=repr)
def test_the_operator_refuses_an_offset_scale_that_is_not_finite(value):
    for call in both_ways(operator_arguments(offset_scale=value)):
        with pytest.raises((RuntimeError, ValueError), match="offset_scale must be finite"):
            call()


@pytest.mark.parametrize("height, kernel, stride", [(1, 3, 3), (1, 2, 2), (2, 4, 7), (1, 9, 9)])
def test_the_operator_refuses_a_kernel_that_does_not_fit(height, kernel, stride):
    """(height - kernel) / stride is between -1 and 0, which C++ rounds to 0 and Python to -1."""
    input, arguments = torch.zeros(1, height, 20, 1), ([kernel, 1], [stride, 1], [0, 0], [1, 1], 1, 1.0, False, False)
    offset, mask = torch.zeros(1, 1, 20, 2 * kernel), torch.zeros(1, 1, 20, kernel)
    with pytest.raises((RuntimeError, ValueError)):
        torch.ops.internimage.dcnv3(input, offset, mask, *arguments)
    with pytest.raises((RuntimeError, ValueError)):
        torch.ops.internimage.dcnv3_backward(mask[..., :1], input, offset, mask, *arguments, False, [True] * 3)


@pytest.mark.skipif(not has_kernel("dcnv3", "cpu"), reason="needs the compiled CPU kernels")
@pytest.mark.parametrize("name", ["kernel_size", "stride", "padding", "dilation"])
@pytest.mark.parametrize("value", [2**62, 2**40, 2**30, -1])
def test_the_operator_refuses_numbers_that_would_overflow(name, value):
    for call in both_ways(operator_arguments(**{name: [value, 3]})):
        with pytest.raises(RuntimeError, match="must"):
            call()


@pytest.mark.skipif(not has_kernel("dcnv3", "cpu"), reason="needs the compiled CPU kernels")
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"shape": (2, 5, 6, 5)}, "grad_output must have the output's shape"),
        ({"shape": (2, 6, 5, 4)}, "grad_output must have the output's shape"),
        ({"shape": (2, 5, 6)}, "grad_output must have the output's shape"),
        ({"dtype": torch.float64}, "grad_output must have input's dtype"),
        ({"output_mask": [True] * 2}, "output_mask must have 3 entries"),
        ({"output_mask": []}, "output_mask must have 3 entries"),
    ],
    ids=str,
)
def test_the_backward_refuses_what_does_not_fit(changes, message):
    grad_output = torch.zeros(changes.get("shape", (2, 5, 6, 4)), dtype=changes.get("dtype", torch.float32))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.internimage.dcnv3_backward(
            grad_output, *operator_arguments(), False, changes.get("output_mask", [True] * 3)
        )


@pytest.mark.skipif(not has_kernel("dcnv3", "cpu"), reason="needs the compiled CPU kernels")
def test_what_torch_says_is_passed_on():
    """Output and offset take 64 and 72 TiB, more than there are addresses. Before 2.13 torch does not tell."""
    n = 1 << 20
    input, value = torch.ones(1, 1, 1, 16), torch.zeros(1, 1, 1, 1)
    offset, mask = value.expand(1, n - 1, n - 1, 18), value.expand(1, n - 1, n - 1, 9)
    arguments = [3, 3], [1, 1], [n // 2, n // 2], [1, 1], 1, 1.0, False, True
    tells = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
    with pytest.raises(RuntimeError, match="you tried to allocate" if tells else "API call failed") as failure:
        torch.ops.internimage.dcnv3(input, offset, mask, *arguments)
    assert not tells or "API call failed" not in str(failure.value)
