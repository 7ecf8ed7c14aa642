# SPDX-License-Identifier: MIT
"""The folder that `convert` writes: how it is recognized as ours, and how a new model replaces an old one in it.

Only files with the names that `convert` writes are replaced, and only in a folder whose config.json says that `convert`
wrote it. Everything else is kept.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..atomic import exchange, is_leftover, noted, partial_folder, recover, sync_folder
from ..locks import hold
from ..weights.file_names import CONFIG, INDEX_SUFFIX
from .detect import ConvertError

_logger = logging.getLogger(__name__)

CARD = "README.md"
MARK = "internimage"  # key of config.json; timm and transformers ignore it
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def mark(config: dict[str, Any], card: str) -> None:
    """Record in a config.json that `convert` wrote the folder, and the card's digest, which shows later edits."""
    config[MARK] = {"written_by": "internimage convert", "card": _digest(card.encode())}


def check_destination(folder: Path, overwrite: bool) -> None:
    """Check that a model may be written to a folder, after cleaning up what a killed conversion left there.

    Raises:
        ConvertError: It is not a folder; it contains a model, and `overwrite` is false; or it contains other files.
    """
    if folder.exists() and not folder.is_dir():
        raise ConvertError(f"'{folder}' is not a folder; the result is one")
    real = Path(os.path.realpath(folder))
    for place in (real.parent, real):
        recover(place)
    if not folder.is_dir() or not _entries(folder):
        return
    if _cards(folder) is not None:
        if not overwrite:
            raise ConvertError(f"the folder '{folder}' holds a model; overwrite replaces it")
        return
    reason = f", and its {CONFIG} does not say that convert has written it" if (folder / CONFIG).exists() else ""
    hint = "overwrite replaces nothing there: remove it yourself, or name another" if overwrite else "name another"
    raise ConvertError(f"the folder '{folder}' is not empty{reason}; {hint}")


def check_source(source: Path, folder: Path) -> None:
    """Raise ConvertError if weights are in the folder that the result would replace."""
    if not source.exists() or not folder.is_dir():
        return
    real = Path(os.path.realpath(folder))
    files = list(source.iterdir()) if source.is_dir() else []
    sources = [Path(os.path.realpath(path)) for path in (source, *files)]
    if any(real == path or (real == path.parent and _is_ours(path.name)) for path in sources):
        raise ConvertError(f"the source '{source}' is in '{folder}', which the result would replace: name another")


@contextmanager
def staging(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder on the same disk to write a model to, for `place`; removed at the end.

    Raises:
        ConvertError: As `check_destination`.
        internimage.locks.LockedError: Another conversion writes to the folder.
    """
    real = Path(os.path.realpath(folder))  # keeps a symbolic link
    if not real.exists():
        real.parent.mkdir(parents=True, exist_ok=True)
        with partial_folder(real.parent) as partial:
            yield _new(partial)
        return
    with ExitStack() as stack:
        if real.is_dir():
            stack.enter_context(hold(real))
        check_destination(folder, overwrite)
        yield _new(stack.enter_context(partial_folder(real)))


def _new(partial: Path) -> Path:
    folder = partial / "model"
    folder.mkdir()
    return folder


def place(staged: Path, folder: Path) -> list[str]:
    """Move a staged model to its place, replacing an older one if there is one.

    At any time the folder has the old model, the new one, or none that loads: config.json is removed first and added
    last. After a kill, the next command that writes there completes it; until then nothing loads.

    Returns:
        The names of the files that were placed.
    """
    real = Path(os.path.realpath(folder))
    new = sorted(os.listdir(staged), key=_order)
    sync_folder(staged)
    if real not in staged.parents:
        os.rename(staged, real)  # fails if something was put into the folder meanwhile
        sync_folder(real.parent)
        return sorted(new)
    cards = _cards(real) or []
    old = sorted((name for name in os.listdir(real) if _is_ours(name)), key=_order, reverse=True)
    if CARD in old and _digest((real / CARD).read_bytes()) not in cards:
        _logger.warning("'%s' was not written by convert or was edited since, and stays as it is", folder / CARD)
        old.remove(CARD)
        new.remove(CARD)
    else:
        cards.append(_digest((staged / CARD).read_bytes()))
    exchange(real, staged, old, new, cards=cards)
    recover(real, ours=True)
    return sorted(new)


def _is_ours(name: str) -> bool:
    return name in (CONFIG, CARD) or _WEIGHTS.fullmatch(name) is not None


def _order(name: str) -> int:
    """The order in which files are added; they are removed in reverse. Readers refuse an index with missing shards."""
    return 3 if name == CONFIG else 1 if name.endswith(INDEX_SUFFIX) else 2 if _WEIGHTS.fullmatch(name) else 0


def _entries(folder: Path) -> list[str]:
    """Names in a folder, except for what a killed process may have left."""
    return [name for name in os.listdir(folder) if not is_leftover(name)]


def _cards(folder: Path) -> list[str] | None:
    """Digests of the cards that `convert` has written to a folder; None if nothing shows that the folder is ours."""
    for read in (_cards_in_journal, _cards_in_config):
        try:
            return [str(card) for card in read(folder)]
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            continue
    return None


def _cards_in_journal(folder: Path) -> list[Any]:
    cards: list[Any] = (noted(folder) or {})["cards"]
    return cards


def _cards_in_config(folder: Path) -> list[Any]:
    return [json.loads((folder / CONFIG).read_text(encoding="utf-8"))[MARK]["card"]]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
