# SPDX-License-Identifier: MIT
"""The settings of `finetune`, checked before anything is read or written."""

from dataclasses import dataclass

from ...config import ConfigError
from ...engine.config import REQUIRED, RunConfig, setting
from ...values import Choice, Flag, Number, Text, Whole


@dataclass(kw_only=True)
class FinetuneConfig(RunConfig):
    """Settings of `finetune`; a recipe is a YAML file of some of them. `internimage finetune --help` describes each.

    Raises:
        ConfigError: A value is out of its range, or two settings do not go together.
    """

    data: str = setting(
        Text(),
        REQUIRED,
        "folder with train/CLASS/IMAGE and, if there is one, val/CLASS/IMAGE; or CLASS/IMAGE",
        free=True,
    )
    model: str = setting(Text(), "internimage_tiny", "any name that `internimage evaluate --model` takes")
    pretrained: bool = setting(Flag(), True, "start from the weights that the name refers to")
    checkpoint: str | None = setting(Text(), None, "start from this file or folder of weights instead")
    head_from_22k: bool = setting(
        Flag(), False, "take the classifier from ImageNet-22k weights, for class folders named by synsets"
    )
    img_size: int | None = setting(Whole(1, 16384), None, "image side in pixels; null: the model's own")
    in_chans: int | None = setting(
        Choice((1, 3)), None, "image channels; 1 reads images as grayscale; null: the model's own"
    )
    drop_path: float = setting(Number(at_least=0, below=1), 0.1, "rate of stochastic depth")
    smoothing: float = setting(Number(at_least=0, below=1), 0.1, "label smoothing")
    mixup: float = setting(Number(at_least=0), 0.0, "alpha of mixup; 0 is off")
    cutmix: float = setting(Number(at_least=0), 0.0, "alpha of cutmix; 0 is off")
    scale_min: float = setting(
        Number(above=0, at_most=1), 0.35, "smallest share of the image's area that a random crop keeps"
    )
    ratio_max: float = setting(Number(at_least=1), 1.3333, "largest aspect ratio of a random crop")
    hflip: float = setting(Number(at_least=0, at_most=1), 0.5, "probability of a horizontal flip")
    color_jitter: float = setting(Number(at_least=0), 0.3, "strength of random brightness, contrast and saturation")
    auto_augment: str | None = setting(Text(), None, "timm's policy, such as rand-m9-mstd0.5-inc1")
    random_erasing: float = setting(Number(at_least=0, at_most=1), 0.0, "probability that a part of an image is erased")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_from_22k and not (self.pretrained or self.checkpoint):
            raise ConfigError("'head_from_22k' needs weights to take the head from: pretrained=true or checkpoint=PATH")

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with each other."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def starts_from(self) -> dict[str, str | None]:
        return {"model": self.model, "checkpoint": self.checkpoint}

    def check_batch(self, processes: int) -> None:
        super().check_batch(processes)
        if self.mixes and self.batch_size // (processes * self.accumulate) % 2:
            raise ConfigError(
                f"mixup and cutmix pair images, so 'batch_size' over {self._split(processes)} must be even, got "
                f"{self.batch_size}"
            )
