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


def test_what_is_not_wanted_or_not_there():
    problem = deform_oracle.draw(3, padding=(1, 1))
    problem.offset.view(-1)[::5] = math.nan
    problem.mask.view(-1)[::3] = math.inf
    expected = deform_oracle.output_and_gradients(problem)
    found = by_torchvision(problem, (False, True, False, False, True))
    assert [found[name].numel() for name in ("input", "mask", "weight")] == [0, 0, 0]
    for name in ("output", "offset", "bias"):
        assert torch.equal(found[name].isfinite(), expected[name].isfinite())
    empty = by_torchvision(deform_oracle.draw(3, 0, padding=(1, 1)))
    assert empty["output"].shape == (0, 6, 5, 6)
