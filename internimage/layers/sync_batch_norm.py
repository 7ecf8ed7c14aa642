# SPDX-License-Identifier: MIT
"""Batch norm over the batches of all processes, also on the CPU."""

import warnings

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as collectives
from torch import Tensor, nn

from ..ops.sampling import accumulate_dtype


def _all_reduce(x: Tensor) -> Tensor:
    """The sum over all processes, with a gradient."""
    with warnings.catch_warnings():  # torch 2.14 deprecates it for a private module
        warnings.simplefilter("ignore", FutureWarning)
        return collectives.all_reduce(x)


class CpuSyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all processes, on the CPU, which torch's SyncBatchNorm does not support.

    The mean is computed first and the variance from deviations, so that no digits cancel. Every process must have the
    same number of samples.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        axes, shape = (0, 2, 3), (1, -1, 1, 1)
        wide = x.to(accumulate_dtype(x.dtype))
        count = dist.get_world_size() * (x.numel() // x.shape[1])
        mean = _all_reduce(wide.sum(axes)) / count
        centered = wide - mean.view(shape)
        var = _all_reduce(centered.square().sum(axes)) / count
        running_mean, running_var, batches = self.running_mean, self.running_var, self.num_batches_tracked
        if running_mean is not None and running_var is not None and batches is not None:  # track_running_stats
            with torch.no_grad():
                batches.add_(1)
                share = self.momentum if self.momentum is not None else 1 / float(batches)
                running_mean.lerp_(mean.to(running_mean.dtype), share)
                running_var.lerp_((var * count / max(count - 1, 1)).to(running_var.dtype), share)
        y = centered * torch.rsqrt(var + self.eps).view(shape)
        if self.affine:
            y = y * self.weight.to(y.dtype).view(shape) + self.bias.to(y.dtype).view(shape)
        return y.to(x.dtype)


def synchronize_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Make the batch norms of a model see the batches of all processes; keys and weights stay the same."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = CpuSyncBatchNorm  # has no additional state
    return model
