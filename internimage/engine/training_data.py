# SPDX-License-Identifier: MIT
"""Training images: timm's augmentation, each sample drawn from its own seed."""

from dataclasses import dataclass

import torch
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .config import ConfigError
from .data import DataError, GuardedDataset
from .randomness import PlanSampler, seed_sample
from .settings import FinetuneConfig

_ATTEMPTS = 20


@dataclass
class TrainingBatch:
    """A part of a step's batch."""

    images: Tensor  # (n, C, H, W)
    targets: Tensor  # (n,)
    samples: list[tuple[int, int]]  # epoch, index of each
    failures: list[tuple[str, str]]  # file, reason

    def pin_memory(self) -> "TrainingBatch":
        return TrainingBatch(self.images.pin_memory(), self.targets.pin_memory(), self.samples, self.failures)


class SeededDataset(Dataset):
    """A dataset of (epoch, index) keys. The next readable image takes the place of one that cannot be read.

    Args:
        dataset: From `open_dataset`.
        transform: Random; draws from Python, NumPy and torch.
        seed: Of the run.
    """

    def __init__(self, dataset: Dataset, transform, seed: int) -> None:
        self.guarded, self.seed = GuardedDataset(dataset, transform), seed

    def __len__(self) -> int:
        return len(self.guarded)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, tuple[int, int], list[tuple[str, str]]]:
        epoch, index = key
        seed_sample(self.seed, epoch, index)
        failures = []
        for attempt in range(min(_ATTEMPTS, len(self))):
            image, target, failure = self.guarded[(index + attempt) % len(self)]
            if failure is None:
                return image, target, key, failures
            failures.append(failure)
        raise DataError(f"{len(failures)} images in a row cannot be read; the first is '{failures[0][0]}'")

    @staticmethod
    def collate(samples: list) -> TrainingBatch:
        return TrainingBatch(
            torch.stack([image for image, *_ in samples]),
            torch.tensor([target for _, target, *_ in samples], dtype=torch.long),
            [key for _, _, key, _ in samples],
            [failure for *_, failures in samples for failure in failures],
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
        SeededDataset(dataset, training_transform(config, preprocessing), config.seed),
        batch_sampler=sampler,
        num_workers=config.workers,
        collate_fn=SeededDataset.collate,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(config.seed),  # else it draws from the global one
    )
