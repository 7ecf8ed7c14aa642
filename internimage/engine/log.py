# SPDX-License-Identifier: MIT
"""What a run tells: a progress bar, a table of steps, a table of epochs, TensorBoard."""

import csv
import io
import logging
import math
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..config import ConfigError
from ..files import WriteError, write_text
from ..progress import progress_bar
from .run_folder import LOG_FILE, STEPS_FILE

_logger = logging.getLogger(__name__)
# as Python and spreadsheets write them; int() and float() also take 1_0, the digits of other scripts and, of a step,
# more digits than a float has room for
_COUNT = re.compile(r"0*[1-9][0-9]{0,14}")
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|nan|[-+]?inf", re.IGNORECASE)
_STEP_FIELDS = ("step", "epoch", "loss", "lr", "grad_norm", "images_per_second")


def check_tensorboard() -> None:
    """ConfigError where TensorBoard's package is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ConfigError("tensorboard=true needs the package 'tensorboard': pip install tensorboard") from error


class TrainingLog:
    """The log of one run. Each row stands once, also after a run was killed and resumed.

    Args:
        output: The run's folder.
        epochs: Rows of the epochs that are done.
        step: Steps that are done; later rows on the disk are dropped.
        total: Steps of the whole run.
        batch_size: Images a step.
        tensorboard: Write its files, to `output/tensorboard`.
        progress: Show a bar and a line an epoch on stderr.
        writes: Whether this process is the one that writes.
        note: Is given a WriteError where a row cannot be written, so that the run can stop with all its processes;
            None: it is raised.
        last_epoch: Epochs of the whole run.

    Raises:
        WriteError: The disk is full, or the like.
    """

    def __init__(
        self,
        output: Path,
        epochs: list[dict],
        step: int,
        total: int,
        batch_size: int,
        tensorboard: bool = False,
        progress: bool = True,
        writes: bool = True,
        note: Callable[[Exception], None] | None = None,
        last_epoch: int | None = None,
    ) -> None:
        self.output, self.epochs, self.batch_size, self.writes = output, epochs, batch_size, writes
        self.note, self.last_epoch = note, last_epoch
        self.prints = progress and writes
        self.bar = progress_bar(
            total * batch_size, "finetune", "img", shown=self.prints, initial=step * batch_size, leave=False
        )
        self.board = self._steps = None
        if not writes:
            return
        for path in (output / LOG_FILE, output / STEPS_FILE):
            kind = "a folder" if path.is_dir() else "a pipe" if path.is_fifo() else ""
            if kind:  # before an epoch's work; opening a pipe would wait for its reader
                what = kind.split()[1]
                raise WriteError(f"'{path}' is {kind}, and the run writes a file of that name: move the {what} away")
        with self._writing(path, raises=True):
            kept = read_steps(output, step) if step else []
            write_text(path, _csv(kept, _STEP_FIELDS))
            self._steps = path.open("a", newline="", encoding="utf-8")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            _quiet_tensorboard()
            with self._writing(output / "tensorboard", raises=True):
                self.board = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1 if step else None)

    def step(self, step: int, epoch: int, loss: float, lr: float, grad_norm: float, seconds: float) -> None:
        """Note one step."""
        self.bar.update(self.batch_size)
        self.bar.set_postfix(epoch=self._of(epoch), loss=f"{loss:.3f}", lr=f"{lr:.1e}", refresh=False)
        if self._steps is None:
            return
        rate = self.batch_size / seconds
        with self._writing(self.output / STEPS_FILE):
            # repr: losses can be compared to their last digit
            self._steps.write(f"{step},{epoch},{loss!r},{lr:.6g},{grad_norm:.6g},{rate:.6g}\n")
        if self.board is not None:
            with self._writing(self.output / "tensorboard"):
                for name, value in (("loss", loss), ("lr", lr), ("grad_norm", grad_norm), ("images_per_second", rate)):
                    self.board.add_scalar(f"train/{name}", value, step)

    def epoch(self, row: dict, step: int, validation: str = "") -> None:
        """Log one epoch and print its line; the table is rewritten as a whole.

        Args:
            row: Of the table; columns that begin with `val_` also go to TensorBoard.
            step: Steps done.
            validation: The metrics for the line, empty without any.
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

    def _line(self, row: dict, validation: str) -> str:
        """Such as `epoch 3/30: train loss 0.4312, val loss 0.3901, val top-1 91.25 %, 812 images/s`."""
        parts = [f"train loss {row['train_loss']:.4f}"]
        if validation:
            parts.append(validation)
        parts.append(f"{row['images_per_second']:.0f} images/s")
        return f"epoch {self._of(row['epoch'])}: {', '.join(parts)}"

    @contextmanager
    def validating(self) -> Iterator[None]:
        """Context in which the bar says why it stands still."""
        self.bar.set_description("validate")
        try:
            yield
        finally:
            self.bar.set_description("finetune", refresh=False)

    def flush(self) -> None:
        """Everything noted is on the disk: before a checkpoint that says that it was done.

        Raises:
            WriteError: It is not.
        """
        if self._steps is not None:
            with self._writing(self.output / STEPS_FILE, raises=True):
                self._steps.flush()
                os.fsync(self._steps.fileno())
        if self.board is not None:
            with self._writing(self.output / "tensorboard", raises=True):
                self.board.flush()

    def close(self) -> None:
        """Close the files. What `flush` has not confirmed may be lost, and that is no error here."""
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
                f"to go on from the last checkpoint"
            )
            if raises or self.note is None:
                raise problem from error
            self.note(problem)


def _quiet_tensorboard() -> None:
    """TensorBoard's thread keeps an error for the next call, and lets the interpreter print it too: not that."""
    before = threading.excepthook
    if getattr(before, "quiet_tensorboard", False):
        return

    def hook(arguments) -> None:
        if not (isinstance(arguments.exc_value, OSError) and type(arguments.thread).__name__ == "_AsyncWriterThread"):
            before(arguments)

    hook.quiet_tensorboard = True
    threading.excepthook = hook


def read_steps(output: Path, last: int | None = None) -> list[dict[str, str]]:
    """The rows of the table of steps, up to a step.

    The half written last line of a run that was killed is left out. So is whatever else is not a row of ours, with one
    warning: the table is for people and their programs, and must not keep a run from going on.

    Args:
        output: The run's folder.
        last: Leave out later steps; None reads all.

    Returns:
        A dictionary of strings a row, as they stand in the file; the step is a whole number and the others are numbers.
    """
    path = output / STEPS_FILE
    if not path.is_file():
        return []
    lines = path.read_bytes().decode("utf-8-sig", errors="replace").split("\n")
    half = lines.pop()  # what follows the last line's end
    header = tuple(name.strip() for name in lines[0].split(",")) if lines else ()
    rows = [_step(header, line) for line in lines[1:] if line.strip()]
    good = [row for row in rows if row is not None]
    odd = len(rows) - len(good) + bool(lines and not set(_STEP_FIELDS) <= set(header))
    if half.strip() and (row := _step(header, half)) is not None:
        good.append(row)
    if odd:
        lines = "1 line" if odd == 1 else f"{odd} lines"
        _logger.warning(f"'{path}': left out {lines} that no run has written")
    return [row for row in good if last is None or int(row["step"]) <= last]


def _step(header: tuple[str, ...], line: str) -> dict[str, str] | None:
    """A line of the table of steps, None if it is none. There are only numbers in it, so no quotes."""
    cells = [cell.strip() for cell in line.split(",")]
    row = dict(zip(header, cells))
    try:
        good = (
            len(cells) == len(header)
            and all(_COUNT.fullmatch(row[name]) for name in ("step", "epoch"))
            and all(_NUMBER.fullmatch(row[name]) for name in _STEP_FIELDS[2:])
            # loss and norm of the gradient need not be finite
            and all(math.isfinite(float(row[name])) for name in ("lr", "images_per_second"))
        )
    except KeyError:
        return None
    if not good:
        return None
    return {name: row[name] for name in _STEP_FIELDS}


def _csv(rows: list[dict], fields: tuple[str, ...] | None = None) -> str:
    fields = fields or tuple(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return text.getvalue()
