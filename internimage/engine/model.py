# SPDX-License-Identifier: MIT
"""A model for a command: by name, from a folder, or with a file of weights."""

import difflib
from pathlib import Path

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_data_config
from torch import nn

from ..dtypes import NAMES
from ..errors import UserError
from ..models.backbone import check_fusable
from ..models.checkpoints import count_classes

DTYPES = {name: getattr(torch, name) for name in NAMES}


class ModelError(UserError, ValueError):
    """A model that does not exist, or that cannot do what it was asked."""


def known_models() -> list[str]:
    """Our names, with and without tags."""
    return timm.list_models("internimage_*", include_tags=True) + timm.list_models("internimage_*")


def create_model(
    name: str,
    checkpoint: str | None = None,
    pretrained: bool = True,
    num_classes: int | None = None,
    use_ema: bool = False,
    **kwargs,
) -> nn.Module:
    """`timm.create_model` with a command's conveniences.

    Args:
        name: `internimage_SIZE[.TAG]`, any other timm name, `hf-hub:REPO`, `local-dir:FOLDER`, or a folder that
            `finetune` has written.
        checkpoint: File or folder of weights for the architecture `name`. Its own number of classes is taken unless
            `num_classes` says otherwise.
        pretrained: Load the weights that `name` stands for.
        num_classes: Instead of the weights' own.
        use_ema: Of a checkpoint that has averaged weights beside the others, take those.
        kwargs: For `timm.create_model`.

    Raises:
        ModelError: There is no such model; the message has the nearest names.
        internimage.CheckpointError: The weights cannot be read or do not fit.
    """
    if ":" not in name and (Path(name) / "config.json").is_file():
        name = f"local-dir:{name}"
    if ":" not in name and not timm.is_model(name):
        if Path(name).is_dir():
            raise ModelError(f"the folder '{name}' has no config.json, so it is not a model that finetune has written")
        names = timm.list_models(include_tags=True) if not name.startswith("intern") else []
        near = difflib.get_close_matches(name, known_models() + names, n=3, cutoff=0.5)
        instead = (
            f"did you mean {' or '.join(near)}?" if near else f"ours are {', '.join(timm.list_models('internim*'))}"
        )
        raise ModelError(f"there is no model '{name}'; {instead}")
    if use_ema:
        kwargs["use_ema"] = True
    if checkpoint is not None:
        kwargs["pretrained_cfg_overlay"] = dict(file=str(checkpoint), source="")
        if num_classes is None:
            num_classes = count_classes(checkpoint, use_ema)
            kwargs["pretrained_cfg_overlay"]["num_classes"] = num_classes
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    try:
        return timm.create_model(name, pretrained=pretrained or checkpoint is not None, **kwargs)
    except (RuntimeError, ValueError, FileNotFoundError) as error:
        if isinstance(error, UserError):
            raise
        raise ModelError(f"cannot create '{name}': {error}") from error
    except KeyError as error:  # timm, reading a config.json of transformers
        raise ModelError(
            f"cannot create '{name}': its config.json is not timm's (it has no {error}). Official weights load by "
            f"their names here, such as internimage_tiny.ogvl_in1k"
        ) from error


def data_config(model: nn.Module, img_size: int | None = None, crop_pct: float | None = None) -> dict:
    """timm's preprocessing for a model, with overrides; checks that the model takes the size.

    A model of one channel reads grey images, normalised by the mean of the three channels' means.

    Raises:
        ModelError: It does not, or takes neither one channel nor three.
    """
    config = resolve_data_config({"crop_pct": crop_pct}, model=model)
    channels = getattr(model, "in_chans", 3)
    if channels not in (1, 3):
        raise ModelError(f"the model takes {channels} channels; images have 1 or 3")
    size = config["input_size"][1:] if img_size is None else (img_size, img_size)
    config["input_size"] = (channels, *size)
    if channels == 1:
        for key in ("mean", "std"):
            config[key] = (sum(config[key]) / len(config[key]),)
    if getattr(model, "fuses_stages", False):
        try:
            check_fusable(torch.empty(1, *config["input_size"], device="meta"))
        except ValueError as error:
            raise ModelError(str(error)) from error
    return config


def pick_device(name: str = "auto") -> torch.device:
    """A torch device by name; `auto` is the machine's accelerator, or the CPU.

    Raises:
        ModelError: There is no such device here.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device '{name}' cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def label_names(model: nn.Module) -> list[str]:
    """A readable name of every class: those saved with the weights, ImageNet's, or the indices."""
    cfg = getattr(model, "pretrained_cfg", {})
    names, descriptions = cfg.get("label_names"), cfg.get("label_descriptions") or {}
    if names and len(names) == model.num_classes:
        return [descriptions.get(name, name) for name in names]
    subset = infer_imagenet_subset(model)
    if subset is not None:
        info = ImageNetInfo(subset)
        return [info.index_to_description(i) for i in range(model.num_classes)]
    return [str(i) for i in range(model.num_classes)]
