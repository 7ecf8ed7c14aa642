# SPDX-License-Identifier: MIT
"""Fine-tuning on a folder of images: what is checked, made, trained and written, in this order."""

import json
import os
import signal
import threading
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.models._hub import save_config_for_hf
from torch import nn
from torch.utils.data import Dataset

from ...atomic import partial_folder, recover, sync_folder
from ...data.datasets import DataError, class_difference, class_names, find_split, open_dataset
from ...engine.checkpoint import checkpoints, step_of
from ...engine.create import create_model, data_config, pick_device
from ...engine.log import check_tensorboard
from ...engine.parallel import full_weights
from ...engine.rng import seed_run
from ...engine.run_folder import (
    CHECKPOINTS,
    LOG_FILE,
    REPORT_FILE,
    WEIGHTS_FILE,
    begin_result,
    check_output,
    end_result,
    own_output,
    remove_result,
)
from ...engine.trainer import Trainer, TrainingError
from ...engine.world import World, join, leave
from ...files import WriteError
from ...locks import check_free
from ...progress import message
from ...weights.safetensors_io import write_safetensors
from .config import FinetuneConfig
from .evaluate import Evaluation
from .report import write_report

__all__ = ["LOG_FILE", "FinetuneConfig", "Outcome", "Preempted", "TrainingError", "finetune", "save_model", "train"]


class Preempted(Exception):
    """The run was asked to stop (SIGTERM), saved its state and left. The same command goes on with it."""


@dataclass
class Outcome:
    """What a finished run has come to."""

    output: Path  # the folder of the model
    result: Evaluation | None  # of the saved weights on the validation split; None without one
    report: Path | None  # None if none was asked for, or none could be written
    complete: bool  # False where the evaluation or the report was due and failed, which was told


def save_model(
    model: nn.Module,
    folder: Path,
    names: list[str],
    preprocessing: dict,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write timm's `config.json` and then `model.safetensors` into a folder, each whole or not at all.

    Args:
        model: With the architecture and arguments to be named in the configuration.
        folder: Is there.
        names: The classes.
        preprocessing: From `data_config`.
        weights: Instead of the model's own state dict, where that is spread over processes.
    """
    weights = {k: v.detach() for k, v in (model.state_dict() if weights is None else weights).items()}
    with partial_folder(folder) as partial:
        config, tensors = partial / "config.json", partial / WEIGHTS_FILE
        save_config_for_hf(model, config, dict(label_names=names), data_config=preprocessing)
        written = json.loads(config.read_text(encoding="utf-8"))
        written["model_args"].pop("num_classes", None)  # stands beside them too, and transformers would pass it twice
        config.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        specs = {key: (tuple(value.shape), value.dtype) for key, value in weights.items()}
        write_safetensors(tensors, specs, lambda key: weights[key].cpu())
        for file in (config, tensors):
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
            os.replace(file, folder / file.name)
        sync_folder(folder)


def _create_model(config: FinetuneConfig, names: list[str]) -> nn.Module:
    return create_model(
        config.model,
        config.checkpoint,
        pretrained=config.pretrained,
        num_classes=len(names),
        img_size=config.img_size,
        in_chans=config.in_chans,
        drop_path_rate=config.drop_path or None,  # 0 is also for models that have no such argument
        head_from_22k=names if config.head_from_22k else None,
    )


def open_data(config: FinetuneConfig) -> tuple[Dataset, Dataset | None, list[str]]:
    """Training set, validation set or None, and the classes.

    Raises:
        DataError: There is none, one class, less than a batch, or the splits differ in their classes.
    """
    split = find_split(config.data, "train") if Path(config.data).is_dir() else None
    if split is None:
        raise DataError(f"there is no data at '{config.data}': expected a folder with train/CLASS/IMAGE")
    train_set = open_dataset(split, split="")
    names = class_names(train_set)
    if len(names) < 2:
        raise DataError(f"'{split}' has one class ({names[0]}); two are needed")
    if len(train_set) < config.batch_size:
        part = config.accumulate * (2 if config.mixes else 1)
        fitting = len(train_set) // part * part
        hint = f": set batch_size={fitting} or less" if fitting else ""
        raise DataError(
            f"batch_size={config.batch_size} is more than the {len(train_set)} training images of '{split}'{hint}"
        )
    validation = find_split(config.data, "validation")
    val_set = None
    if validation != Path(config.data):  # with eval_every=0 too: it is evaluated at the end
        val_set = open_dataset(validation, split="")
        if class_names(val_set) != names:
            difference = class_difference(names, class_names(val_set) or [])
            raise DataError(f"'{split}' (here) and '{validation}' (there) have different classes: {difference}")
    return train_set, val_set, names


@contextmanager
def _sigterm():
    """A function that says whether SIGTERM came; the signal itself does nothing else meanwhile."""
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # a handler cannot be set; nothing will come
        yield came.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.set())
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


def finetune(config: FinetuneConfig, progress: bool = True) -> Path:
    """As `train`; returns the folder of the result."""
    return train(config, progress).output


def train(config: FinetuneConfig, progress: bool = True) -> Outcome:
    """Train a classifier on the classes of a folder, in one process or in each process of a torchrun launch.

    The result, in `config.output`: `model.safetensors` and `config.json` (a folder for `timm.create_model`,
    `evaluate` and `predict`), the resolved settings, a row a step and a row an epoch as CSV, a report, and the last two
    checkpoints. The weights are those of the last epoch, or their average with `ema_decay`: none are chosen by their
    accuracy.

    A run that was stopped, however, goes on from its last checkpoint when it is started again with the same settings.
    In float32 on a CPU it ends with the same weights, bit for bit, as one that was never stopped.

    Args:
        config: The settings.
        progress: Show a bar and a line an epoch on stderr.

    Returns:
        Where the result is, and how it does on the validation split. The split is always evaluated at the end, and
        with `eval_every=0` only then.

    Raises:
        UserError: The data, the weights or the settings cannot be used; nothing has been written then.
        TrainingError: Too many steps had no finite loss, or training diverged; no model is written then.
        internimage.engine.checkpoint.CheckpointWriteError: The disk is full.
        Preempted: SIGTERM came, and a checkpoint was written.
        KeyboardInterrupt: Ctrl-C; its message says what the same command does now.
    """
    stage = _Stage()
    with _sigterm() as stop:
        try:
            with ExitStack() as held:
                return _finetune(config, join(pick_device(config.device)), stop, progress, stage, held)
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(stage.after_interrupt(config)) from error
        finally:
            leave()


@dataclass
class _Stage:
    """How far `_finetune` has come, for who interrupts it."""

    began: bool = False  # the output folder is this run's
    saved: bool = False  # the model is written
    done: bool = False  # and so is all else
    total: int = 0  # steps

    def after_interrupt(self, config: FinetuneConfig) -> str:
        """What was saved, and how to go on."""
        if self.done:
            return f"interrupted; training is done, and the result is in '{config.output}'"
        if not self.began:
            return "interrupted before training began; nothing was changed"
        again = "the same command" if config.resume else "the same command with resume=true"
        if self.saved:
            return f"interrupted; the model is in '{config.output}', and {again} finishes the run"
        kept = checkpoints(Path(config.output) / CHECKPOINTS)
        if not kept:
            return "interrupted before the first checkpoint; the same command begins anew"
        steps = f"step {step_of(kept[0])} of {self.total}"
        return f"interrupted; {again} resumes after {steps}"


def _finetune(config: FinetuneConfig, world: World, stop, progress: bool, stage: _Stage, held: ExitStack) -> Outcome:
    output = Path(config.output)
    with world.together():  # what is quick to see comes before a model is made, and perhaps downloaded
        config.check_parts(world.size)
        if config.tensorboard:
            check_tensorboard()
        if world.first:
            if output.is_dir():
                check_free(output)
                recover(output)
            check_output(config)
        train_set, val_set, names = open_data(config)
    seed_run(config.seed)
    with world.together():
        model = _create_model(config, names)
        preprocessing = data_config(model, config.img_size)
    if preprocessing["input_size"][0] == 1:
        train_set.input_img_mode = "L"
        if val_set is not None:
            val_set.input_img_mode = "L"
    model.to(world.device)
    trainer = Trainer(config, world, model, names, preprocessing, train_set, val_set, output)
    stage.began, stage.total = True, trainer.total
    with world.together():
        if world.first:
            held.enter_context(own_output(config))  # until the result is there
    resumed = trainer.resume()
    if resumed is not None and world.first and progress:
        message(f"going on from {resumed}, step {trainer.progress.step} of {trainer.total}")
    held.callback(trainer.close)
    if not trainer.run(stop, progress):
        raise Preempted(
            f"asked to stop: saved after step {trainer.progress.step} of {trainer.total} in '{output / CHECKPOINTS}'; "
            f"the same command goes on from there"
        )
    trainer.check_finite()
    # the model comes first: whatever happens in what follows must not cost it
    weights = full_weights(trainer.result)
    with world.together():
        if world.first:
            _save_result(trainer.result, output, names, preprocessing, weights)
    stage.saved = True
    report = None
    try:
        trainer.finish()
    except TrainingError:
        if world.first:
            remove_result(output)
        raise
    with world.together():
        if world.first:
            if config.report and trainer.final is not None:
                report = _write_report(config, trainer, val_set, names, preprocessing)
            end_result(output)
    stage.done = True
    due = val_set is not None
    complete = not due or (trainer.final is not None and (report is not None or not config.report or not world.first))
    return Outcome(output, trainer.final, report, complete)


def _save_result(model: nn.Module, output: Path, names: list[str], preprocessing: dict, weights: dict) -> None:
    try:
        begin_result(output)
        save_model(model, output, names, preprocessing, weights)
    except OSError as error:
        raise WriteError(
            f"training is done, and the result could not be written to '{output}' ({error}). Make room and run "
            f"the same command again: it goes on from the last checkpoint"
        ) from error


def _write_report(
    config: FinetuneConfig, trainer: Trainer, val_set: Dataset, names: list[str], preprocessing: dict
) -> Path | None:
    """Write the report; None, and a message, if that fails: the model is there already."""
    path = Path(config.output) / REPORT_FILE
    model = None if trainer.sharded else trainer.result
    try:
        write_report(path, config, trainer.final, val_set, names, trainer.progress.epochs, model, preprocessing)
    except Exception as error:  # drawing, images that are gone, a full disk: whatever it is
        reason = str(error) or type(error).__name__
        message(f"the report '{path}' could not be written ({reason}): the model is saved without it")
        return None
    return path
