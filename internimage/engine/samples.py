# SPDX-License-Identifier: MIT
"""Training samples: each drawn from a seed of its own, in micro-batches that say what could not be read."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset, default_collate

from ..data.workers import init_worker_signals
from .rng import PlanSampler, seed_sample

_ATTEMPTS = 20

Failure = tuple[str, str]  # file, reason


@dataclass
class MicroBatch:
    """The part of a step's batch that a process computes gradients for at once."""

    data: Any  #: tensors for the task's loss, in tuples, lists and dictionaries
    samples: list[tuple[int, int]]  #: epoch and index of each
    failures: list[Failure]  #: what could not be read
    error: str | None = None  #: why `data` is a placeholder, so that all processes still end the step together

    def pin_memory(self) -> "MicroBatch":
        """For `DataLoader(pin_memory=True)`."""
        return replace(self, data=tree_map_only(torch.Tensor, torch.Tensor.pin_memory, self.data))


class Readable(Protocol):
    """A map-style dataset whose samples say why they cannot be read, such as `internimage.data.datasets.GuardedDataset`
    with a random transform: `dataset[i]` is `(*sample, failure)`, failure None for a good one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, ...]: ...


class SeededDataset(Dataset[Any]):
    """A dataset of (epoch, index) keys. The next readable sample replaces one that cannot be read.

    Args:
        dataset: Draws from Python, NumPy and torch alone.
        seed: Of the run.
        placeholder: A sample of the right shapes, for where too many in a row cannot be read.
    """

    def __init__(self, dataset: Readable, seed: int, placeholder: tuple[Any, ...]) -> None:
        self.dataset, self.seed, self.placeholder = dataset, seed, placeholder

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> tuple[tuple[Any, ...], tuple[int, int], list[Failure], bool]:
        epoch, index = key
        seed_sample(self.seed, epoch, index)
        failures: list[Failure] = []
        for attempt in range(min(_ATTEMPTS, len(self))):
            *sample, failure = self.dataset[(index + attempt) % len(self)]
            if failure is None:
                return tuple(sample), key, failures, True
            failures.append(failure)
        return self.placeholder, key, failures, False


@dataclass(frozen=True)
class _Collate:
    """For `DataLoader(collate_fn=...)`."""

    collate: Callable[[list[tuple[Any, ...]]], Any]

    def __call__(self, items: list[Any]) -> MicroBatch:
        samples, keys, failures, good = zip(*items)
        error = None
        if not all(good):
            missed = failures[good.index(False)]
            error = f"{len(missed)} images in a row cannot be read; the first is '{missed[0][0]}' ({missed[0][1]})"
        return MicroBatch(self.collate(list(samples)), list(keys), [f for part in failures for f in part], error)


def sample_loader(
    dataset: SeededDataset,
    sampler: PlanSampler,
    workers: int,
    pin_memory: bool,
    collate: Callable[[list[tuple[Any, ...]]], Any] = default_collate,
) -> DataLoader[Any]:
    """The micro-batches of the rest of a run, in one pass: workers start once and prefetch across epochs.

    Args:
        dataset: The samples.
        sampler: Which of them, in which order.
        workers: Loader processes; 0 loads in this one.
        pin_memory: For copies to a GPU.
        collate: Makes a micro-batch's data of its samples.
    """
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=_Collate(collate),
        pin_memory=pin_memory,
        worker_init_fn=init_worker_signals,
        generator=torch.Generator().manual_seed(dataset.seed),  # otherwise it draws from the global one
    )
