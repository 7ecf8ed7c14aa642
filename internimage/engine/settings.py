# SPDX-License-Identifier: MIT
"""The settings of `finetune`, checked before anything is read or written."""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from .checkpoint import checkpoints
from .config import ConfigError, dump, from_dict
from .files import write_text
from .model import DTYPES

CONFIG_FILE, WEIGHTS_FILE, REPORT_FILE = "finetune.yaml", "model.safetensors", "report.html"
LOG_FILE, STEPS_FILE = "log.csv", "steps.csv"
CHECKPOINTS, BAD_BATCHES = "checkpoints", "bad-batches"

# may differ between a run and its continuation: where and how, not what is computed
_FREE = ("output", "overwrite", "resume", "workers", "device", "tensorboard", "report", "data",
         "checkpoint_every", "compile", "grad_checkpointing", "nan_limit")  # fmt: skip


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
    eval_every: int = 1  # epochs between evaluations on the validation split; 0 is never
    checkpoint_every: int = 0  # steps between checkpoints, beside the one after each epoch
    tensorboard: bool = False  # write TensorBoard's files too
    report: bool = True  # write report.html at the end

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "nan_limit"):
            if getattr(self, name) < 1:
                raise ConfigError(f"'{name}' must be at least 1, got {getattr(self, name)}")
        for name in ("workers", "eval_every", "checkpoint_every", "warmup_epochs", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"'{name}' must not be negative, got {getattr(self, name)}")
        if self.precision not in DTYPES:
            raise ConfigError(f"'precision' must be one of {', '.join(DTYPES)}, got '{self.precision}'")
        if self.parallel not in ("ddp", "fsdp"):
            raise ConfigError(f"'parallel' must be ddp or fsdp, got '{self.parallel}'")
        if self.parallel == "fsdp" and self.precision == "float16":
            raise ConfigError("with parallel=fsdp 'precision' must be float32 or bfloat16")
        if not 0 <= self.freeze <= 5:
            raise ConfigError(f"'freeze' must be 0 to 5, got {self.freeze}")
        if self.head_from_22k and not (self.pretrained or self.checkpoint):
            raise ConfigError("'head_from_22k' needs weights to take the head from: pretrained=true or checkpoint=PATH")
        if not 0 < self.scale_min <= 1:
            raise ConfigError(f"'scale_min' must be above 0 and at most 1, got {self.scale_min}")
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


def prepare_output(config: FinetuneConfig) -> tuple[Path, bool]:
    """Make the result's folder; refuses to mix a new result with an old one.

    Returns:
        The folder, and whether it holds an unfinished run of these settings to go on with.

    Raises:
        ConfigError: It holds a finished result, an unfinished run of other settings, or what is not ours.
    """
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise ConfigError(f"'{output}' is a file; 'output' must name a folder")
    if output.is_dir() and any(output.iterdir()):
        if not (output / CONFIG_FILE).is_file():
            raise ConfigError(f"the folder '{output}' is not empty and not ours")
        if (output / WEIGHTS_FILE).is_file():
            if not config.overwrite:
                raise ConfigError(f"the folder '{output}' holds an earlier result; overwrite=true replaces it")
        elif config.resume and checkpoints(output / CHECKPOINTS):
            _check_same(config, output)
            return output, True
        _clear(output)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / CONFIG_FILE, dump(config))
    return output, False


def _check_same(config: FinetuneConfig, output: Path) -> None:
    try:
        earlier = asdict(from_dict(FinetuneConfig, yaml.safe_load((output / CONFIG_FILE).read_text(encoding="utf-8"))))
    except (ConfigError, yaml.YAMLError, TypeError, AttributeError) as error:
        raise ConfigError(f"'{output / CONFIG_FILE}' cannot be read, so the run cannot go on: {error}") from error
    differ = [f"{k} was {earlier[k]}, now {v}" for k, v in asdict(config).items() if k not in _FREE and earlier[k] != v]
    if differ:
        raise ConfigError(
            f"the folder '{output}' holds an unfinished run of other settings ({'; '.join(differ)}): set them back to "
            f"go on with it, or resume=false to begin anew"
        )


def _clear(output: Path) -> None:
    """Remove an earlier run; what makes it count as finished goes after its checkpoints, so a kill cannot mix runs."""
    for folder in (CHECKPOINTS, BAD_BATCHES, "tensorboard"):
        shutil.rmtree(output / folder, ignore_errors=True)
    for file in (LOG_FILE, STEPS_FILE, REPORT_FILE, "config.json", WEIGHTS_FILE):
        (output / file).unlink(missing_ok=True)
