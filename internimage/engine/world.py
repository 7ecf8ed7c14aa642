# SPDX-License-Identifier: MIT
"""What one process of a torchrun launch needs to know, and the few exchanges that training and evaluation make."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as collectives
from torch import Tensor, nn

from ..errors import UserError
from ..ops.sampling import accumulate_dtype
from .parent import end_with_torchrun, outlive_torchrun


class LaunchError(UserError, RuntimeError):
    """Several processes that cannot work together."""


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

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

    def gather(self, thing) -> list:
        """Picklable things of all processes, by rank."""
        if self.size == 1:
            return [thing]
        things = [None] * self.size
        dist.all_gather_object(things, thing)
        return things

    def agree(self, problem: Exception | None) -> None:
        """Raise in all processes what went wrong in one; to be called in all at once.

        A process that raised alone would leave the others waiting for it in their next exchange.

        Args:
            problem: This process's, or None.
        """
        problem = next((p for p in self.gather(problem) if p is not None), None)
        if problem is not None:
            problem.everywhere = True  # the first process alone tells
            raise problem

    @contextmanager
    def together(self) -> Iterator[None]:
        """Context of work that may fail in one process (bad input, a full disk) and then fails in all of them.

        There must be no exchange between processes in it.
        """
        problem = None
        try:
            yield
        except (UserError, OSError) as error:
            problem = error
        self.agree(problem)


def join(device: torch.device) -> World:
    """Join the other processes of a torchrun launch, or stand alone where there is none.

    Each process takes its own accelerator of the kind of `device`; on the CPU they talk over gloo. Until `leave`, it
    ends when torchrun is gone.

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


def _sum(x: Tensor) -> Tensor:
    """All-reduce with a gradient."""
    with warnings.catch_warnings():  # torch 2.14 points to a private module instead
        warnings.simplefilter("ignore", FutureWarning)
        return collectives.all_reduce(x)


class CpuSyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all processes, on the CPU, where torch's SyncBatchNorm refuses to work.

    The mean comes first and the variance from deviations, so that no digits cancel.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        axes, shape = (0, 2, 3), (1, -1, 1, 1)
        wide = x.to(accumulate_dtype(x.dtype))
        count = dist.get_world_size() * (x.numel() // x.shape[1])  # parts are of one size: see BatchPlan
        mean = _sum(wide.sum(axes)) / count
        centered = wide - mean.view(shape)
        var = _sum(centered.square().sum(axes)) / count
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                share = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
                self.running_var.lerp_((var * count / max(count - 1, 1)).to(self.running_var.dtype), share)
        y = centered * torch.rsqrt(var + self.eps).view(shape)
        if self.affine:
            y = y * self.weight.to(y.dtype).view(shape) + self.bias.to(y.dtype).view(shape)
        return y.to(x.dtype)


def synchronise_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with batch norms that see the batches of all processes; keys and weights stay."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = CpuSyncBatchNorm  # no state of its own, so nothing is to be copied
    return model
