# SPDX-License-Identifier: MIT
"""Classification as a task of the engine: class folders, cross entropy, accuracy, and a folder for timm."""

from pathlib import Path
from typing import Any

import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ...data.datasets import (
    GuardedDataset,
    MapDataset,
    class_difference,
    class_names,
    open_dataset,
    read_as_gray,
)
from ...data.fingerprint import fingerprint
from ...data.image_sets import find_split
from ...data.images import DataError
from ...engine.create import create_model, data_config
from ...engine.report import Page
from ...engine.rng import PlanSampler
from ...engine.samples import SeededDataset, sample_loader
from ...engine.task import Task
from ...engine.world import World
from ...errors import list_some
from ...models.timm_folder import save_model
from .augment import Mixing, training_transform
from .config import FinetuneConfig
from .evaluate import Evaluation, evaluate
from .report import report_page


class ClassificationTask(Task[FinetuneConfig, Evaluation]):
    """Fine-tuning of a classifier on the classes of a folder."""

    loss_unit = "cross entropy, nats"

    train_set: MapDataset
    val_set: MapDataset | None
    names: list[str]  # of the classes
    data_config: dict[str, Any]  # timm's preprocessing
    mixing: Mixing | None = None

    @property
    def model_name(self) -> str:
        return self.config.model

    def open_data(self) -> None:
        """Open the splits.

        Raises:
            DataError: There is none, one class, less than a batch, or the splits differ in their classes.
        """
        self.train_set, self.val_set, self.names = open_data(self.config)

    def create_model(self) -> nn.Module:
        config = self.config
        model = create_model(
            config.model,
            config.checkpoint,
            pretrained=config.pretrained,
            num_classes=len(self.names),
            img_size=config.img_size,
            in_chans=config.in_chans,
            drop_path_rate=config.drop_path or None,  # 0 is also for models that have no such argument
            head_from_22k=self.names if config.head_from_22k else None,
        )
        self.data_config = data_config(model, config.img_size)
        if self.data_config["input_size"][0] == 1:
            for split in (self.train_set, self.val_set):
                if split is not None:
                    read_as_gray(split)
        self.transform = training_transform(config, self.data_config)
        self.loss_function: nn.Module = LabelSmoothingCrossEntropy(config.smoothing)
        if config.mixes:
            self.mixing, self.loss_function = Mixing(config, len(self.names)), SoftTargetCrossEntropy()
        return model

    # ---- samples

    @property
    def train_size(self) -> int:
        return len(self.train_set)

    @property
    def identity(self) -> dict[str, Any]:
        return {"samples": len(self.train_set), "classes": self.names}

    def fingerprint(self) -> list[str] | None:
        return fingerprint(self.train_set)

    def difference(self, before: dict[str, Any], now: dict[str, Any]) -> str | None:
        images = before.get("images")  # version 0.1.0's first checkpoints had none
        if not (
            isinstance(before.get("samples"), int)
            and isinstance(before.get("classes"), list)
            and isinstance(images, (list, type(None)))
        ):
            raise ValueError("it does not say which images")
        if (before["samples"], before["classes"]) != (now["samples"], now["classes"]):
            return f"{_describe_images(before)}, here are {_describe_images(now)}"
        if images is None or now["images"] is None or images == now["images"]:
            return None
        names, here = now["classes"], now["images"]
        changed = [name for i, name in enumerate(names) if images[i : i + 1] != here[i : i + 1]] or names
        return f"other images: as many, with other names or sizes, in {len(changed)} classes ({list_some(changed, 3)})"

    def train_loader(self, sampler: PlanSampler, pin_memory: bool) -> DataLoader[Any]:
        placeholder = (torch.zeros(self.data_config["input_size"]), 0)
        images = GuardedDataset(self.train_set, self.transform)
        seeded = SeededDataset(images, self.config.seed, placeholder)
        return sample_loader(seeded, sampler, self.config.workers, pin_memory)

    # ---- a step

    def prepare(self, data: list[Tensor], step: int) -> tuple[Tensor, Tensor]:
        images, targets = data
        return (images, targets) if self.mixing is None else self.mixing(images, targets, step)

    def loss(self, model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
        images, targets = data
        return self.loss_function(model(images).float(), targets)

    def record(self, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        images, targets = zip(*batches)
        return {"images": torch.cat(images).cpu(), "targets": torch.cat(targets).cpu()}

    # ---- validation

    @property
    def has_validation(self) -> bool:
        return self.val_set is not None

    def validate(self, model: nn.Module, world: World, unreadable: set[str], last: bool) -> Evaluation:
        config = self.config
        assert self.val_set is not None
        return evaluate(
            model, self.val_set, self.data_config, max(config.batch_size // (world.size * config.accumulate), 1),
            config.workers, world.device, progress=False, world=world, reported=unreadable, keep_predictions=last,
        )  # fmt: skip

    def metrics(self, result: Evaluation) -> dict[str, float]:
        return {"top1": result.top1, "loss": result.loss}

    def describe(self, metrics: dict[str, float]) -> str:
        return f"val loss {metrics['loss']:.4f}, val top-1 {metrics['top1']:.2f} %"

    # ---- what is left at the end

    def save(self, model: nn.Module, folder: Path, weights: dict[str, Tensor]) -> None:
        save_model(model, folder, self.names, self.data_config, weights)

    def page(self, result: Evaluation, model: nn.Module | None, epochs: list[dict[str, Any]]) -> Page:
        assert self.val_set is not None
        return report_page(self.config.model, result, self.val_set, self.names, epochs, model, self.data_config)


def _describe_images(data: dict[str, Any]) -> str:
    return f"{data['samples']} images of {len(data['classes'])} classes ({list_some(data['classes'], 3)})"


def open_data(config: FinetuneConfig) -> tuple[MapDataset, MapDataset | None, list[str]]:
    """Training set, validation set or None, and the classes.

    Raises:
        DataError: There is none, one class, less than a batch, or the splits differ in their classes.
    """
    split = find_split(config.data, "train") if Path(config.data).is_dir() else None
    if split is None:
        raise DataError(f"there is no data at '{config.data}': expected a folder with train/CLASS/IMAGE")
    train_set = open_dataset(split, split="")
    names = class_names(train_set) or []
    if len(names) < 2:
        raise DataError(f"'{split}' has one class ({list_some(names)}); two are needed")
    if len(train_set) < config.batch_size:
        part = config.accumulate * (2 if config.mixes else 1)
        fitting = len(train_set) // part * part
        hint = f": set batch_size={fitting} or less" if fitting else ""
        raise DataError(
            f"batch_size={config.batch_size} is more than the {len(train_set)} training images of '{split}'{hint}"
        )
    validation = find_split(config.data, "validation")
    val_set = None
    if validation != Path(config.data):  # with eval_every=0 too: it is evaluated at the end
        val_set = open_dataset(validation, split="")
        if class_names(val_set) != names:
            difference = class_difference(names, class_names(val_set) or [])
            raise DataError(f"'{split}' (here) and '{validation}' (there) have different classes: {difference}")
    return train_set, val_set, names
