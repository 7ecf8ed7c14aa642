# SPDX-License-Identifier: MIT
"""Small models for tests of views, in float64 with offsets that are not zero."""

import timm
import torch
from torch import nn

from internimage.layers.dcnv3 import DCNv3
from internimage.layers.deform_conv import DeformConv

# what huge has and atto has not; layers as small as atto's
HUGE = dict(
    dw_kernel_size=5, center_feature_scale=True, remove_center=True, res_post_norm=True, layer_scale=0.5,
    stage3_post_norm_blocks=(1,),
)  # fmt: skip


SMALL_RESNET = dict(layers=(1, 1, 1, 1), channels=(8, 16, 24, 32))


def model(name: str, **arguments) -> nn.Module:
    """A model by timm's name, or "small resnet", with 3 classes, in float64 and eval mode.

    Its sampling points are moved by some tenths of a pixel.
    """
    if name == "small resnet":
        name, arguments = "dcnv2_resnet18", {**SMALL_RESNET, **arguments}
    torch.manual_seed(0)
    created = timm.create_model(name, num_classes=3, **arguments).double().eval()
    with torch.no_grad():
        for module in created.modules():
            if isinstance(module, DCNv3):
                nn.init.normal_(module.offset.weight, std=0.05)
                nn.init.uniform_(module.offset.bias, -0.4, 0.4)
                nn.init.normal_(module.mask.weight, std=0.2)
            elif isinstance(module, DeformConv):
                nn.init.normal_(module.conv_offset.weight, std=0.01)
                nn.init.uniform_(module.conv_offset.bias, -0.4, 0.4)
            elif isinstance(module, nn.BatchNorm2d):  # of a new ResNet's branches it is zero
                nn.init.uniform_(module.weight, 0.5, 1.0)
    return created


def image(height: int = 32, width: int = 32, seed: int = 1) -> torch.Tensor:
    """A smooth image (3, height, width) in float64."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, 3, height // 8 + 1, width // 8 + 1, generator=generator, dtype=torch.float64)
    return nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")[0]
