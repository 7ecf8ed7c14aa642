# SPDX-License-Identifier: MIT
"""A model to time: InternImage-T, the official implementation, or a timm model, with random weights."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dtypes import torch_dtype
from .official import official_model

OURS = "internimage_tiny"
OFFICIAL = "official InternImage-T"
DTYPES = ("fp32", "bf16")  # as rows name them


@dataclass(frozen=True)
class Contender:
    """A model in the dtype, memory format and image size in which it is timed."""

    name: str
    dtype: str = "fp32"
    channels_last: bool = False
    checkout: Path | None = None  # for the official model
    img_size: int = 224

    def build(self) -> nn.Module:
        """The model in eval mode, always with the same weights."""
        torch.manual_seed(0)
        model: nn.Module
        if self.checkout is not None:
            model = official_model(
                self.checkout, channels=64, depths=[4, 4, 18, 4], groups=[4, 8, 16, 32], drop_path_rate=0.0
            )
            # our parameters have the official names
            model.load_state_dict(replace(self, name=OURS, checkout=None).build().state_dict())
        else:
            cfg = timm.get_pretrained_cfg(self.name, allow_unregistered=True)
            fixed_size = self.name.startswith("swin") or (cfg is not None and cfg.fixed_input_size)
            arguments: dict[str, Any] = {"img_size": self.img_size} if fixed_size else {}
            try:
                model = timm.create_model(self.name, drop_path_rate=0.0, **arguments)
            except TypeError as error:  # the model has no drop path
                if "drop_path_rate" not in str(error):
                    raise
                model = timm.create_model(self.name, **arguments)
            if self.name == OURS:
                randomize_sampling(model)
        model = model.eval().to(torch_dtype(self.dtype))
        return model.to(memory_format=torch.channels_last) if self.channels_last else model

    def images(self, batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(batch, 3, self.img_size, self.img_size, generator=generator).to(torch_dtype(self.dtype))
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images


def randomize_sampling(model: nn.Module) -> None:
    """Give offset and mask, which are initialized to zero, random weights, so that points leave the pixel centers."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith((".dcn.offset.weight", ".dcn.mask.weight")):
            with torch.no_grad():
                parameter.normal_(0, 1 / math.sqrt(parameter.shape[1]), generator=generator)


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
