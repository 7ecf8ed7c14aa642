# SPDX-License-Identifier: MIT
"""Wrong arguments of deformable convolution: the error messages, which are raised before anything is computed."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from internimage.ops import deform_conv2d

TENSORS = ("input", "offset", "weight", "bias", "mask")
MAPS = ("input", "offset", "weight", "mask")


class NoKernel(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.namespace != "internimage", f"{func} was called"
        return func(*args, **(kwargs or {}))


def valid() -> dict:
    """Two groups, two offset groups."""
    return {
        "input": torch.zeros(2, 4, 5, 6),
        "offset": torch.zeros(2, 36, 5, 6),
        "weight": torch.zeros(8, 2, 3, 3),
        "bias": torch.zeros(8),
        "mask": torch.zeros(2, 18, 5, 6),
        "padding": 1,
    }


def refused(exception: type[Exception], words: tuple, **changes) -> None:
    with NoKernel(), pytest.raises(exception) as error:
        deform_conv2d(**{**valid(), **changes})
    assert error.type is exception
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value), f"{word!r} is not in {str(error.value)!r}"


def test_the_valid_arguments_are_valid():
    assert deform_conv2d(**valid()).shape == (2, 8, 5, 6)


# ---- each tensor


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("value", [None, 1.0, [[1.0]], np.zeros((2, 4, 5, 6), np.float32), "tensor"], ids=repr)
def test_no_tensor(name, value):
    if value is None and name in ("bias", "mask"):
        assert deform_conv2d(**{**valid(), name: None}).shape == (2, 8, 5, 6)
    else:
        refused(
            TypeError, (name, "torch.Tensor", type(value).__name__ if value is not None else "None"), **{name: value}
        )


def test_a_mask_without_offsets():
    """It says what to pass for a mask alone."""
    refused(TypeError, ("mask", "offset must be a torch.Tensor", "None", "zeros"), offset=None)


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("rank", [0, 2, 3, 5])
def test_wrong_rank(name, rank):
    right = "1 dimension" if name == "bias" else "4 dimensions"
    refused(ValueError, (name, right, f"got {rank}", str((2,) * rank)), **{name: torch.zeros((2,) * rank)})


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_unsupported_dtype(name, dtype):
    words = (name, "float64, float32, bfloat16 or float16", str(dtype))
    refused(TypeError, words, **{name: valid()[name].to(dtype)})


@pytest.mark.parametrize("name", ["offset", "weight", "bias", "mask"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_mixed_dtypes(name, dtype):
    refused(TypeError, (name, "dtype of input", "torch.float32", str(dtype)), **{name: valid()[name].to(dtype)})


def test_autocast_mixes_all_dtypes_but_float64():
    halves = {name: valid()[name].half() for name in ("offset", "weight", "mask")}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert deform_conv2d(**{**valid(), **halves}).dtype == torch.bfloat16
        for name in ("offset", "weight", "bias", "mask"):
            words = (name, "dtype of input", "torch.float32", "torch.float64")
            refused(TypeError, words, **{name: valid()[name].double()})


@pytest.mark.parametrize("name", TENSORS)
def test_other_device(name):
    named = "offset" if name == "input" else name  # input is what the others are compared with
    refused(ValueError, (named, "device of input", "cpu", "meta"), **{name: valid()[name].to("meta")})


# ---- shapes of offset and mask


@pytest.mark.parametrize("name, channels", [("offset", 36), ("mask", 18)])
@pytest.mark.parametrize("axis", [0, 2, 3])
@pytest.mark.parametrize("step", [-1, 1])
def test_shape_that_does_not_fit(name, channels, axis, step):
    shape = [2, channels, 5, 6]
    shape[axis] += step
    refused(ValueError, (name, f"(2, {channels}, 5, 6)", str(tuple(shape))), **{name: torch.zeros(shape)})


@pytest.mark.parametrize("channels", [0, 1, 17, 19, 35])
def test_channels_of_offset_that_make_no_groups(channels):
    refused(ValueError, ("offset", "multiple of 18", str((2, channels, 5, 6))), offset=torch.zeros(2, channels, 5, 6))


@pytest.mark.parametrize("channels", [0, 9, 17, 36])
def test_channels_of_mask_are_half_of_the_offsets(channels):
    words = ("mask", "(2, 18, 5, 6)", str((2, channels, 5, 6)))
    refused(ValueError, words, mask=torch.zeros(2, channels, 5, 6))


@pytest.mark.parametrize(
    "changes, shape",
    [
        ({"stride": 2}, (2, 36, 3, 3)),
        ({"stride": (1, 2)}, (2, 36, 5, 3)),
        ({"padding": (2, 0)}, (2, 36, 7, 4)),
        ({"dilation": 2}, (2, 36, 3, 4)),
        ({"weight": torch.zeros(8, 2, 1, 3), "offset": torch.zeros(2, 12, 5, 6)}, (2, 12, 7, 6)),
    ],
    ids=["stride", "stride of columns", "padding", "dilation", "kernel"],
)
def test_shape_that_the_geometry_asks_for(changes, shape):
    refused(ValueError, ("offset", f"must have shape {shape}", "5, 6)"), **changes)


@pytest.mark.parametrize("name, channels", [("offset", 36), ("mask", 18)])
def test_swapped_height_and_width_are_pointed_out(name, channels):
    words = (name, f"(2, {channels}, 5, 6)", f"(2, {channels}, 6, 5)", "height and width", "swapped")
    refused(ValueError, words, **{name: torch.zeros(2, channels, 6, 5)})


@pytest.mark.parametrize("name, channels", [("offset", 36), ("mask", 18)])
def test_the_layout_of_dcnv3_is_pointed_out(name, channels):
    """Channels last; the message has the right shape and how to get it."""
    words = (name, f"(2, {channels}, 5, 6)", f"(2, 5, 6, {channels})", "channels last", "dcnv3", "permute(0, 3, 1, 2)")
    refused(ValueError, words, **{name: torch.zeros(2, 5, 6, channels)})


def test_the_layout_of_dcnv3_is_pointed_out_where_the_height_could_be_channels():
    """18 rows are as many as the channels of one offset group."""
    words = ("offset", "(2, 18, 6, 36)", "channels last")
    refused(ValueError, words, input=torch.zeros(2, 4, 18, 6), offset=torch.zeros(2, 18, 6, 36), mask=None)


# ---- groups, channels, geometry

REFUSED = [
    # three offset groups of four channels
    (dict(offset=torch.zeros(2, 54, 5, 6), mask=None), ("offset groups", "divide", "channels of input", "3", "4")),
    (dict(offset=torch.zeros(2, 144, 5, 6), mask=None), ("offset groups", "divide", "channels of input", "8", "4")),
    (dict(weight=torch.zeros(8, 3, 3, 3)), ("weight", "divide", "(8, 3, 3, 3)", "4")),
    (dict(weight=torch.zeros(8, 8, 3, 3)), ("weight", "divide", "(8, 8, 3, 3)", "4")),
    (dict(weight=torch.zeros(7, 2, 3, 3), bias=None), ("weight", "2 groups", "divide", "7 output channels")),
    (dict(weight=torch.zeros(8, 0, 3, 3)), ("weight", "(8, 0, 3, 3)")),
    (dict(weight=torch.zeros(0, 2, 3, 3)), ("weight", "(0, 2, 3, 3)")),
    (dict(weight=torch.zeros(8, 2, 0, 3)), ("weight", "(8, 2, 0, 3)")),
    (dict(input=torch.zeros(2, 0, 5, 6)), ("input", "(2, 0, 5, 6)")),
    (dict(bias=torch.zeros(7)), ("bias", "(8,)", "(7,)")),
    (dict(bias=torch.zeros(1)), ("bias", "(8,)", "(1,)")),
    (dict(weight=torch.zeros(8, 2, 9, 9)), ("5 x 6", "smaller than the kernel", "(9, 9)", "padding (1, 1)")),
    (dict(weight=torch.zeros(8, 2, 3, 9)), ("5 x 6", "smaller than the kernel", "(3, 9)")),
    (dict(dilation=(3, 1), padding=0), ("5 x 6", "smaller than the kernel", "dilation (3, 1)", "padding (0, 0)")),
    (dict(stride=0), ("stride", "at least 1", "0")),
    (dict(stride=(1, -2)), ("stride", "at least 1", "(1, -2)")),
    (dict(padding=-1), ("padding", "at least 0", "-1")),
    (dict(dilation=(0, 1)), ("dilation", "at least 1", "(0, 1)")),
    (dict(stride=(1, 1, 1)), ("stride", "pair", "got 3 values")),
    (dict(padding=[]), ("padding", "pair", "got 0 values")),
]


@pytest.mark.parametrize("changes, words", REFUSED, ids=lambda value: str(value)[:60])
def test_refused(changes, words):
    refused(ValueError, words, **changes)


@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
@pytest.mark.parametrize("value", [3.0, "3", None, (1, None), True, torch.tensor(3.0)], ids=repr)
def test_pairs_of_something_else(name, value):
    refused(TypeError, (name, "an int or a (height, width) pair", repr(value)), **{name: value})


def test_a_mask_in_the_place_of_the_stride():
    """It is the last argument; the message is one line, not the tensor's numbers."""
    refused(TypeError, ("stride", "an int or a (height, width) pair"), stride=valid()["mask"])


def test_a_batch_that_is_empty_is_checked_too():
    maps = {name: valid()[name][:0] for name in ("input", "mask")}
    refused(ValueError, ("offset", "(0, 36, 5, 6)", "(0, 36, 5, 5)"), offset=torch.zeros(0, 36, 5, 5), **maps)


def test_checks_are_made_under_compilation_too():
    """The same message, in the error that dynamo makes of it."""
    torch._dynamo.reset()
    compiled = torch.compile(deform_conv2d, fullgraph=True, backend="eager")
    arguments = {**valid(), "mask": torch.zeros(2, 18, 6, 5)}
    with pytest.raises(Exception, match=r"mask must have shape \(2, 18, 5, 6\)"):
        compiled(**arguments)


# ---- calls of the operator itself, which bypass the checking function


def operator_arguments(**changes) -> list:
    tensors = {name: valid()[name] for name in ("input", "offset", "mask", "weight", "bias")}
    others = dict(stride=[1, 1], padding=[1, 1], dilation=[1, 1], groups=2, offset_groups=2)
    return list({**tensors, **others, **changes}.values())


def both_ways(arguments: list) -> list:
    """Calls of the operator and of its backward pass."""
    grad_output = torch.zeros(2, 8, 5, 6)
    return [
        lambda: torch.ops.internimage.deform_conv2d(*arguments),
        lambda: torch.ops.internimage.deform_conv2d_backward(grad_output, *arguments, False, [True] * 5),
    ]


def test_the_valid_arguments_are_those_of_the_operator():
    output, grads = (call() for call in both_ways(operator_arguments()))
    assert output.shape == (2, 8, 5, 6) and [g.shape for g in grads] == [t.shape for t in operator_arguments()[:5]]


@pytest.mark.parametrize("elsewhere", [("input",), ("offset",), ("mask",), ("weight",), ("bias",), ("input", "weight")])
def test_the_operator_refuses_tensors_of_several_devices(elsewhere):
    """torch calls the shape function if one tensor is on the meta device; its result would have no data."""
    for call in both_ways(operator_arguments(**{name: valid()[name].to("meta") for name in elsewhere})):
        with pytest.raises(ValueError, match="must be on the device of input"):
            call()


@pytest.mark.parametrize(
    "changes",
    [
        {"offset": torch.zeros(2, 36, 5, 5)},
        {"offset": torch.zeros(2, 18, 5, 6)},
        {"mask": torch.zeros(2, 18, 6, 5)},
        {"mask": torch.zeros(1, 18, 5, 6)},
        {"weight": torch.zeros(8, 2, 5, 5)},
        {"weight": torch.zeros(8, 4, 3, 3)},
        {"offset_groups": 3},
        {"padding": [-1, 1]},
        {"padding": [2**62, 1]},
        {"stride": [0, 1]},
    ],
    ids=lambda changes: str(list(changes)[0]),
)
def test_the_operator_reads_nothing_out_of_bounds(changes):
    """It refuses what does not fit, in whatever words."""
    for call in both_ways(operator_arguments(**changes)):
        with pytest.raises((RuntimeError, ValueError, ZeroDivisionError)):
            call()
