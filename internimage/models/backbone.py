# SPDX-License-Identifier: MIT
"""The backbone of InternImage: stem and stages, their initialization, and access to its parts.

Paper: "InternImage: Exploring Large-Scale Vision Foundation Models with Deformable Convolutions", CVPR 2023,
https://arxiv.org/abs/2211.05778. State-dict keys and shapes are those of the official classification models
(https://github.com/OpenGVLab/InternImage, MIT license).
"""

from typing import TYPE_CHECKING, Any

import torch
from timm.layers import calculate_drop_path_rates, trunc_normal_
from torch import nn

from ..layers.attention_pool import AttentivePool
from ..layers.dcnv3 import DCNv3
from ..layers.packing import set_weight_packing
from .blocks import Block, Stage, Stem
from .families import FamilyModel

__all__ = ["Backbone"]


class Backbone(FamilyModel):
    """Stem and four stages at strides 4, 8, 16, 32 with C, 2C, 4C, 8C channels, C = `channels`.

    Without a forward: a subclass calls `patch_embed`, then each of `levels` followed by its `downsample`.

    Args:
        in_chans: Image channels.
        channels: Channels C of the first stage.
        depths: Blocks of each stage.
        groups: DCNv3 groups of each stage.
        norm: Whether a norm follows the last block of each stage.
        stage3_post_norm_blocks: Blocks of the third stage that are followed by an extra norm.
        drop_path_rate: Stochastic depth rate of the last block, rising linearly from 0.
        act_layer: Activation, by timm's name.
        pack_weights: Whether CPU inference keeps packed copies of weights; see `set_weight_packing`.
        device, dtype: Of the parameters; "meta" allocates nothing.
        block_kwargs: Arguments of `Block`.
    """

    feature_info: list[dict[str, Any]]

    if TYPE_CHECKING:
        levels: Any  # an nn.ModuleList of stages, which does not know the class of its items

    def __init__(
        self,
        in_chans: int,
        channels: int,
        depths: tuple[int, ...],
        groups: tuple[int, ...],
        norm: bool,
        stage3_post_norm_blocks: tuple[int, ...],
        drop_path_rate: float,
        act_layer: str,
        pack_weights: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **block_kwargs: Any,
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.patch_embed = Stem(in_chans, channels, act_layer, device=device, dtype=dtype)
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)  # a list a stage
        self.levels = nn.ModuleList()
        self.feature_info = []
        for i in range(4):
            stage = Stage(
                channels * 2**i,
                depth=depths[i],
                drop_path=rates[i],
                norm=norm,
                post_norm_blocks=tuple(stage3_post_norm_blocks) if i == 2 else (),
                downsample=i < 3,
                groups=groups[i],
                act_layer=act_layer,
                device=device,
                dtype=dtype,
                **block_kwargs,
            )
            self.levels.append(stage)
            self.feature_info += [dict(num_chs=channels * 2**i, reduction=4 * 2**i, module=f"levels.{i}")]
        if not pack_weights:
            set_weight_packing(self, False)

    # ---- parts, see `parts.HasParts`

    @torch.jit.ignore
    def get_stem(self) -> list[Stem]:
        """What precedes the first stage."""
        return [self.patch_embed]

    @torch.jit.ignore
    def get_stages(self) -> list[Stage]:
        """The stages, each with the downsampling to the next."""
        return [stage for stage in self.levels if isinstance(stage, Stage)]

    @torch.jit.ignore
    def get_blocks(self) -> list[Block]:
        """The blocks of all stages, in order of execution."""
        return [block for stage in self.get_stages() for block in stage.blocks if isinstance(block, Block)]

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        for stage in self.get_stages():
            stage.grad_checkpointing = enable

    # ---- initial values

    @staticmethod
    def _init_module(module: nn.Module) -> None:
        """Initial values of one module's own parameters, as upstream: convolutions keep torch's defaults."""
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            return  # torch would spend most of the time of building a model on nothing
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, DCNv3):  # comes after its linears: `apply` visits children first
            module.reset_parameters()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialize every parameter and buffer, e.g. after `to_empty()` of a model built on the meta device."""
        self._init_part(self)

    def _init_part(self, part: nn.Module) -> None:
        """`init_weights` of the model or of one of its children."""
        for module in part.modules():
            if isinstance(module, (nn.Conv2d, nn.LayerNorm, nn.BatchNorm2d)):
                module.reset_parameters()
            elif isinstance(module, Block):
                module.reset_layer_scale()
            elif isinstance(module, AttentivePool):
                for bias in (module.cross_dcn.q_bias, module.cross_dcn.k_bias, module.cross_dcn.v_bias):
                    nn.init.zeros_(bias)
        part.apply(self._init_module)

    @torch.jit.ignore
    def materialize(self, children: set[str], device: torch.device | str) -> None:
        """Give children of a model on the meta device memory on `device` and initial values; the others stay there.

        Args:
            children: Names of direct children, such as "head".
            device: Where they go.
        """
        for name in sorted(children):
            child = self.get_submodule(name)
            child.to_empty(device=device)
            self._init_part(child)
