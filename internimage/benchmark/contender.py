# SPDX-License-Identifier: MIT
"""A model to time: one of this package, its official implementation, or a timm model, with random weights."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dtypes import torch_dtype
from ..layers.deform_conv import DeformConv
from ..layers.packing import set_weight_packing
from ..models.families import is_ours
from .official import official_arguments, official_model

# the official names of the sizes, by ours
SIZES = {"tiny": "T", "small": "S", "base": "B", "large": "L", "xlarge": "XL", "huge": "H", "giant": "G"}
DTYPES = ("fp32", "bf16")  # as rows name them


@dataclass(frozen=True)
class Contender:
    """A model in the dtype, memory format and image size in which it is timed."""

    model: str  # timm's name
    dtype: str = "fp32"
    channels_last: bool = False
    checkout: Path | None = None  # for the official implementation of the model, which is one of ours
    img_size: int = 224
    packed: bool = True  # whether inference keeps packed weights, if the model has them
    on_torchvision: bool = False  # deformable convolutions by torchvision's operator

    @property
    def ours(self) -> bool:
        """Whether it is a model of this package."""
        return self.checkout is None and not self.on_torchvision and is_ours(self.model)

    @property
    def who(self) -> str:
        """Its name in rows."""
        if self.checkout is not None:
            size = self.model.removeprefix("internimage_")
            return f"official InternImage-{SIZES.get(size, size)}"
        if self.on_torchvision:
            return f"{self.model} on torchvision"
        return f"{self.model} (weights not packed)" if self.ours and not self.packed else self.model

    def build(self) -> nn.Module:
        """The model in eval mode, always with the same weights."""
        torch.manual_seed(0)
        model: nn.Module
        if self.checkout is not None:
            own: Any = replace(self, checkout=None).build()
            model = official_model(self.checkout, drop_path_rate=0.0, **official_arguments(own))
            model.load_state_dict(own.state_dict())  # our parameters have the official names
        else:
            cfg = timm.get_pretrained_cfg(self.model, allow_unregistered=True)
            fixed_size = self.model.startswith("swin") or (cfg is not None and cfg.fixed_input_size)
            arguments: dict[str, Any] = {"img_size": self.img_size} if fixed_size else {}
            try:
                model = timm.create_model(self.model, drop_path_rate=0.0, **arguments)
            except TypeError as error:  # the model has no drop path
                if "drop_path_rate" not in str(error):
                    raise
                model = timm.create_model(self.model, **arguments)
            if is_ours(self.model):
                make_like_trained(model)
                set_weight_packing(model, self.packed)
            if self.on_torchvision:
                use_torchvision(model)
        model = model.eval().to(torch_dtype(self.dtype))
        return model.to(memory_format=torch.channels_last) if self.channels_last else model

    def images(self, batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(batch, 3, self.img_size, self.img_size, generator=generator).to(torch_dtype(self.dtype))
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images


def use_torchvision(model: nn.Module) -> None:
    """Have torchvision's operator convolve in the deformable layers of a model."""
    from torchvision.ops import deform_conv2d

    def convolve(layer: DeformConv, input: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        output: Tensor = deform_conv2d(
            input,
            offset,
            layer.weight,
            layer.bias,
            layer.stride,
            layer.padding,
            layer.dilation,
            mask if layer.modulated else None,
        )
        return output

    for module in model.modules():
        if isinstance(module, DeformConv):
            module._convolve = partial(convolve, module)  # type: ignore[method-assign]


@torch.no_grad()
def make_like_trained(model: nn.Module) -> None:
    """Replace initial values of one of our models with which its blocks would do next to nothing.

    Offset and mask, initialized to zero, get random weights, so that points leave the pixel centers. Layer scales,
    initialized to 1e-5, become 1, so that the logits that are compared depend on what the blocks compute.
    """
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith((".dcn.offset.weight", ".dcn.mask.weight", ".conv_offset.weight")):
            parameter.normal_(0, 1 / math.sqrt(parameter[0].numel()), generator=generator)
        elif name.endswith((".gamma1", ".gamma2")):
            parameter.fill_(1)


def inference(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    """A function that runs inference on the images."""

    def run() -> Tensor:
        with torch.inference_mode():
            logits: Tensor = model(images)
            return logits

    return run


def training_step(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    """A function that does a forward pass, loss, backward pass and update, at a negligible learning rate."""
    labels = torch.arange(len(images)) % 1000
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def run() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss

    return run
