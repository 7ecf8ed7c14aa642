# SPDX-License-Identifier: MIT
"""User errors, as one family of exceptions: the command line prints them without a traceback."""

import errno
from collections.abc import Iterable
from typing import Any


class UserError(Exception):
    """Bad input. The message names what was wrong and what would be right."""

    status = 2  # of the command that it ends
    everywhere = False  # raised in all processes of a launch, for the first one to report


class CheckpointError(UserError, RuntimeError):
    """Weights or a checkpoint that cannot be read, or do not fit the model. Nothing was written to the model."""


def is_disk_full(error: BaseException) -> bool:
    """Whether a disk, a quota or the largest size of a file is exhausted."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_write_protected(error: BaseException) -> bool:
    """Whether a file or its file system may not be written to."""
    return isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)


def list_some(names: Iterable[Any], most: int = 10) -> str:
    """For messages: the first names in order, and how many more there are."""
    names = sorted(map(str, names))
    return (", ".join(names[:most]) or "nothing") + (f" and {len(names) - most} more" if len(names) > most else "")


def one_line(error: BaseException, most: int = 300) -> str:
    """For messages: what another library said, on one line and not longer than `most` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[: most - 3]}..."
