# SPDX-License-Identifier: MIT
"""Training images: timm's augmentation, each sample drawn from its own seed."""

from dataclasses import dataclass, replace

import torch
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ...config import ConfigError
from ...data.datasets import GuardedDataset
from ...data.workers import worker_signals
from ...engine.rng import PlanSampler, seed_sample
from .config import FinetuneConfig

_ATTEMPTS = 20


@dataclass
class TrainingBatch:
    """A part of a step's batch."""

    images: Tensor  # (n, C, H, W)
    targets: Tensor  # (n,)
    samples: list[tuple[int, int]]  # epoch, index of each
    failures: list[tuple[str, str]]  # file, reason
    error: str | None = None  # why there are no images: they are zero then, so that all processes end the step together

    def pin_memory(self) -> "TrainingBatch":
        return replace(self, images=self.images.pin_memory(), targets=self.targets.pin_memory())


class SeededDataset(Dataset):
    """A dataset of (epoch, index) keys. The next readable image takes the place of one that cannot be read.

    Args:
        dataset: From `open_dataset`.
        transform: Random; draws from Python, NumPy and torch.
        seed: Of the run.
        shape: Of an image, (C, H, W).
    """

    def __init__(self, dataset: Dataset, transform, seed: int, shape: tuple[int, int, int]) -> None:
        self.guarded, self.seed, self.shape = GuardedDataset(dataset, transform), seed, shape

    def __len__(self) -> int:
        return len(self.guarded)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, tuple[int, int], list[tuple[str, str]], bool]:
        epoch, index = key
        seed_sample(self.seed, epoch, index)
        failures = []
        for attempt in range(min(_ATTEMPTS, len(self))):
            image, target, failure = self.guarded[(index + attempt) % len(self)]
            if failure is None:
                return image, target, key, failures, True
            failures.append(failure)
        return torch.zeros(self.shape), 0, key, failures, False

    @staticmethod
    def collate(samples: list) -> TrainingBatch:
        images, targets, keys, failures, good = zip(*samples)
        error = None
        if not all(good):
            missed = failures[good.index(False)]
            error = f"{len(missed)} images in a row cannot be read; the first is '{missed[0][0]}' ({missed[0][1]})"
        return TrainingBatch(
            torch.stack(images),
            torch.tensor(targets, dtype=torch.long),
            list(keys),
            [failure for part in failures for failure in part],
            error,
        )


def training_transform(config: FinetuneConfig, preprocessing: dict):
    """timm's augmentation by the settings: Pillow image -> normalised tensor."""
    try:
        return create_transform(
            input_size=preprocessing["input_size"],
            is_training=True,
            scale=(config.scale_min, 1.0),
            ratio=(1 / config.ratio_max, config.ratio_max),
            hflip=config.hflip,
            color_jitter=config.color_jitter,
            auto_augment=config.auto_augment,
            re_prob=config.random_erasing,
            re_mode="pixel",
            interpolation=preprocessing["interpolation"],
            mean=preprocessing["mean"],
            std=preprocessing["std"],
        )
    except (AssertionError, ValueError) as error:
        if config.auto_augment is None:
            raise
        raise ConfigError(
            f"'auto_augment' must be a policy of timm, such as rand-m9-mstd0.5, got '{config.auto_augment}'"
        ) from error


def training_loader(
    dataset: Dataset, sampler: PlanSampler, config: FinetuneConfig, preprocessing: dict, pin_memory: bool
) -> DataLoader:
    """The batches of the rest of a run, in one pass: workers are started once and prefetch across epochs."""
    return DataLoader(
        SeededDataset(dataset, training_transform(config, preprocessing), config.seed, preprocessing["input_size"]),
        batch_sampler=sampler,
        num_workers=config.workers,
        collate_fn=SeededDataset.collate,
        pin_memory=pin_memory,
        worker_init_fn=worker_signals,
        generator=torch.Generator().manual_seed(config.seed),  # else it draws from the global one
    )
