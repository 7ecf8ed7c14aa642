# SPDX-License-Identifier: MIT
"""Loading the model that the options of `tables.MODEL` specify."""

import argparse
from typing import Any

import torch
from torch import nn

from ..dtypes import torch_dtype
from ..engine.create import create_model, data_config, pick_device


def load_model(arguments: argparse.Namespace) -> tuple[nn.Module, dict[str, Any], torch.device, torch.dtype]:
    """Model, preprocessing (timm's data config), device and dtype."""
    device = pick_device(arguments.device)
    model = create_model(
        arguments.model,
        arguments.checkpoint,
        num_classes=arguments.num_classes,
        use_ema=arguments.use_ema,
        img_size=arguments.img_size,
    )
    return model, data_config(model, arguments.img_size, arguments.crop_pct), device, torch_dtype(arguments.dtype)
