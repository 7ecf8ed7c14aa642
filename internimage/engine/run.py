# SPDX-License-Identifier: MIT
"""A training run from its settings to its result: what is checked, created, trained and written, in this order."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

import torch

from ..atomic import recover
from ..files import WriteError
from ..locks import check_free
from ..progress import message
from .checkpoint import checkpoints, step_of
from .config import RunConfig
from .create import pick_device
from .log import check_tensorboard
from .parallel import full_weights
from .report import write_report
from .rng import seed_run
from .run_folder import CHECKPOINTS, REPORT_FILE, begin_result, check_output, end_result, own_output, remove_result
from .task import Config, Result, Task
from .trainer import Trainer, TrainingError
from .world import World, join, leave


class Preempted(Exception):
    """The run was asked to stop (SIGTERM), saved its state and left. The same command resumes it."""


@dataclass
class Outcome(Generic[Result]):
    """The result of a finished run."""

    output: Path  #: the folder of the model
    result: Result | None  #: of the saved weights on the validation samples; None without any
    report: Path | None  #: None if none was asked for, or none could be written
    complete: bool  #: False where the validation or the report was due and failed, which was reported


def train(task: Task[Config, Result], progress: bool = True) -> Outcome[Result]:
    """Train in this process, or in each process of a torchrun launch, and write the result to `config.output`.

    The folder then has the model as `Task.save` writes it, the resolved settings, a row for each step and for each
    epoch as CSV, a report, and the last two checkpoints. The weights are those of the last epoch, or their moving
    average with `ema_decay`: none are chosen by their validation.

    A run that was stopped, in whatever way, resumes from its last checkpoint when it is started again with the same
    settings. In float32 on a CPU it ends with the same weights, bit for bit, as one that was never stopped.

    Args:
        task: Made of its settings; its data are not opened yet.
        progress: Show a bar and a line for each epoch on stderr.

    Returns:
        Where the result is, and how it validates. Validation always runs at the end, with `eval_every=0` only then.

    Raises:
        UserError: The data, the weights or the settings cannot be used; nothing has been written then.
        TrainingError: Too many steps were skipped, or training diverged; no model is written then.
        internimage.engine.checkpoint.CheckpointWriteError: The disk is full.
        Preempted: SIGTERM came, and a checkpoint was written.
        KeyboardInterrupt: Ctrl-C; its message says what the same command does next.
    """
    stage = _Stage()
    with _sigterm() as stop:
        try:
            with ExitStack() as held:
                return _train(task, join(pick_device(task.config.device)), stop, progress, stage, held)
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(stage.after_interrupt(task.config)) from error
        finally:
            leave()


@contextmanager
def _sigterm() -> Iterator[Callable[[], bool]]:
    """A function that says whether SIGTERM came; the signal itself does nothing else meanwhile."""
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # cannot set a handler; nothing will come
        yield came.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.set())
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass
class _Stage:
    """How far a run has come, for who interrupts it."""

    began: bool = False  # the output folder is this run's
    saved: bool = False  # the model is written
    done: bool = False  # and so is all else
    total: int = 0  # steps

    def after_interrupt(self, config: RunConfig) -> str:
        """What was saved, and how to resume."""
        if self.done:
            return f"interrupted; training is done, and the result is in '{config.output}'"
        if not self.began:
            return "interrupted before training began; nothing was changed"
        again = "the same command" if config.resume else "the same command with resume=true"
        if self.saved:
            return f"interrupted; the model is in '{config.output}', and {again} finishes the run"
        kept = checkpoints(Path(config.output) / CHECKPOINTS)
        if not kept:
            return "interrupted before the first checkpoint; the same command starts over"
        return f"interrupted; {again} resumes after step {step_of(kept[0])} of {self.total}"


def _train(
    task: Task[Config, Result],
    world: World,
    stop: Callable[[], bool],
    progress: bool,
    stage: _Stage,
    held: ExitStack,
) -> Outcome[Result]:
    config, output = task.config, Path(task.config.output)
    with world.raise_on_all_ranks():  # quick checks first: a model may have to be downloaded
        config.check_batch(world.size)
        if config.tensorboard:
            check_tensorboard()
        if world.first:
            if output.is_dir():
                check_free(output)
                recover(output)
            check_output(config)
        task.open_data()
    seed_run(config.seed)
    with world.raise_on_all_ranks():
        model = task.create_model()
    model.to(world.device)
    trainer = Trainer(task, world, model, output)
    stage.began, stage.total = True, trainer.total
    with world.raise_on_all_ranks():
        if world.first:
            held.enter_context(own_output(config))  # until the result is there
    resumed = trainer.resume()
    if resumed is not None and world.first and progress:
        message(f"resuming from {resumed}, step {trainer.progress.step} of {trainer.total}")
    held.callback(trainer.close)
    if not trainer.run(stop, progress):
        raise Preempted(
            f"asked to stop: saved after step {trainer.progress.step} of {trainer.total} in '{output / CHECKPOINTS}'; "
            f"the same command resumes from there"
        )
    trainer.check_finite()
    # the model comes first: whatever happens in what follows must not cost it
    weights = full_weights(trainer.result)
    with world.raise_on_all_ranks():
        if world.first:
            _save(task, trainer, output, weights)
    stage.saved = True
    try:
        trainer.finish()
    except TrainingError:
        if world.first:
            remove_result(output)
        raise
    report = None
    with world.raise_on_all_ranks():
        if world.first:
            if config.report and trainer.final is not None:
                report = _write_report(task, trainer, output / REPORT_FILE)
            end_result(output)
    stage.done = True
    due = task.has_validation
    complete = not due or (trainer.final is not None and (report is not None or not config.report or not world.first))
    return Outcome(output, trainer.final, report, complete)


def _save(task: Task[Any, Any], trainer: Trainer[Any, Any], output: Path, weights: dict[str, torch.Tensor]) -> None:
    try:
        begin_result(output)
        task.save(trainer.result, output, weights)
    except OSError as error:
        raise WriteError(
            f"training is done, and the result could not be written to '{output}' ({error}). Make room and run "
            f"the same command again: it resumes from the last checkpoint"
        ) from error


def _write_report(task: Task[Any, Any], trainer: Trainer[Any, Any], path: Path) -> Path | None:
    """Write the report; None, and a message, if that fails: the model is already saved."""
    model = None if trainer.sharded else trainer.result
    epochs = trainer.progress.epochs
    try:
        write_report(path, task.config, task.page(trainer.final, model, epochs), epochs, task.loss_unit)
    except Exception as error:  # drawing, images that are gone, a full disk: whatever it is
        reason = str(error) or type(error).__name__
        message(f"the report '{path}' could not be written ({reason}): the model is saved without it")
        return None
    return path
