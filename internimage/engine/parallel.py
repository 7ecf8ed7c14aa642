# SPDX-License-Identifier: MIT
"""A model in several processes: DDP, or FSDP2 with sharded weights."""

import inspect
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from ..config import ConfigError
from ..models.parts import NoSuchParts, repeated_blocks
from .world import World


def replicate(model: nn.Module, world: World) -> nn.Module:
    """The model in DDP, or unchanged in a single process. Buffers are not broadcast: batch norm is synchronized."""
    if world.size == 1:
        return model
    # torch strides depthwise kernels differently from their gradients, and warns that this costs a copy
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    options: dict[str, Any] = dict(gradient_as_bucket_view=True)
    if world.device.type != "cpu":
        options["device_ids"] = [world.device.index]
    # renamed in torch 2.14
    known = inspect.signature(DistributedDataParallel).parameters
    options["forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"] = False
    return DistributedDataParallel(model, **options)


def shard(model: nn.Module, world: World, dtype: torch.dtype) -> nn.Module:
    """Shard a model's weights over all processes, in place; those of a block are gathered when it runs.

    Args:
        model: To be sharded block by block.
        world: The processes.
        dtype: Of the computation; sharded weights, the reduction of gradients and batch norm stay in float32.

    Raises:
        ConfigError: The model's blocks are unknown; sharded as one unit, all of it would be gathered at once.
    """
    try:
        blocks = repeated_blocks(model)
    except NoSuchParts as error:
        raise ConfigError(f"'parallel' cannot be fsdp: {error}") from error
    mesh = init_device_mesh(world.device.type, (world.size,))
    low = dtype if dtype != torch.float32 else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, output_dtype=None)
    exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, output_dtype=low)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    if low is not None:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                fully_shard(module, mesh=mesh, mp_policy=exact)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def last_backward(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Context of a forward and backward pass: gradients are reduced only in the last one of a step."""
    if isinstance(model, DistributedDataParallel):
        return nullcontext() if last else model.no_sync()
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_is_last_backward(last)
    return nullcontext()


def full_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The full state dict, on the CPU of the first process; call it in all processes."""
    if not is_sharded(model):
        return model.state_dict()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: dict[str, Any] = get_model_state_dict(model, options=options)
    return weights
