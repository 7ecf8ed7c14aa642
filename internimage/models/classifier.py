# SPDX-License-Identifier: MIT
"""InternImage: the backbone with its heads, and what timm asks of a model."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from timm.layers import SelectAdaptivePool2d
from timm.layers.helpers import get_device_dtype
from timm.models import register_notrace_function
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..layers.activation import activation_class
from ..layers.attention_pool import AttentivePool
from ..layers.factory import FactoryKwargs
from ..layers.norm import create_norm
from ..weights.key_maps import INTERNIMAGE, KeyMap, Shape
from .arguments import check_arguments, check_num_classes
from .backbone import Backbone

__all__ = ["InternImage"]

# The attentive head of huge and giant, the same in both.
_HEAD_CHANNELS, _HEAD_HEADS, _HEAD_OUT = 1024, 16, 768


@register_notrace_function
def check_fusable(x: Tensor) -> Tensor:
    """The image batch x, after a check that the attentive head can take its size.

    The head joins stage 4, doubled by a pixel shuffle, with stage 3, so stage 3 must have even sides.

    Raises:
        ValueError: It cannot; the message names sizes that fit.
    """
    check_sides(x.shape[-2], x.shape[-1])
    return x


def check_sides(height: int, width: int) -> None:
    """The check of `check_fusable` for an image size."""
    if (height + 15) // 16 % 2 != 0 or (width + 15) // 16 % 2 != 0:
        raise ValueError(
            f"this model takes image sides of which ceil(side / 16) is even, got {height} x {width}; "
            f"multiples of 32 always fit, the next are {(height + 31) // 32 * 32} x {(width + 31) // 32 * 32}"
        )


class InternImage(Backbone):
    """InternImage classifier and backbone.

    Four stages at strides 4, 8, 16, 32 with C, 2C, 4C, 8C channels, C = `channels`. Tensors are channels last inside,
    (N, C, H, W) outside (`forward_features`, `forward_intermediates`).

    The head of tiny to xlarge is a 1x1 convolution to `cls_scale` * 8C channels with batch norm and GELU, pooling and a
    linear layer. The attentive head of huge and giant joins stages 3 and 4 to 1024 channels at stride 16, pools them by
    attention to 768 and normalizes them: `forward_features` returns that joint map, and the image's sides must fit
    (`check_fusable`).

    Args:
        in_chans: Image channels.
        num_classes: Classes of the linear layer; 0 for none.
        global_pool: "avg", "max", "avgmax", "catavgmax", or "" for an unpooled map (no classes then); with
            `attentive_head`, "attn" or "". None takes "avg" or "attn".
        channels: Channels C of the first stage.
        depths: Blocks of each stage.
        groups: DCNv3 groups of each stage.
        mlp_ratio: Ratio of hidden to outer channels of the MLP.
        layer_scale: Initial layer scale, None for no layer scale.
        offset_scale: DCNv3's factor on kernel grid and offsets.
        post_norm: Norm after instead of before each branch.
        res_post_norm: A norm on both sides of each branch.
        dw_kernel_size: Kernel of DCNv3's depthwise convolution, None for 3.
        center_feature_scale: Whether DCNv3 mixes its input in.
        remove_center: DCNv3 without the kernel's center point.
        stage3_post_norm_blocks: Blocks of the third stage that are followed by an extra norm.
        attentive_head: Use the head of huge and giant.
        cls_scale: Ratio of output to input channels of the head's 1x1 convolution.
        act_layer: Activation, by timm's name.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block, rising linearly from 0.
        pack_weights: Whether CPU inference keeps copies of the weights in the layout of its kernels, made in the first
            call: faster, for up to twice the memory. `layers.set_weight_packing` changes it later.
        device, dtype: Of the parameters; "meta" allocates nothing.

    Shapes:
        (N, in_chans, H, W) -> (N, num_classes), any H and W (see above for the attentive head).

    Raises:
        ValueError: An argument is out of range or does not fit another; the message names it.
    """

    key_map: ClassVar[KeyMap] = INTERNIMAGE

    if TYPE_CHECKING:  # of the two heads; identities where the other one has a module
        conv_head: nn.Module
        dcnv3_head_x3: nn.Module
        dcnv3_head_x4: nn.Module
        clip_projector: nn.Module
        fc_norm: nn.Module
        head: nn.Module

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        channels: int = 64,
        depths: tuple[int, ...] = (4, 4, 18, 4),
        groups: tuple[int, ...] = (4, 8, 16, 32),
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        offset_scale: float = 1.0,
        post_norm: bool = False,
        res_post_norm: bool = False,
        dw_kernel_size: int | None = None,
        center_feature_scale: bool = False,
        remove_center: bool = False,
        stage3_post_norm_blocks: tuple[int, ...] = (),
        attentive_head: bool = False,
        cls_scale: float = 1.5,
        act_layer: str = "gelu",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        pack_weights: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: FactoryKwargs = {"device": device, "dtype": dtype}
        check_arguments(
            in_chans=in_chans,
            num_classes=num_classes,
            channels=channels,
            depths=depths,
            groups=groups,
            mlp_ratio=mlp_ratio,
            layer_scale=layer_scale,
            offset_scale=offset_scale,
            dw_kernel_size=dw_kernel_size,
            stage3_post_norm_blocks=stage3_post_norm_blocks,
            cls_scale=cls_scale,
            act_layer=act_layer,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            post_norm=post_norm,
            res_post_norm=res_post_norm,
            center_feature_scale=center_feature_scale,
            remove_center=remove_center,
            attentive_head=attentive_head,
            pack_weights=pack_weights,
        )
        super().__init__(
            in_chans,
            channels,
            depths,
            groups,
            norm=not post_norm or center_feature_scale,
            stage3_post_norm_blocks=stage3_post_norm_blocks,
            drop_path_rate=drop_path_rate,
            act_layer=act_layer,
            pack_weights=pack_weights,
            mlp_ratio=mlp_ratio,
            layer_scale=layer_scale,
            offset_scale=offset_scale,
            post_norm=post_norm,
            res_post_norm=res_post_norm,
            dw_kernel_size=dw_kernel_size,
            center_feature_scale=center_feature_scale,
            remove_center=remove_center,
            **dd,
        )
        self.num_classes = num_classes
        self.fuses_stages = attentive_head  # forward_features joins stages 3 and 4
        self.attentive = attentive_head  # pooling is by attention
        self.layer_scale = layer_scale
        if attentive_head:
            self.num_features = _HEAD_CHANNELS
            self.dcnv3_head_x4 = nn.Sequential(nn.Conv2d(8 * channels, _HEAD_CHANNELS * 4, 1, **dd), nn.PixelShuffle(2))
            self.dcnv3_head_x3 = nn.Conv2d(4 * channels, _HEAD_CHANNELS, 1, **dd)
            self.clip_projector = AttentivePool(_HEAD_CHANNELS, _HEAD_OUT, _HEAD_HEADS, **dd)
            self.fc_norm = create_norm(_HEAD_OUT, **dd)
            self.conv_head = nn.Identity()
            self._head_channels = _HEAD_OUT
        else:
            self.num_features = 8 * channels
            self._head_channels = int(8 * channels * cls_scale)
            self.dcnv3_head_x4 = self.dcnv3_head_x3 = nn.Identity()
            self.clip_projector = self.fc_norm = nn.Identity()
            self.conv_head = nn.Sequential(
                nn.Conv2d(8 * channels, self._head_channels, 1, bias=False, **dd),
                create_norm(self._head_channels, "batchnorm", in_format="NCHW", out_format="NCHW", **dd),
                activation_class(act_layer)(),
            )
        self._set_head(num_classes, global_pool, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.apply(self._init_module)

    def _set_head(
        self,
        num_classes: int,
        global_pool: str | None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Pooling and classifier; sets `head_hidden_size`."""
        check_num_classes(num_classes)
        if global_pool is None:
            global_pool = "attn" if self.attentive else "avg"
        pools = ("attn", "") if self.attentive else ("avg", "max", "avgmax", "catavgmax", "")
        if global_pool not in pools:
            raise ValueError(f"global_pool must be one of {pools} for this model, got {global_pool!r}")
        if num_classes > 0 and not global_pool:
            raise ValueError(f"global_pool='' gives a map, which has no classes: pass num_classes=0, not {num_classes}")
        self.attend = global_pool == "attn"  # pooling by attention, which is not one of timm's
        pool_type = "" if self.attend else global_pool
        self.global_pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type))
        if self.attend:
            self.global_pool.pool_type = "attn"  # timm saves the name with the model, whose constructor takes it
        self.global_pool.train(self.training)
        pooled = self.num_features if self.attentive and not self.attend else self._head_channels
        self.head_hidden_size = pooled * self.global_pool.feat_mult()
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(self.head_hidden_size, num_classes, device=device, dtype=dtype)
        self.head.train(self.training)

    @torch.jit.ignore
    def arguments_of(self, shapes: Mapping[str, Shape]) -> dict[str, Any]:
        """The arguments with which a model of this architecture has weights of these shapes, under our names."""
        arguments = super().arguments_of(shapes)
        if "levels.0.blocks.0.gamma1" in shapes:  # 1 is what the detectors' tiny is trained from
            arguments["layer_scale"] = self.layer_scale or 1.0
        return arguments

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay besides the biases and vectors that timm excludes itself: none."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer-wise learning rates, in upstream's grouping.

        Every block is a layer; the stem belongs to the first block, a stage's norm and downsampling to the first block
        of the next stage, the head to the last block.
        """
        if coarse:
            return dict(stem=r"^patch_embed", blocks=r"^levels\.(\d+)")
        between = [(rf"^levels\.{i}\.(?:norm|downsample)\.", (i + 1, 0)) for i in range(len(self.levels) - 1)]
        extra = [
            (rf"^levels\.{i}\.post_norms\.{k}\.", (i, block))
            for i, stage in enumerate(self.get_stages())
            for k, block in enumerate(stage.post_norm_blocks)
        ]
        return dict(
            blocks=[
                (r"^patch_embed\.", (0, 0)),
                (r"^levels\.(\d+)\.blocks\.(\d+)\.", None),
                *between,
                *extra,
                (r"^(?:levels|conv_head|dcnv3_head_x3|dcnv3_head_x4|clip_projector|fc_norm|head)\.", (99999,)),
            ]
        )

    @torch.jit.ignore
    def check_image_size(self, height: int, width: int) -> None:
        """Whether the model takes images of this size; see `parts.ChecksImageSize`.

        Raises:
            ValueError: It does not; the message names sizes that it takes.
        """
        if self.fuses_stages:
            check_sides(height, width)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The linear classifier."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Create a new classifier, and another pooling if one is named; the rest of the head keeps its weights.

        Args:
            num_classes: Classes of the new classifier; 0 for none.
            global_pool: As for the constructor. None keeps the pooling, except that a classifier after an unpooled map
                restores the model's default pooling.

        Raises:
            ValueError: As the constructor.
        """
        kept = "attn" if self.attend else self.global_pool.pool_type
        if global_pool is None and (kept or num_classes == 0):
            global_pool = kept
        self._set_head(num_classes, global_pool, **get_device_dtype(self))
        self.head.apply(self._init_module)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Feature maps of the stages, each after its last norm and before the downsampling.

        Args:
            x: (N, in_chans, H, W).
            indices: The last n stages for an int, those named for a list, all for None.
            norm: For timm's signature, without effect: a stage's norm is part of its map.
            stop_early: Stop after the last stage requested.
            output_fmt: Layout of the maps, "NCHW" or "NHWC".
            intermediates_only: Do not return the final features.

        Returns:
            The maps, or (`forward_features`' result, maps).

        Raises:
            ValueError: Unknown `output_fmt`.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}")
        take, last = feature_take_indices(len(self.levels), indices)
        stages = self.levels[: last + 1] if stop_early else self.levels
        if self.fuses_stages and not intermediates_only and len(stages) == 4:
            x = check_fusable(x)
        x = self.patch_embed(x)
        maps = []
        intermediates = []
        for i, stage in enumerate(stages):
            x = stage(x)
            maps.append(x)
            if i in take:
                intermediates.append(x.permute(0, 3, 1, 2) if output_fmt == "NCHW" else x)
            if i < len(stages) - 1:
                x = stage.downsample(x)
        if intermediates_only:
            return intermediates
        if self.fuses_stages and len(maps) == 4:
            return self._fuse(maps[2], maps[3]), intermediates
        return x.permute(0, 3, 1, 2), intermediates

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove what the requested stages do not need; the counterpart of `forward_intermediates(indices)`.

        Args:
            indices: As in `forward_intermediates`.
            prune_norm: Also remove what joins stages 3 and 4 (huge and giant).
            prune_head: Remove the head.

        Returns:
            The indices of the stages kept.
        """
        take, last = feature_take_indices(len(self.levels), indices)
        cut = last < len(self.levels) - 1
        self.levels = self.levels[: last + 1]
        self.levels[-1].downsample = nn.Identity()
        if cut or prune_head or (prune_norm and self.fuses_stages):
            self.conv_head = self.clip_projector = self.fc_norm = nn.Identity()
            self.attentive = False
            if cut or prune_norm:
                self.fuses_stages = False
                self.dcnv3_head_x4 = self.dcnv3_head_x3 = nn.Identity()
                self.num_features = self.feature_info[last]["num_chs"]
            self._head_channels = self.num_features
            self._set_head(0, "")
        return take

    def _fuse(self, stage3: Tensor, stage4: Tensor) -> Tensor:
        """The attentive head's map: (N, h, w, 4C) and (N, h / 2, w / 2, 8C) -> (N, 1024, h, w)."""
        return self.dcnv3_head_x4(stage4.permute(0, 3, 1, 2)) + self.dcnv3_head_x3(stage3.permute(0, 3, 1, 2))

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> (N, num_features, h, w): stage 4, or stages 3 and 4 joined for the attentive head."""
        if self.fuses_stages:
            x = check_fusable(x)
        x = self.patch_embed(x)
        stage3 = x
        for i, stage in enumerate(self.levels):
            x = stage(x)
            if i == 2:
                stage3 = x
            x = stage.downsample(x)
        if self.fuses_stages:
            return self._fuse(stage3, x)
        return x.permute(0, 3, 1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(N, num_features, h, w) -> (N, num_classes), or (N, head_hidden_size) with `pre_logits`."""
        x = self.conv_head(x)
        if self.attend:
            x = self.fc_norm(self.clip_projector(x))
        else:
            x = self.global_pool(x)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
