# SPDX-License-Identifier: MIT
"""Training in float64, for tests that compare two ways to the same numbers: in this process by `in_double`, or in
processes of their own by running this file, which takes the command line's arguments.

Sums in another order differ by rounding, and AdamW magnifies that: it moves a weight by lr * m / (sqrt(v) + 1e-8), so
where a gradient is nothing but rounding noise of size d, by up to lr * d / 1e-8 a step. In float32, d is some 1e-8 and
the noise moves weights as far as gradients do: no bound on the difference follows. In float64 d is some 1e-16.
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

NOISE = 1e-14  # of a gradient: sums of some thousand terms of at most 1, each rounded to 1.1e-16 of itself
ADAMW_EPS = 1e-8


def bound(steps: int, lr: float) -> float:
    """How far weights, and losses that change by at most 1 a unit of weight, can come apart by rounding alone."""
    return steps * lr * NOISE / ADAMW_EPS


@contextmanager
def in_double() -> Iterator[None]:
    """Context in which `finetune` computes in float64 throughout."""
    place, policy = trainer.Trainer._to_device, parallel.MixedPrecisionPolicy

    def place_double(self, batch, step):
        images, targets = place(self, batch, step)
        return images.double(), targets

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)  # losses and statistics want 32 bits at least
            patch.setattr(trainer.Trainer, "_to_device", place_double)
            patch.setattr(task, "evaluate", partial(task.evaluate, dtype=torch.float64))
            patch.setattr(parallel, "MixedPrecisionPolicy", lambda **kwargs: policy(**kwargs | {"reduce_dtype": None}))
            yield
    finally:
        torch.set_default_dtype(before)


if __name__ == "__main__":
    with in_double():
        sys.exit(main(sys.argv[1:]))
