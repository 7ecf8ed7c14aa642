# SPDX-License-Identifier: MIT
"""What the engine asks of a task.

The engine knows tensors, steps, processes, checkpoints and the folder of a run. All else is the task's: where samples
come from, what the loss is, how the model is validated, what the report shows and what the saved folder holds.
`docs/add-a-task.md` adds one.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor, nn
from torch.utils.data import DataLoader

from .config import RunConfig
from .report import Page
from .rng import PlanSampler
from .world import World

Config = TypeVar("Config", bound=RunConfig)
Result = TypeVar("Result")


class Task(ABC, Generic[Config, Result]):
    """A task with its settings, and in time its data and model.

    `internimage.engine.run.train` calls `open_data`, then `create_model`, and then the rest as training needs it. In a
    launch of several processes each has a task of its own, and all make the same calls. Only `validate` may talk to the
    others.

    Args:
        config: The settings.
    """

    loss_unit: str  #: what the loss is, and its unit, for the axis of a plot

    def __init__(self, config: Config) -> None:
        self.config = config

    @property
    @abstractmethod
    def model_name(self) -> str:
        """For messages."""

    # ---- what there is before training

    @abstractmethod
    def open_data(self) -> None:
        """Find the data and check them. Comes before the model, which may have to be downloaded.

        Raises:
            UserError: They cannot be used.
        """

    @abstractmethod
    def create_model(self) -> nn.Module:
        """The model to be trained, on the CPU.

        Raises:
            UserError: It cannot be built, or does not fit the data.
        """

    # ---- samples

    @property
    @abstractmethod
    def train_size(self) -> int:
        """Training samples."""

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What each process knows of the data at once, such as their number and classes.

        Numbers, texts and lists. It is kept in the checkpoints; a run only resumes with the same. "samples" is the
        number of samples.
        """

    def fingerprint(self) -> Any:
        """What distinguishes these samples from others with the same identity; None if nothing does. Only called in the
        first process, since looking at many files takes time."""
        return None

    @abstractmethod
    def difference(self, before: dict[str, Any], now: dict[str, Any]) -> str | None:
        """How the data differ from those that a checkpoint was trained on.

        Args:
            before: Of the checkpoint: `identity`, with `fingerprint` as "images".
            now: Of this run.

        Returns:
            Words that follow "the run was trained on"; None if it may resume.

        Raises:
            ValueError: `before` is not of this task.
        """

    @abstractmethod
    def train_loader(self, sampler: PlanSampler, pin_memory: bool) -> DataLoader[Any]:
        """The micro-batches of a run, see `internimage.engine.samples.sample_loader`."""

    # ---- a step

    def prepare(self, data: Any, step: int) -> Any:
        """What is done to a micro-batch's data on the device, before the loss: mixing of images, for instance.

        Args:
            data: Of a `MicroBatch`.
            step: Optimizer steps done. Random draws depend on it and the seed alone.
        """
        return data

    @abstractmethod
    def loss(self, model: nn.Module, data: Any) -> Tensor:
        """The mean loss of a micro-batch, under autocast. Calls the model once.

        Args:
            model: As it is to be called: in several processes, the wrapper that exchanges gradients.
            data: From `prepare`.
        """

    @abstractmethod
    def record(self, batches: list[Any]) -> dict[str, Any]:
        """A step's data as they are kept for inspection where the loss was not finite.

        Args:
            batches: What `prepare` returned for each micro-batch.
        """

    # ---- validation

    @property
    @abstractmethod
    def has_validation(self) -> bool:
        """Whether there are samples to validate on."""

    @abstractmethod
    def validate(self, model: nn.Module, world: World, unreadable: set[str], last: bool) -> Result:
        """Evaluate the model; to be called in all processes at once. Training continues with the same weights.

        Args:
            model: In any mode, on its device.
            world: The processes.
            unreadable: Files that were reported already; is added to.
            last: After the last step: the result is what the report shows.

        Raises:
            internimage.engine.finite.NotFiniteError: The outputs are not finite.
            UserError: The samples cannot be used.
        """

    @abstractmethod
    def metrics(self, result: Result) -> dict[str, float]:
        """Columns of the table of epochs, which adds the prefix `val_`. The report plots "loss" beside the training
        loss."""

    @abstractmethod
    def describe(self, metrics: dict[str, float]) -> str:
        """The metrics of an epoch for its line on the terminal, such as "val loss 0.3901, val top-1 91.25 %"."""

    # ---- what is left at the end

    @abstractmethod
    def save(self, model: nn.Module, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write the model into a folder that is there: `model.safetensors` and `config.json`, each whole or not at all.

        Args:
            model: With the architecture; its own weights may be spread over processes.
            folder: The run's.
            weights: The whole state dict.
        """

    @abstractmethod
    def page(self, result: Result, model: nn.Module | None, epochs: list[dict[str, Any]]) -> Page:
        """What the report shows beside the curves and settings of any run.

        Args:
            result: Of the last validation.
            model: To draw with; None where its weights are spread over processes.
            epochs: The table of epochs.
        """
