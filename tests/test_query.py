# SPDX-License-Identifier: MIT
"""The operator of DCNv3's query, against its formula in float64. Needs the operators alone, not the layers."""

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close
from test_gelu import exact_gelu
from test_layer_norm import exact_layer_norm

from internimage import ops  # noqa: F401  (defines the operator)
from internimage.extension import has_kernel

query = torch.ops.internimage.query
on_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)


def exact_query(input, conv_weight, conv_bias, norm_weight, norm_bias, stride, padding, eps):
    bias = None if conv_bias is None else conv_bias.double()
    x = F.conv2d(
        input.double().permute(0, 3, 1, 2), conv_weight.double(), bias, stride, padding, groups=len(conv_weight)
    )
    return exact_gelu(exact_layer_norm(x.permute(0, 2, 3, 1), norm_weight, norm_bias, eps))


def draw(size, channels, kernel, dtype=torch.float32, bias=True):
    """Tensors of a call; activations are not centered, and no tensor is symmetric."""
    return (
        (torch.randn(*size, channels) + 0.5).to(dtype),
        torch.randn(channels, 1, *kernel).to(dtype),
        torch.randn(channels).to(dtype) if bias else None,
        torch.randn(channels).to(dtype),
        torch.randn(channels).to(dtype),
    )


def check(tensors, stride, padding, eps=1e-6):
    output = query(*tensors, stride, padding, eps)
    assert output.dtype == tensors[0].dtype and output.is_contiguous()
    assert_close(output, exact_query(*tensors, stride, padding, eps))


@on_dtypes
@pytest.mark.parametrize("channels", [1, 3, 16, 70, 515])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 5), (4, 2)], ids=str)
def test_query_operator(kernel, channels, dtype):
    """Every tail of channels; rows of which some pixels go four by four."""
    for padding in ([0, 0], [1, 1], [2, 2], [7, 3]):
        check(draw((2, 6, 11), channels, kernel, dtype), [1, 1], padding)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stride", [[2, 2], [2, 1], [1, 3], [40, 40]], ids=str)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 5), (4, 2)], ids=str)
def test_query_operator_with_a_stride(kernel, stride, dtype):
    for padding in ([0, 0], [1, 2], [6, 6]):
        check(draw((2, 7, 19), 20, kernel, dtype), stride, padding)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (2, 7)], ids=str)
def test_query_operator_of_small_images(kernel, bias):
    """From one that the padded kernel just covers on; the sum of no tap at all is the bias."""
    for height in (1, 2, 4):
        for width in (1, 2, 3, 4, 5, 6):
            check(draw((1, height, width), 6, kernel, torch.float64, bias), [1, 1], [kernel[0], kernel[1]])
            check(draw((1, height, width), 6, kernel, torch.float64, bias), [1, 1], [kernel[0] // 2, kernel[1] // 2])


@pytest.mark.parametrize("width", [1, 3, 4, 5, 63, 64, 65, 66, 67, 300])
def test_query_operator_of_long_rows(width):
    """Longer than a strip, whose length depends on the channels: 64 pixels of 64."""
    check(draw((1, 3, width), 64, (3, 3), torch.float32), [1, 1], [1, 1])
    check(draw((1, 2, width), 1500, (3, 3), torch.float32), [1, 1], [1, 1])


def test_query_operator_of_any_layout():
    input, conv_weight, conv_bias, norm_weight, norm_bias = draw((2, 5, 6), 12, (3, 3), torch.float64)
    strided = input.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    weight = conv_weight.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    wide = torch.randn(12, 3, dtype=torch.float64)
    check((strided, weight, wide[:, 0], wide[:, 1], wide[:, 2]), [1, 1], [1, 1], 0.5)
    check(
        (input[:1].expand(3, 5, 6, 12), conv_weight, conv_bias, norm_weight[:1].expand(12), norm_bias), [1, 1], [1, 1]
    )


@pytest.mark.skipif(not has_kernel("query", "cpu"), reason="needs the compiled CPU kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [16, 70])
def test_threads_and_batches_do_not_change_a_bit(channels, dtype):
    tensors = draw((5, 40, 45), channels, (3, 3), dtype)
    expected, threads = query(*tensors, [1, 1], [1, 1], 1e-6), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(query(*tensors, [1, 1], [1, 1], 1e-6), expected)
    finally:
        torch.set_num_threads(threads)
    for i in range(5):
        assert torch.equal(query(tensors[0][i : i + 1], *tensors[1:], [1, 1], [1, 1], 1e-6)[0], expected[i])


def test_nan_and_infinity_stay_in_the_windows_that_see_them():
    tensors = draw((1, 9, 9), 20, (3, 3))
    tensors[0][0, 4, 4, 7], tensors[0][0, 0, 0, 3] = float("nan"), float("inf")
    seen = query(*tensors, [1, 1], [1, 1], 1e-6).isnan().any(-1)[0]
    expected = torch.zeros(9, 9, dtype=torch.bool)
    expected[3:6, 3:6] = expected[:2, :2] = True
    assert torch.equal(seen, expected)


@pytest.mark.parametrize("size", [(0, 5, 6), (2, 0, 3), (2, 3, 0)], ids=str)
def test_empty(size):
    tensors = draw(size, 4, (3, 3))
    if 0 in size[1:]:
        if not has_kernel("query", "cpu"):
            return  # torch refuses some of them
        output = query(*tensors, [1, 1], [2, 2], 1e-6)  # sees padding alone: the bias
        alone = exact_gelu(exact_layer_norm(tensors[2], tensors[3], tensors[4], 1e-6))
        assert_close(output, alone.expand(output.shape))
    else:
        assert query(*tensors, [2, 1], [1, 1], 1e-6).shape == (0, 3, 6, 4)


WRONG = [
    (0, torch.randn(5, 6, 4), "input must be"),
    (0, torch.randn(2, 5, 6, 0), "input must be"),
    (0, torch.randn(2, 5, 6, 3), "conv_weight must be"),
    (0, torch.randn(2, 2, 6, 4), "does not fit"),
    (1, torch.randn(4, 2, 3, 3), "conv_weight must be"),
    (1, torch.randn(4, 3, 3), "conv_weight must be"),
    (1, torch.randn(4, 1, 0, 3), "out of range"),
    (1, torch.randn(4, 1, 3, 3).double(), "conv_weight must be .* input's dtype"),
    (2, torch.randn(3), "must be vectors of C"),
    (2, torch.randn(1), "must be vectors of C"),
    (3, torch.randn(4, 1), "must be vectors of C"),
    (4, torch.randn(4).bfloat16(), "must be vectors of C in input's dtype"),
    (5, [0, 1], "out of range"),
    (5, [1, 1, 1], "pairs"),
    (5, [1 << 62, 1], "out of range"),
    (6, [-1, 0], "out of range"),
    (6, [1 << 62, 0], "out of range"),
]


@pytest.mark.skipif(not has_kernel("query", "cpu"), reason="needs the compiled CPU kernels")
@pytest.mark.parametrize(
    "place, value, message", WRONG, ids=lambda value: str(value)[:20] if isinstance(value, str) else ""
)
def test_query_operator_names_what_does_not_fit(place, value, message):
    arguments = [*draw((2, 5, 6), 4, (3, 3)), [1, 1], [0, 0], 1e-6]
    arguments[place] = value
    with pytest.raises(RuntimeError, match=f"internimage::query: .*{message}") as error:
        query(*arguments)
    assert len(str(error.value).splitlines()[0]) < 200


def test_query_operator_is_well_behaved():
    tensors = draw((2, 5, 6), 7, (3, 5))
    torch.library.opcheck(query, (*tensors, [1, 2], [1, 0], 1e-6))
    torch.library.opcheck(query, (*draw((1, 3, 4), 2, (1, 1), torch.float64, bias=False), [1, 1], [0, 0], 1e-6))
