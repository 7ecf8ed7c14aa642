# SPDX-License-Identifier: MIT
"""The operator of a block in CPU inference, against its formula in float64. Needs the operators alone, not the layers.

That it has the bits of the modules, and when models call it, is in test_fused_block.py.
"""

import pytest
import torch
import torch.nn.functional as F
from conftest import TOLERANCE, assert_close
from test_gelu import exact_gelu
from test_layer_norm import exact_layer_norm
from torch import Tensor

from internimage import ops  # noqa: F401  (defines the operator)
from internimage.extension import has_kernel
from internimage.ops import dcnv3_reference

pytestmark = pytest.mark.skipif(not has_kernel("block", "cpu"), reason="needs the compiled CPU kernels, and oneDNN")

EPS = 1e-6
NORMS = {  # which of the norms before and after the two branches, and whether there are scales
    "plain": ((True, True), (False, False), False),
    "post-norm, scaled": ((False, False), (True, True), True),
    "all norms, scaled": ((True, True), (True, True), True),
    "scaled": ((True, True), (False, False), True),
    "none": ((False, False), (False, False), False),
}
BY_TORCH, BY_ONEDNN, BY_ONEDNN_IN_FLOAT = range(3)


class Arguments:
    """Random ones of the operator, and what it computes."""

    def __init__(self, norms: str, channels: int, groups: int, blend: bool, dtype: torch.dtype) -> None:
        self.channels, self.groups = channels, groups
        before, after, scaled = NORMS[norms]
        self.norms = [self._norm(dtype) if there else None for there in (*before, *after)]
        self.scales = [self._row(channels, dtype) if scaled else None for _ in range(2)]
        self.conv = torch.randn(channels, 1, 3, 3).to(dtype) / 3, self._row(channels, dtype)
        self.query_norm = self._norm(dtype)
        self.blend = self._linear(channels, groups, dtype) if blend else None
        sizes = [(channels, channels), (channels, 18 * groups), (channels, 9 * groups)]
        sizes += [(channels, channels), (channels, 4 * channels), (4 * channels, channels)]
        self.linears = [self._linear(*size, dtype) for size in sizes]

    @staticmethod
    def _row(count: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(count).to(dtype)

    def _norm(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self._row(self.channels, dtype), self._row(self.channels, dtype)

    def _linear(self, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return (torch.randn(outputs, inputs) / inputs**0.5).to(dtype), self._row(outputs, dtype)

    def lists(self, method: int, packed: bool) -> tuple[list[Tensor | None], list[int], list[float]]:
        def product(weight: Tensor, bias: Tensor, joined: bool = True) -> list[Tensor | None]:
            pack = torch.ops.mkldnn._reorder_linear_weight
            return [weight, bias, pack(weight, 100) if packed and joined else None]

        input_proj, offset, mask, output_proj, fc1, fc2 = self.linears
        both = torch.cat([offset[0], mask[0]]), torch.cat([offset[1], mask[1]])
        weights: list[Tensor | None] = [t for norm in self.norms for t in (norm or (None, None))]
        weights += [*self.scales, *self.conv, *self.query_norm, *(self.blend or (None, None))]
        weights += [*product(*input_proj), *product(*both), *product(*offset, False), *product(*mask, False)]
        weights += [*product(*output_proj), *product(*fc1), *product(*fc2)]
        settings = [method, 8, 1, 1, 1, 1, 3, 3, 1, 1, 1, 1, 1, 1, self.groups, 0, 1]
        return weights, settings, [EPS] * 5 + [1.0]

    def exact(self, x: Tensor) -> Tensor:
        def norm(i: int, x: Tensor) -> Tensor:
            return x if self.norms[i] is None else exact_layer_norm(x, *(t.double() for t in self.norms[i]), EPS)

        def linear(of: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
            return F.linear(x, *(t.double() for t in of))

        def sample(x: Tensor) -> Tensor:
            weight, bias = (t.double() for t in self.conv)
            conv = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=self.channels).permute(0, 2, 3, 1)
            query = exact_gelu(exact_layer_norm(conv, *(t.double() for t in self.query_norm), EPS))
            projected, offset, mask = linear(input_proj, x), linear(offset_, query), linear(mask_, query)
            geometry = [3, 3], [1, 1], [1, 1], [1, 1], self.groups, 1.0, False, True
            y = dcnv3_reference.dcnv3(projected, offset, mask, *geometry)
            if self.blend:
                share = linear(self.blend, query).sigmoid().repeat_interleave(self.channels // self.groups, -1)
                y = y * (1 - share) + projected * share
            return linear(output_proj, y)

        input_proj, offset_, mask_, output_proj, fc1, fc2 = self.linears
        x = x.double()
        for i, branch in enumerate((sample, lambda x: linear(fc2, exact_gelu(linear(fc1, x))))):
            y = norm(2 + i, branch(norm(i, x)))
            x = x + (y if self.scales[i] is None else y * self.scales[i].double())
        return x


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("blend", [True, False])
@pytest.mark.parametrize("norms", NORMS)
@torch.no_grad()
def test_block_operator(norms, blend, packed):
    """float32, with channels that are no whole number of vectors, and chunks with and without a rest."""
    for channels, groups in ((16, 2), (21, 3), (64, 4)):
        arguments = Arguments(norms, channels, groups, blend, torch.float32)
        lists = arguments.lists(BY_ONEDNN, packed)
        for size, rows in (((2, 5, 7), 20), ((1, 4, 4), 16), ((1, 1, 3), 9), ((3, 1, 8), 1), ((0, 4, 4), 5)):
            x = torch.randn(*size, channels)
            kept = x.clone()
            output = torch.ops.internimage.block(x, *lists, rows)
            assert torch.equal(x, kept) and output.shape == x.shape and output.dtype == x.dtype
            assert_close(output, arguments.exact(x), 2e-5)


@pytest.mark.parametrize("norms", NORMS)
@pytest.mark.parametrize(
    "method, dtype",
    [
        *((BY_TORCH, dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)),
        *((BY_ONEDNN_IN_FLOAT, dtype) for dtype in (torch.bfloat16, torch.float16)),
    ],
    ids=str,
)
@torch.no_grad()
def test_block_operator_without_products_in_its_dtype(norms, method, dtype):
    arguments = Arguments(norms, 16, 2, False, dtype)
    x = torch.randn(2, 5, 7, 16).to(dtype)
    output = torch.ops.internimage.block(x, *arguments.lists(method, False), 20)
    assert output.dtype == dtype
    expected = arguments.exact(x)
    assert_close(output, expected, 3 * TOLERANCE[dtype] if dtype.itemsize < 4 else 2e-5)
