# SPDX-License-Identifier: MIT
"""Arguments that several verbs share."""

import argparse

import torch
from torch import nn

from ..engine.model import DTYPES, create_model, data_config, pick_device


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, with which weights, where and at what size."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        required=True,
        metavar="NAME",
        help="internimage_SIZE[.TAG], any timm name, hf-hub:REPO, or a folder that finetune has written",
    )
    group.add_argument("--checkpoint", metavar="PATH", help="file or folder of weights to load into the model")
    group.add_argument("--use-ema", action="store_true", help="of a checkpoint's two sets of weights take the averaged")
    group.add_argument("--num-classes", type=int, metavar="N", help="instead of the weights' own number of classes")
    group.add_argument("--img-size", type=int, metavar="PIXELS", help="image side, instead of the model's own")
    group.add_argument("--crop-pct", type=float, metavar="SHARE", help="share of the resized image that is kept")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps, ...; auto takes an accelerator if any")
    group.add_argument("--dtype", default="float32", choices=list(DTYPES), help="what the model runs in")


def load_model(arguments: argparse.Namespace) -> tuple[nn.Module, dict, torch.device, torch.dtype]:
    """Model, preprocessing, device and dtype from `add_model_arguments`."""
    device = pick_device(arguments.device)
    model = create_model(
        arguments.model,
        arguments.checkpoint,
        num_classes=arguments.num_classes,
        use_ema=arguments.use_ema,
        img_size=arguments.img_size,
    )
    return model, data_config(model, arguments.img_size, arguments.crop_pct), device, DTYPES[arguments.dtype]
