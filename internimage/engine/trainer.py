# SPDX-License-Identifier: MIT
"""The state of a training run and its loop."""

import dataclasses
import difflib
import math
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from ..errors import UserError
from . import checkpoint, parallel
from .config import ConfigError
from .distributed import World, synchronise_batch_norm
from .evaluate import evaluate
from .model import DTYPES
from .randomness import BatchPlan, DropPathDraws, PlanSampler, seed_mixing, seed_step
from .settings import BAD_BATCHES, CHECKPOINTS, FinetuneConfig
from .training_data import TrainingBatch, training_loader, training_transform
from .training_log import TrainingLog

_STATE_FILE = "state.pt"


class TrainingError(UserError, RuntimeError):
    """Training cannot go on."""


@dataclass
class Progress:
    """Where a run stands. With the weights and the optimizer's state, all that a continuation needs."""

    step: int = 0  # optimizer steps done, the left out ones too; the position in the sampler
    skipped: int = 0  # steps left out because they were not finite
    loss_sum: float = 0.0  # of the current epoch
    loss_steps: int = 0
    seconds: float = 0.0  # in steps of the current epoch
    epochs: list[dict] = field(default_factory=list)  # a row an epoch


def frozen_parts(model: nn.Module, freeze: int) -> list[nn.Module]:
    """The modules that `freeze` keeps as they are.

    Raises:
        ConfigError: The model has no stages.
    """
    if not freeze:
        return []
    if freeze == 5:
        classifier = model.get_classifier()
        return [part for part in model.children() if part is not classifier]
    if not hasattr(model, "levels"):
        raise ConfigError("'freeze' of 1 to 4 is for InternImage models; 5 works with every model")
    return [model.patch_embed, *list(model.levels)[:freeze]]


class Trainer:
    """A model in training.

    Args:
        config: The settings.
        world: The processes.
        model: On its device; is changed in place.
        names: The classes.
        preprocessing: timm's, from `data_config`.
        train_set, val_set: From `open_dataset`; `val_set` may be None.
        output: The run's folder.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        world: World,
        model: nn.Module,
        names: list[str],
        preprocessing: dict,
        train_set: Dataset,
        val_set: Dataset | None,
        output: Path,
    ) -> None:
        self.config, self.world, self.names, self.preprocessing = config, world, names, preprocessing
        self.train_set, self.val_set, self.output = train_set, val_set, output
        self.plan = BatchPlan(len(train_set), config.batch_size, world.size * config.accumulate, config.seed)
        self.parts = [world.rank * config.accumulate + i for i in range(config.accumulate)]
        self.total = config.epochs * self.plan.steps_per_epoch
        self.progress = Progress()
        training_transform(config, preprocessing)  # says what is wrong with the settings before anything is written

        self.frozen = frozen_parts(model, config.freeze)
        for part in self.frozen:
            part.requires_grad_(False)
        if world.size > 1:
            model = synchronise_batch_norm(model, world.device)
        self.draws = DropPathDraws(model, self.plan, config.seed)
        if config.channels_last:
            model.to(memory_format=torch.channels_last)
        if config.grad_checkpointing:
            model.set_grad_checkpointing()
        self.sharded = config.parallel == "fsdp" and world.size > 1
        # foreach functions do not know sharded tensors of uneven parts
        self.average = None
        if config.ema_decay:
            self.average = ModelEmaV3(model, decay=config.ema_decay, use_warmup=True, foreach=not self.sharded)
        dtype = DTYPES[config.precision]
        if self.sharded:
            parallel.shard(model, world, dtype)
            if self.average is not None:
                parallel.shard(self.average.module, world, dtype)
        if config.compile:
            model.compile()
        self.model = model
        self.wrapped = model if self.sharded else parallel.replicate(model, world)
        self.optimizer, self.scheduler = _optimizer(model, config, self.plan.steps_per_epoch)
        autocast = dtype != torch.float32 and not self.sharded
        self.autocast = torch.autocast(world.device.type, dtype=dtype if autocast else None, enabled=autocast)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.precision == "float16")
        self.mix, self.loss_fn = None, LabelSmoothingCrossEntropy(config.smoothing)
        if config.mixes:
            self.mix = Mixup(
                config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=len(names)
            )  # fmt: skip
            self.loss_fn = SoftTargetCrossEntropy()
        self.trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        # of a step that is left out, batch norm's statistics are taken back
        self.statistics = [b for name, b in model.named_buffers() if not name.endswith(".factor")]

    # ---- checkpoints

    def _state(self) -> dict[str, Any]:
        name, keys, position, has_gauss, cached = np.random.get_state()
        return {
            "progress": dataclasses.asdict(self.progress),
            "scaler": self.scaler.state_dict(),
            "schedule": None if self.scheduler is None else _plain(self.scheduler.state_dict()),
            # every draw is derived from seed, epoch, sample and step; these are for code that draws beside them
            "random": {
                "python": random.getstate(),
                "numpy": (name, keys.tolist(), position, has_gauss, cached),
                "torch": torch.get_rng_state(),
            },
        }

    def save(self) -> None:
        """Write a checkpoint; in all processes at once."""
        folder, step = self.output / CHECKPOINTS, self.progress.step
        self.log.flush()
        if self.sharded:

            def write(partial: Path) -> None:
                average = self.average.module if self.average else None
                parallel.write_shards(partial, self.model, average, self.optimizer)
                if self.world.first:
                    torch.save(self._state(), partial / _STATE_FILE)

            checkpoint.save_folder(folder, step, write, self.world)
        elif self.world.first:
            state = self._state() | {
                "model": self.model.state_dict(),
                "average": self.average.module.state_dict() if self.average else None,
                "optimizer": self.optimizer.state_dict(),
            }
            checkpoint.save_file(folder, step, state)

    def resume(self) -> Path | None:
        """Take up the newest checkpoint of the output folder; returns it, None if there is none."""
        found = checkpoint.newest(self.output / CHECKPOINTS, self._read)
        return found[0] if found else None

    def _read(self, path: Path) -> None:
        if path.is_dir() != self.sharded:
            raise ConfigError(f"'{path}' was written with another 'parallel': set it back, or resume=false")
        if self.sharded:
            average = self.average.module if self.average else None
            parallel.read_shards(path, self.model, average, self.optimizer)
            state = checkpoint.load_file(path / _STATE_FILE)
        else:
            state = checkpoint.load_file(path)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.average is not None:
                self.average.module.load_state_dict(state["average"])
        self.scaler.load_state_dict(state["scaler"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["schedule"])
        self.progress = Progress(**state["progress"])
        random.setstate(state["random"]["python"])
        np.random.set_state(state["random"]["numpy"])
        torch.set_rng_state(state["random"]["torch"])

    # ---- the loop

    def run(self, stop, progress: bool = True) -> bool:
        """Train to the end, or until `stop` asks to leave.

        Args:
            stop: Called between steps; true where this process was asked to stop.
            progress: Show a bar on stderr.

        Returns:
            Whether the end was reached. A checkpoint of where it stands has been written either way.

        Raises:
            TrainingError: Too many steps had no finite loss.
            internimage.engine.checkpoint.CheckpointWriteError: The disk is full.
        """
        config, state, plan = self.config, self.progress, self.plan
        self.log = TrainingLog(
            self.output, state.epochs, state.step, self.total, config.batch_size, config.tensorboard, progress,
            self.world.first,
        )  # fmt: skip
        sampler = PlanSampler(plan, self.parts, state.step, self.total)
        pin = self.world.device.type == "cuda"
        loader = iter(training_loader(self.train_set, sampler, config, self.preprocessing, pin))
        self._train_mode()
        saved = -1
        try:
            while state.step < self.total:
                start = time.perf_counter()
                batches = [next(loader) for _ in self.parts]
                stopping = self._step(batches, stop, start)
                if state.step % plan.steps_per_epoch == 0:
                    self._end_epoch()
                due = config.checkpoint_every and state.step % config.checkpoint_every == 0
                if stopping or due or state.step % plan.steps_per_epoch == 0:
                    self.save()
                    saved = state.step
                if stopping and state.step < self.total:
                    return False
            if saved != state.step:  # resumed at the very end
                self.save()
            return True
        finally:
            self.log.close()
            del loader

    def _train_mode(self) -> None:
        self.model.train()
        for part in self.frozen:
            part.eval()

    def _step(self, batches: list[TrainingBatch], stop, start: float) -> bool:
        """One optimizer step; returns whether a process was asked to stop."""
        state, config = self.progress, self.config
        step = state.step
        before = [b.clone() for b in self.statistics]
        self.optimizer.zero_grad(set_to_none=True)
        loss_sum = torch.zeros((), device=self.world.device)
        seen = []
        for i, batch in enumerate(batches):
            for file, reason in batch.failures:
                tqdm.write(f"'{file}' cannot be read ({reason}); the next image takes its place")
            images, targets = self._place(batch, step)
            seen.append((images, targets, batch.samples))
            self.draws.draw(step, self.parts[i])
            seed_step(config.seed, step, i, self.world.rank)
            with parallel.last_backward(self.wrapped, i + 1 == len(batches)):
                with self.autocast:
                    logits = self.wrapped(images)
                    loss = self.loss_fn(logits.float(), targets) / len(batches)
                self.scaler.scale(loss).backward()
            loss_sum += loss.detach()
        self.scaler.unscale_(self.optimizer)
        norm = _grad_norm(self.trained)
        # one exchange: the mean loss, whether a loss was not finite, whether to stop
        bad_loss = (~loss_sum.isfinite()).float()
        mine = torch.stack([loss_sum, bad_loss, torch.full_like(loss_sum, float(stop()))])
        total, bad, stopping = self.world.sum(mine).tolist()
        loss, norm = total / self.world.size, norm.item()
        overflow = self.scaler.is_enabled() and not math.isfinite(norm)  # the scaler's own business
        if bad or (not math.isfinite(norm) and not overflow):
            self._leave_out(step, loss, norm, seen, before)
        else:
            if config.clip_grad is not None and not overflow:
                _scale_grads(self.trained, min(1.0, config.clip_grad / (norm + 1e-6)))
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.average is not None:
                self.average.update(self.model, step=step + 1)
            state.loss_sum += loss
            state.loss_steps += 1
        state.step += 1
        if self.scheduler is not None:
            self.scheduler.step_update(state.step)
        seconds = time.perf_counter() - start
        state.seconds += seconds
        epoch = step // self.plan.steps_per_epoch + 1
        self.log.step(state.step, epoch, loss, self.optimizer.param_groups[-1]["lr"], norm, seconds)
        return bool(stopping)

    def _place(self, batch: TrainingBatch, step: int) -> tuple[Tensor, Tensor]:
        device = self.world.device
        images = batch.images.to(device, non_blocking=True)
        targets = batch.targets.to(device, non_blocking=True)
        if self.mix is not None:
            seed_mixing(self.config.seed, step)
            images, targets = self.mix(images, targets)
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, targets

    def _leave_out(self, step: int, loss: float, norm: float, seen: list, before: list[Tensor]) -> None:
        """Take a step back, keep its batch for inspection, and stop after too many."""
        state, config = self.progress, self.config
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler.is_enabled():
            self.scaler.update(self.scaler.get_scale())  # forgets what unscale_ saw
        for now, then in zip(self.statistics, before):
            now.copy_(then)
        state.skipped += 1
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
        where = f"epoch {step // self.plan.steps_per_epoch + 1}, step {step + 1}"
        file = self.output / BAD_BATCHES / f"step-{step + 1:09d}-process-{self.world.rank}.pt"
        file.parent.mkdir(exist_ok=True)
        images, targets, samples = zip(*seen)
        torch.save(
            {
                "images": torch.cat(images).cpu(),
                "targets": torch.cat(targets).cpu(),
                "epochs": [epoch for part in samples for epoch, _ in part],
                "indices": [index for part in samples for _, index in part],
                "loss": loss,
                "grad_norm": norm,
            },
            file,
        )
        if self.world.first:
            tqdm.write(f"{what} in {where}: the step is left out ({state.skipped} of nan_limit={config.nan_limit})")
        if state.skipped >= config.nan_limit:
            raise TrainingError(
                f"{what} in {where}, and {state.skipped} steps were left out for that: a smaller lr than {config.lr} "
                f"or a smaller clip_grad may help. The batches are in '{file.parent}'"
            )

    def _end_epoch(self) -> None:
        state, config = self.progress, self.config
        epoch = state.step // self.plan.steps_per_epoch
        row = {
            "epoch": epoch,
            "lr": self.optimizer.param_groups[-1]["lr"],
            "train_loss": state.loss_sum / state.loss_steps if state.loss_steps else math.nan,
            "images_per_second": self.plan.steps_per_epoch * config.batch_size / state.seconds,
        }
        if state.skipped:
            row["skipped_steps"] = state.skipped
        state.loss_sum, state.loss_steps, state.seconds = 0.0, 0, 0.0
        if self.val_set is not None and config.eval_every and (
            epoch % config.eval_every == 0 or epoch == config.epochs
        ):  # fmt: skip
            result = self.evaluate()
            row |= {"val_top1": result.top1, "val_loss": result.loss}
            self._train_mode()
        self.log.epoch(row, state.step)

    def evaluate(self, **kwargs):
        """The weights that the run will save, on the validation split."""
        return evaluate(
            self.result, self.val_set, self.preprocessing, max(self.config.batch_size // self.plan.parts, 1),
            self.config.workers, self.world.device, progress=False, world=self.world, **kwargs,
        )  # fmt: skip

    @property
    def result(self) -> nn.Module:
        """The model whose weights are saved: the average, if one is kept."""
        return self.model if self.average is None else self.average.module


def _optimizer(model: nn.Module, config: FinetuneConfig, steps_per_epoch: int) -> tuple:
    """timm's optimizer and schedule by the settings; what timm does not know is a ConfigError."""
    try:
        optimizer = create_optimizer_v2(
            model, config.opt, lr=config.lr, weight_decay=config.weight_decay, layer_decay=config.layer_decay
        )
    except (ValueError, AssertionError) as error:
        near = difflib.get_close_matches(config.opt, list_optimizers(), n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise ConfigError(f"'opt' cannot be '{config.opt}': {error}{hint}") from error
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
    if scheduler is None and config.sched != "none":
        near = difflib.get_close_matches(config.sched, ("cosine", "step", "poly", "constant", "none"), n=1)
        raise ConfigError(f"there is no schedule '{config.sched}'; did you mean '{(near or ['cosine'])[0]}'?")
    return optimizer, scheduler


def _grad_norm(parameters: list[nn.Parameter]) -> Tensor:
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def _scale_grads(parameters: list[nn.Parameter], factor: float) -> None:
    if factor < 1:
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], factor)


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """What of a schedule's state can be stored without code."""
    return {k: v for k, v in state.items() if isinstance(v, (int, float, str, bool, list, tuple, type(None)))}
