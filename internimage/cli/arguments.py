# SPDX-License-Identifier: MIT
"""Loading the model that the options of `tables.MODEL` specify."""

import argparse
from typing import Any

import torch
from torch import nn

from ..dtypes import torch_dtype
from ..engine.create import create_model, data_config, pick_device
from ..export.description import ExportError
from ..export.runtime import is_exported, open_exported


def load_model(arguments: argparse.Namespace) -> tuple[nn.Module, dict[str, Any], torch.device, torch.dtype]:
    """Model, preprocessing (timm's data config), device and dtype. It may be a file that `export` has written."""
    if is_exported(arguments.model):
        if arguments.verb not in ("evaluate", "predict"):
            raise ExportError(
                f"'{arguments.model}' is an exported file, which evaluate and predict take, and no others"
            )
        return _load_exported(arguments)
    device = pick_device(arguments.device)
    model = create_model(
        arguments.model,
        arguments.checkpoint,
        num_classes=arguments.num_classes,
        use_ema=arguments.use_ema,
        img_size=arguments.img_size,
    )
    return model, data_config(model, arguments.img_size, arguments.crop_pct), device, torch_dtype(arguments.dtype)


def _load_exported(arguments: argparse.Namespace) -> tuple[nn.Module, dict[str, Any], torch.device, torch.dtype]:
    """An exported file, which has its own preprocessing and dtype, on the CPU."""
    device = pick_device(arguments.device)
    if device.type != "cpu" and arguments.device != "auto":
        raise ExportError(f"exported files are evaluated on the CPU, got --device {arguments.device}")
    model = open_exported(arguments.model)
    config = model.description.data_config()
    if arguments.crop_pct is not None:
        config["crop_pct"] = arguments.crop_pct
    if arguments.img_size is not None:
        size = (arguments.img_size, arguments.img_size)
        if "height" not in model.description.open and size != config["input_size"][1:]:
            fixed = " x ".join(map(str, config["input_size"][1:]))
            raise ExportError(f"'{arguments.model}' takes images of {fixed} only, got --img-size {arguments.img_size}")
        config["input_size"] = (config["input_size"][0], *size)
    return model, config, torch.device("cpu"), torch.float32
