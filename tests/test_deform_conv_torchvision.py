# SPDX-License-Identifier: MIT
"""Deformable convolution by torchvision's kernels and our rules for what is outside, as it is on CUDA and MPS.

Here on a CPU, whose kernels of torchvision have the same semantics; our own serve there otherwise.
"""

import math
import os

import deform_oracle
import pytest
import strategies
import torch
from deform_oracle import FORMATS, Problem, assert_all_close
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from internimage.ops import deform_conv_torchvision

EXAMPLES = int(os.environ.get("INTERNIMAGE_TEST_EXAMPLES", 100))  # that hypothesis draws
HALF = [torch.bfloat16, torch.float16]

pytest.importorskip("torchvision", reason="needs torchvision")


def by_torchvision(problem: Problem, wanted=(True,) * 5) -> dict:
    tensors, arguments = problem.operands()
    output = deform_conv_torchvision.forward(*tensors, *arguments)
    grads = deform_conv_torchvision.backward(problem.grad_output, *tensors, *arguments, False, list(wanted))
    grads = dict(zip(("input", "offset", "mask", "weight", "bias"), grads, strict=True))
    return {"output": output, **{name: grads[name] for name in problem.tensors}}


@settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(problem=strategies.deform_problems(), memory_format=st.sampled_from(list(FORMATS.values())))
def test_formula(problem, memory_format):
    results = by_torchvision(problem.stored(memory_format))
    assert_all_close(results, deform_oracle.output_and_gradients(problem), 1e-11, least=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_other_dtypes(memory_format, dtype):
    problem = deform_oracle.draw(3, 2, (7, 8), 20, 6, padding=(1, 1), offset_groups=2).map(lambda t: t.to(dtype))
    results = by_torchvision(problem.stored(FORMATS[memory_format]))
    assert results["output"].is_contiguous(memory_format=FORMATS[memory_format])
    assert {t.dtype for t in results.values()} == {dtype}
    assert_all_close(results, deform_oracle.output_and_gradients(problem))


def test_points_that_are_nowhere():
    """Neither their offsets nor their masks matter, whatever they are."""
    problem = deform_oracle.draw(4, padding=(1, 1), offset_groups=2)
    problem.offset.view(-1)[::5] = math.nan
    gone = problem.offset.isnan().unflatten(1, (-1, 2)).any(2)
    problem.mask[gone] = math.inf
    results = by_torchvision(problem)
    assert_all_close(results, deform_oracle.output_and_gradients(problem), 1e-11)
    assert not results["mask"][gone].any()


def test_gradients_that_are_not_wanted_are_empty():
    problem = deform_oracle.draw(5, padding=(1, 1))
    expected, found = by_torchvision(problem), by_torchvision(problem, (False, True, False, False, True))
    for name in ("input", "mask", "weight"):
        expected[name] = expected[name].new_empty(0)
    assert_all_close(found, expected, 1e-13)


def test_empty_batch():
    problem = deform_oracle.draw(6, 0, padding=(1, 1))
    results = by_torchvision(problem)
    assert {name: t.shape for name, t in results.items() if name != "output"} == {
        name: t.shape for name, t in problem.tensors.items()
    }
    assert results["output"].shape == (0, 6, 5, 6)
