# SPDX-License-Identifier: MIT
"""Every random draw of training as a function of (seed, epoch, sample) or (seed, step).

No draw depends on earlier ones, so a run sees the same batches if it resumes in the middle of an epoch, loads with
another number of workers, or runs in another number of processes.
"""

import random
from collections.abc import Iterator

import numpy as np
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.data import Sampler

# the purpose of a seed: no two purposes share a stream
_ORDER, _SAMPLE, _STEP, _DROP_PATH = range(4)


def _derive(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


def _seed_all(value: int) -> None:
    """Python, NumPy and torch. timm's augmentations draw from all three."""
    random.seed(value)
    np.random.seed(value & 0xFFFFFFFF)
    torch.manual_seed(value)


def seed_run(seed: int) -> None:
    """Before the model is made."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def seed_sample(seed: int, epoch: int, index: int) -> None:
    """Before a sample is read and augmented."""
    _seed_all(_derive(_SAMPLE, seed, epoch, index))


def seed_step(seed: int, step: int, micro_step: int = 0, rank: int = 0) -> None:
    """Before a forward pass: for the dropout of other models."""
    _seed_all(_derive(_STEP, seed, step, micro_step, rank))


def seed_mixing(seed: int, step: int) -> None:
    """Before a batch is mixed: timm draws one ratio and one box for it from NumPy, the same in every process."""
    np.random.seed(_derive(_STEP, seed, step) & 0xFFFFFFFF)


class BatchPlan:
    """Which samples belong to which batch.

    Args:
        samples: Size of the training set.
        batch_size: Samples in an optimizer step, over all processes and micro-batches.
        micro_batches: The equal parts that a batch is split into: processes times gradient accumulation steps.
        seed: Of the order.
    """

    def __init__(self, samples: int, batch_size: int, micro_batches: int, seed: int) -> None:
        self.samples, self.batch_size, self.micro_batches, self.seed = samples, batch_size, micro_batches, seed
        self.steps_per_epoch = samples // batch_size  # the last, smaller batch is dropped
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def positions(self, index: int) -> list[int]:
        """The positions in the batch that a micro-batch holds.

        timm mixes the first image with the last, the second with the second to last, and so on. A micro-batch of even
        size takes a slice from the front and the mirrored one from the back, so that pairs stay together and mixing the
        micro-batches is mixing the batch.
        """
        size = self.batch_size // self.micro_batches
        if size % 2:
            return list(range(index * size, (index + 1) * size))
        front = list(range(index * size // 2, (index + 1) * size // 2))
        return front + [self.batch_size - 1 - i for i in reversed(front)]

    def samples_of(self, step: int, index: int) -> list[tuple[int, int]]:
        """(epoch, index) of the samples in a micro-batch of an optimizer step."""
        epoch, inside = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(_derive(_ORDER, self.seed, epoch))
            self._epoch, self._order = epoch, torch.randperm(self.samples, generator=generator)
        start = inside * self.batch_size
        return [(epoch, int(self._order[start + i])) for i in self.positions(index)]


class PlanSampler(Sampler[list[tuple[int, int]]]):
    """Batch sampler over the rest of a run: the micro-batches of one process, from a step on.

    Args:
        plan: The batches.
        micro_batches: Those of each batch that this process takes, in order.
        start, stop: First step, and the step after the last.
    """

    def __init__(self, plan: BatchPlan, micro_batches: list[int], start: int, stop: int) -> None:
        self.plan, self.micro_batches, self.start, self.stop = plan, micro_batches, start, stop

    def __len__(self) -> int:
        return (self.stop - self.start) * len(self.micro_batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.stop):
            for index in self.micro_batches:
                yield self.plan.samples_of(step, index)


class PlannedDropPath(nn.Module):
    """Stochastic depth with draws that `DropPathDraws` sets; the identity in evaluation."""

    def __init__(self, drop_prob: float, scale_by_keep: bool) -> None:
        super().__init__()
        self.drop_prob, self.scale_by_keep = drop_prob, scale_by_keep
        self.factor: Tensor  # (N,): 0, or 1 / (1 - drop_prob)
        self.register_buffer("factor", torch.empty(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * self.factor.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


class DropPathDraws:
    """Replaces timm's `DropPath` modules in a model, and sets their draws for each step.

    The draws of a step form a table, layers by positions in the batch, of which each process takes its columns.

    Args:
        model: Is changed in place.
        plan: The batches.
        seed: Of the draws.
    """

    def __init__(self, model: nn.Module, plan: BatchPlan, seed: int) -> None:
        self.plan, self.seed = plan, seed
        self.layers: list[PlannedDropPath] = []
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if type(child) is DropPath and child.drop_prob > 0:
                    planned = PlannedDropPath(child.drop_prob, child.scale_by_keep)
                    setattr(parent, name, planned)
                    self.layers.append(planned)
        device = next(model.parameters()).device
        size = plan.batch_size // plan.micro_batches
        for layer in self.layers:
            layer.factor = torch.ones(size, device=device)

    def draw(self, step: int, index: int) -> None:
        """Set the draws for a micro-batch of a step."""
        if not self.layers:
            return
        generator = torch.Generator().manual_seed(_derive(_DROP_PATH, self.seed, step))
        table = torch.rand(len(self.layers), self.plan.batch_size, generator=generator)
        table = table[:, self.plan.positions(index)]
        for layer, row in zip(self.layers, table):
            keep = 1 - layer.drop_prob
            factor = (row < keep).float()
            # in place: a compiled or checkpointed forward reads the same memory
            layer.factor.copy_(factor / keep if layer.scale_by_keep and keep > 0 else factor)
