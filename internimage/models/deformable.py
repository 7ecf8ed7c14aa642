# SPDX-License-Identifier: MIT
"""Making the 3x3 convolutions of a ResNet deformable, without a change of what it computes."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from ..errors import UserError
from ..layers.deform_conv import DeformConv, DeformConv2d, ModulatedDeformConv2d, accept_old_keys
from .arguments import check_whole_number
from .attributes import name_of

MOST_OFFSET_GROUPS = 8192


class DeformError(UserError, ValueError):
    """A model whose convolutions cannot be made deformable. It is unchanged."""


def check_stages(stages: Any) -> tuple[int, ...]:
    """`stages` in order; raises ValueError unless they are some of 1 to 4, each named once."""
    if not isinstance(stages, Iterable) or isinstance(stages, (str, bytes)):
        raise ValueError(f"stages must be some of 1, 2, 3 and 4, got {stages!r}")
    numbers = tuple(stages)
    for number in numbers:
        check_whole_number("each of stages", number, 1, 4)
    if not numbers or len(set(numbers)) < len(numbers):
        raise ValueError(f"stages must name at least one of 1 to 4, and each once, got {numbers}")
    return tuple(sorted(map(int, numbers)))


def check_deformation(stages: Any, modulated: Any, offset_groups: Any) -> tuple[int, ...]:
    """Check arguments of `deform_convolutions` by themselves, and return `stages` in order; raises ValueError."""
    if not isinstance(modulated, (bool, int)) or modulated not in (0, 1):
        raise ValueError(f"modulated must be true or false, got {modulated!r}")
    check_whole_number("offset_groups", offset_groups, 1, MOST_OFFSET_GROUPS)
    return check_stages(stages)


@torch.no_grad()
def deform_convolutions(
    model: ResNet, stages: Sequence[int] = (2, 3, 4), modulated: bool = True, offset_groups: int = 1
) -> ResNet:
    """Make the 3x3 convolutions of a ResNet's stages deformable, in place. The model computes the same as before.

    The offsets begin at zero. So do the mask's logits, whose sigmoid halves every sample: therefore the weight of a
    convolution that becomes modulated is doubled. Weight and bias stay the same parameters.

    Args:
        model: A timm ResNet of basic or bottleneck blocks: also one that is dilated, grouped (ResNeXt), has attention
            or anti-aliasing. Convolutions of the shortcuts stay as they are.
        stages: Which stages, 1 (`layer1`) to 4 (`layer4`). DCNv1 has (4,), DCNv2 (2, 3, 4).
        modulated: DCNv2, with a mask, instead of DCNv1.
        offset_groups: Groups of input channels with offsets of their own.

    Returns:
        The model.

    Raises:
        DeformError: It is no such ResNet, a stage has no 3x3 convolutions or is deformable already, or `offset_groups`
            does not divide the channels of one. The model is unchanged.
        ValueError: An argument is out of range.
    """
    stages = check_deformation(stages, modulated, offset_groups)
    name = name_of(model)
    if not isinstance(model, ResNet):
        raise DeformError(f"'{name}' is no ResNet of timm's (timm.models.resnet.ResNet), got {type(model).__name__}")
    found = [place for stage in stages for place in _convolutions(model, name, stage)]
    for _, key, conv in found:
        _check(conv, f"'{key}' of '{name}'", offset_groups)
    for block, key, conv in found:
        setattr(block, key.rpartition(".")[2], _deformable(conv, modulated, offset_groups))
    for block in dict.fromkeys(block for block, _, _ in found):
        accept_old_keys(block)
    return model


def _convolutions(model: ResNet, name: str, stage: int) -> list[tuple[nn.Module, str, nn.Module]]:
    """The 3x3 convolutions of a stage: block, name in the model, and convolution."""
    layer = getattr(model, f"layer{stage}")
    if any(isinstance(module, DeformConv) for module in layer.modules()):
        raise DeformError(f"stage {stage} of '{name}' is deformable already")
    found: list[tuple[nn.Module, str, nn.Module]] = []
    for key, block in layer.named_children():
        if not isinstance(block, (BasicBlock, Bottleneck)):
            raise DeformError(
                f"stage {stage} of '{name}' has blocks of the kind {type(block).__name__}; those of BasicBlock and "
                f"Bottleneck can be made deformable"
            )
        for child, conv in block.named_children():
            kernel: Any = getattr(conv, "kernel_size", None)
            if child in ("conv1", "conv2", "conv3") and kernel != (1, 1):
                found.append((block, f"layer{stage}.{key}.{child}", conv))
    if not found:
        raise DeformError(f"stage {stage} of '{name}' has no 3x3 convolutions to make deformable")
    return found


def _check(conv: nn.Module, what: str, offset_groups: int) -> None:
    if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        raise DeformError(f"{what} is no plain convolution with zeros as padding, but {conv}")
    if conv.kernel_size != (3, 3):
        raise DeformError(f"{what} is no 3x3 convolution: its kernel is {conv.kernel_size}")
    if conv.in_channels % offset_groups:
        raise DeformError(f"offset_groups must divide the {conv.in_channels} channels of {what}, got {offset_groups}")


def _deformable(conv: Any, modulated: bool, offset_groups: int) -> DeformConv:
    new = (ModulatedDeformConv2d if modulated else DeformConv2d)(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups,
        conv.bias is not None, offset_groups, device="meta",
    )  # fmt: skip
    new.weight, new.bias = conv.weight, conv.bias
    new.conv_offset.to(conv.weight.dtype).to_empty(device=conv.weight.device)
    new.conv_offset.reset_parameters()
    if modulated:
        new.weight.mul_(2)
    return new.train(conv.training)
