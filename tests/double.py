# SPDX-License-Identifier: MIT
"""Training in float64, for tests that compute the same values in two ways: in this process by `in_double`, or in other
processes by running this file with the arguments of the command line.

Sums in another order differ by rounding errors, which AdamW amplifies: it moves a weight by lr * m / (sqrt(v) + 1e-8),
which for a gradient that is only rounding noise of size d can be lr * d / 1e-8 per step. In float32, d is about 1e-8,
and noise moves weights as far as gradients do, so there is no useful bound. In float64, d is about 1e-16.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch

from internimage.cli import main
from internimage.engine import parallel, trainer
from internimage.tasks.classification import task

NOISE = 1e-14  # of a gradient: a sum of some thousand terms of at most 1, with relative rounding errors of 1.1e-16
ADAMW_EPS = 1e-8


def bound(steps: int, lr: float) -> float:
    """How far rounding alone can move weights, and losses that change by at most 1 per unit of weight."""
    return steps * lr * NOISE / ADAMW_EPS


@contextmanager
def in_double() -> Iterator[None]:
    """Context in which `finetune` computes everything in float64."""
    place, policy = trainer.Trainer._to_device, parallel.MixedPrecisionPolicy

    def place_double(self, batch, step):
        images, targets = place(self, batch, step)
        return images.double(), targets

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)  # for losses and statistics, which use float32
            patch.setattr(trainer.Trainer, "_to_device", place_double)
            patch.setattr(task, "evaluate", partial(task.evaluate, dtype=torch.float64))
            patch.setattr(parallel, "MixedPrecisionPolicy", lambda **kwargs: policy(**kwargs | {"reduce_dtype": None}))
            yield
    finally:
        torch.set_default_dtype(before)


if __name__ == "__main__":
    with in_double():
        sys.exit(main(sys.argv[1:]))
