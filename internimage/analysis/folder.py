# SPDX-License-Identifier: MIT
"""The folder that an analysis is written to: all of its files or none, and never in place of somebody else's."""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from ..atomic import exchange, is_leftover, partial_folder, recover, sync_folder
from ..errors import UserError
from ..html_page import written_by
from ..locks import hold

PAGE, ARRAYS = "index.html", "views.npz"
GENERATOR = "internimage analyze"
_PICTURE = re.compile(r"(image|erf|points|saliency|masked)-model\d+(-node\d+)?(-[\w.]+)?\.png")


class FolderError(UserError, OSError):
    """A folder that an analysis cannot be written to. It is unchanged."""


def check_destination(folder: Path) -> None:
    """Check that an analysis may be written to a folder: a new or empty one, or one with an earlier analysis.

    Raises:
        FolderError: It is no folder, or has files of another origin.
    """
    if folder.exists() and not folder.is_dir():
        raise FolderError(f"'{folder}' is not a folder; the result is one")
    if not folder.is_dir():
        return
    recover(folder)
    names = [name for name in sorted(os.listdir(folder)) if not is_leftover(name)]
    if not names:
        return
    others = [name for name in names if not _is_ours(name)]
    if others or written_by(folder / PAGE) != GENERATOR:
        reason = f"contains '{others[0]}'" if others else f"has no {PAGE} of an earlier analysis"
        raise FolderError(f"the folder '{folder}' is not empty, and {reason}: name another, such as a new one")


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the files of an analysis, in place of those of an earlier one.

    Args:
        folder: As for `check_destination`; created if it does not exist.
        files: By name; the page is among them.

    Raises:
        FolderError: As `check_destination`.
        LockedError: Another process writes there.
        OSError: The disk is full, for example. What was there before is unchanged.
    """
    real = Path(os.path.realpath(folder))  # keeps a symbolic link
    new = not real.exists()
    real.mkdir(parents=True, exist_ok=True)
    try:
        with hold(real):
            check_destination(folder)
            with partial_folder(real) as partial:
                staged = partial / "analysis"
                staged.mkdir()
                for name, content in files.items():
                    with (staged / name).open("wb") as file:
                        file.write(content)
                        file.flush()
                        os.fsync(file.fileno())
                sync_folder(staged)
                # the page goes first and comes last: with it all of its pictures are there
                old = sorted((name for name in os.listdir(real) if _is_ours(name)), key=lambda name: name != PAGE)
                exchange(real, staged, old, sorted(files, key=lambda name: name == PAGE))
    except BaseException:
        if new:
            with suppress(OSError):
                real.rmdir()  # only if it is empty
        raise


def _is_ours(name: str) -> bool:
    return name in (PAGE, ARRAYS) or _PICTURE.fullmatch(name) is not None
