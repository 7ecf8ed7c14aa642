# SPDX-License-Identifier: MIT
"""The settings of `finetune`, checked before anything is read or written."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from ...config import ConfigError
from ...dtypes import DTYPE
from ...values import BadValue, Choice, Flag, Kind, Number, Text, Whole, shown


def _setting(kind: Kind, default: Any, help: str, optional: bool = False) -> Any:
    """A field with what its value may be and what it is for; `optional`, or a default of None, allows None too."""
    return dataclasses.field(
        default=default, metadata={"kind": kind, "help": help, "optional": optional or default is None}
    )


_REQUIRED = dataclasses.MISSING


@dataclass
class FinetuneConfig:
    """Settings of `finetune`; a recipe is a YAML file of some of them. `internimage finetune --help` describes each.

    Raises:
        ConfigError: A value is out of its range, or two settings do not go together.
    """

    data: str = _setting(
        Text(), _REQUIRED, "folder with train/CLASS/IMAGE and, if there is one, val/CLASS/IMAGE; or CLASS/IMAGE"
    )
    output: str = _setting(Text(), _REQUIRED, "folder for the result")
    model: str = _setting(Text(), "internimage_tiny", "any name that `internimage evaluate --model` takes")
    pretrained: bool = _setting(Flag(), True, "start from the weights that the name stands for")
    checkpoint: str | None = _setting(Text(), None, "start from this file or folder of weights instead")
    head_from_22k: bool = _setting(
        Flag(), False, "take the classifier from ImageNet-22k weights, for class folders named by synsets"
    )
    overwrite: bool = _setting(Flag(), False, "replace a finished result in `output`")
    resume: bool = _setting(Flag(), True, "go on with an unfinished run in `output`; false begins it anew")
    img_size: int | None = _setting(Whole(1, 16384), None, "image side in pixels; null: the model's own")
    in_chans: int | None = _setting(
        Choice((1, 3)), None, "image channels; 1 reads images as gray; null: the model's own"
    )
    freeze: int = _setting(
        Whole(0, 5), 0, "train neither the stem nor the first N of the four stages; 5 trains the classifier alone"
    )
    epochs: int = _setting(Whole(1), 30, "passes over the training images")
    batch_size: int = _setting(Whole(1), 64, "images per step, over all processes and accumulated parts")
    accumulate: int = _setting(Whole(1), 1, "parts of a batch that a process runs one after the other")
    workers: int = _setting(Whole(0, 1024), 2, "loader processes of each process; 0 loads in the process itself")
    # numpy takes no larger seed
    seed: int = _setting(Whole(0, 2**32 - 1), 0, "seed of every random draw")
    device: str = _setting(Text(), "auto", "cpu, cuda, mps, ...; auto takes an accelerator if there is one")
    parallel: str = _setting(
        Choice(("ddp", "fsdp")), "ddp", "how processes share the work: ddp, or fsdp, which also shards the weights"
    )
    precision: str = _setting(
        DTYPE, "float32", "float32, or bfloat16 or float16 for automatic mixed precision; fp32, bf16, fp16 for short"
    )
    compile: bool = _setting(Flag(), False, "compile the model with torch.compile")
    channels_last: bool = _setting(Flag(), False, "keep images and convolutions in the channels-last memory format")
    grad_checkpointing: bool = _setting(
        Flag(), False, "recompute activations in the backward pass: less memory, more time"
    )
    opt: str = _setting(Text(), "adamw", "optimizer, by timm's name")
    lr: float = _setting(Number(least=0), 1e-3, "highest learning rate of the schedule")
    weight_decay: float = _setting(Number(least=0), 0.05, "weight decay, on weights but not on biases and norms")
    layer_decay: float | None = _setting(
        Number(above=0, most=1), None, "learning rate factor from each layer to the one below it"
    )
    offset_lr_factor: float = _setting(
        Number(least=0), 1.0, "learning rate factor of DCNv3's offset projections and center feature scales"
    )
    clip_grad: float | None = _setting(
        Number(above=0), 5.0, "largest norm of the gradient; null does not clip", optional=True
    )
    sched: str = _setting(Text(), "cosine", "learning rate schedule, by timm's name; none keeps the rate as it is")
    warmup_epochs: int = _setting(
        Whole(0), 2, "epochs in which the learning rate rises to `lr`; below `epochs`, 0 is no warmup"
    )
    warmup_lr: float = _setting(Number(least=0), 1e-6, "learning rate that the warmup begins with")
    min_lr: float = _setting(Number(least=0), 1e-6, "learning rate that the schedule ends with")
    drop_path: float = _setting(Number(least=0, below=1), 0.1, "rate of stochastic depth")
    smoothing: float = _setting(Number(least=0, below=1), 0.1, "label smoothing")
    mixup: float = _setting(Number(least=0), 0.0, "alpha of mixup; 0 is off")
    cutmix: float = _setting(Number(least=0), 0.0, "alpha of cutmix; 0 is off")
    scale_min: float = _setting(
        Number(above=0, most=1), 0.35, "smallest share of the image's area that a random crop keeps"
    )
    ratio_max: float = _setting(Number(least=1), 1.3333, "longest aspect ratio of a random crop")
    hflip: float = _setting(Number(least=0, most=1), 0.5, "probability of a horizontal flip")
    color_jitter: float = _setting(Number(least=0), 0.3, "strength of random brightness, contrast and saturation")
    auto_augment: str | None = _setting(Text(), None, "timm's policy, such as rand-m9-mstd0.5-inc1")
    random_erasing: float = _setting(Number(least=0, most=1), 0.0, "probability that a part of an image is erased")
    ema_decay: float | None = _setting(
        Number(above=0, most=1), None, "decay of a moving average of the weights; the average is what is saved then"
    )
    nan_limit: int = _setting(
        Whole(1), 10, "steps whose loss or gradient is not finite are left out; training stops after this many"
    )
    eval_every: int = _setting(
        Whole(0), 1, "epochs between evaluations on the validation split; 0: only after the last epoch"
    )
    checkpoint_every: int = _setting(Whole(0), 0, "steps between checkpoints, beside the one after each epoch")
    tensorboard: bool = _setting(Flag(), False, "write TensorBoard's files too")
    report: bool = _setting(Flag(), True, "write report.html at the end")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.metadata["optional"]:
                continue
            try:
                setattr(self, field.name, field.metadata["kind"].check(value))
            except BadValue as error:
                raise ConfigError(f"'{field.name}' must be {error}, got {shown(value)}") from error
        if self.parallel == "fsdp" and self.precision == "float16":
            raise ConfigError("with parallel=fsdp 'precision' must be float32 or bfloat16")
        if self.head_from_22k and not (self.pretrained or self.checkpoint):
            raise ConfigError("'head_from_22k' needs weights to take the head from: pretrained=true or checkpoint=PATH")
        self.check_parts(1)

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    def check_schedule(self) -> None:
        """The learning rate rises and then falls, or ConfigError. For new runs: one that has begun so may end so."""
        if self.sched != "none" and self.warmup_epochs >= self.epochs:
            most = f"at most {self.epochs - 1}, or to 0" if self.epochs > 1 else "0"
            raise ConfigError(
                f"'warmup_epochs' must be below 'epochs', got warmup_epochs={self.warmup_epochs} and "
                f"epochs={self.epochs}: the learning rate would only rise. Set warmup_epochs to {most}"
            )

    def check_parts(self, processes: int) -> None:
        """The batch can be shared by so many processes, or ConfigError."""
        parts = processes * self.accumulate
        split = f"{processes} processes times accumulate={self.accumulate}" if parts > 1 else "one part"
        if self.batch_size % parts:
            raise ConfigError(f"'batch_size' must divide by {split}, got {self.batch_size}")
        if self.mixes and self.batch_size // parts % 2:
            raise ConfigError(
                f"mixup and cutmix pair images, so 'batch_size' over {split} must be even, got {self.batch_size}"
            )
