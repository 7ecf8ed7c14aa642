# SPDX-License-Identifier: MIT
"""The DCNv3 layer: projections, prediction of offset and mask, and the operator."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.arguments import as_pair, check_channels, check_kernel, check_offset_scale
from ..ops.dcnv3 import apply_dcnv3  # the import defines torch.ops.internimage.dcnv3
from ..ops.sampling import Geometry, Pair, num_points, sampling_locations
from ..ops.transforms import is_transformed
from . import for_onnx
from .activation import activation_class
from .factory import FactoryKwargs
from .linear import Linear
from .norm import create_norm
from .query import Query


def _query_padding(kernel: int, dilation: int, padding: int, dw_kernel: int) -> int:
    """Padding that makes the window of the depthwise convolution concentric with the sampling window, on one axis."""
    twice = 2 * padding + dw_kernel - 1 - dilation * (kernel - 1)
    if twice < 0 or twice % 2:
        raise ValueError(
            f"dw_kernel_size {dw_kernel} cannot be centered on a kernel of {kernel} with dilation {dilation} and "
            f"padding {padding}; choose it so that 2 * padding + dw_kernel_size - 1 - dilation * (kernel_size - 1) is "
            f"even and not negative"
        )
    return twice // 2


class DCNv3(nn.Module):
    """Deformable convolution v3 with its projections (Wang et al., CVPR 2023, section 3.1).

    ::

        query  = act(norm(depthwise_conv(x)))
        y      = dcnv3(input_proj(x), offset(query), softmax(mask(query)))
        y      = y * (1 - s) + input_proj(x) * s,  s = sigmoid(center_feature_scale(query))   (huge and giant only)
        output = output_proj(y)

    Offset and mask are initialized to zero: a regular grid with equal weights.

    Args:
        channels: Number of channels C of input and output.
        kernel_size, stride, padding, dilation: Sampling geometry, ints or (height, width) pairs.
        groups: Number of groups; divides `channels`.
        offset_scale: Factor on the kernel grid and on the offsets.
        dw_kernel_size: Kernel of the depthwise convolution, `kernel_size` if None.
        center_feature_scale: Blend the projected input back in, with a weight per group. The output must have the
            size of the input.
        remove_center: Omit the kernel's center point.
        act_layer: timm's name of the activation after the depthwise convolution.
        norm_layer: "layernorm" or "batchnorm", the norm after the depthwise convolution.
        device, dtype: Of the parameters.

    Shapes:
        (N, H, W, C) -> (N, Ho, Wo, C), with Ho, Wo as for a convolution.

    Raises:
        TypeError, ValueError: An argument is out of range or inconsistent with another; the message names it.
    """

    center_feature_scale: torch.jit.Final[bool]  # lets TorchScript drop the branch whose parameters do not exist

    def __init__(
        self,
        channels: int,
        kernel_size: int | Sequence[int] = 3,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        groups: int = 4,
        offset_scale: float = 1.0,
        dw_kernel_size: int | Sequence[int] | None = None,
        center_feature_scale: bool = False,
        remove_center: bool = False,
        act_layer: str = "gelu",
        norm_layer: str = "layernorm",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: FactoryKwargs = {"device": device, "dtype": dtype}
        self.channels = channels
        self.kernel_size: Pair = as_pair(kernel_size, "kernel_size", 1)
        self.stride: Pair = as_pair(stride, "stride", 1)
        self.padding: Pair = as_pair(padding, "padding", 0)
        self.dilation: Pair = as_pair(dilation, "dilation", 1)
        self.groups = groups
        check_offset_scale(offset_scale)
        self.offset_scale = float(offset_scale)
        self.remove_center = bool(remove_center)
        self.dw_kernel_size: Pair = self.kernel_size
        if dw_kernel_size is not None:
            self.dw_kernel_size = as_pair(dw_kernel_size, "dw_kernel_size", 1)
        check_channels(channels, groups)
        check_kernel(self.kernel_size, self.remove_center)
        padding_y, padding_x = (
            _query_padding(*axis) for axis in zip(self.kernel_size, self.dilation, self.padding, self.dw_kernel_size)
        )
        dw_padding = padding_y, padding_x
        self.center_feature_scale = center_feature_scale
        if center_feature_scale:
            same = tuple(2 * p == d * (k - 1) for k, p, d in zip(self.kernel_size, self.padding, self.dilation))
            if self.stride != (1, 1) or same != (True, True):
                raise ValueError(
                    "center_feature_scale needs an output of the size of the input: stride 1 and padding "
                    f"dilation * (kernel_size - 1) / 2, got stride {self.stride}, padding {self.padding}"
                )
            self.center_feature_scale_proj_weight = nn.Parameter(torch.empty(groups, channels, **dd))
            self.center_feature_scale_proj_bias = nn.Parameter(torch.empty(groups, **dd))

        self.dw_conv = Query(
            nn.Conv2d(channels, channels, self.dw_kernel_size, self.stride, dw_padding, groups=channels, **dd),
            create_norm(channels, norm_layer, in_format="NCHW", out_format="NHWC", **dd),
            activation_class(act_layer)(),
        )
        points = num_points(self.kernel_size, self.remove_center)
        self.offset = Linear(channels, groups * points * 2, **dd)
        self.mask = Linear(channels, groups * points, **dd)
        self.input_proj = Linear(channels, channels, **dd)
        self.output_proj = Linear(channels, channels, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the layer's own parameters; the depthwise convolution and its norm keep torch's defaults."""
        for linear in (self.offset, self.mask):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        for linear in (self.input_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        if self.center_feature_scale:
            nn.init.zeros_(self.center_feature_scale_proj_weight)
            nn.init.zeros_(self.center_feature_scale_proj_bias)

    @property
    @torch.jit.unused
    def geometry(self) -> Geometry:
        """The operator's non-tensor arguments."""
        pairs = self.kernel_size, self.stride, self.padding, self.dilation
        return Geometry(*pairs, self.groups, self.offset_scale, self.remove_center, softmax=True)

    def query(self, x: Tensor) -> Tensor:
        """The features from which offset and mask are predicted: (N, H, W, C) -> (N, Ho, Wo, C)."""
        return self.dw_conv(x.permute(0, 3, 1, 2))

    @torch.jit.ignore
    def sampling(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Sampling locations and weights for the input x, for analysis and visualization.

        Args:
            x: (N, H, W, C).

        Returns:
            Locations (N, Ho, Wo, groups, P, 2) as (x, y) in pixels of the layer's input, and weights
            (N, Ho, Wo, groups, P), which sum to 1 over P.
        """
        query = self.query(x)
        location = self.locations(self.offset(query))
        return location, self.mask(query).view(location.shape[:-1]).softmax(-1)

    @torch.jit.ignore
    def offset_module(self) -> nn.Module:
        """The linear layer of the offsets; see `PredictsOffsets`."""
        return self.offset

    @torch.jit.ignore
    def locations(self, predicted: Tensor) -> Tensor:
        """Sampling locations, from the offsets (N, Ho, Wo, groups * P * 2); see `PredictsOffsets`."""
        return sampling_locations(predicted, self.geometry)

    @torch.jit.ignore
    def location_gradient(self, gradient: Tensor) -> Tensor:
        """The gradient with respect to the locations: an offset moves one by `offset_scale`; see `PredictsOffsets`."""
        return gradient.unflatten(-1, (self.groups, -1, 2)) / self.offset_scale

    @torch.jit.ignore
    def kernel_points(self) -> list[tuple[int, int]]:
        """Column and row of each point, column by column; see `PredictsOffsets`."""
        height, width = self.kernel_size
        points = [(x, y) for x in range(width) for y in range(height)]
        if self.remove_center:
            points.remove((width // 2, height // 2))
        return points

    @torch.jit.ignore
    def input_size(self, x: Tensor) -> tuple[int, int]:
        """Height and width of an input; see `SamplingLayer`."""
        return x.shape[1], x.shape[2]

    @torch.jit.ignore
    def offset_parameters(self) -> list[nn.Parameter]:
        """The parameters of the offsets and of the center feature scale, which upstream trains more slowly."""
        parameters = list(self.offset.parameters())
        if self.center_feature_scale:
            parameters += [self.center_feature_scale_proj_weight, self.center_feature_scale_proj_bias]
        return parameters

    def _sample(self, projected: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        """Call the operator without the checks of `ops.dcnv3`: the shapes are right by construction, and the call is
        visible to TorchScript, FX and export."""
        if not torch.jit.is_scripting():
            if is_transformed():
                return self._sample_transformed(projected, offset, mask)
        return torch.ops.internimage.dcnv3(
            projected,
            offset,
            mask,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.offset_scale,
            self.remove_center,
            True,
        )

    @torch.jit.unused
    def _sample_transformed(self, projected: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        """`_sample` under `torch.func` and in forward mode."""
        return apply_dcnv3(projected, offset, mask, *self.geometry)

    @torch.jit.unused
    def _sample_for_onnx(self, projected: Tensor, query: Tensor) -> Tensor:
        """`_sample`, and what precedes it, in operators that ONNX has."""
        return for_onnx.dcnv3(self, projected, query, Linear)

    def _predict_and_sample(self, projected: Tensor, query: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if torch.onnx.is_in_onnx_export():
                return self._sample_for_onnx(projected, query)
        return self._sample(projected, self.offset(query), self.mask(query))

    def forward(self, x: Tensor) -> Tensor:
        projected = self.input_proj(x)
        query = self.query(x)
        y = self._predict_and_sample(projected, query)
        if self.center_feature_scale:
            scale = F.linear(query, self.center_feature_scale_proj_weight, self.center_feature_scale_proj_bias)
            scale = scale.sigmoid().unsqueeze(-1)  # (N, H, W, groups, 1)
            mixed = torch.lerp(y.unflatten(-1, (self.groups, -1)), projected.unflatten(-1, (self.groups, -1)), scale)
            y = mixed.flatten(-2)
        return self.output_proj(y)

    def extra_repr(self) -> str:
        return (
            f"channels={self.channels}, kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}, groups={self.groups}, offset_scale={self.offset_scale}, "
            f"center_feature_scale={self.center_feature_scale}, remove_center={self.remove_center}"
        )
