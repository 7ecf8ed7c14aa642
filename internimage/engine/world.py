# SPDX-License-Identifier: MIT
"""The processes of a torchrun launch, and the few collectives that training and evaluation use."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import UserError
from .parent import end_with_torchrun, outlive_torchrun

T = TypeVar("T")


class LaunchError(UserError, RuntimeError):
    """Several processes that cannot work together."""


@dataclass(frozen=True)
class World:
    """Rank, world size and device of this process."""

    rank: int = 0  #: of this process
    size: int = 1  #: number of processes
    device: torch.device = torch.device("cpu")  #: of this process

    @property
    def first(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all processes; the same on each."""
        if self.size > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values

    def gather(self, value: T) -> list[T]:
        """The picklable values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def raise_any(self, problem: UserError | OSError | None) -> None:
        """Raise in all processes what went wrong in one of them; to be called in all at once.

        A process that raised alone would leave the others waiting in their next collective.

        Args:
            problem: This process's, or None.
        """
        problem = next((p for p in self.gather(problem) if p is not None), None)
        if problem is not None:
            problem.everywhere = True  # type: ignore[union-attr]  # raised in all processes, reported by the first
            raise problem

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """Context of work that may fail in one process (bad input, a full disk), and then raises in all of them.

        No collectives may be called inside it.
        """
        problem: UserError | OSError | None = None
        try:
            yield
        except (UserError, OSError) as error:
            problem = error
        self.raise_any(problem)


def join(device: torch.device) -> World:
    """Join the process group of a torchrun launch; without one, the world is this process.

    Each process uses its own accelerator of the type of `device`; on the CPU they communicate over gloo. Until `leave`,
    the process exits when torchrun is gone.

    Raises:
        LaunchError: There are fewer accelerators than processes on this machine.
    """
    end_with_torchrun()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return World(device=device)
    if device.type != "cpu":
        local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.accelerator.device_count()
        if local >= count:
            raise LaunchError(
                f"this machine has {count} {device.type} devices and was given more processes: start torchrun with "
                f"--nproc-per-node {count}, or set device=cpu"
            )
        device = torch.device(device.type, local)
        torch.accelerator.set_device_index(local)
    if not dist.is_initialized():
        backend = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}.get(device.type)
        dist.init_process_group(backend)
    return World(dist.get_rank(), dist.get_world_size(), device)


def leave() -> None:
    """Close what `join` opened."""
    outlive_torchrun()
    if dist.is_initialized():
        dist.destroy_process_group()
