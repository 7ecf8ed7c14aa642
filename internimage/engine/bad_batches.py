# SPDX-License-Identifier: MIT
"""Batches whose loss or gradient was not finite, kept for inspection."""

from pathlib import Path
from typing import Any

import torch

from ..files import WriteError, archive_errors, writing


def keep_batch(
    folder: Path,
    step: int,
    rank: int,
    record: dict[str, Any],
    samples: list[tuple[int, int]],
    loss: float,
    grad_norm: float,
) -> None:
    """Write what a process had of a skipped step.

    Args:
        folder: For such files; is made.
        step: Its number, from 1.
        rank: Of the process.
        record: The task's data, from `Task.record`.
        samples: Epoch and index of each.
        loss, grad_norm: Of the step, over all processes.

    Raises:
        WriteError: The disk is full, or the like.
    """
    file = folder / f"step-{step:09d}-process-{rank}.pt"
    batch = {
        **record,
        "epochs": [epoch for epoch, _ in samples],
        "indices": [index for _, index in samples],
        "loss": loss,
        "grad_norm": grad_norm,
    }
    try:
        with archive_errors(), writing(file) as handle:
            torch.save(batch, handle)
    except OSError as error:
        raise WriteError(
            f"the batch of step {step}, whose loss or gradient was not finite, could not be written to '{file}' "
            f"({error.strerror or error}). Make room and run the same command again to resume from the last checkpoint"
        ) from error
