# SPDX-License-Identifier: MIT
"""Fine-tuning on a folder of images, on timm's optimizers, schedules, augmentation and losses."""

import csv
import io
import math
import os
import random
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from timm.data import Mixup, create_loader
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import nn
from tqdm import tqdm

from ..errors import UserError
from .config import ConfigError, dump
from .data import DataError, class_names, find_split, open_dataset
from .evaluate import evaluate
from .files import write_text
from .model import DTYPES, create_model, data_config, pick_device

CONFIG_FILE, LOG_FILE = "finetune.yaml", "log.csv"


class TrainingError(UserError, RuntimeError):
    """Training cannot go on."""


@dataclass
class FinetuneConfig:
    """Settings of `finetune`; a recipe is a YAML file of some of them."""

    data: str  # folder with train/CLASS/IMAGE and, if there is one, val/CLASS/IMAGE; or CLASS/IMAGE
    output: str  # folder for the result
    model: str = "internimage_tiny"  # any name that `internimage evaluate --model` takes
    pretrained: bool = True  # start from the weights that the name stands for
    checkpoint: str | None = None  # start from this file or folder instead
    head_from_22k: bool = False  # take the classifier from ImageNet-22k weights, for class folders named by synsets
    overwrite: bool = False  # replace an earlier result in `output`
    img_size: int | None = None  # image side in pixels; None: the model's own
    in_chans: int | None = None  # image channels, 1 reads images as grey; None: the model's own
    epochs: int = 30
    batch_size: int = 64
    workers: int = 2  # loader processes
    seed: int = 0
    device: str = "auto"
    precision: str = "float32"  # float32, or bfloat16 or float16 for automatic mixed precision
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
    grad_checkpointing: bool = False  # less memory, more time
    eval_every: int = 1  # epochs between evaluations on the validation split; 0 is never

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"'{name}' must be at least 1, got {getattr(self, name)}")
        if self.precision not in DTYPES:
            raise ConfigError(f"'precision' must be one of {', '.join(DTYPES)}, got '{self.precision}'")
        if (self.mixup > 0 or self.cutmix > 0) and self.batch_size % 2:
            raise ConfigError(f"mixup and cutmix pair images, so 'batch_size' must be even, got {self.batch_size}")
        if self.head_from_22k and not (self.pretrained or self.checkpoint):
            raise ConfigError("'head_from_22k' needs weights to take the head from: pretrained=true or checkpoint=PATH")
        if not 0 < self.scale_min <= 1:
            raise ConfigError(f"'scale_min' must be above 0 and at most 1, got {self.scale_min}")


def prepare_output(config: FinetuneConfig) -> Path:
    """Make the result's folder; refuses to mix a new result with an old one."""
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise ConfigError(f"'{output}' is a file; 'output' must name a folder")
    if output.is_dir() and any(output.iterdir()):
        ours = (output / CONFIG_FILE).is_file()
        if not (config.overwrite and ours):
            why = "holds an earlier result; overwrite=true replaces it" if ours else "is not empty and not ours"
            raise ConfigError(f"the folder '{output}' {why}")
    output.mkdir(parents=True, exist_ok=True)
    return output


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def save_model(model: nn.Module, folder: Path, names: list[str], preprocessing: dict) -> None:
    """Write `model.safetensors` and timm's `config.json` into a folder, each whole or not at all."""
    partial = Path(tempfile.mkdtemp(dir=folder, prefix=".partial-"))
    try:
        save_for_hf(
            model, partial, model_config=dict(label_names=names), safe_serialization=True, data_config=preprocessing
        )
        for file in partial.iterdir():
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _create_model(config: FinetuneConfig, names: list[str]) -> nn.Module:
    kwargs = {"head_from_22k": names} if config.head_from_22k else {}
    try:
        return create_model(
            config.model,
            config.checkpoint,
            pretrained=config.pretrained,
            num_classes=len(names),
            in_chans=config.in_chans,
            drop_path_rate=config.drop_path,
            **kwargs,
        )
    except TypeError as error:
        if "head_from_22k" not in str(error):
            raise
        raise ConfigError(f"'head_from_22k' is for InternImage models, which '{config.model}' is not") from error


def _autocast(config: FinetuneConfig, device: torch.device) -> torch.autocast:
    enabled = config.precision != "float32"
    return torch.autocast(device.type, dtype=DTYPES[config.precision] if enabled else None, enabled=enabled)


def finetune(config: FinetuneConfig, progress: bool = True) -> Path:
    """Train a classifier on the classes of a folder.

    The result, in `config.output`: `model.safetensors` and `config.json` (a folder for `timm.create_model`,
    `evaluate` and `predict`), the resolved settings and a log with a row an epoch. The weights are those of the last
    epoch, or their average with `ema_decay`: none are chosen by their accuracy.

    Args:
        config: The settings.
        progress: Show a bar on stderr.

    Returns:
        The folder.

    Raises:
        UserError: The data, the weights or the settings cannot be used; nothing has been written then.
        TrainingError: The loss became NaN or infinite.
    """
    device = pick_device(config.device)
    split = find_split(config.data, "train") if Path(config.data).is_dir() else None
    if split is None:
        raise DataError(f"there is no data at '{config.data}': expected a folder with train/CLASS/IMAGE")
    train_set = open_dataset(split, split="")
    names = class_names(train_set)
    if len(names) < 2:
        raise DataError(f"'{split}' has one class ({names[0]}); two are needed")
    if len(train_set) < config.batch_size:
        raise DataError(
            f"batch_size={config.batch_size} is more than the {len(train_set)} training images of '{split}'"
        )
    validation = find_split(config.data, "validation")
    val_set = None
    if config.eval_every and validation != Path(config.data):
        val_set = open_dataset(validation, split="")
        if class_names(val_set) != names:
            raise DataError(f"'{split}' and '{validation}' have different classes: {names} and {class_names(val_set)}")

    seed_everything(config.seed)
    model = _create_model(config, names)
    preprocessing = data_config(model, config.img_size)
    if preprocessing["input_size"][0] == 1:
        train_set.input_img_mode = "L"
        if val_set is not None:
            val_set.input_img_mode = "L"
    if config.grad_checkpointing:
        model.set_grad_checkpointing()
    model.to(device)
    averaged = ModelEmaV3(model, decay=config.ema_decay, use_warmup=True) if config.ema_decay else None

    loader = create_loader(
        train_set,
        input_size=preprocessing["input_size"],
        batch_size=config.batch_size,
        is_training=True,
        use_prefetcher=False,
        scale=(config.scale_min, 1.0),
        ratio=(1 / config.ratio_max, config.ratio_max),
        hflip=config.hflip,
        color_jitter=config.color_jitter,
        auto_augment=config.auto_augment,
        re_prob=config.random_erasing,
        interpolation=preprocessing["interpolation"],
        mean=preprocessing["mean"],
        std=preprocessing["std"],
        num_workers=config.workers,
        persistent_workers=config.workers > 0,
        device=device,
    )
    mix, loss_fn = None, LabelSmoothingCrossEntropy(config.smoothing)
    if config.mixup > 0 or config.cutmix > 0:
        mix = Mixup(config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=len(names))
        loss_fn = SoftTargetCrossEntropy()
    optimizer = create_optimizer_v2(
        model, config.opt, lr=config.lr, weight_decay=config.weight_decay, layer_decay=config.layer_decay
    )
    steps = len(loader)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        config.sched,
        num_epochs=config.epochs,
        warmup_epochs=config.warmup_epochs,
        warmup_lr=config.warmup_lr,
        min_lr=config.min_lr,
        warmup_prefix=True,
        step_on_epochs=False,
        updates_per_epoch=steps,
    )
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
    output = prepare_output(config)
    write_text(output / CONFIG_FILE, dump(config))

    rows = []
    update = 0
    bar = tqdm(total=config.epochs * steps, unit="step", desc="finetune", disable=not progress)
    for epoch in range(config.epochs):
        model.train()
        total_loss, start = 0.0, time.perf_counter()
        for images, targets in loader:
            images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            if mix is not None:
                images, targets = mix(images, targets)
            with _autocast(config, device):
                loss = loss_fn(model(images), targets)
            value = loss.item()
            if not math.isfinite(value):
                bar.close()
                raise TrainingError(
                    f"the loss is {value} in epoch {epoch}, step {update % steps}: a smaller lr than {config.lr} or a "
                    f"smaller clip_grad may help"
                )
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            if config.clip_grad is not None:
                scaler.unscale_(optimizer)
                dispatch_clip_grad(model.parameters(), config.clip_grad)
            scaler.step(optimizer)
            scaler.update()
            update += 1
            if scheduler is not None:
                scheduler.step_update(update)
            if averaged is not None:
                averaged.update(model, step=update)
            total_loss += value
            bar.update()
            bar.set_postfix(loss=f"{value:.3f}", lr=f"{optimizer.param_groups[0]['lr']:.1e}", refresh=False)
        seconds = time.perf_counter() - start
        row = {
            "epoch": epoch + 1,
            "lr": optimizer.param_groups[-1]["lr"],
            "train_loss": total_loss / steps,
            "images_per_second": steps * config.batch_size / seconds,
        }
        if val_set is not None and ((epoch + 1) % config.eval_every == 0 or epoch + 1 == config.epochs):
            subject = model if averaged is None else averaged.module
            result = evaluate(
                subject, val_set, preprocessing, config.batch_size, config.workers, device, progress=False
            )
            row |= {"val_top1": result.top1, "val_loss": result.loss}
        rows.append(row)
        write_text(output / LOG_FILE, _csv(rows))
    bar.close()
    save_model(model if averaged is None else averaged.module, output, names, preprocessing)
    return output


def _csv(rows: list[dict]) -> str:
    fields = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return text.getvalue()
