# SPDX-License-Identifier: MIT
"""Checkpoint containers: safetensors, shards, pickles. Opened lazily, read tensor by tensor, never executed."""

import _compat_pickle
import argparse
import itertools
import logging
import pickle
import pickletools
import re
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import UserError
from ..hub import INDEX_SUFFIX, weight_map

_logger = logging.getLogger(__name__)

# Besides tensors and plain containers, an official training checkpoint holds its configuration, a yacs node (a dict),
# and others hold their command line. Nothing else is unpickled.
_ALLOWED_GLOBALS = [(OrderedDict, "yacs.config.CfgNode"), argparse.Namespace]
_HARMLESS = re.compile(  # ours and torch's own, not worth naming in a refusal
    r"yacs\.config\.CfgNode|argparse\.Namespace|collections\.(OrderedDict|Counter)|_codecs\.encode"
    r"|builtins\.(set|complex|bytearray)|torch\.(\w+|storage\.\w+Storage|nn\.parameter\.Parameter)"
    r"|torch\.(_utils|_tensor)\._rebuild\w+|torch\.serialization\._get_layout"
)
_ALLOW_LIST = threading.Lock()

_WRAPPERS = ("model", "module", "state_dict")  # where a pickle keeps its weights, in upstream's order
_AVERAGED = ("model_ema", "state_dict_ema")  # upstream's and timm's averaged weights
_PICKLES = ("*.pth", "*.pt", "*.bin", "*.ckpt")
_LONGEST_HEADER = 100_000_000  # bytes of json in a safetensors file, by its specification


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be read, or is not of this model. Nothing was written to the model."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def existing_path(path: str | Path) -> Path:
    """A checkpoint's path, with `~` resolved; raises FileNotFoundError if there is nothing."""
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at '{path}'" + ("" if path.is_absolute() else f" in '{Path.cwd()}'"))
    return path


def open_checkpoint(path: str | Path, use_ema: bool = False) -> dict[str, Entry]:
    """The tensors of a file or folder, by name; nothing of a safetensors file is read before `Entry.read`.

    Args:
        path: A safetensors file, a shard index, a pickle (`.pth`, `.pt`, `.bin`, `.ckpt`), or a folder with one.
        use_ema: Take the averaged weights of a pickle that has both.

    Raises:
        CheckpointError: It is none of these, damaged, incomplete, or a pickle with something else than data in it.
        FileNotFoundError: There is nothing at `path`.
    """
    path = existing_path(path)
    if path.is_dir():
        path = _find_in_folder(path)
    return _open_shards(path, use_ema) if path.name.endswith(INDEX_SUFFIX) else _open_file(path, use_ema)


def from_state_dict(data: object, origin: str = "the state dict", use_ema: bool = False) -> dict[str, Entry]:
    """What was unpickled, wrapped or not, as a checkpoint; `origin` names it in messages."""
    state_dict = _unwrap(data, origin, use_ema)
    entries = {
        key: Entry(tuple(value.shape), lambda value=value: value)
        for key, value in state_dict.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }
    if not entries:
        raise CheckpointError(f"{origin} holds no tensors; it has {_some(state_dict)}")
    return entries


def _some(names: Iterable[Any], most: int = 10) -> str:
    names = sorted(map(str, names))
    return (", ".join(names[:most]) or "nothing") + (f" and {len(names) - most} more" if len(names) > most else "")


# ---- folders and shards


def _find_in_folder(folder: Path) -> Path:
    for patterns in (
        ["model.safetensors" + INDEX_SUFFIX],
        ["*.safetensors" + INDEX_SUFFIX],
        ["*.bin" + INDEX_SUFFIX],
        ["model.safetensors"],
        ["*.safetensors"],
        ["pytorch_model.bin"],
        _PICKLES,
    ):
        found = [file for pattern in patterns for file in folder.glob(pattern)]
        if len(found) == 1:
            return found[0]
        if found:
            raise CheckpointError(
                f"'{folder}' holds several weight files ({_some(file.name for file in found)}) and no "
                f"'model.safetensors{INDEX_SUFFIX}' that says how they belong together; name one file"
            )
    raise CheckpointError(f"'{folder}' holds no weights: no .safetensors, {', '.join(p[1:] for p in _PICKLES)} file")


def _open_shards(index: Path, use_ema: bool) -> dict[str, Entry]:
    try:
        shard_of = weight_map(index)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    shards = sorted(set(shard_of.values()))
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise CheckpointError(f"'{index}' names {len(shards)} shards; {len(missing)} are missing: {_some(missing)}")
    entries: dict[str, Entry] = {}
    for shard in shards:
        found = _open_file(index.parent / shard, use_ema)
        odd = set(found) ^ {key for key, name in shard_of.items() if name == shard}
        if odd:
            raise CheckpointError(f"'{index}' and its shard '{shard}' disagree about {len(odd)} tensors: {_some(odd)}")
        entries.update(found)
    return entries


# ---- single files


def _open_file(path: Path, use_ema: bool) -> dict[str, Entry]:
    """By content, not by name: a safetensors file called .bin opens as what it is."""
    with path.open("rb") as file:
        start = file.read(64)
    # before the pickles: the size of a header, which stands first, may begin like one of them
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= _LONGEST_HEADER:
        if use_ema:
            _logger.warning("'%s' holds one set of weights; use_ema has no choice", path)
        return _open_safetensors(path)
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        return _open_pickle(path, use_ema)
    hint = ""
    if not start:
        hint = ": it is empty"
    elif start.lstrip()[:1] == b"<":
        hint = ": it looks like a web page; a download link with /blob/ gives one"
    elif start.startswith(b"version https://git-lfs"):
        hint = ": it is the pointer that git leaves without git-lfs; `git lfs pull` fetches the file itself"
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
        with _only_allowed_globals():
            # memory-mapped: a tensor's bytes are read when it is copied, not all at once
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_mappable(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(path, error)) from error
    except Exception as error:  # there is no end to how reading damaged bytes can fail
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(f"'{path}' is damaged, truncated or no torch checkpoint: {reason}") from error
    return from_state_dict(data, f"'{path}'", use_ema)


def _is_mappable(path: Path) -> bool:
    """Whether the tensors' bytes stand in the file as they are.

    They do not in the format before torch 1.6, nor in an archive that was packed again with compression, which torch
    would map all the same and give wrong numbers.
    """
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())


@contextmanager
def _only_allowed_globals() -> Iterator[None]:
    """Our allow-list instead of, not beside, what the process has allowed; the latter is put back."""
    with _ALLOW_LIST:
        others = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(_ALLOWED_GLOBALS)
        try:
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(others)


def _refusal(path: Path, error: Exception) -> str:
    odd = [name for name in _globals_of_pickle(path) if not _HARMLESS.fullmatch(name)]
    if not odd:
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].partition("\n")[0]
        return f"'{path}' cannot be unpickled safely (torch can up to protocol 2), or is damaged: {reason}"
    return (
        f"'{path}' was refused: unpickling it would call {_some(odd)}, and this package unpickles nothing but data. "
        f"Nothing of it was run. If you trust its source, save its weights alone: "
        f"safetensors.torch.save_file(state_dict, PATH)"
    )


def _globals_of_pickle(path: Path) -> list[str]:
    """What a pickle imports, read off its instructions without following them; incomplete for a damaged one."""
    found: dict[str, None] = {}
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if name.endswith("data.pkl"):
                        found.update(dict.fromkeys(_imports(archive.open(name))))
        else:
            with path.open("rb") as file:
                for _ in range(5):  # the format before torch 1.6: magic number, version, system, data, storage keys
                    found.update(dict.fromkeys(_imports(file)))
    except Exception as error:  # only a message depends on it
        _logger.debug("'%s': %s", path, error)
    return list(found)


def _imports(file: Any) -> Iterator[str]:
    strings: list[str] = []
    memo: dict[int, str] = {}
    count = itertools.count()
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name == "GLOBAL":
            module, _, name = argument.partition(" ")
            # up to protocol 2, modules stand under their Python 2 names
            module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
            yield f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}"
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(strings[-2:])
        elif opcode.name == "MEMOIZE":
            memo[next(count)] = strings[-1] if strings else ""
        elif opcode.name in ("BINGET", "LONG_BINGET"):
            strings.append(memo.get(argument, ""))
        elif isinstance(argument, str):
            strings.append(argument)


# ---- what was unpickled


def _unwrap(data: object, origin: str, use_ema: bool) -> Mapping[Any, Any]:
    if not isinstance(data, Mapping):
        raise CheckpointError(f"{origin} holds a {type(data).__name__}, not a state dict")
    plain = [name for name in _WRAPPERS if isinstance(data.get(name), Mapping)]
    averaged = [name for name in _AVERAGED if isinstance(data.get(name), Mapping)]
    if use_ema and not averaged:
        if plain:
            raise CheckpointError(f"{origin} has no averaged weights ('model_ema'); it has {_some(data)}")
        _logger.warning("%s holds one set of weights; use_ema has no choice", origin)
    wrappers = averaged + plain if use_ema else plain + averaged
    if plain and averaged:
        other = plain[0] if use_ema else averaged[0]
        _logger.info("%s holds '%s' and '%s': took '%s'", origin, wrappers[0], other, wrappers[0])
    return data[wrappers[0]] if wrappers else data
