# SPDX-License-Identifier: MIT
"""The settings that every training run has, whatever it trains. A task adds its own in a subclass.

Nothing here imports torch: settings are checked before it is loaded.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import yaml

from ..config import ConfigError
from ..dtypes import DTYPE
from ..values import BadValue, Choice, Flag, Kind, Number, Text, Whole, shown

REQUIRED = dataclasses.MISSING  # the default of a setting that has none


def setting(kind: Kind, default: Any, help: str, optional: bool = False, free: bool = False) -> Any:
    """A dataclass field for one setting.

    Args:
        kind: The values it may have.
        default: Its default, or `REQUIRED`. A default of None allows None.
        help: What it is for, as `--help` prints it.
        optional: Allow None though the default is another value.
        free: May differ between a run and its continuation: it says where and how, not what is computed.
    """
    metadata = {"kind": kind, "help": help, "optional": optional or default is None, "free": free}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class RunConfig:
    """Settings of a training run.

    Raises:
        ConfigError: A value is out of its range, or two settings do not go together.
    """

    output: str = setting(Text(), REQUIRED, "folder for the result", free=True)
    overwrite: bool = setting(Flag(), False, "replace a finished result in `output`", free=True)
    resume: bool = setting(Flag(), True, "resume an unfinished run in `output`; false starts it over", free=True)
    freeze: int = setting(
        Whole(0, 5), 0, "train neither the stem nor the first N of the four stages; 5 trains the classifier alone"
    )
    epochs: int = setting(Whole(1), 30, "passes over the training images")
    batch_size: int = setting(Whole(1), 64, "images per step, over all processes and accumulated micro-batches")
    accumulate: int = setting(Whole(1), 1, "micro-batches that a process accumulates gradients over")
    workers: int = setting(
        Whole(0, 1024), 2, "loader processes of each process; 0 loads in the process itself", free=True
    )
    # numpy takes no larger seed
    seed: int = setting(Whole(0, 2**32 - 1), 0, "seed of every random draw")
    device: str = setting(Text(), "auto", "cpu, cuda, mps, ...; auto takes an accelerator if there is one", free=True)
    parallel: str = setting(
        Choice(("ddp", "fsdp")), "ddp", "how processes share the work: ddp, or fsdp, which also shards the weights"
    )
    precision: str = setting(
        DTYPE, "float32", "float32, or bfloat16 or float16 for automatic mixed precision; fp32, bf16, fp16 for short"
    )
    compile: bool = setting(Flag(), False, "compile the model with torch.compile", free=True)
    channels_last: bool = setting(Flag(), False, "keep images and convolutions in the channels-last memory format")
    grad_checkpointing: bool = setting(
        Flag(), False, "recompute activations in the backward pass: less memory, more time", free=True
    )
    opt: str = setting(Text(), "adamw", "optimizer, by timm's name")
    lr: float = setting(Number(at_least=0), 1e-3, "highest learning rate of the schedule")
    weight_decay: float = setting(Number(at_least=0), 0.05, "weight decay, on weights but not on biases and norms")
    layer_decay: float | None = setting(
        Number(above=0, at_most=1), None, "learning rate factor from each layer to the one below it"
    )
    offset_lr_factor: float = setting(
        Number(at_least=0),
        1.0,
        "learning rate factor of what predicts offsets; of DCNv3's center feature scales and DCNv2's masks too",
    )
    clip_grad: float | None = setting(
        Number(above=0), 5.0, "largest norm of the gradient; null does not clip", optional=True
    )
    sched: str = setting(Text(), "cosine", "learning rate schedule, by timm's name; none keeps the rate constant")
    warmup_epochs: int = setting(
        Whole(0), 2, "epochs in which the learning rate rises to `lr`; below `epochs`, 0 is no warmup"
    )
    warmup_lr: float = setting(Number(at_least=0), 1e-6, "learning rate at the start of the warmup")
    min_lr: float = setting(Number(at_least=0), 1e-6, "learning rate at the end of the schedule")
    ema_decay: float | None = setting(
        Number(above=0, at_most=1), None, "decay of a moving average of the weights; the average is what is saved then"
    )
    nan_limit: int = setting(
        Whole(1), 10, "steps with a non-finite loss or gradient are skipped; training stops after this many", free=True
    )
    eval_every: int = setting(
        Whole(0), 1, "epochs between evaluations on the validation split; 0: only after the last epoch"
    )
    checkpoint_every: int = setting(
        Whole(0), 0, "steps between checkpoints, in addition to the one after each epoch", free=True
    )
    tensorboard: bool = setting(Flag(), False, "write TensorBoard files too", free=True)
    report: bool = setting(Flag(), True, "write report.html at the end", free=True)

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
        self.check_batch(1)

    @property
    def starts_from(self) -> dict[str, str | None]:
        """Settings that may name files the run reads at its start, and their values."""
        return {}

    def check_schedule(self) -> None:
        """The learning rate rises and then falls. Only for new runs: one that was started otherwise may finish.

        Raises:
            ConfigError: It would only rise.
        """
        if self.sched != "none" and self.warmup_epochs >= self.epochs:
            most = f"at most {self.epochs - 1}, or to 0" if self.epochs > 1 else "0"
            raise ConfigError(
                f"'warmup_epochs' must be below 'epochs', got warmup_epochs={self.warmup_epochs} and "
                f"epochs={self.epochs}: the learning rate would only rise. Set warmup_epochs to {most}"
            )

    def check_batch(self, processes: int) -> None:
        """The batch can be split into equal micro-batches over this many processes.

        Raises:
            ConfigError: It cannot.
        """
        count = processes * self.accumulate
        if self.batch_size % count:
            raise ConfigError(f"'batch_size' must divide by {self._split(processes)}, got {self.batch_size}")

    def _split(self, processes: int) -> str:
        """Into what a batch is split, for messages."""
        if processes * self.accumulate == 1:
            return "one micro-batch"
        return f"{processes} processes times accumulate={self.accumulate}"


def settings_of(cls: type[RunConfig]) -> list[dataclasses.Field[Any]]:
    """The fields of a config as people read them: the task's own first, then those of every run."""
    common = {field.name for field in dataclasses.fields(RunConfig)}
    return sorted(dataclasses.fields(cls), key=lambda field: field.name in common)


def dump(config: RunConfig) -> str:
    """The resolved settings as YAML, every one written out."""
    values = {field.name: getattr(config, field.name) for field in settings_of(type(config))}
    return yaml.safe_dump(values, sort_keys=False)
