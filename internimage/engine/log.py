# SPDX-License-Identifier: MIT
"""The log of a run: a progress bar, a table of steps, a table of epochs, TensorBoard."""

import csv
import io
import logging
import math
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ..config import ConfigError
from ..files import WriteError, write_text
from ..progress import progress_bar
from .run_folder import LOG_FILE, STEPS_FILE

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter  # an optional package

_logger = logging.getLogger(__name__)
# as Python and spreadsheets write numbers; int() and float() would also accept 1_0, digits of other scripts and, for a
# step, more digits than a float can represent
_COUNT = re.compile(r"0*[1-9][0-9]{0,14}")
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|nan|[-+]?inf", re.IGNORECASE)
_STEP_FIELDS = ("step", "epoch", "loss", "lr", "grad_norm", "images_per_second")


def check_tensorboard() -> None:
    """Raise ConfigError if the package tensorboard is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ConfigError("tensorboard=true needs the package 'tensorboard': pip install tensorboard") from error


class TrainingLog:
    """The log of one run. It has no duplicate rows, even if the run was killed and resumed.

    Args:
        output: The run's folder.
        epochs: Rows of the completed epochs.
        step: Completed steps; later rows on the disk are dropped.
        total: Steps of the whole run.
        batch_size: Images per step.
        tensorboard: Also write TensorBoard files, to `output/tensorboard`.
        progress: Show a bar and a line per epoch on stderr.
        writes: Whether this process writes the files.
        note: Called with a WriteError if a row cannot be written, so that all processes of the run can stop together;
            None raises it.
        last_epoch: Epochs of the whole run.

    Raises:
        WriteError: The disk is full, or another error of the file system.
    """

    def __init__(
        self,
        output: Path,
        epochs: list[dict[str, Any]],
        step: int,
        total: int,
        batch_size: int,
        tensorboard: bool = False,
        progress: bool = True,
        writes: bool = True,
        note: Callable[[WriteError], None] | None = None,
        last_epoch: int | None = None,
    ) -> None:
        self.output, self.epochs, self.batch_size, self.writes = output, epochs, batch_size, writes
        self.note, self.last_epoch = note, last_epoch
        self.prints = progress and writes
        self.bar = progress_bar(
            total * batch_size, "finetune", "img", shown=self.prints, initial=step * batch_size, leave=False
        )
        self.board: SummaryWriter | None = None
        self._steps: TextIO | None = None
        if not writes:
            return
        for path in (output / LOG_FILE, output / STEPS_FILE):
            kind = "a folder" if path.is_dir() else "a pipe" if path.is_fifo() else ""
            if kind:  # checked before training; opening a pipe would wait for its reader
                what = kind.split()[1]
                raise WriteError(f"'{path}' is {kind}, but the run writes a file of that name: move the {what} away")
        with self._writing(path, raises=True):
            kept = read_steps(output, step) if step else []
            write_text(path, _csv(kept, _STEP_FIELDS))
            self._steps = path.open("a", newline="", encoding="utf-8")
        if tensorboard:
            with self._writing(output / "tensorboard", raises=True):
                self.board = _open_tensorboard(output / "tensorboard", step)

    def step(self, step: int, epoch: int, loss: float, lr: float, grad_norm: float, seconds: float) -> None:
        """Log one step.

        Args:
            step, epoch: From 1.
            loss, lr, grad_norm: Of the step.
            seconds: Its duration.
        """
        self.bar.update(self.batch_size)
        self.bar.set_postfix(epoch=self._of(epoch), loss=f"{loss:.3f}", lr=f"{lr:.1e}", refresh=False)
        if self._steps is None:
            return
        rate = self.batch_size / seconds
        with self._writing(self.output / STEPS_FILE):
            # repr, so that losses can be compared to the last digit
            self._steps.write(f"{step},{epoch},{loss!r},{lr:.6g},{grad_norm:.6g},{rate:.6g}\n")
        if self.board is not None:
            with self._writing(self.output / "tensorboard"):
                for name, value in (("loss", loss), ("lr", lr), ("grad_norm", grad_norm), ("images_per_second", rate)):
                    self.board.add_scalar(f"train/{name}", value, step)

    def epoch(self, row: dict[str, Any], step: int, validation: str = "") -> None:
        """Log one epoch and print its line; the table is rewritten as a whole.

        Args:
            row: Of the table; columns that begin with `val_` also go to TensorBoard.
            step: Completed steps.
            validation: The validation metrics for the line; empty without validation.
        """
        self.epochs.append(row)
        if self.prints:
            self.bar.write(self._line(row, validation), file=sys.stderr)
        if not self.writes:
            return
        with self._writing(self.output / LOG_FILE):
            write_text(self.output / LOG_FILE, _csv(self.epochs))
        if self.board is not None:
            with self._writing(self.output / "tensorboard"):
                for name, value in row.items():
                    if name.startswith("val_"):
                        self.board.add_scalar(f"val/{name[4:]}", value, step)

    def _of(self, epoch: int) -> str:
        return str(epoch) if self.last_epoch is None else f"{epoch}/{self.last_epoch}"

    def _line(self, row: dict[str, Any], validation: str) -> str:
        """Such as `epoch 3/30: train loss 0.4312, val loss 0.3901, val top-1 91.25 %, 812 images/s`."""
        parts = [f"train loss {row['train_loss']:.4f}"]
        if validation:
            parts.append(validation)
        parts.append(f"{row['images_per_second']:.0f} images/s")
        return f"epoch {self._of(row['epoch'])}: {', '.join(parts)}"

    @contextmanager
    def validating(self) -> Iterator[None]:
        """Context in which the bar says that it waits for validation."""
        self.bar.set_description("validate")
        try:
            yield
        finally:
            self.bar.set_description("finetune", refresh=False)

    def flush(self) -> None:
        """Sync the log to the disk; to be called before a checkpoint, which implies that the logged steps are done.

        Raises:
            WriteError: It could not be written.
        """
        if self._steps is not None:
            with self._writing(self.output / STEPS_FILE, raises=True):
                self._steps.flush()
                os.fsync(self._steps.fileno())
        if self.board is not None:
            with self._writing(self.output / "tensorboard", raises=True):
                self.board.flush()

    def close(self) -> None:
        """Close the files. Rows that were not flushed may be lost, without an error."""
        self.bar.close()
        for file in (self._steps, self.board):
            if file is not None:
                try:
                    file.close()
                except OSError:
                    pass

    @contextmanager
    def _writing(self, path: Path, raises: bool = False) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            problem = WriteError(
                f"'{path}' could not be written ({error.strerror or error}). Make room and run the same command again "
                f"to resume from the last checkpoint"
            )
            if raises or self.note is None:
                raise problem from error
            self.note(problem)


class _QuietHook:
    """`threading.excepthook` without the OSErrors of TensorBoard's writer thread, which also raises them on next use.

    Args:
        before: The hook that is replaced.
    """

    def __init__(self, before: Callable[[threading.ExceptHookArgs], object]) -> None:
        self.before = before

    def __call__(self, arguments: threading.ExceptHookArgs) -> None:
        if not (isinstance(arguments.exc_value, OSError) and type(arguments.thread).__name__ == "_AsyncWriterThread"):
            self.before(arguments)


def _open_tensorboard(folder: Path, step: int) -> "SummaryWriter":
    """Open the log of TensorBoard, after `step` steps; the interpreter does not print errors that it raises anyway."""
    from torch.utils.tensorboard import SummaryWriter

    if not isinstance(threading.excepthook, _QuietHook):
        threading.excepthook = _QuietHook(threading.excepthook)
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


def read_steps(output: Path, last: int | None = None) -> list[dict[str, str]]:
    """Read the table of steps, up to a step.

    An incomplete last line of a killed run is ignored. Other lines that are not valid rows are ignored with one
    warning: people and their programs may edit the table, and a run must be able to resume in any case.

    Args:
        output: The run's folder.
        last: The last step to return; None for all.

    Returns:
        A dictionary per row, with the strings in the file; the step is a whole number and the others are numbers.
    """
    path = output / STEPS_FILE
    if not path.is_file():
        return []
    lines = path.read_bytes().decode("utf-8-sig", errors="replace").split("\n")
    incomplete = lines.pop()  # what follows the last newline
    header = tuple(name.strip() for name in lines[0].split(",")) if lines else ()
    rows = [_parse_step(header, line) for line in lines[1:] if line.strip()]
    valid = [row for row in rows if row is not None]
    invalid = len(rows) - len(valid) + bool(lines and not set(_STEP_FIELDS) <= set(header))
    if incomplete.strip() and (row := _parse_step(header, incomplete)) is not None:
        valid.append(row)
    if invalid:
        count = "1 line that is not a row" if invalid == 1 else f"{invalid} lines that are not rows"
        _logger.warning("'%s': ignoring %s of the table", path, count)
    return [row for row in valid if last is None or int(row["step"]) <= last]


def _parse_step(header: tuple[str, ...], line: str) -> dict[str, str] | None:
    """A row of the table of steps, or None if it is invalid. Rows have only numbers, so there are no quotes."""
    cells = [cell.strip() for cell in line.split(",")]
    row = dict(zip(header, cells))
    try:
        valid = (
            len(cells) == len(header)
            and all(_COUNT.fullmatch(row[name]) for name in ("step", "epoch"))
            and all(_NUMBER.fullmatch(row[name]) for name in _STEP_FIELDS[2:])
            # the loss and the norm of the gradient may be infinite or NaN
            and all(math.isfinite(float(row[name])) for name in ("lr", "images_per_second"))
        )
    except KeyError:
        return None
    if not valid:
        return None
    return {name: row[name] for name in _STEP_FIELDS}


def _csv(rows: Sequence[Mapping[str, Any]], fields: tuple[str, ...] | None = None) -> str:
    """A table as text; the columns are `fields`, or the keys of all rows."""
    fields = fields or tuple(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return text.getvalue()
