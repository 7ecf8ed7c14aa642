# SPDX-License-Identifier: MIT
"""Deformable convolution v1 and v2 from the papers' equations, slow and in float64; independent of the package.

Dai et al., ICCV 2017, equations 2 to 4, and Zhu et al., CVPR 2019, equation 1. For each position p0 of the output::

    y(p0) = sum_k  w(pk) m(k) x(p0 + pk + dpk)
    x(p) = sum_q  g(qy, py) g(qx, px) x(q)        g(a, b) = max(0, 1 - |a - b|)

with a loop over every image, output pixel, offset group, kernel point and pixel q. v1 has no m. A point that is not
strictly inside (-1, H) x (-1, W) is no part of the sum. The gradients are the derivatives of the same sums, written
out. Layouts are torchvision's: NCHW, points row by row, offsets (y, x).
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from conftest import TOLERANCE
from torch import Tensor

TENSORS = ("input", "offset", "weight", "bias", "mask")
FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}

# of `draw`: small problems of each kind, for derivatives
CASES = {
    "v2": {"padding": (1, 1), "kernel_size": (2, 3)},
    "v1": {"padding": (1, 0), "kernel_size": (3, 2), "mask": False, "bias": False, "stride": (1, 2)},
    "groups": {"padding": (1, 1), "kernel_size": (2, 2), "groups": 2, "offset_groups": 2, "dilation": (1, 2)},
}


@dataclass(frozen=True)
class Problem:
    """Tensors and arguments of one call, and a gradient of its result. `bias` and `mask` may be None."""

    input: Tensor  # (N, C, H, W)
    offset: Tensor  # (N, offset_groups * kh * kw * 2, Ho, Wo)
    weight: Tensor  # (Cout, C / groups, kh, kw)
    bias: Tensor | None  # (Cout,)
    mask: Tensor | None  # (N, offset_groups * kh * kw, Ho, Wo)
    grad_output: Tensor  # (N, Cout, Ho, Wo)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def kernel_size(self) -> tuple[int, int]:
        return self.weight.shape[2], self.weight.shape[3]

    @property
    def offset_groups(self) -> int:
        return self.offset.shape[1] // (2 * math.prod(self.kernel_size))

    @property
    def window(self) -> dict:
        return {name: getattr(self, name) for name in ("stride", "padding", "dilation")}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those that there are, by name."""
        return {name: getattr(self, name) for name in TENSORS if getattr(self, name) is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> "Problem":
        """The problem with another form of each tensor."""
        return replace(
            self, **{name: function(t) for name, t in self.tensors.items()}, grad_output=function(self.grad_output)
        )

    def stored(self, memory_format: torch.memory_format) -> "Problem":
        """The problem with its images, maps and weight in a memory format."""
        return self.map(lambda t: t.contiguous(memory_format=memory_format) if t.dim() == 4 else t)

    def as_function(self, function: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """Such a function as one of the problem's tensors alone, in their order, and these."""
        names = list(self.tensors)
        return (lambda *t: function(**dict(zip(names, t)), **self.window)), tuple(self.tensors.values())

    def operands(self) -> tuple[list[Tensor], tuple]:
        """Tensors and other arguments of `torch.ops.internimage.deform_conv2d`."""
        mask = torch.ones_like(self.offset[:, ::2]) if self.mask is None else self.mask
        bias = torch.zeros_like(self.weight[:, 0, 0, 0]) if self.bias is None else self.bias
        groups = self.input.shape[1] // self.weight.shape[1]
        tensors = [self.input, self.offset, mask, self.weight, bias]
        return tensors, (self.stride, self.padding, self.dilation, groups, self.offset_groups)

    def call(self, function: Callable[..., Tensor], **tensors: Tensor) -> Tensor:
        """The result of a function with the arguments of `deform_conv2d`."""
        return function(**{**self.tensors, **tensors}, **self.window)

    def differentiate(self, function: Callable[..., Tensor], **needed: bool) -> dict[str, Tensor]:
        """Such a function's output, and its gradients by name of the tensor; none for those with False in `needed`."""
        leaves = {name: t.detach().requires_grad_(needed.get(name, True)) for name, t in self.tensors.items()}
        output = self.call(function, **leaves)
        wanted = [name for name, leaf in leaves.items() if leaf.requires_grad]
        grads = torch.autograd.grad(output, [leaves[name] for name in wanted], self.grad_output)
        return {"output": output.detach(), **dict(zip(wanted, grads, strict=True))}


def output_size(size, kernel_size, stride=(1, 1), padding=(0, 0), dilation=(1, 1)) -> tuple[int, int]:
    axes = zip(size, kernel_size, stride, padding, dilation)
    height, width = ((length + 2 * p - d * (k - 1) - 1) // s + 1 for length, k, s, p, d in axes)
    return height, width


def off_the_grid(offset: Tensor) -> Tensor:
    """No closer than 0.1 to an integer, where the interpolation has kinks: all else in a location is an integer."""
    return offset.floor() + 0.1 + 0.8 * (offset - offset.floor())


def draw(
    seed: int,
    n: int = 2,
    size: tuple[int, int] = (5, 6),
    channels: int = 4,
    out_channels: int = 6,
    kernel_size: tuple[int, int] = (3, 3),
    groups: int = 1,
    offset_groups: int = 1,
    offset_std: float = 1.5,
    bias: bool = True,
    mask: bool = True,
    **window: tuple[int, int],
) -> Problem:
    """A problem in float64, with no location at a kink."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    ho, wo = output_size(size, kernel_size, **window)
    points = offset_groups * math.prod(kernel_size)
    return Problem(
        input=randn(n, channels, *size),
        offset=off_the_grid(randn(n, points * 2, ho, wo) * offset_std),
        weight=randn(out_channels, channels // groups, *kernel_size),
        bias=randn(out_channels) if bias else None,
        mask=randn(n, points, ho, wo) if mask else None,
        grad_output=randn(n, out_channels, ho, wo),
        **window,
    )


def small(case: str, n: int = 1, seed: int = 0) -> Problem:
    return draw(seed, n, (3, 4), 4, 2, **CASES[case])


def _shares(location: float, length: int) -> list[tuple[int, float, float]]:
    """The pixels q near a location along one axis: q, g(q, location) and its derivative, at kinks the right-hand one.

    Empty if the location is not strictly inside (-1, length); comparisons with NaN are false.
    """
    if not -1 < location < length:
        return []
    found = []
    for q in range(length):
        distance = location - q
        if -1 <= distance < 1:
            found.append((q, 1 - abs(distance), 1.0 if distance < 0 else -1.0))
    return found


@dataclass(frozen=True)
class _Sample:
    """One point of one offset group at one output pixel."""

    pixel: tuple[int, int, int]  # image, row and column of the output
    group: int
    row: int  # of the point in the kernel
    column: int
    mask_channel: int
    rows: list[tuple[int, float, float]]  # `_shares` of its y
    columns: list[tuple[int, float, float]]  # of its x

    def at(self, channel: int) -> tuple[int, int, int, int]:
        """The index of this output pixel's number in a channel of an NCHW tensor."""
        image, row, column = self.pixel
        return image, channel, row, column


def _arrays(problem: Problem) -> dict[str, np.ndarray]:
    """All tensors; a mask of ones and a bias of zeros where there is none."""
    n, _, ho, wo = problem.offset.shape
    found = {name: t.detach().double().cpu().numpy() for name, t in problem.tensors.items()}
    found.setdefault("mask", np.ones((n, problem.offset.shape[1] // 2, ho, wo)))
    found.setdefault("bias", np.zeros(problem.weight.shape[0]))
    return found


def _samples(problem: Problem, offset: np.ndarray) -> Iterator[_Sample]:
    n, _, height, width = problem.input.shape
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = problem.kernel_size, problem.stride, problem.padding, problem.dilation
    for b, oy, ox, g in itertools.product(range(n), *map(range, offset.shape[2:]), range(problem.offset_groups)):
        for i, j in itertools.product(range(kh), range(kw)):
            channel = (g * kh + i) * kw + j
            y = oy * sh - ph + i * dh + float(offset[b, 2 * channel, oy, ox])
            x = ox * sw - pw + j * dw + float(offset[b, 2 * channel + 1, oy, ox])
            rows, columns = _shares(y, height), _shares(x, width)
            if rows and columns:
                yield _Sample((b, oy, ox), g, i, j, channel, rows, columns)


def _own(problem: Problem, group: int) -> slice:
    """The input channels of an offset group."""
    size = problem.input.shape[1] // problem.offset_groups
    return slice(group * size, (group + 1) * size)


def columns(problem: Problem) -> Tensor:
    """m(k) x(p0 + pk + dpk): (N, Ho, Wo, kh, kw, C)."""
    arrays = _arrays(problem)
    image, mask = arrays["input"], arrays["mask"]
    n, _, ho, wo = problem.offset.shape
    result = np.zeros((n, ho, wo, *problem.kernel_size, image.shape[1]))
    for s in _samples(problem, arrays["offset"]):
        own = _own(problem, s.group)
        for (y, share_y, _), (x, share_x, _) in itertools.product(s.rows, s.columns):
            if share_y * share_x > 0:  # an infinity beside the point is no part of it
                result[(*s.pixel, s.row, s.column, own)] += (
                    mask[s.at(s.mask_channel)] * share_y * share_x * image[s.pixel[0], own, y, x]
                )
    return torch.from_numpy(result)


def _products(problem: Problem) -> Iterator[tuple[int, slice, int, int]]:
    """Output channel, the input channels that it sees, row and column of the kernel."""
    out_channels, seen = problem.weight.shape[:2]
    groups = problem.input.shape[1] // seen
    for o, i, j in itertools.product(range(out_channels), *map(range, problem.kernel_size)):
        first = o // (out_channels // groups) * seen
        yield o, slice(first, first + seen), i, j


def forward(problem: Problem) -> Tensor:
    """The output, (N, Cout, Ho, Wo)."""
    sampled, arrays = columns(problem).numpy(), _arrays(problem)
    n, _, ho, wo = problem.offset.shape
    result = np.zeros((n, len(arrays["bias"]), ho, wo)) + arrays["bias"][:, None, None]
    for o, seen, i, j in _products(problem):
        result[:, o] += sampled[:, :, :, i, j, seen] @ arrays["weight"][o, :, i, j]
    return torch.from_numpy(result)


def gradients_of_columns(problem: Problem, grad_columns: Tensor) -> dict[str, Tensor]:
    """Derivatives of <grad_columns, columns> with respect to input, offset and mask."""
    arrays, of_columns = _arrays(problem), grad_columns.detach().double().cpu().numpy()
    image, mask = arrays["input"], arrays["mask"]
    grads = {name: np.zeros_like(arrays[name]) for name in ("input", "offset", "mask")}
    for s in _samples(problem, arrays["offset"]):
        own = _own(problem, s.group)
        grad, factor = of_columns[(*s.pixel, s.row, s.column, own)], mask[s.at(s.mask_channel)]
        for (y, share_y, slope_y), (x, share_x, slope_x) in itertools.product(s.rows, s.columns):
            at = s.pixel[0], own, y, x
            value = float(grad @ image[at])
            grads["input"][at] += factor * share_y * share_x * grad
            grads["mask"][s.at(s.mask_channel)] += share_y * share_x * value
            grads["offset"][s.at(2 * s.mask_channel)] += factor * slope_y * share_x * value
            grads["offset"][s.at(2 * s.mask_channel + 1)] += factor * share_y * slope_x * value
    return {name: torch.from_numpy(grad) for name, grad in grads.items()}


def gradients(problem: Problem) -> dict[str, Tensor]:
    """Derivatives of <grad_output, output> by the name of each tensor that the problem has."""
    sampled, arrays = columns(problem).numpy(), _arrays(problem)
    grad_output = problem.grad_output.detach().double().cpu().numpy()
    of_weight, of_columns = np.zeros_like(arrays["weight"]), np.zeros_like(sampled)
    for o, seen, i, j in _products(problem):
        grad = grad_output[:, o, :, :, None]
        of_columns[:, :, :, i, j, seen] += grad * arrays["weight"][o, :, i, j]
        of_weight[o, :, i, j] = (grad * sampled[:, :, :, i, j, seen]).sum((0, 1, 2))
    grads = gradients_of_columns(problem, torch.from_numpy(of_columns))
    grads["weight"] = torch.from_numpy(of_weight)
    grads["bias"] = torch.from_numpy(grad_output.sum((0, 2, 3)))
    return {name: grads[name] for name in problem.tensors}


def output_and_gradients(problem: Problem) -> dict[str, Tensor]:
    return {"output": forward(problem), **gradients(problem)}


def assert_all_close(
    results: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float | None = None, least: float = 0.0
) -> None:
    """The largest deviation is within the tolerance, times the largest value or `least`."""
    assert results.keys() == expected.keys()
    for name, right in expected.items():
        result = results[name]
        assert result.shape == right.shape, f"{name}: {tuple(result.shape)}, expected {tuple(right.shape)}"
        if right.numel() == 0:
            continue
        deviation = (result.detach().double().cpu() - right.detach().double().cpu()).abs().max().item()
        limit = TOLERANCE[result.dtype] if tolerance is None else tolerance
        allowed = limit * max(least, right.abs().max().item())
        assert deviation <= allowed, f"{name}: deviates by {deviation:.2e}, allowed {allowed:.1e}"  # also false for NaN
