# SPDX-License-Identifier: MIT
"""Files that are there whole or not at all."""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from .errors import UserError


class WriteError(UserError, OSError):
    """A file could not be written; what was there before is as it was."""


def save_tensors(path: Path, thing: Any) -> None:
    """`torch.save` to the disk itself, with an OSError where it is full: torch makes a RuntimeError of that."""
    try:
        with path.open("wb") as file:  # not by torch, which keeps the cause for itself
            torch.save(thing, file)
            file.flush()
            os.fsync(file.fileno())
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a text file under its name only once it is complete; makes the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o666 & ~_umask())  # mkstemp gives the owner alone
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
