# SPDX-License-Identifier: MIT
"""The training loop: optimizer steps, epochs and checkpoints of any task, in one process or several."""

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..config import ConfigError
from ..data.images import DataError
from ..data.workers import block_worker_signals
from ..dtypes import torch_dtype
from ..errors import UserError, one_line
from ..layers.sync_batch_norm import synchronize_batch_norm
from ..progress import message
from . import checkpoint, parallel
from .bad_batches import keep_batch
from .finite import NotFiniteError, finite_weights, weights_problem
from .freeze import frozen_parts
from .log import TrainingLog
from .optimizer import create_optimizer, grad_norm, learning_rate, scale_grads
from .rng import BatchPlan, DropPathDraws, PlanSampler, seed_step
from .run_folder import BAD_BATCHES, CHECKPOINTS
from .run_state import Progress, RunState
from .samples import MicroBatch
from .task import Config, Result, Task
from .unreadable import UnreadableFiles
from .world import World

_logger = logging.getLogger(__name__)


class TrainingError(UserError, RuntimeError):
    """Training cannot continue."""


class Trainer(Generic[Config, Result]):
    """A model in training.

    Args:
        task: With its data opened and its model created.
        world: The processes.
        model: The task's, on its device; is changed in place.
        output: The run's folder.

    Raises:
        ConfigError: A setting does not go with the model.
    """

    def __init__(self, task: Task[Config, Result], world: World, model: nn.Module, output: Path) -> None:
        self.task, self.config, self.world, self.output = task, task.config, world, output
        config = task.config
        self.plan = BatchPlan(task.train_size, config.batch_size, world.size * config.accumulate, config.seed)
        self.micro_batches = [world.rank * config.accumulate + i for i in range(config.accumulate)]
        self.total = config.epochs * self.plan.steps_per_epoch
        self._log: TrainingLog | None = None
        self.final: Result | None = None  # of the last validation, at the end of the run
        self._problem: UserError | OSError | None = None
        self._unreadable = UnreadableFiles(world)

        self._prepare_model(model)
        self.optimizer, self.scheduler = create_optimizer(model, config, self.plan.steps_per_epoch)
        dtype = torch_dtype(config.precision)
        autocast = dtype != torch.float32 and not self.sharded
        self.autocast = torch.autocast(world.device.type, dtype=dtype if autocast else None, enabled=autocast)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.precision == "float16")
        self.trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        # a skipped step takes its changes to batch norm's statistics back
        self.statistics = [b for name, b in model.named_buffers() if not name.endswith(".factor")]
        self.state = RunState(
            world, model, self.ema, self.optimizer, self.scheduler, self.scaler, self.sharded, self._data(),
            task.difference,
        )  # fmt: skip
        self._finite = finite_weights(self.result)

    def _prepare_model(self, model: nn.Module) -> None:
        """Freeze, synchronize, average, shard and compile the model, in this order."""
        config, world = self.config, self.world
        self.frozen = frozen_parts(model, config.freeze)
        for part in self.frozen:
            part.requires_grad_(False)
        if world.size > 1:
            model = synchronize_batch_norm(model, world.device)
        self.drop_path = DropPathDraws(model, self.plan, config.seed)
        if config.channels_last:
            model.to(memory_format=torch.channels_last)
        if config.grad_checkpointing:
            try:
                model.set_grad_checkpointing()  # type: ignore[operator]  # timm's models have it
            except (AssertionError, AttributeError) as error:  # how timm's models refuse
                raise ConfigError(
                    f"'grad_checkpointing' is not for '{self.task.model_name}', which cannot do it"
                ) from error
        self.sharded = config.parallel == "fsdp" and world.size > 1
        self.ema = None
        if config.ema_decay:
            # foreach functions do not support sharded tensors of uneven sizes
            self.ema = ModelEmaV3(model, decay=config.ema_decay, use_warmup=True, foreach=not self.sharded)
        if self.sharded:
            for sharded in [model] if self.ema is None else [model, self.ema.module]:
                parallel.shard(sharded, world, torch_dtype(config.precision))
        if config.compile:
            # torch (2.14) cannot compile training with variable image sizes, which it assumes after a second size in
            # the same process; here every batch but the last one of a validation has one shape
            model.compile(dynamic=False)
        self.model = model
        self.wrapped = model if self.sharded else parallel.replicate(model, world)

    def _data(self) -> dict[str, Any]:
        """What identifies the data. Every process compares its own count and classes, the first one looks closer."""
        world, task = self.world, self.task
        return {**task.identity, "images": world.gather(task.fingerprint() if world.first else None)[0]}

    # ---- checkpoints

    def save(self) -> None:
        """Write a checkpoint; to be called in all processes at once.

        Raises:
            UserError: The disk is full, or the like; in all processes.
        """
        self._flush()
        self.state.save(self.output / CHECKPOINTS)

    def resume(self) -> Path | None:
        """Load the newest checkpoint of the output folder; returns it, None if there is none."""
        folder = self.output / CHECKPOINTS
        found = self.state.load(folder)
        if self.world.first:
            checkpoint.recover(folder, found)
        return found

    @property
    def progress(self) -> Progress:
        return self.state.progress

    @property
    def log(self) -> TrainingLog:
        """Open from `run` to `close`."""
        assert self._log is not None
        return self._log

    @property
    def result(self) -> nn.Module:
        """The model whose weights are saved: the moving average, if there is one."""
        return self.model if self.ema is None else self.ema.module

    def _flush(self) -> None:
        """What was logged is on the disk, or an error in all processes."""
        with self.world.raise_on_all_ranks():
            if self._problem is not None:
                raise self._problem
            self.log.flush()

    def _note(self, problem: UserError) -> None:
        """Note an error of this process; the next collective tells the others, and all stop."""
        self._problem = self._problem or problem

    # ---- the loop

    def run(self, stop: Callable[[], bool], progress: bool = True) -> bool:
        """Train to the end, or until `stop` asks to leave. `finish` comes next, and `close` in any case.

        Args:
            stop: Called between steps; true where this process was asked to stop.
            progress: Show a bar on stderr.

        Returns:
            Whether the last step was done. A checkpoint of the run's state has been written either way.

        Raises:
            TrainingError: Too many steps were skipped, or training diverged.
            UserError: The disk is full, or too many samples cannot be read.
        """
        config, state, plan = self.config, self.progress, self.plan
        with self.world.raise_on_all_ranks():
            self._log = TrainingLog(
                self.output, state.epochs, state.step, self.total, config.batch_size, config.tensorboard, progress,
                self.world.first, self._note, config.epochs,
            )  # fmt: skip
        sampler = PlanSampler(plan, self.micro_batches, state.step, self.total)
        with block_worker_signals():
            loader = iter(self.task.train_loader(sampler, self.world.device.type == "cuda"))
        self._train_mode()
        try:
            while state.step < self.total:
                if self._epoch_is_open():  # after the checkpoint: nothing is lost if validation is interrupted
                    self._end_epoch()
                    continue
                start = time.perf_counter()
                batches = [next(loader) for _ in self.micro_batches]
                stopping = self._step(batches, stop, start)
                due = config.checkpoint_every and state.step % config.checkpoint_every == 0
                if stopping or due or state.step % plan.steps_per_epoch == 0:
                    self.save()
                if stopping:
                    return False
            return True
        finally:
            del loader

    def finish(self) -> None:
        """What comes after the last step, once the model is saved: the last validation, and the last epoch's row.

        Raises:
            TrainingError: The outputs are not finite.
            UserError: The disk is full, or the like.
        """
        if self._epoch_is_open():
            self._end_epoch()
        self._flush()
        self.close()

    def close(self) -> None:
        """End the bar, and close the files of the log."""
        log, self._log = self._log, None
        if log is not None:
            log.close()

    def _epoch_is_open(self) -> bool:
        """Whether all steps of an epoch are done and its row is not written yet."""
        epochs, rest = divmod(self.progress.step, self.plan.steps_per_epoch)
        return rest == 0 and len(self.progress.epochs) < epochs

    def _train_mode(self) -> None:
        self.model.train()
        for part in self.frozen:
            part.eval()

    # ---- a step

    def _step(self, batches: list[MicroBatch], stop: Callable[[], bool], start: float) -> bool:
        """One optimizer step; returns whether a process was asked to stop."""
        state, config = self.progress, self.config
        step = state.step
        before = [b.clone() for b in self.statistics]
        self.optimizer.zero_grad(set_to_none=True)
        loss_sum = torch.zeros((), device=self.world.device)
        seen: list[Any] = []
        for i, batch in enumerate(batches):
            self._unreadable.add(batch.failures)
            if batch.error is not None:
                self._note(DataError(batch.error))
            data = self._to_device(batch, step)
            seen.append(data)
            self.drop_path.draw(step, self.micro_batches[i])
            seed_step(config.seed, step, i, self.world.rank)
            with parallel.last_backward(self.wrapped, i + 1 == len(batches)):
                with self.autocast:
                    loss = self.task.loss(self.wrapped, data) / len(batches)
                self.scaler.scale(loss).backward()
            loss_sum += loss.detach()
        self.scaler.unscale_(self.optimizer)
        norm = grad_norm(self.trained)
        # one exchange: the mean loss, whether a loss was not finite, whether to stop, whether something went wrong
        bad_loss = (~loss_sum.isfinite()).float()
        flags = torch.tensor([float(stop()), float(self._problem is not None)], device=self.world.device)
        total, bad, stopping, failed = self.world.sum(torch.cat([torch.stack([loss_sum, bad_loss]), flags])).tolist()
        if failed:
            self.world.raise_any(self._problem)
        mean, length = total / self.world.size, norm.item()
        # too large for float16: the scaler handles that, as long as it scales up
        overflow = not math.isfinite(length) and self.scaler.is_enabled() and self.scaler.get_scale() > 1
        if bad or (not math.isfinite(length) and not overflow):
            self._skip_step(step, mean, length, batches, seen, before)
        else:
            if config.clip_grad is not None and not overflow:
                scale_grads(self.trained, min(1.0, config.clip_grad / (length + 1e-6)))
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.ema is not None:
                self.ema.update(self.model, step=step + 1)
            state.loss_sum += mean
            state.loss_steps += 1
        state.step += 1
        if self.scheduler is not None:
            self.scheduler.step_update(state.step)
        seconds = time.perf_counter() - start
        state.seconds += seconds
        epoch = step // self.plan.steps_per_epoch + 1
        self.log.step(state.step, epoch, mean, learning_rate(self.optimizer), length, seconds)
        return bool(stopping)

    def _to_device(self, batch: MicroBatch, step: int) -> Any:
        """A micro-batch's data as the loss takes them."""
        device = self.world.device
        data = tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), batch.data)
        data = self.task.prepare(data, step)
        if self.config.channels_last:
            data = tree_map_only(Tensor, _channels_last, data)
        return data

    def _skip_step(
        self, step: int, loss: float, norm: float, batches: list[MicroBatch], seen: list[Any], before: list[Tensor]
    ) -> None:
        """Undo a step, keep its batch for inspection, and stop after too many."""
        state, config = self.progress, self.config
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler.is_enabled():
            self.scaler.update(self.scaler.get_scale())  # forgets what unscale_ saw
        for now, then in zip(self.statistics, before):
            now.copy_(then)
        state.skipped += 1
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
        where = f"epoch {step // self.plan.steps_per_epoch + 1}, step {step + 1}"
        folder = self.output / BAD_BATCHES
        with self.world.raise_on_all_ranks():
            samples = [sample for batch in batches for sample in batch.samples]
            keep_batch(folder, step + 1, self.world.rank, self.task.record(seen), samples, loss, norm)
        if self.world.first:
            message(f"{what} in {where}: the step is skipped ({state.skipped} of nan_limit={config.nan_limit})")
        if state.skipped >= config.nan_limit:
            raise TrainingError(
                f"{what} in {where}, and {state.skipped} steps were skipped for that: a smaller lr than {config.lr} "
                f"or a smaller clip_grad may help. The batches are in '{folder}'"
            )

    # ---- the end of an epoch

    def check_finite(self) -> None:
        """Whether the weights that the run will save are finite; to be called in all processes at once.

        Raises:
            TrainingError: Some are not; in all processes.
        """
        problem = weights_problem(self.result, self._finite, self.world)
        if problem is not None:
            raise self._diverged(problem)

    def _diverged(self, what: str) -> TrainingError:
        epoch = self.progress.step // self.plan.steps_per_epoch
        problem = TrainingError(
            f"training diverged: {what} after epoch {epoch}. A smaller lr than {self.config.lr} or a smaller clip_grad "
            f"may help, with resume=false to start over. No model was written; the checkpoints stay in "
            f"'{self.output / CHECKPOINTS}'"
        )
        problem.everywhere = True  # raised in all processes, reported by the first
        return problem

    def _end_epoch(self) -> None:
        state, config = self.progress, self.config
        epoch = state.step // self.plan.steps_per_epoch
        self.check_finite()
        row = {
            "epoch": epoch,
            "lr": learning_rate(self.optimizer),
            "train_loss": state.loss_sum / state.loss_steps if state.loss_steps else math.nan,
            "images_per_second": self.plan.steps_per_epoch * config.batch_size / state.seconds,
        }
        if state.skipped:
            row["skipped_steps"] = state.skipped
        state.loss_sum, state.loss_steps, state.seconds = 0.0, 0, 0.0
        self._unreadable.exchange()
        result = None
        if self.task.has_validation and epoch == config.epochs:
            result = self.final = self._validate_at_the_end()
        elif self.task.has_validation and config.eval_every and epoch % config.eval_every == 0:
            try:
                result = self._validate()
            except NotFiniteError as problem:  # later steps may mend it
                if self.world.first:
                    message(f"epoch {epoch} has no validation: {problem}")
            self._train_mode()
        metrics = {} if result is None else self.task.metrics(result)
        row |= {f"val_{name}": value for name, value in metrics.items()}
        self.log.epoch(row, state.step, self.task.describe(metrics) if metrics else "")

    def _validate(self, last: bool = False) -> Result:
        """The weights that the run will save, on the validation samples."""
        with self.log.validating():
            return self.task.validate(self.result, self.world, self._unreadable.reported, last)

    def _validate_at_the_end(self) -> Result | None:
        """For the last row, the report and the last line. Training is done: no fault of the samples undoes it."""
        try:
            return self._validate(last=True)
        except NotFiniteError as problem:  # no later step can mend it
            raise self._diverged(str(problem)) from problem
        except UserError as error:
            if self.world.first:
                message(f"the validation images were not evaluated: {error}")
            return None
        except Exception as error:  # a killed worker, a full GPU, whatever it is: the model is saved
            if self.world.size > 1:  # the others wait for this process
                raise
            _logger.debug("validating", exc_info=error)
            message(f"the validation images were not evaluated: {type(error).__name__}: {one_line(error)}")
            return None


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
