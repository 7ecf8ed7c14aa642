# SPDX-License-Identifier: MIT
"""timm's optimizer and schedule from the config, and clipping of gradients."""

import difflib

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from ..config import ConfigError
from ..models.parts import NoSuchParts, offset_parameters
from .config import RunConfig


def create_optimizer(
    model: nn.Module, config: RunConfig, steps_per_epoch: int
) -> tuple[torch.optim.Optimizer, Scheduler | None]:
    """Optimizer and schedule; the schedule is None with `sched=none`.

    Raises:
        ConfigError: timm does not know the optimizer or the schedule, or a setting does not go with the model.
    """
    try:
        optimizer = create_optimizer_v2(
            model, config.opt, lr=config.lr, weight_decay=config.weight_decay, layer_decay=config.layer_decay
        )
    except (ValueError, AssertionError) as error:
        near = difflib.get_close_matches(config.opt, list_optimizers(), n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise ConfigError(f"'opt' cannot be '{config.opt}': {error}{hint}") from error
    if config.offset_lr_factor != 1:
        _scale_offsets(optimizer, model, config.offset_lr_factor)
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            config.sched,
            num_epochs=max(config.epochs - config.warmup_epochs, 1),
            warmup_epochs=min(config.warmup_epochs, config.epochs),
            warmup_lr=config.warmup_lr,
            min_lr=config.min_lr,
            warmup_prefix=True,
            step_on_epochs=False,
            updates_per_epoch=steps_per_epoch,
        )
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"'sched' cannot be '{config.sched}': {error}") from error
    if scheduler is None:
        if config.sched != "none":
            known = ("cosine", "step", "poly", "constant", "none")
            nearest = (difflib.get_close_matches(config.sched, known, n=1) or ["cosine"])[0]
            raise ConfigError(f"there is no schedule '{config.sched}'; did you mean '{nearest}'?")
        for group in optimizer.param_groups:  # as timm's schedules do
            group["lr"] *= group.get("lr_scale", 1.0)
    return optimizer, scheduler


def _scale_offsets(optimizer: torch.optim.Optimizer, model: nn.Module, factor: float) -> None:
    """Move the parameters that `offset_lr_factor` is for to groups of their own."""
    try:
        offsets = {id(parameter) for parameter in offset_parameters(model)}
    except NoSuchParts as error:
        raise ConfigError(f"'offset_lr_factor' must be 1: {error}") from error
    for group in list(optimizer.param_groups):
        is_offset = [id(parameter) in offsets for parameter in group["params"]]
        if not any(is_offset):
            continue
        slow = {**group, "lr_scale": group.get("lr_scale", 1.0) * factor}
        for key in ("params", "param_names"):
            if key in group:
                slow[key] = [thing for thing, yes in zip(group[key], is_offset) if yes]
                group[key] = [thing for thing, yes in zip(group[key], is_offset) if not yes]
        if group["params"]:
            optimizer.param_groups.append(slow)
        else:
            group.update(slow)


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """The largest learning rate: the head's, with layer decay."""
    return max(group["lr"] for group in optimizer.param_groups)


def grad_norm(parameters: list[nn.Parameter]) -> Tensor:
    """Norm of all gradients together, also if they are sharded."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def scale_grads(parameters: list[nn.Parameter], factor: float) -> None:
    """Scale gradients down, in place; a factor of 1 or more leaves them unchanged."""
    if factor < 1:
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], factor)
