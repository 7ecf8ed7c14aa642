# SPDX-License-Identifier: MIT
"""Every random draw of training as a function of (seed, epoch, sample) or (seed, step).

No draw depends on what was drawn before it, so a run that is resumed inside an epoch, loads with another number of
workers, or is spread over another number of processes sees the same batches.
"""

import random
from collections.abc import Iterator

import numpy as np
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.data import Sampler

# what a seed is for: draws for two purposes never share a stream
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
    """Before a forward pass: dropout of models that are not ours."""
    _seed_all(_derive(_STEP, seed, step, micro_step, rank))


def seed_mixing(seed: int, step: int) -> None:
    """Before a batch is mixed: timm draws one ratio and box a batch from NumPy, the same in every process."""
    np.random.seed(_derive(_STEP, seed, step) & 0xFFFFFFFF)


class BatchPlan:
    """Which samples stand in which batch.

    Args:
        samples: Images of the training set.
        batch_size: Images an optimizer step, over all processes and accumulated parts.
        parts: Into how many equal parts a batch is split: processes times accumulation.
        seed: Of the order.
    """

    def __init__(self, samples: int, batch_size: int, parts: int, seed: int) -> None:
        self.samples, self.batch_size, self.parts, self.seed = samples, batch_size, parts, seed
        self.steps_per_epoch = samples // batch_size  # the last, smaller batch is left out
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def positions(self, part: int) -> list[int]:
        """The positions in the batch that a part holds.

        timm mixes the first image with the last, the second with the one before the last and so on. A part of even
        size is a piece from the front and its mirror image from the back, so that pairs stay together and mixing the
        parts is mixing the batch.
        """
        size = self.batch_size // self.parts
        if size % 2:
            return list(range(part * size, (part + 1) * size))
        front = list(range(part * size // 2, (part + 1) * size // 2))
        return front + [self.batch_size - 1 - i for i in reversed(front)]

    def batch(self, step: int, part: int) -> list[tuple[int, int]]:
        """(epoch, index) of the samples of a part of the batch of an optimizer step."""
        epoch, inside = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(_derive(_ORDER, self.seed, epoch))
            self._epoch, self._order = epoch, torch.randperm(self.samples, generator=generator)
        start = inside * self.batch_size
        return [(epoch, int(self._order[start + i])) for i in self.positions(part)]


class PlanSampler(Sampler[list[tuple[int, int]]]):
    """Batch sampler over the rest of a run: the parts of one process, from a step on.

    Args:
        plan: The batches.
        parts: The parts of each batch that this process takes, in order.
        start, stop: First step, and the step after the last.
    """

    def __init__(self, plan: BatchPlan, parts: list[int], start: int, stop: int) -> None:
        self.plan, self.parts, self.start, self.stop = plan, parts, start, stop

    def __len__(self) -> int:
        return (self.stop - self.start) * len(self.parts)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.stop):
            for part in self.parts:
                yield self.plan.batch(step, part)


class PlannedDropPath(nn.Module):
    """Stochastic depth whose draws are set from outside, by `DropPathDraws`; in evaluation the identity."""

    def __init__(self, drop_prob: float, scale_by_keep: bool) -> None:
        super().__init__()
        self.drop_prob, self.scale_by_keep = drop_prob, scale_by_keep
        self.register_buffer("factor", torch.empty(0), persistent=False)  # (N,): 0, or 1 / (1 - drop_prob)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * self.factor.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


class DropPathDraws:
    """Takes the place of timm's `DropPath` modules in a model and sets their draws for a step.

    The draws of a step are one table, layers by positions in the batch; each process takes its columns.

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
        size = plan.batch_size // plan.parts
        for layer in self.layers:
            layer.factor = torch.ones(size, device=device)

    def draw(self, step: int, part: int) -> None:
        """Set the draws of a part of a step's batch."""
        if not self.layers:
            return
        generator = torch.Generator().manual_seed(_derive(_DROP_PATH, self.seed, step))
        table = torch.rand(len(self.layers), self.plan.batch_size, generator=generator)
        table = table[:, self.plan.positions(part)]
        for layer, row in zip(self.layers, table):
            keep = 1 - layer.drop_prob
            factor = (row < keep).float()
            # in place: a compiled or checkpointed forward reads the same memory
            layer.factor.copy_(factor / keep if layer.scale_by_keep and keep > 0 else factor)
