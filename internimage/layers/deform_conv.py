# SPDX-License-Identifier: MIT
"""Deformable convolution v1 and v2 as layers that predict their own offsets, with the state-dict keys of mmcv's packs.

Papers: "Deformable Convolutional Networks", ICCV 2017, https://arxiv.org/abs/1703.06211 (v1), and "Deformable ConvNets
v2: More Deformable, Better Results", CVPR 2019, https://arxiv.org/abs/1811.11168 (v2).
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError
from ..extension import has_kernel
from ..ops.arguments import as_pair, check_count
from ..ops.deform_conv import apply_deform_conv2d  # the import defines torch.ops.internimage.deform_conv2d
from ..ops.onednn import multiplied_in
from ..ops.sampling import CONVOLUTION, Geometry, Pair, sampling_locations
from ..ops.transforms import is_transformed
from . import for_onnx
from .factory import FactoryKwargs
from .fast_path import use_fast_path
from .packing import PacksWeights, Snapshot

__all__ = ["DeformConv", "DeformConv2d", "ModulatedDeformConv2d", "accept_old_keys", "offset_layouts"]


def _check_divides(divisor: int, name: str, channels: int, of: str) -> None:
    if channels % divisor:
        raise ValueError(f"{name} must divide {of}, {channels}, got {divisor}")


class _OffsetConv(nn.Module):
    """The convolution that predicts offsets and mask logits. Its parameters are zero at the start.

    Not an `nn.Conv2d`: the `init_weights` of timm's ResNets, and many another recipe, gives every one of those random
    weights, and the offsets would no longer begin on the regular grid.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair,
        device: torch.device | str | None, dtype: torch.dtype | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, *kernel, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zeros: a regular grid, and masks of 0.5."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight, self.bias, self.stride, self.padding, self.dilation)

    def extra_repr(self) -> str:
        out_channels, in_channels, *kernel = self.weight.shape
        return f"{in_channels}, {out_channels}, kernel_size={tuple(kernel)}, stride={self.stride}"


class _Kept:
    """The weight as the operator multiplies with it: channels last, in the dtype of the product."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight
        kept = weight.detach().to(multiplied_in(weight.dtype))
        self.tensor = kept.contiguous(memory_format=torch.channels_last)
        self._snapshot = Snapshot([weight], [weight])

    def is_current(self, weight: nn.Parameter) -> bool:
        return weight is self.weight and self._snapshot.is_current()

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # a copy of the layer makes its own


class DeformConv(PacksWeights):
    """What `DeformConv2d` and `ModulatedDeformConv2d` have in common; create one of these."""

    __constants__ = ["modulated"]  # lets TorchScript drop the branch of the other class

    if TYPE_CHECKING:  # not at run time, as TorchScript reads the annotations of a module
        modulated: bool

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        offset_groups: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: FactoryKwargs = {"device": device, "dtype": dtype}
        self.in_channels = check_count(in_channels, "in_channels")
        self.out_channels = check_count(out_channels, "out_channels")
        self.kernel_size: Pair = as_pair(kernel_size, "kernel_size", 1)
        self.stride: Pair = as_pair(stride, "stride", 1)
        self.padding: Pair = as_pair(padding, "padding", 0)
        self.dilation: Pair = as_pair(dilation, "dilation", 1)
        self.groups, self.offset_groups = check_count(groups, "groups"), check_count(offset_groups, "offset_groups")
        _check_divides(self.groups, "groups", self.in_channels, "in_channels")
        _check_divides(self.groups, "groups", self.out_channels, "out_channels")
        _check_divides(self.offset_groups, "offset_groups", self.in_channels, "in_channels")
        self.weight = nn.Parameter(
            torch.empty(self.out_channels, self.in_channels // self.groups, *self.kernel_size, **dd)
        )
        if bias:
            self.bias = nn.Parameter(torch.empty(self.out_channels, **dd))
        else:
            self.register_parameter("bias", None)
        channels = (3 if self.modulated else 2) * self.offset_groups * self.kernel_size[0] * self.kernel_size[1]
        self.conv_offset = _OffsetConv(
            self.in_channels, channels, self.kernel_size, self.stride, self.padding, self.dilation, **dd
        )
        self._kept: _Kept | None = None
        self.reset_parameters()

    def clear_packed(self) -> None:
        """Drop the copy of the weight that inference keeps; the next call in eval mode makes one."""
        self._kept = None

    def reset_parameters(self) -> None:
        """Initialize weight and bias as mmcv does, and what predicts offsets and mask to zero."""
        if self.modulated:
            bound = 1 / math.sqrt(self.in_channels * self.kernel_size[0] * self.kernel_size[1])
            nn.init.uniform_(self.weight, -bound, bound)
        else:
            nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.conv_offset.reset_parameters()

    def _predict(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Offsets (N, 2 * offset_groups * P, Ho, Wo), and the mask (N, offset_groups * P, Ho, Wo): ones for v1."""
        predicted = self.conv_offset(input)
        points = self.offset_groups * self.kernel_size[0] * self.kernel_size[1]
        if self.modulated:
            return predicted[:, : 2 * points], predicted[:, 2 * points :].sigmoid()
        ones = predicted.new_ones(points).view(1, points, 1, 1)  # expanded, they take no memory
        return predicted, ones.expand(predicted.shape[0], -1, predicted.shape[2], predicted.shape[3])

    def _convolve(self, input: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        """Call the operator without the checks of `ops.deform_conv2d`: the shapes are right by construction, and the
        call is visible to TorchScript, FX and export."""
        weight: Tensor = self.weight
        bias = self.bias
        if bias is None:
            bias = weight.new_zeros(self.out_channels)
        if not torch.jit.is_scripting():
            if is_transformed():
                return self._convolve_transformed(input, offset, mask, bias)
            if self._can_keep(input):
                weight = self._kept_weight()
        return torch.ops.internimage.deform_conv2d(
            input,
            offset,
            mask,
            weight,
            bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.offset_groups,
        )

    @torch.jit.unused
    def _can_keep(self, input: Tensor) -> bool:
        return (
            self.pack_weights
            and not self.training
            and use_fast_path(input, self.weight, self.bias)
            and not self.weight.is_inference()
            and self.weight.is_contiguous()
            and has_kernel("fingerprint", "cpu")
        )

    @torch.jit.unused
    def _kept_weight(self) -> Tensor:
        """The weight without the copy that the operator otherwise makes in each call, half of its time for few
        pixels."""
        if self._kept is None or not self._kept.is_current(self.weight):
            self._kept = _Kept(self.weight)
        return self._kept.tensor

    @torch.jit.unused
    def _convolve_transformed(self, input: Tensor, offset: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
        """`_convolve` under `torch.func` and in forward mode."""
        window = self.stride, self.padding, self.dilation
        return apply_deform_conv2d(input, offset, mask, self.weight, bias, *window, self.groups, self.offset_groups)

    @torch.jit.unused
    def _forward_for_onnx(self, input: Tensor) -> Tensor:
        """`forward` in operators that ONNX has."""
        return for_onnx.deform_conv2d(self, input, _OffsetConv)

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if torch.onnx.is_in_onnx_export():
                return self._forward_for_onnx(input)
        offset, mask = self._predict(input)
        return self._convolve(input, offset, mask)

    # ---- see `SamplingLayer`

    @torch.jit.ignore
    def sampling(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Sampling locations and weights for the input x, for analysis and visualization.

        Args:
            x: (N, in_channels, H, W).

        Returns:
            Locations (N, Ho, Wo, offset_groups, P, 2) as (x, y) in pixels of the layer's input, the points of the
            kernel row by row; and weights (N, Ho, Wo, offset_groups, P): the mask, or ones for v1.
        """
        offset, mask = self._predict(x)
        location = self.locations(offset)
        return location, mask.unflatten(1, (self.offset_groups, -1)).permute(0, 3, 4, 1, 2)

    @torch.jit.ignore
    def offset_module(self) -> nn.Module:
        """The convolution of the offsets, and with v2 of the mask; see `PredictsOffsets`."""
        return self.conv_offset

    @torch.jit.ignore
    def locations(self, predicted: Tensor) -> Tensor:
        """Sampling locations, from the output of `conv_offset`, or its offsets alone; see `PredictsOffsets`."""
        offset = predicted[:, : 2 * self.offset_groups * self.kernel_size[0] * self.kernel_size[1]]
        window = self.kernel_size, self.stride, self.padding, self.dilation
        geometry = Geometry(*window, self.offset_groups, 1.0, False, False)
        return sampling_locations(offset.permute(0, 2, 3, 1), geometry, CONVOLUTION)

    @torch.jit.ignore
    def location_gradient(self, gradient: Tensor) -> Tensor:
        """The offsets' part of the gradient, as (x, y): an offset moves a location by itself; see `PredictsOffsets`."""
        points = self.offset_groups * self.kernel_size[0] * self.kernel_size[1]
        parts = gradient[:, : 2 * points].unflatten(1, (self.offset_groups, -1, 2))
        return parts.permute(0, 4, 5, 1, 2, 3).flip(-1)

    @torch.jit.ignore
    def kernel_points(self) -> list[tuple[int, int]]:
        """Column and row of each point, row by row; see `PredictsOffsets`."""
        height, width = self.kernel_size
        return [(x, y) for y in range(height) for x in range(width)]

    @torch.jit.ignore
    def input_size(self, x: Tensor) -> tuple[int, int]:
        """Height and width of an input; see `SamplingLayer`."""
        return x.shape[2], x.shape[3]

    @torch.jit.ignore
    def offset_parameters(self) -> list[nn.Parameter]:
        """The parameters that predict offsets and mask, which DCNv2 trains at a tenth of the learning rate."""
        return list(self.conv_offset.parameters())

    # ---- state dicts

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *arguments: Any
    ) -> None:
        self.adapt_keys(state_dict, prefix)
        bias = state_dict.get(f"{prefix}bias")
        if self.bias is None and isinstance(bias, Tensor) and not bias.is_meta and not bias.any():
            del state_dict[f"{prefix}bias"]  # another implementation always has one, and zeros it for no_bias
        weight = state_dict.get(f"{prefix}conv_offset.weight")
        if isinstance(weight, Tensor):
            self._check_offsets(tuple(weight.shape), f"{prefix}conv_offset.weight")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *arguments)

    @torch.jit.ignore
    def adapt_keys(self, tensors: dict[str, Any], prefix: str) -> None:
        """Rename the layer's tensors of another spelling, `conv_offset_mask`, in place.

        Raises:
            CheckpointError: The layer is dilated: what has this spelling predicts offsets without dilation.
        """
        for kind in ("weight", "bias"):
            old, new = f"{prefix}conv_offset_mask.{kind}", f"{prefix}conv_offset.{kind}"
            if old not in tensors or new in tensors:
                continue
            if self.dilation != (1, 1):
                raise CheckpointError(
                    f"'{old}' cannot be loaded: the implementation with this key predicts offsets without dilation, "
                    f"and this layer has dilation {self.dilation}"
                )
            tensors[new] = tensors.pop(old)

    def _check_offsets(self, shape: tuple[int, ...], key: str) -> None:
        """Raise CheckpointError for offsets of the other version, or of another number of groups."""
        own = tuple(self.conv_offset.weight.shape)
        if shape[1:] != own[1:] or shape[0] == own[0]:
            return  # anything else is an error of torch's
        layouts = offset_layouts(shape[0], self.in_channels, self.kernel_size)
        if not layouts:
            return
        modulated, groups = next((layout for layout in layouts if layout[0] == self.modulated), layouts[0])
        instead = f"{(ModulatedDeformConv2d if modulated else DeformConv2d).__name__}(..., offset_groups={groups})"
        raise CheckpointError(
            f"'{key}' has {shape[0]} channels, as in {instead}; {type(self).__name__} with offset_groups="
            f"{self.offset_groups} has {own[0]}"
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}, "
            f"offset_groups={self.offset_groups}"
        )


class DeformConv2d(DeformConv):
    """Deformable convolution (v1) that predicts its offsets.

    ::

        dp = conv_offset(x)
        y(p) = sum_k w_k x(p + p_k + dp_k)

    with p_k the points of the kernel, row by row, and x interpolated bilinearly, zero outside. `conv_offset` is a
    convolution with the kernel, stride, padding and dilation of the layer, zero at the start: then the layer is the
    plain convolution with the same weight.

    State-dict keys are those of mmcv's `DeformConv2dPack`. See `accept_old_keys` for an older spelling.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: As for `nn.Conv2d`, with
            numbers as padding.
        offset_groups: Groups of input channels with offsets of their own; divides `in_channels`.
        device, dtype: Of the parameters.

    Shapes:
        (N, in_channels, H, W) -> (N, out_channels, Ho, Wo), as of a convolution.

    Raises:
        TypeError, ValueError: An argument is out of range or does not fit another; the message names it.
    """

    modulated = False


class ModulatedDeformConv2d(DeformConv):
    """Modulated deformable convolution (v2) that predicts its offsets and its mask.

    ::

        dp, logits = conv_offset(x)
        y(p) = sum_k w_k x(p + p_k + dp_k) sigmoid(logits_k)

    Of the channels of `conv_offset` the first two thirds are the offsets and the last third the logits. All are zero at
    the start: then the layer is **half** the plain convolution with the same weight. State-dict keys are those of
    mmcv's `ModulatedDeformConv2dPack`; `conv_offset_mask`, as another implementation calls it, is loaded too.

    Arguments, shapes and errors are those of `DeformConv2d`.
    """

    modulated = True


def offset_layouts(channels: int, in_channels: int, kernel_size: Sequence[int]) -> list[tuple[bool, int]]:
    """What a `conv_offset` with this many output channels can be: (modulated, offset_groups) pairs.

    One at most, except where 3 divides `in_channels`: then 6 channels a point may be three groups of v1 or two of v2.
    """
    found = []
    for modulated, each in ((True, 3), (False, 2)):
        groups, rest = divmod(channels, each * kernel_size[0] * kernel_size[1])
        if groups and not rest and in_channels % groups == 0:
            found.append((modulated, groups))
    return found


def accept_old_keys(model: nn.Module) -> None:
    """Let a model's `load_state_dict` take the keys of old mmcv: `NAME_offset.weight` beside `NAME.weight`.

    For the layers that the model has now. A layer cannot do this itself: torch shows it only the keys below its name.
    """
    for module in model.modules():
        if any(isinstance(child, DeformConv) for child in module.children()):
            module.register_load_state_dict_pre_hook(_rename_beside)


def _rename_beside(module: nn.Module, state_dict: dict[str, Any], prefix: str, *unused: Any) -> None:
    for name, child in module.named_children():
        for kind in ("weight", "bias") if isinstance(child, DeformConv) else ():
            old, new = f"{prefix}{name}_offset.{kind}", f"{prefix}{name}.conv_offset.{kind}"
            if old in state_dict and new not in state_dict:
                state_dict[new] = state_dict.pop(old)
