# SPDX-License-Identifier: MIT
"""Checkpoint containers: safetensors, shards, pickles. Opened lazily, read tensor by tensor, never executed."""

import argparse
import json
import logging
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..hub import INDEX_SUFFIX

_logger = logging.getLogger(__name__)

# Besides tensors and plain containers, an official training checkpoint holds its configuration, a yacs node (a dict),
# and others hold their command line. Nothing else is unpickled.
_ALLOWED_GLOBALS = [(OrderedDict, "yacs.config.CfgNode"), argparse.Namespace]
_WRAPPERS = ("model", "module", "state_dict")  # where a pickle keeps its weights, in upstream's order


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, or is not of this model. Nothing was written to the model."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def open_checkpoint(path: str | Path, use_ema: bool = False) -> dict[str, Entry]:
    """The tensors of a file or folder, by name; nothing of a safetensors file is read before `Entry.read`.

    Args:
        path: A safetensors file, a shard index, a pickle (`.pth`, `.pt`, `.bin`, `.ckpt`), or a folder with one.
        use_ema: Take the averaged weights of a pickle that has both.

    Raises:
        CheckpointError: It is none of these, damaged, incomplete, or a pickle with something else than data in it.
        FileNotFoundError: There is nothing at `path`.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at '{path}'")
    if path.is_dir():
        path = _find_in_folder(path)
    if path.name.endswith(INDEX_SUFFIX):
        entries: dict[str, Entry] = {}
        for shard in _shards_of_index(path):
            entries.update(_open_file(shard, use_ema))
        listed = set(_weight_map(path))
        if listed != set(entries):
            odd = sorted(listed ^ set(entries))
            raise CheckpointError(f"'{path}' and its shards disagree about {len(odd)} tensors: {_some(odd)}")
        return entries
    return _open_file(path, use_ema)


def from_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Entry]:
    """A state dict in memory as a checkpoint."""
    return {
        key: Entry(tuple(value.shape), lambda value=value: value)
        for key, value in state_dict.items()
        if isinstance(value, Tensor)
    }


def _some(names: list[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _find_in_folder(folder: Path) -> Path:
    for pattern in ("*.safetensors" + INDEX_SUFFIX, "*.bin" + INDEX_SUFFIX):
        found = sorted(folder.glob(pattern))
        if found:
            return found[0]
    for pattern in ("model.safetensors", "*.safetensors", "pytorch_model.bin", "*.pth", "*.pt", "*.bin"):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            names = _some([file.name for file in found])
            raise CheckpointError(
                f"'{folder}' holds several weight files ({names}) and no index ('model.safetensors{INDEX_SUFFIX}') "
                f"that says how they belong together; name one file"
            )
    raise CheckpointError(f"'{folder}' holds no weights: no .safetensors, .pth, .pt or .bin file")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"'{index}' is not a shard index: {error}") from error


def _shards_of_index(index: Path) -> list[Path]:
    names = sorted(set(_weight_map(index).values()))
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"'{index}' names {len(names)} shards; {len(missing)} are missing: {_some(missing)}")
    return [index.parent / name for name in names]


def _open_file(path: Path, use_ema: bool) -> dict[str, Entry]:
    """By content, not by name: a safetensors file called .bin opens as what it is."""
    with path.open("rb") as file:
        start = file.read(16)
    if zipfile.is_zipfile(path) or start[:1] == b"\x80":
        return _open_pickle(path, use_ema)
    if len(start) >= 9 and start[8:9] == b"{":
        if use_ema:
            raise CheckpointError(
                f"'{path}' is a safetensors file, which holds one set of weights: use_ema has no choice"
            )
        return _open_safetensors(path)
    hint = ": it looks like a web page; a download link with /blob/ gives one" if start.lstrip()[:1] == b"<" else ""
    if start[:2] == b"PK":
        hint = ": it starts like a torch file and is truncated"
    raise CheckpointError(f"'{path}' is not a checkpoint (no safetensors, no torch file){hint}")


def _open_safetensors(path: Path) -> dict[str, Entry]:
    try:
        file = safe_open(path, framework="pt", device="cpu")
        return {
            key: Entry(tuple(file.get_slice(key).get_shape()), lambda key=key: file.get_tensor(key))
            for key in file.keys()
        }
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"'{path}' is damaged or truncated: {error}") from error


def _open_pickle(path: Path, use_ema: bool) -> dict[str, Entry]:
    try:
        with torch.serialization.safe_globals(_ALLOWED_GLOBALS):
            # memory-mapped: a tensor's bytes are read when it is copied, not all at once
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(path, error)) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, IndexError, TypeError) as error:
        raise CheckpointError(f"'{path}' is not a torch checkpoint, or is truncated: {error}") from error
    return from_state_dict(_unwrap(path, data, use_ema))


def _refusal(path: Path, error: Exception) -> str:
    named = re.search(r"(?:GLOBAL|Unsupported class|Unsupported global:?(?: GLOBAL)?)\s+`?([\w.]+)", str(error))
    if named is None:
        return f"'{path}' cannot be unpickled safely, or is damaged: {str(error).splitlines()[0]}"
    return (
        f"'{path}' was refused: unpickling it would run '{named.group(1)}', which is not data. Nothing of it was run. "
        f"If you trust its source, save its weights alone: safetensors.torch.save_file(state_dict, PATH)"
    )


def _unwrap(path: Path, data: object, use_ema: bool) -> Mapping[str, Tensor]:
    if not isinstance(data, Mapping):
        raise CheckpointError(f"'{path}' holds a {type(data).__name__}, not a state dict")
    wrappers = [name for name in _WRAPPERS if isinstance(data.get(name), Mapping)]
    if use_ema:
        if not isinstance(data.get("model_ema"), Mapping):
            raise CheckpointError(f"'{path}' has no 'model_ema'; it has {_some(sorted(map(str, data)))}")
        wrappers = ["model_ema"]
    elif not wrappers and isinstance(data.get("model_ema"), Mapping):
        wrappers = ["model_ema"]
    if wrappers:
        if {"model", "model_ema"} <= set(data):
            other = "model" if use_ema else "model_ema"
            _logger.info("'%s' holds 'model' and 'model_ema': took '%s', not '%s'", path, wrappers[0], other)
        data = data[wrappers[0]]
    if not any(isinstance(value, Tensor) for value in data.values()):
        raise CheckpointError(f"'{path}' holds no tensors; it has {_some(sorted(map(str, data)))}")
    return data
