# SPDX-License-Identifier: MIT
"""What the stages of InternImage are made of: stem, blocks of DCNv3 and MLP, downsampling. All work channels last."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import DropPath
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from ..layers.activation import activation_class
from ..layers.batches import in_groups
from ..layers.conv import Conv2d
from ..layers.dcnv3 import DCNv3
from ..layers.factory import FactoryKwargs
from ..layers.fast_path import has_hooks, use_fast_path
from ..layers.mlp import Mlp
from ..layers.norm import create_norm
from ..layers.packing import PacksWeights
from .fused_block import FusedBlock


class Stem(nn.Module):
    """Two strided convolutions: (N, in_chans, H, W) -> (N, ceil(H / 4), ceil(W / 4), channels)."""

    def __init__(
        self,
        in_chans: int,
        channels: int,
        act_layer: str = "gelu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: FactoryKwargs = {"device": device, "dtype": dtype}
        self.conv1 = Conv2d(in_chans, channels // 2, 3, stride=2, padding=1, **dd)
        self.norm1 = create_norm(channels // 2, in_format="NCHW", out_format="NCHW", **dd)
        self.act = activation_class(act_layer)()
        self.conv2 = Conv2d(channels // 2, channels, 3, stride=2, padding=1, **dd)
        self.norm2 = create_norm(channels, in_format="NCHW", out_format="NHWC", **dd)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if self._can_group(x):
                hidden = self.conv1.out_channels * (x.shape[2] // 2) * (x.shape[3] // 2)
                return in_groups(self._layers, x, max(1, hidden) * x.element_size())
        return self._layers(x)

    @torch.jit.unused
    def _can_group(self, x: Tensor) -> bool:
        """Whether the images may go through in groups: inference on a CPU without hooks, which would see parts."""
        return (
            use_fast_path(x, self.conv1.weight, self.conv2.weight) and x.numel() > 0 and not has_hooks(*self.modules())
        )

    def _layers(self, x: Tensor) -> Tensor:
        x = self.act(self.norm1(self.conv1(x)))
        return self.norm2(self.conv2(x))


class Downsample(nn.Module):
    """Strided convolution between stages: (N, H, W, C) -> (N, ceil(H / 2), ceil(W / 2), 2 * C)."""

    def __init__(
        self, channels: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        dd: FactoryKwargs = {"device": device, "dtype": dtype}
        self.conv = Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False, **dd)
        self.norm = create_norm(2 * channels, in_format="NCHW", out_format="NHWC", **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)))


class Block(PacksWeights):
    """DCNv3 and MLP, each with a residual; (N, H, W, C) -> (N, H, W, C).

    With f the layer, the branch added to x is f(norm(x)); with `post_norm`, norm(f(x)); with `res_post_norm`,
    res_post_norm(f(norm(x))). `layer_scale` multiplies it by a learned vector, initialized to that value.
    """

    if TYPE_CHECKING:  # TorchScript would read the annotations, and takes no optional parameters from them
        gamma1: nn.Parameter | None
        gamma2: nn.Parameter | None

    def __init__(
        self,
        channels: int,
        groups: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        offset_scale: float = 1.0,
        post_norm: bool = False,
        res_post_norm: bool = False,
        dw_kernel_size: int | None = None,
        center_feature_scale: bool = False,
        remove_center: bool = False,
        act_layer: str = "gelu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: FactoryKwargs = {"device": device, "dtype": dtype}
        if post_norm and res_post_norm:
            raise ValueError("post_norm and res_post_norm exclude each other")
        self.post_norm = post_norm
        self.layer_scale = layer_scale
        self.norm1 = create_norm(channels, **dd)
        self.dcn = DCNv3(
            channels,
            groups=groups,
            offset_scale=offset_scale,
            dw_kernel_size=dw_kernel_size,
            center_feature_scale=center_feature_scale,
            remove_center=remove_center,
            act_layer=act_layer,
            **dd,
        )
        self.norm2 = create_norm(channels, **dd)
        self.mlp = Mlp(channels, int(channels * mlp_ratio), act_layer=activation_class(act_layer), **dd)
        # identities where the official model has nothing, so that forward has one path for all sizes
        self.res_post_norm1 = create_norm(channels, **dd) if res_post_norm else nn.Identity()
        self.res_post_norm2 = create_norm(channels, **dd) if res_post_norm else nn.Identity()
        for name in ("gamma1", "gamma2"):
            self.register_parameter(name, None if layer_scale is None else nn.Parameter(torch.empty(channels, **dd)))
        self.reset_layer_scale()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self._fused: FusedBlock | None = None

    def reset_layer_scale(self) -> None:
        """Set the layer scale to its initial value; nothing without one."""
        for gamma in (self.gamma1, self.gamma2):
            if gamma is not None and self.layer_scale is not None:
                nn.init.constant_(gamma, self.layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            fused = self.fused_for(x)
            if fused is not None:
                return fused(x)
        y = self.norm1(self.dcn(x)) if self.post_norm else self.res_post_norm1(self.dcn(self.norm1(x)))
        if self.gamma1 is not None:
            y = y * self.gamma1
        x = x + self.drop_path1(y)
        y = self.norm2(self.mlp(x)) if self.post_norm else self.res_post_norm2(self.mlp(self.norm2(x)))
        if self.gamma2 is not None:
            y = y * self.gamma2
        return x + self.drop_path2(y)

    @torch.jit.unused
    def fused_for(self, x: Tensor) -> FusedBlock | None:
        """The block in CPU inference; None where its modules have to run one by one."""
        if self.training or not use_fast_path(x):
            return None
        fused = self._fused
        if fused is None or fused.dtype != x.dtype or fused.packing != self.pack_weights or not fused.is_current():
            self._fused = None
            if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters()):
                return None
            try:
                fused = FusedBlock(self, x, self.pack_weights)
            except FusedBlock.Unsupported:
                return None
            self._fused = fused
        if fused.has_hooks() or (torch.is_grad_enabled() and fused.requires_grad()):
            return None
        return fused

    @torch.jit.ignore
    def clear_packed(self) -> None:
        """Drop the packed weights; the next call in eval mode makes new ones."""
        self._fused = None


class Stage(nn.Module):
    """Blocks at one resolution; (N, H, W, C) -> (N, H, W, C). `downsample`, to the next stage, is called by the model.

    Args:
        depth: Number of blocks.
        drop_path: Stochastic depth rate of each block.
        norm: Whether a norm follows the last block.
        post_norm_blocks: Indices of the blocks that an extra norm follows.
        downsample: Whether another stage follows.
        block_kwargs: Arguments of `Block`.
    """

    post_norm_blocks: list[int]  # declared for TorchScript, which cannot tell the type of an empty list

    def __init__(
        self,
        channels: int,
        depth: int,
        drop_path: list[float],
        norm: bool,
        post_norm_blocks: tuple[int, ...],
        downsample: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **block_kwargs: Any,
    ) -> None:
        super().__init__()
        dd: FactoryKwargs = {"device": device, "dtype": dtype}
        if any(not 0 <= i < depth for i in post_norm_blocks):
            raise ValueError(f"post_norm_blocks must name blocks 0 to {depth - 1} of its stage, got {post_norm_blocks}")
        self.grad_checkpointing = False
        self.blocks = nn.ModuleList(
            [Block(channels, drop_path=drop_path[i], **block_kwargs, **dd) for i in range(depth)]
        )
        self.post_norm_blocks = list(post_norm_blocks)
        self.post_norms = nn.ModuleList([create_norm(channels, **dd) for _ in post_norm_blocks])
        self.norm = create_norm(channels, **dd) if norm else nn.Identity()
        self.downsample = Downsample(channels, **dd) if downsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            fused = self._fused_for(x)
            if fused is not None:
                return in_groups(fused, x, x[0].numel() * x.element_size())
        for i, block in enumerate(self.blocks):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
            for k, norm in enumerate(self.post_norms):  # a loop that TorchScript can unroll
                if self.post_norm_blocks[k] == i:
                    x = norm(x)
        return self.norm(x)

    @torch.jit.unused
    def _fused_for(self, x: Tensor) -> Callable[[Tensor], Tensor] | None:
        """The stage in CPU inference; None where its modules have to run one by one."""
        norms = [self.norm, *self.post_norms]
        if self.training or not use_fast_path(x) or x.numel() == 0:
            return None
        if has_hooks(*self.blocks, *(module for norm in norms for module in norm.modules())):
            return None
        blocks: list[Any] = list(self.blocks)
        if any(type(block) is not Block or "forward" in vars(block) for block in blocks):
            return None
        fused = [block.fused_for(x) for block in blocks]

        def run(group: Tensor) -> Tensor:
            for i, block in enumerate(fused):
                assert block is not None
                group = block(group)
                if i in self.post_norm_blocks:
                    group = self.post_norms[self.post_norm_blocks.index(i)](group)
            return self.norm(group)

        return None if None in fused else run
