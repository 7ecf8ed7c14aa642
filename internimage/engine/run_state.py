# SPDX-License-Identifier: MIT
"""The mutable state of a run, and how it is written to a checkpoint and loaded again."""

import dataclasses
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

from ..config import ConfigError
from . import checkpoint, integrity, shards
from .integrity import DamagedError
from .world import World

_logger = logging.getLogger(__name__)

_STATE_FILE = "state.pt"


@dataclass
class Progress:
    """How far a run is. With the weights and the optimizer's state, all that a continuation needs."""

    step: int = 0  # optimizer steps done, skipped ones included; the position in the sampler
    skipped: int = 0  # steps whose loss or gradient was not finite
    loss_sum: float = 0.0  # of the current epoch
    loss_steps: int = 0
    seconds: float = 0.0  # in steps of the current epoch
    epochs: list[dict[str, Any]] = field(default_factory=list)  # a row an epoch

    @classmethod
    def read(cls, values: Any) -> "Progress":
        """From what `dataclasses.asdict` gave and a checkpoint kept.

        Raises:
            internimage.engine.integrity.DamagedError: It is something else.
        """
        fields: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or "step" not in values or values.keys() - fields.keys():
            raise DamagedError("its 'progress' is not that of a run")
        for name, value in values.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            checks: dict[Any, bool] = {
                int: isinstance(value, int) and number and value >= 0,
                float: number,
                list[dict[str, Any]]: (
                    isinstance(value, list) and all(isinstance(row, dict) and "epoch" in row for row in value)
                ),
            }
            if not checks[fields[name]]:
                raise DamagedError(f"its 'progress' has {value!r:.50} for '{name}'")
        return cls(**values)


class RunState:
    """All mutable training state.

    Args:
        world: The processes.
        model: In training; not the wrapper of DDP.
        ema: The moving average of its weights, or None.
        optimizer, scheduler, scaler: `scheduler` may be None.
        sharded: The weights are sharded over the processes.
        data: What identifies the training data: numbers, texts and lists. Resuming on others would be another run.
        difference: `Task.difference`, which compares the data of a checkpoint with these.
    """

    def __init__(
        self,
        world: World,
        model: nn.Module,
        ema: ModelEmaV3 | None,
        optimizer: torch.optim.Optimizer,
        scheduler: Scheduler | None,
        scaler: torch.amp.GradScaler,
        sharded: bool,
        data: dict[str, Any],
        difference: Callable[[dict[str, Any], dict[str, Any]], str | None],
    ) -> None:
        self.world, self.model, self.optimizer, self.scheduler = world, model, optimizer, scheduler
        self.ema = None if ema is None else ema.module
        self.scaler, self.sharded, self.data, self.difference = scaler, sharded, data, difference
        self.progress = Progress()

    def save(self, folder: Path) -> None:
        """Write a checkpoint; to be called in all processes at once.

        Args:
            folder: Of the run's checkpoints.

        Raises:
            CheckpointWriteError: The disk is full, or the like; in all processes.
        """
        step = self.progress.step
        if self.sharded:

            def write(partial: Path) -> None:
                mine = shards.write(partial, self.model, self.ema, self.optimizer)
                checksums = {name: list(pair) for part in self.world.gather(mine) for name, pair in part.items()}
                if self.world.first:  # last, so that this file vouches for all others
                    integrity.save(partial / _STATE_FILE, self._metadata() | {"checksums": checksums})

            checkpoint.save_folder(folder, step, write, self.world)
            return
        with self.world.raise_on_all_ranks():
            if self.world.first:
                state = self._metadata() | {
                    "model": self.model.state_dict(),
                    "average": None if self.ema is None else self.ema.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                }
                checkpoint.save_file(folder, step, state)

    def load(self, folder: Path) -> Path | None:
        """Load the newest checkpoint; returns it, None if there is none. To be called in all processes at once.

        Raises:
            UserError: No checkpoint can be read, they are of another kind of run or of other data, or the processes do
                not find the same ones.
        """
        return checkpoint.newest(folder, self.world, self._read, self._restore)

    def _metadata(self) -> dict[str, Any]:
        """All but the tensors of weights and optimizer."""
        name, keys, *rest = np.random.get_state(legacy=True)
        return {
            "progress": dataclasses.asdict(self.progress),
            "scaler": self.scaler.state_dict(),
            "schedule": None if self.scheduler is None else _plain(self.scheduler.state_dict()),
            "data": self.data,
            # every draw is derived from seed, epoch, sample and step; these are for code that draws beside them
            "random": {
                "python": random.getstate(),
                "numpy": (name, np.asarray(keys).tolist(), *rest),
                "torch": torch.get_rng_state(),
            },
        }

    def _read(self, path: Path) -> tuple[tuple[Any, ...], int]:
        """What `_restore` needs, checked, and a checksum of it all; nothing is changed."""
        if path.is_dir() != self.sharded:
            written, now = ("several sharding processes", "one") if path.is_dir() else ("one file", "shards")
            raise ConfigError(
                f"'{path}' was written by {written} and cannot be read as {now}: start it again with as many processes "
                f"and the same 'parallel' as before, or resume=false to start over"
            )
        state, checksum = checkpoint.read_file(path / _STATE_FILE if self.sharded else path)
        progress = _check(state, path, self.sharded)
        try:
            difference = self.difference(state["data"], self.data)
        except ValueError as error:
            raise DamagedError(f"its 'data' is not that of such a run ({error})") from error
        if difference is not None:
            raise ConfigError(
                f"the run in '{path.parent.parent}' was trained on {difference}: give it the same images to resume, or "
                f"resume=false to start over"
            )
        index = shards.check(path, state.get("checksums"), self.world) if self.sharded else None
        return (path, state, progress, index), checksum

    def _restore(self, found: tuple[Any, ...]) -> None:
        path, state, progress, index = found
        try:
            if self.sharded:
                shards.read(path, index, self.model, self.ema, self.optimizer)
            else:
                self.model.load_state_dict(state["model"])
                self.optimizer.load_state_dict(state["optimizer"])
                if self.ema is not None:
                    self.ema.load_state_dict(state["average"])
            self.scaler.load_state_dict(state["scaler"])
            if self.scheduler is not None:
                self.scheduler.load_state_dict(state["schedule"])
            random.setstate(state["random"]["python"])
            np.random.set_state(state["random"]["numpy"])
            torch.set_rng_state(state["random"]["torch"])
        except OSError:
            raise
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            _logger.debug("restoring '%s'", path, exc_info=error)
            raise DamagedError("its tensors are not those of this run") from error
        self.progress = progress


def _check(state: dict[str, Any], path: Path, sharded: bool) -> Progress:
    """That a state is whole, as far as this can be seen without loading it; returns its progress."""
    kinds: dict[str, type | tuple[type, ...]] = {
        "progress": dict,
        "scaler": dict,
        "data": dict,
        "random": dict,
        "schedule": (dict, type(None)),
    }
    if not sharded:
        kinds |= {"model": dict, "optimizer": dict, "average": (dict, type(None))}
    for name, kind in kinds.items():
        if name not in state:
            raise DamagedError(f"it has no '{name}'")
        if not isinstance(state[name], kind):
            raise DamagedError(f"its '{name}' is of another kind ({type(state[name]).__name__})")
    progress = Progress.read(state["progress"])
    if progress.step != checkpoint.step_of(path):
        raise DamagedError(f"it is of step {progress.step}")
    return progress


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """What of a schedule's state can be stored without code."""
    return {k: v for k, v in state.items() if isinstance(v, (int, float, str, bool, list, tuple, type(None)))}
