# SPDX-License-Identifier: MIT
"""Augmentation of training images by timm: crops, flips and colors of one image, and mixing of a batch."""

from collections.abc import Callable
from typing import Any

from PIL import Image
from timm.data import Mixup, create_transform
from torch import Tensor

from ...config import ConfigError
from ...engine.rng import seed_mixing
from .config import FinetuneConfig


def training_transform(config: FinetuneConfig, data_config: dict[str, Any]) -> Callable[[Image.Image], Tensor]:
    """timm's augmentation: Pillow image -> normalized tensor.

    Args:
        config: The settings.
        data_config: timm's preprocessing, from `internimage.engine.create.data_config`.

    Raises:
        ConfigError: timm has no such policy as `auto_augment`.
    """
    try:
        return create_transform(
            input_size=data_config["input_size"],
            is_training=True,
            scale=(config.scale_min, 1.0),
            ratio=(1 / config.ratio_max, config.ratio_max),
            hflip=config.hflip,
            color_jitter=config.color_jitter,
            auto_augment=config.auto_augment,
            re_prob=config.random_erasing,
            re_mode="pixel",
            interpolation=data_config["interpolation"],
            mean=data_config["mean"],
            std=data_config["std"],
        )
    except (AssertionError, ValueError) as error:
        if config.auto_augment is None:
            raise
        raise ConfigError(
            f"'auto_augment' must be a policy of timm, such as rand-m9-mstd0.5, got '{config.auto_augment}'"
        ) from error


class Mixing:
    """Mixup and cutmix of a micro-batch, by draws that depend on the seed and the step alone.

    timm draws one ratio and one box a batch, so they are the same in every process. `BatchPlan` keeps the images that
    timm mixes with each other in one micro-batch.
    """

    def __init__(self, config: FinetuneConfig, classes: int) -> None:
        self.seed = config.seed
        self.mixup = Mixup(config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=classes)

    def __call__(self, images: Tensor, targets: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """(N, C, H, W) images and (N,) classes -> mixed images and (N, classes) probabilities."""
        seed_mixing(self.seed, step)
        return self.mixup(images, targets)
