# SPDX-License-Identifier: MIT
"""The loop of a training run."""

import logging
import math
import time
from pathlib import Path

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..config import ConfigError
from ..data.datasets import DataError
from ..data.fingerprint import fingerprint
from ..data.workers import signals_for_us
from ..dtypes import torch_dtype
from ..errors import UserError, one_line
from ..files import WriteError, archive_errors, writing
from ..progress import message
from ..tasks.classification.augment import TrainingBatch, training_loader, training_transform
from ..tasks.classification.config import FinetuneConfig
from ..tasks.classification.evaluate import Evaluation, evaluate
from . import checkpoint, parallel
from .finite import NotFiniteError, finite_weights, weights_problem
from .freeze import frozen_parts
from .log import TrainingLog
from .optimizer import create_optimizer, grad_norm, learning_rate, scale_grads
from .rng import BatchPlan, DropPathDraws, PlanSampler, seed_mixing, seed_step
from .run_folder import BAD_BATCHES, CHECKPOINTS
from .run_state import Progress, RunState
from .world import World, synchronise_batch_norm

_logger = logging.getLogger(__name__)


class TrainingError(UserError, RuntimeError):
    """Training cannot go on."""


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
        self.log: TrainingLog | None = None
        self._noted: Exception | None = None
        self._unreadable: set[str] = set()  # files that were named already
        self._to_tell: list[tuple[str, str]] = []  # others, by the first process at the end of the epoch, and why
        self.final: Evaluation | None = None  # of the validation split, once the run is at its end
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
            try:
                model.set_grad_checkpointing()
            except (AssertionError, AttributeError) as error:  # timm's way to say it
                raise ConfigError(f"'grad_checkpointing' is not for '{config.model}', which cannot do it") from error
        self.sharded = config.parallel == "fsdp" and world.size > 1
        # foreach functions do not know sharded tensors of uneven parts
        self.average = None
        if config.ema_decay:
            self.average = ModelEmaV3(model, decay=config.ema_decay, use_warmup=True, foreach=not self.sharded)
        dtype = torch_dtype(config.precision)
        if self.sharded:
            parallel.shard(model, world, dtype)
            if self.average is not None:
                parallel.shard(self.average.module, world, dtype)
        if config.compile:
            # torch (2.14) fails on the training of images whose size it takes for variable, as it does after a second
            # size in the same process; here every batch but the last one of a validation has one shape
            model.compile(dynamic=False)
        self.model = model
        self.wrapped = model if self.sharded else parallel.replicate(model, world)
        self.optimizer, self.scheduler = create_optimizer(model, config, self.plan.steps_per_epoch)
        autocast = dtype != torch.float32 and not self.sharded
        self.autocast = torch.autocast(world.device.type, dtype=dtype if autocast else None, enabled=autocast)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.precision == "float16")
        self.mix, self.loss_fn = None, LabelSmoothingCrossEntropy(config.smoothing)
        if config.mixes:
            self.mix = Mixup(config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=len(names))
            self.loss_fn = SoftTargetCrossEntropy()
        self.trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        # of a step that is left out, batch norm's statistics are taken back
        self.statistics = [b for name, b in model.named_buffers() if not name.endswith(".factor")]
        self.state = RunState(
            world, model, self.average, self.optimizer, self.scheduler, self.scaler, self.sharded,
            {"samples": len(train_set), "classes": names, "images": self._fingerprint()},
        )  # fmt: skip
        self._finite = finite_weights(self.result)

    # ---- checkpoints

    def save(self) -> None:
        """Write a checkpoint; to be called in all processes at once.

        Raises:
            UserError: The disk is full, or the like; in all processes.
        """
        with self.world.together():
            self._raise_noted()
            self.log.flush()
        self.state.save(self.output / CHECKPOINTS)

    def _fingerprint(self) -> list[str] | None:
        """The first process asks the file system for all; each compares its own count and classes all the same."""
        return self.world.gather(fingerprint(self.train_set) if self.world.first else None)[0]

    def resume(self) -> Path | None:
        """Take up the newest checkpoint of the output folder; returns it, None if there is none."""
        folder = self.output / CHECKPOINTS
        found = self.state.load(folder)
        if self.world.first:
            checkpoint.recover(folder, found)
        return found

    @property
    def progress(self) -> Progress:
        return self.state.progress

    def _note(self, problem: Exception) -> None:
        """Something went wrong in this process alone: the next exchange tells the others, and all stop."""
        self._noted = self._noted or problem

    def _raise_noted(self) -> None:
        if self._noted is not None:
            raise self._noted

    # ---- the loop

    def run(self, stop, progress: bool = True) -> bool:
        """Train to the end, or until `stop` asks to leave. `finish` comes next, and `close` in any case.

        Args:
            stop: Called between steps; true where this process was asked to stop.
            progress: Show a bar on stderr.

        Returns:
            Whether the last step was done. A checkpoint of where it stands has been written either way.

        Raises:
            TrainingError: Too many steps had no finite loss, or training diverged.
            UserError: The disk is full, or too many images cannot be read.
        """
        config, state, plan = self.config, self.progress, self.plan
        with self.world.together():
            self.log = TrainingLog(
                self.output, state.epochs, state.step, self.total, config.batch_size, config.tensorboard, progress,
                self.world.first, self._note, config.epochs,
            )  # fmt: skip
        sampler = PlanSampler(plan, self.parts, state.step, self.total)
        pin = self.world.device.type == "cuda"
        with signals_for_us():
            loader = iter(training_loader(self.train_set, sampler, config, self.preprocessing, pin))
        self._train_mode()
        try:
            while state.step < self.total:
                if self._epoch_is_open():  # the checkpoint comes first: nothing is lost if validating is interrupted
                    self._end_epoch()
                    continue
                start = time.perf_counter()
                batches = [next(loader) for _ in self.parts]
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
        """What comes after the last step, once the model is safe: the last evaluation, and the last epoch's row.

        Raises:
            TrainingError: The outputs are not finite.
            UserError: The disk is full, or the like.
        """
        if self._epoch_is_open():
            self._end_epoch()
        with self.world.together():
            self._raise_noted()
            self.log.flush()
        self.close()

    def close(self) -> None:
        """End the bar, and close the files of the log."""
        log, self.log = self.log, None
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

    def _step(self, batches: list[TrainingBatch], stop, start: float) -> bool:
        """One optimizer step; returns whether a process was asked to stop."""
        state, config = self.progress, self.config
        step = state.step
        before = [b.clone() for b in self.statistics]
        self.optimizer.zero_grad(set_to_none=True)
        loss_sum = torch.zeros((), device=self.world.device)
        seen = []
        for i, batch in enumerate(batches):
            self._tell_failures(batch)
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
        norm = grad_norm(self.trained)
        # one exchange: the mean loss, whether a loss was not finite, whether to stop, whether something went wrong
        bad_loss = (~loss_sum.isfinite()).float()
        flags = torch.tensor([float(stop()), float(self._noted is not None)], device=self.world.device)
        total, bad, stopping, noted = self.world.sum(torch.cat([torch.stack([loss_sum, bad_loss]), flags])).tolist()
        if noted:
            self.world.agree(self._noted)
        loss, norm = total / self.world.size, norm.item()
        # too large for float16: the scaler's own business, as long as it scales up
        overflow = not math.isfinite(norm) and self.scaler.is_enabled() and self.scaler.get_scale() > 1
        if bad or (not math.isfinite(norm) and not overflow):
            self._leave_out(step, loss, norm, seen, before)
        else:
            if config.clip_grad is not None and not overflow:
                scale_grads(self.trained, min(1.0, config.clip_grad / (norm + 1e-6)))
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
        self.log.step(state.step, epoch, loss, learning_rate(self.optimizer), norm, seconds)
        return bool(stopping)

    def _tell_failures(self, batch: TrainingBatch) -> None:
        for file, reason in batch.failures:
            if file not in self._unreadable:
                self._unreadable.add(file)
                if self.world.first:
                    self._tell_unreadable(file, reason)
                else:
                    self._to_tell.append((file, reason))
        if batch.error is not None:
            self._note(DataError(batch.error))

    def _tell_unreadable(self, file: str, reason: str) -> None:
        message(f"'{file}' cannot be read ({reason}); the next image takes its place")

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
        folder = self.output / BAD_BATCHES
        with self.world.together():
            self._keep_batch(folder / f"step-{step + 1:09d}-process-{self.world.rank}.pt", seen, loss, norm)
        if self.world.first:
            message(f"{what} in {where}: the step is left out ({state.skipped} of nan_limit={config.nan_limit})")
        if state.skipped >= config.nan_limit:
            raise TrainingError(
                f"{what} in {where}, and {state.skipped} steps were left out for that: a smaller lr than {config.lr} "
                f"or a smaller clip_grad may help. The batches are in '{folder}'"
            )

    def _keep_batch(self, file: Path, seen: list, loss: float, norm: float) -> None:
        images, targets, samples = zip(*seen)
        batch = {
            "images": torch.cat(images).cpu(),
            "targets": torch.cat(targets).cpu(),
            "epochs": [epoch for part in samples for epoch, _ in part],
            "indices": [index for part in samples for _, index in part],
            "loss": loss,
            "grad_norm": norm,
        }
        try:
            with archive_errors(), writing(file) as handle:
                torch.save(batch, handle)
        except OSError as error:
            raise WriteError(
                f"the batch of step {self.progress.step + 1}, whose loss or gradient was not finite, could not be "
                f"written to '{file}' ({error.strerror or error}). Make room and run the same command again to go on "
                f"from the last checkpoint"
            ) from error

    def check_finite(self) -> None:
        """Whether the weights that the run will save are numbers; to be called in all processes at once.

        Raises:
            TrainingError: Some are not; in all processes.
        """
        problem = weights_problem(self.result, self._finite, self.world)
        if problem is not None:
            self._diverged(problem)

    def _diverged(self, what: str) -> None:
        epoch = self.progress.step // self.plan.steps_per_epoch
        problem = TrainingError(
            f"training diverged: {what} after epoch {epoch}. A smaller lr than {self.config.lr} or a smaller clip_grad "
            f"may help, with resume=false to begin anew. No model was written; the checkpoints stay in "
            f"'{self.output / CHECKPOINTS}'"
        )
        problem.everywhere = True  # the first process alone tells
        raise problem

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
        for file, reason in sorted({pair for part in self.world.gather(self._to_tell) for pair in part}):
            if self.world.first and file not in self._unreadable:
                self._tell_unreadable(file, reason)
            self._unreadable.add(file)
        self._to_tell = []
        result = None
        if self.val_set is not None and epoch == config.epochs:
            result = self.final = self._evaluate_at_the_end()
        elif self.val_set is not None and config.eval_every and epoch % config.eval_every == 0:
            try:
                with self.log.validating():
                    result = self.evaluate()
            except NotFiniteError as problem:  # later steps may mend it
                if self.world.first:
                    message(f"epoch {epoch} has no validation: {problem}")
            self._train_mode()
        if result is not None:
            row |= {"val_top1": result.top1, "val_loss": result.loss}
        self.log.epoch(row, state.step)

    def _evaluate_at_the_end(self) -> Evaluation | None:
        """For the last row, the report and the last line. The training is done: nothing about the images undoes it."""
        try:
            with self.log.validating():
                return self.evaluate(keep_answers=True)
        except NotFiniteError as problem:  # no later step can mend it
            self._diverged(str(problem))
        except DataError as error:
            if self.world.first:
                message(f"the validation images were not evaluated: {error}")
            return None
        except Exception as error:  # a killed worker, a full GPU, whatever it is: the model is saved
            if self.world.size > 1:  # the others wait for this process
                raise
            _logger.debug("evaluating", exc_info=error)
            message(f"the validation images were not evaluated: {type(error).__name__}: {one_line(error)}")
            return None

    def evaluate(self, **kwargs):
        """The weights that the run will save, on the validation split."""
        return evaluate(
            self.result, self.val_set, self.preprocessing, max(self.config.batch_size // self.plan.parts, 1),
            self.config.workers, self.world.device, progress=False, world=self.world, told=self._unreadable, **kwargs,
        )  # fmt: skip

    @property
    def result(self) -> nn.Module:
        """The model whose weights are saved: the average, if one is kept."""
        return self.model if self.average is None else self.average.module
