# SPDX-License-Identifier: MIT
"""What stands for the operators in a file of ONNX, in two forms of standard ONNX operators.

`"deform-conv"` is ONNX's DeformConv (opset 19): one node for a call, exact for every geometry. A DCNv3 is depthwise,
with a weight of ones. `"grid-sample"` is plain torch around one `grid_sample`, for runtimes without DeformConv.

ONNX orders the points and numbers of offsets in another way than DCNv3, knows neither `offset_scale` nor a kernel
without center, and has the offsets relative to other points. All this is put into weight and bias of the layers that
predict the offsets (`Outputs`), so that nothing is left to do with the maps that they compute.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .sampling import CONVOLUTION, Geometry, Order, Pair, accumulate_dtype, num_points

# DeformConv's first: as DeformConv-22, which adds a type, it could not be written at opset 19 to 21
_VERSION = 19


class Outputs(NamedTuple):
    """Which of a layer's output channels a form takes, and how it changes them: `output[channels] * scale + shift`."""

    channels: list[int] | None = None  # None: all, in their order
    scale: float = 1.0
    shift: list[float] | None = None  # a number for each channel that is taken; None: zeros

    def followed_by(self, taken: int, unchanged: int) -> "Outputs":
        """These, `taken` in number, and then the next `unchanged` channels as they are; the scale must be 1."""
        channels = None if self.channels is None else [*self.channels, *range(taken, taken + unchanged)]
        shift = None if self.shift is None else [*self.shift, *[0.0] * unchanged]
        return Outputs(channels, self.scale, shift)

    def of_parameters(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Weight (channels, ...) and bias of a linear layer or convolution that has these outputs."""
        return self._changed(weight, 0, shifted=False), self._changed(bias, 0)

    def of_map(self, predicted: Tensor, dim: int) -> Tensor:
        """The outputs themselves, whose channels are along `dim`; for layers of unknown kind."""
        return self._changed(predicted, dim)

    def _changed(self, t: Tensor, dim: int, shifted: bool = True) -> Tensor:
        if self.channels is not None:
            t = t.index_select(dim, torch.tensor(self.channels, device=t.device))
        if self.scale != 1.0:
            t = t * self.scale
        if shifted and self.shift is not None and any(self.shift):
            shape = [1] * t.dim()
            shape[dim] = -1
            t = t + torch.tensor(self.shift, dtype=t.dtype, device=t.device).view(shape)
        return t


def _points(geometry: Geometry, order: Order) -> list[Pair]:
    """(column, row) of the kernel's points, in an operator's order."""
    height, width = geometry.kernel_size
    if order.row_major:
        points = [(x, y) for y in range(height) for x in range(width)]
    else:
        points = [(x, y) for x in range(width) for y in range(height)]
    if geometry.remove_center:
        points.remove((width // 2, height // 2))
    return points


def _scaled(geometry: Geometry, point: Pair) -> tuple[float, float]:
    """(x, y) of a kernel point relative to the kernel's first one, both without offsets: with `offset_scale` s,
    center + (dilation * point - center) * s."""
    found = []
    for number, side, dilation in zip(point, reversed(geometry.kernel_size), reversed(geometry.dilation)):
        center = dilation * (side - 1) // 2
        found.append(center + (dilation * number - center) * geometry.offset_scale)
    return found[0], found[1]


def _normalized_mask(mask: Tensor, geometry: Geometry) -> Tensor:
    """(N, Ho, Wo, groups * P) -> (N, Ho, Wo, groups, P)."""
    points = num_points(geometry.kernel_size, geometry.remove_center)
    mask = mask.unflatten(-1, (geometry.groups, points))
    return mask.softmax(-1) if geometry.softmax else mask


class DeformConvForm:
    """ONNX's DeformConv: points row by row, offsets (y, x), relative to the points of an unscaled kernel."""

    def offsets(self, geometry: Geometry, order: Order) -> Outputs:
        """Of what predicts the offsets. The center that was removed, whose weight is zero, repeats another point."""
        own = {point: i for i, point in enumerate(_points(geometry, order))}
        index, shift = [], []
        for group in range(geometry.groups):
            for point in self._kernel(geometry):
                first = (group * len(own) + own[self._present(geometry, point)]) * 2
                unscaled = [d * p for d, p in zip(reversed(geometry.dilation), point)]
                x, y = (to - at for to, at in zip(_scaled(geometry, point), unscaled))
                index += [first, first + 1] if order.y_first else [first + 1, first]
                shift += [y, x]
        return Outputs(None if index == list(range(len(index))) else index, geometry.offset_scale, shift)

    def masks(self, geometry: Geometry, order: Order) -> Outputs:
        """Of what predicts the mask. The center that was removed is not among them: the softmax is without it."""
        own = {point: i for i, point in enumerate(_points(geometry, order))}
        kernel = [point for point in self._kernel(geometry) if point in own]
        index = [group * len(own) + own[point] for group in range(geometry.groups) for point in kernel]
        return Outputs(None if index == list(range(len(index))) else index)

    @staticmethod
    def _kernel(geometry: Geometry) -> list[Pair]:
        return _points(geometry._replace(remove_center=False), CONVOLUTION)

    @staticmethod
    def _present(geometry: Geometry, point: Pair) -> Pair:
        """The point, or of a center that was removed the point to the left of it, or above it in a kernel of one
        column: the one before it, row by row."""
        height, width = geometry.kernel_size
        if not geometry.remove_center or point != (width // 2, height // 2):
            return point
        return (point[0] - 1, point[1]) if width > 1 else (point[0], point[1] - 1)

    def dcnv3(self, input: Tensor, offset: Tensor, mask: Tensor, geometry: Geometry) -> Tensor:
        """See `ops.dcnv3`; offset and mask are the `Outputs` above."""
        height, width = geometry.kernel_size
        channels = input.shape[3]
        mask = _normalized_mask(mask, geometry)
        kernel = [1.0] * (height * width)
        if geometry.remove_center:
            center = height * width // 2
            kernel[center] = 0.0
            mask = torch.cat([mask[..., :center], mask[..., center - 1 :]], dim=-1)
        weight = torch.tensor(kernel * channels, dtype=input.dtype, device=input.device)
        weight = weight.view(channels, 1, height, width)
        first = input.permute(0, 3, 1, 2), offset.permute(0, 3, 1, 2), mask.flatten(-2).permute(0, 3, 1, 2)
        window = geometry.stride, geometry.padding, geometry.dilation
        return self.deform_conv2d(*first, weight, None, *window, channels, geometry.groups).permute(0, 2, 3, 1)

    def deform_conv2d(
        self, input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None,
        stride: Pair, padding: Pair, dilation: Pair, groups: int, offset_groups: int,
    ) -> Tensor:  # fmt: skip
        """See `ops.deform_conv2d`."""
        if torch.jit.is_tracing():
            raise RuntimeError(
                "the TorchScript exporter (dynamo=False) has no DeformConv: export with dynamo=True, or within "
                'internimage.export.operator_form("grid-sample")'
            )
        attributes: dict[str, Any] = {
            "kernel_shape": list(weight.shape[2:]),
            "strides": list(stride),
            "pads": list(padding) * 2,
            "dilations": list(dilation),
            "group": groups,
            "offset_group": offset_groups,
        }
        shape = (input.shape[0], weight.shape[0], *offset.shape[2:])
        tensors = [input, weight, offset, bias, mask]
        if mask is None:  # inputs that are left out at the end are not named
            tensors = tensors[: 3 if bias is None else 4]
        return torch.onnx.ops.symbolic(
            "DeformConv", tensors, attributes, dtype=input.dtype, shape=shape, version=_VERSION
        )


class GridSampleForm:
    """One `grid_sample` for all points, whose groups are images: ONNX's GridSample without padding of borders and with
    `align_corners=0`, which is the combination that runtimes have fast code for.

    The grid is in float32, or float64: in half precision its coordinates, which are relative to the image's size, would
    be hundredths of a pixel apart.
    """

    def offsets(self, geometry: Geometry, order: Order) -> Outputs:
        """Of what predicts the offsets: as (x, y), relative to the first point of the kernel without offsets."""
        points = [_scaled(geometry, point) for point in _points(geometry, order)] * geometry.groups
        index = [2 * i + k for i in range(len(points)) for k in (1, 0)] if order.y_first else None
        return Outputs(index, geometry.offset_scale, [number for point in points for number in point])

    def masks(self, geometry: Geometry, order: Order) -> Outputs:
        """Of what predicts the mask: nothing changes."""
        return Outputs()

    def dcnv3(self, input: Tensor, offset: Tensor, mask: Tensor, geometry: Geometry) -> Tensor:
        """See `ops.dcnv3`; offset and mask are the `Outputs` above."""
        n, height, width, channels = input.shape
        ho, wo, groups = offset.shape[1], offset.shape[2], geometry.groups
        mask = _normalized_mask(mask, geometry)
        points = mask.shape[-1]
        grid = offset.view(n, ho, wo, groups, points, 2).permute(0, 3, 1, 2, 4, 5)
        base = _positions((ho, wo), (height, width), geometry.stride, geometry.padding, grid)
        grid = grid.to(base.dtype) * _pixels((height, width), base) + base.view(ho, wo, 1, 2)
        images = input.permute(0, 3, 1, 2).reshape(n * groups, channels // groups, height, width)
        samples = _sample(images, grid.reshape(n * groups, ho * wo, points, 2))
        factors = mask.permute(0, 3, 1, 2, 4).reshape(n * groups, 1, ho * wo, points)
        output = (samples * factors).sum(-1)
        return output.reshape(n, channels, ho, wo).permute(0, 2, 3, 1)

    def deform_conv2d(
        self, input: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None,
        stride: Pair, padding: Pair, dilation: Pair, groups: int, offset_groups: int,
    ) -> Tensor:  # fmt: skip
        """See `ops.deform_conv2d`; the offsets are the `Outputs` above.

        The samples of an output pixel become a patch of an image, (N, channels, kh * Ho, kw * Wo), which a convolution
        with the kernel as its stride multiplies with the weight.
        """
        n, channels, height, width = input.shape
        (kh, kw), ho, wo = weight.shape[2:], offset.shape[2], offset.shape[3]
        patches = n * offset_groups, 1, ho * kh, wo * kw
        grid = offset.reshape(n, offset_groups, kh, kw, 2, ho, wo).permute(0, 1, 5, 2, 6, 3, 4)
        base = _positions((ho, wo), (height, width), stride, padding, grid)
        grid = grid.to(base.dtype) * _pixels((height, width), base) + base.view(ho, 1, wo, 1, 2)
        images = input.reshape(n * offset_groups, channels // offset_groups, height, width)
        samples = _sample(images, grid.reshape(patches[0], patches[2], patches[3], 2))
        if mask is not None:
            factors = mask.reshape(n, offset_groups, kh, kw, ho, wo).permute(0, 1, 4, 2, 5, 3)
            samples = samples * factors.reshape(patches)
        samples = samples.reshape(n, channels, ho * kh, wo * kw)
        return F.conv2d(samples, weight, bias, (kh, kw), groups=groups)


def _pixels(size: Sequence[int], like: Tensor) -> Tensor:
    """A pixel's width and height in the coordinates of a grid, where an image of `size` goes from -1 to 1: (2,)."""
    two = like.new_full((1,), 2.0)
    return torch.cat([two / size[1], two / size[0]])


def _positions(output: Sequence[int], size: Sequence[int], stride: Pair, padding: Pair, like: Tensor) -> Tensor:
    """Where the kernel's first point is for each output pixel, as (x, y) of a grid: (Ho, Wo, 2)."""
    ends = []
    for axis in (1, 0):
        pixels = torch.arange(output[axis], dtype=accumulate_dtype(like.dtype), device=like.device)
        ends.append((pixels * (2 * stride[axis]) + (1 - 2 * padding[axis])) / size[axis] - 1)
    x, y = ends
    return torch.stack([x.expand(output[0], output[1]), y.unsqueeze(1).expand(output[0], output[1])], dim=-1)


def _sample(images: Tensor, grid: Tensor) -> Tensor:
    """Bilinear samples in the images' dtype. Pixels outside are zero."""
    wide = images.to(grid.dtype)
    samples = F.grid_sample(wide, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return samples.to(images.dtype)


FORMS: dict[str, DeformConvForm | GridSampleForm] = {
    "deform-conv": DeformConvForm(),
    "grid-sample": GridSampleForm(),
}
_chosen: ContextVar[str] = ContextVar("operator_form", default="deform-conv")


def current_form() -> DeformConvForm | GridSampleForm:
    """The form that layers write while a model is exported."""
    return FORMS[_chosen.get()]


@contextmanager
def operator_form(name: str) -> Iterator[None]:
    """Chooses the ONNX operators that DCNv3 and deformable convolutions become, for calls of `torch.onnx.export`.

    ::

        with internimage.export.operator_form("grid-sample"):
            torch.onnx.export(model, (image,), "model.onnx", opset_version=18)

    Works for any code that calls `torch.onnx.export`. It chooses for the current thread (`contextvars`), and can be
    nested.

    Args:
        name: "deform-conv", as without this function: one DeformConv a layer. For opset 19 and above; **at a lower
            opset torch writes an invalid file, without an error**. onnxruntime runs it from version 1.25, and has
            fast code for it from 1.27.
            "grid-sample": one GridSample a layer and the arithmetic around it, for TensorRT, OpenVINO, older
            versions of onnxruntime, and torch's TorchScript exporter (`dynamo=False`). For opset 16 to 19; take 18.
            From opset 20 on, importers of TensorRT have read GridSample as nearest-neighbor, without an error.

    Raises:
        ValueError: There is no such form.
    """
    if name not in FORMS:
        raise ValueError(f"operator_form must be {' or '.join(map(repr, FORMS))}, got {name!r}")
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)
