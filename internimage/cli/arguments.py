# SPDX-License-Identifier: MIT
"""The model that the options shared by several verbs ask for."""

import argparse

import torch
from torch import nn

from ..dtypes import torch_dtype
from ..engine.create import create_model, data_config, pick_device


def load_model(arguments: argparse.Namespace) -> tuple[nn.Module, dict, torch.device, torch.dtype]:
    """Model, preprocessing, device and dtype from the options of `tables.MODEL`."""
    device = pick_device(arguments.device)
    model = create_model(
        arguments.model,
        arguments.checkpoint,
        num_classes=arguments.num_classes,
        use_ema=arguments.use_ema,
        img_size=arguments.img_size,
    )
    return model, data_config(model, arguments.img_size, arguments.crop_pct), device, torch_dtype(arguments.dtype)
