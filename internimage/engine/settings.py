# SPDX-License-Identifier: MIT
"""The settings of `finetune`, checked before anything is read or written."""

import math
from dataclasses import dataclass

from .config import ConfigError
from .model import DTYPES

# settings, what holds for their values (a comparison with nan never does), and that in words
_RANGES = (
    ("epochs batch_size accumulate nan_limit img_size in_chans", lambda x: x >= 1, "be at least 1"),
    ("workers eval_every checkpoint_every warmup_epochs seed", lambda x: x >= 0, "not be negative"),
    ("freeze", lambda x: 0 <= x <= 5, "be 0 to 5"),
    ("lr warmup_lr min_lr weight_decay", lambda x: 0 <= x < math.inf, "be a number from 0 up"),
    ("offset_lr_factor mixup cutmix color_jitter", lambda x: 0 <= x < math.inf, "be a number from 0 up"),
    ("smoothing drop_path", lambda x: 0 <= x < 1, "be at least 0 and below 1"),
    ("hflip random_erasing", lambda x: 0 <= x <= 1, "be 0 to 1"),
    ("layer_decay ema_decay scale_min", lambda x: 0 < x <= 1, "be above 0 and at most 1"),
    ("clip_grad", lambda x: x > 0, "be above 0"),
    ("ratio_max", lambda x: 1 <= x < math.inf, "be at least 1"),
)


@dataclass
class FinetuneConfig:
    """Settings of `finetune`; a recipe is a YAML file of some of them."""

    data: str  # folder with train/CLASS/IMAGE and, if there is one, val/CLASS/IMAGE; or CLASS/IMAGE
    output: str  # folder for the result
    model: str = "internimage_tiny"  # any name that `internimage evaluate --model` takes
    pretrained: bool = True  # start from the weights that the name stands for
    checkpoint: str | None = None  # start from this file or folder instead
    head_from_22k: bool = False  # take the classifier from ImageNet-22k weights, for class folders named by synsets
    overwrite: bool = False  # replace a finished result in `output`
    resume: bool = True  # go on with an unfinished run in `output`; false begins it anew
    img_size: int | None = None  # image side in pixels; None: the model's own
    in_chans: int | None = None  # image channels, 1 reads images as grey; None: the model's own
    freeze: int = 0  # train neither the stem nor the first N of the four stages; 5 trains the classifier alone
    epochs: int = 30
    batch_size: int = 64  # images a step, over all processes and accumulated parts
    accumulate: int = 1  # parts of a batch that a process runs one after the other
    workers: int = 2  # loader processes of each process
    seed: int = 0
    device: str = "auto"
    parallel: str = "ddp"  # how processes share the work: ddp, or fsdp, which also shares the weights
    precision: str = "float32"  # float32, or bfloat16 or float16 for automatic mixed precision
    compile: bool = False  # torch.compile
    channels_last: bool = False  # memory format of images and convolutions
    grad_checkpointing: bool = False  # less memory, more time
    opt: str = "adamw"  # timm's name
    lr: float = 1e-3
    weight_decay: float = 0.05
    layer_decay: float | None = None  # learning rate factor from each layer to the one below it
    offset_lr_factor: float = 1.0  # learning rate factor of DCNv3's offset projections and centre feature scales
    clip_grad: float | None = 5.0  # largest norm of the gradient
    sched: str = "cosine"  # timm's name
    warmup_epochs: int = 2
    warmup_lr: float = 1e-6
    min_lr: float = 1e-6
    drop_path: float = 0.1
    smoothing: float = 0.1  # label smoothing
    mixup: float = 0.0  # alpha; 0 is off
    cutmix: float = 0.0  # alpha; 0 is off
    scale_min: float = 0.35  # smallest share of the image that a random crop keeps
    ratio_max: float = 1.3333  # longest aspect ratio of a random crop
    hflip: float = 0.5  # probability
    color_jitter: float = 0.3
    auto_augment: str | None = None  # timm's policy, such as rand-m9-mstd0.5-inc1
    random_erasing: float = 0.0  # probability
    ema_decay: float | None = None  # keep an average of the weights, and save that
    nan_limit: int = 10  # steps whose loss or gradient is not finite are left out; training stops after this many
    eval_every: int = 1  # epochs between evaluations on the validation split; 0: only after the last epoch
    checkpoint_every: int = 0  # steps between checkpoints, beside the one after each epoch
    tensorboard: bool = False  # write TensorBoard's files too
    report: bool = True  # write report.html at the end

    def __post_init__(self) -> None:
        for names, valid, words in _RANGES:
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not valid(value):
                    raise ConfigError(f"'{name}' must {words}, got {value}")
        if self.precision not in DTYPES:
            raise ConfigError(f"'precision' must be one of {', '.join(DTYPES)}, got '{self.precision}'")
        if self.parallel not in ("ddp", "fsdp"):
            raise ConfigError(f"'parallel' must be ddp or fsdp, got '{self.parallel}'")
        if self.parallel == "fsdp" and self.precision == "float16":
            raise ConfigError("with parallel=fsdp 'precision' must be float32 or bfloat16")
        if self.head_from_22k and not (self.pretrained or self.checkpoint):
            raise ConfigError("'head_from_22k' needs weights to take the head from: pretrained=true or checkpoint=PATH")
        self.check_parts(1)

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

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
