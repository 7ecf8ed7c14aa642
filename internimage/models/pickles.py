# SPDX-License-Identifier: MIT
"""Pickles as data: `torch.load` under a fixed allow-list, and the name of what a refused one would have called."""

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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, some

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


def load_pickle(path: Path, mmap: bool) -> Any:
    """What a torch file holds, if that is data only.

    Args:
        path: The file.
        mmap: Map it: a tensor's bytes are read when it is used, not all at once. Needs `is_mappable(path)`.

    Raises:
        CheckpointError: Unpickling it would call something else, which is named; or it is damaged.
    """
    try:
        with _only_allowed_globals():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(path, error)) from error
    except Exception as error:  # there is no end to how reading damaged bytes can fail
        raise _damaged(path, error) from error


def is_mappable(path: Path) -> bool:
    """Whether the tensors' bytes stand in the file as they are.

    They do not in the format before torch 1.6, nor in an archive that was packed again with compression, which torch
    would map all the same and give wrong numbers.
    """
    try:
        if not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as archive:
            return all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
    except Exception as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return CheckpointError(f"'{path}' is damaged, truncated or no torch checkpoint: {reason}")


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
        f"'{path}' was refused: unpickling it would call {some(odd)}, and this package unpickles nothing but data. "
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
