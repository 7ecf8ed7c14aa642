# SPDX-License-Identifier: MIT
"""What test_nvrtc.py runs on the stand-in for CUDA with all variants of the kernels: which are launched, how, and that
the numbers are right. INTERNIMAGE_CUDA_VARIANTS is "tiles,window,fixed"."""

import re

import cuda_host
import pytest
import torch
from conftest import assert_close

from cuda_stand_in.on_stand_in import CASES, OP, OP_BACKWARD, draw, host, stand_in  # noqa: F401
from internimage.ops import dcnv3_reference as reference


def launches(stand_in) -> list[tuple[str, int, int]]:  # noqa: F811
    """Family, blocks and threads of a block of each launch."""
    found = []
    for event in stand_in.events("launch"):
        mangled, blocks, threads = re.search(
            r"cuda\d+(\w+?_kernel)I.* grid=(\d+),1,1 block=(\d+),1,1 shared=0", event
        ).groups()
        found.append((mangled.removesuffix("_kernel").removesuffix("3x3"), int(blocks), int(threads)))
    return found


def expected_of(on_cpu, geometry):
    exact = [t.double() for t in on_cpu]
    output = reference.dcnv3(*exact[:3], *geometry)
    return output, reference.dcnv3_backward(exact[3], *exact[:3], *geometry, False, [True] * 3)


@pytest.mark.parametrize("dtype", cuda_host.DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_forward(case, dtype, host, stand_in):  # noqa: F811
    geometry, on_cpu, tensors = draw(dtype, **CASES[case])
    host.choose("tiles")
    host.forward(*on_cpu[:3], *geometry)  # so that its kernel can be run by its name
    output = OP(*tensors[:3], *geometry)
    assert host.library.last_message() == b""
    assert_close(output.cpu(), expected_of(on_cpu, geometry)[0])
    ((family, _, threads),) = launches(stand_in)
    serves = case != "general" and dtype != torch.float64
    assert (family, threads) == ("tiles" if serves else "forward", 256)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_backward(case, dtype, host, stand_in):  # noqa: F811
    """Without grad_input, which torch's kernels round: they do not run."""
    has_windows = case in ("plain", "softmax", "no center")
    geometry, on_cpu, tensors = draw(dtype, **CASES[case], **({"n": 3, "size": (9, 10)} if has_windows else {}))
    host.choose("window")
    host.backward(on_cpu[3], *on_cpu[:3], *geometry)
    grads = OP_BACKWARD(tensors[3], *tensors[:3], *geometry, False, [True] * 3)
    assert host.library.last_message() == b""
    for result, right in zip(grads[1:], expected_of(on_cpu, geometry)[1][1:]):
        assert_close(result.cpu(), right)
    ((family, blocks, threads),) = launches(stand_in)
    if has_windows:
        tiles, groups = -(-9 // 4) * -(-10 // 8), 2
        assert (family, blocks, threads) == ("window", 3 * tiles * groups, 32)
    else:
        assert (family, threads) == ("backward", 256)


@pytest.mark.parametrize("value", [None, float("nan")], ids=["finite", "nan"])
@pytest.mark.parametrize("case", CASES)
def test_deterministic_backward(case, value, host, stand_in):  # noqa: F811
    geometry, on_cpu, tensors = draw(torch.float32, **CASES[case])
    host.choose("fixed")
    host.backward(on_cpu[3], *on_cpu[:3], *geometry, deterministic=True)
    expected = expected_of(on_cpu, geometry)[1]
    if value is not None:
        tensors[3].view(-1)[5] = value
    before = stand_in.synchronized
    grads = OP_BACKWARD(tensors[3], *tensors[:3], *geometry, True, [True] * 3)
    assert host.library.last_message() == b"" and stand_in.synchronized == before
    families = [family for family, _, _ in launches(stand_in)]
    assert families == ["fixed_range", "fixed_sum", "fixed_slow", "fixed_round", "backward"]
    if value is None:
        for result, right in zip(grads, expected):
            assert_close(result.cpu(), right)
    else:
        is_nan = grads[0].cpu().isnan()
        assert is_nan.any() and not is_nan.all()


def test_without_the_gradient_of_the_input(host, stand_in):  # noqa: F811
    geometry, on_cpu, tensors = draw(torch.float32)
    host.choose("fixed")
    host.backward(on_cpu[3], *on_cpu[:3], *geometry, deterministic=True)
    OP_BACKWARD(tensors[3], *tensors[:3], *geometry, True, [False, True, True])
    assert [family for family, _, _ in launches(stand_in)] == ["backward"]
