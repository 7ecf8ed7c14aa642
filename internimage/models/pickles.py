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
from pathlib import Path, PurePosixPath
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

# what torch says of the first thing that it refuses
_REFUSED = re.compile(r"(?:Unsupported global: GLOBAL|unsupported GLOBAL) (\S+)")
_INSTRUCTION = re.compile(r"Unsupported operand (\d+)")


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
    # not torch's own words: they advise programmers, and among other things to let a file run code
    _logger.debug("'%s': %s: %s", path, type(error).__name__, error)
    return CheckpointError(f"'{path}' is damaged, truncated or no torch checkpoint: {_damage(path, error)}")


def _damage(path: Path, error: Exception) -> str:
    """What is wrong with a file that torch could not read."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    with path.open("rb") as file:
        archived = file.read(4) == b"PK\x03\x04"
    if archived and not _is_zip(path):
        return "the end of its ZIP archive is missing; compare its size with the original's"
    if archived:
        names = _names_in_zip(path)
        if any(PurePosixPath(name).name == "constants.pkl" for name in names):
            return "it is a TorchScript archive, which holds code; save the state_dict of the model alone"
        if names and not any(PurePosixPath(name).name == "data.pkl" for name in names):
            return "it is a ZIP archive, but written not by torch.save"
        return f"its ZIP archive cannot be read ({type(error).__name__})"
    text = str(error)
    if "magic number" in text or "protocol version" in text:
        return "it is a pickle, but written not by torch.save"
    if isinstance(error, EOFError) or "unexpected EOF" in text:
        return "it ends too early"
    return f"its pickle cannot be read ({type(error).__name__})"


def _is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except Exception:  # as in `is_mappable`
        return False


def _names_in_zip(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except Exception as error:  # only a message depends on it
        _logger.debug("'%s': %s", path, error)
        return []


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
    if odd:
        return (
            f"'{path}' was refused: unpickling it would call {some(odd)}, and this package unpickles nothing but data. "
            f"Nothing of it was run. If you trust its source, save its weights alone: "
            f"safetensors.torch.save_file(state_dict, PATH)"
        )
    refused = _REFUSED.search(str(error))
    if refused:
        return (
            f"'{path}' was refused: it names '{refused[1]}', which is not among the data that this package unpickles; "
            f"or it is damaged. Nothing of it was run"
        )
    reason = "its pickle is not one that torch.save writes"
    unknown = _INSTRUCTION.search(str(error))
    if unknown:
        instruction = pickletools.code2op.get(chr(int(unknown[1])))
        reason = f"its pickle has the unknown instruction {unknown[1]}"
        if instruction is not None:
            reason = f"its pickle has the instruction {instruction.name}, which torch.save does not write"
            if instruction.proto > 2:
                reason = (
                    f"it was written with pickle protocol {instruction.proto}, of which torch cannot tell data from "
                    f"code; save it again without another pickle_protocol, or with pickle_protocol=2"
                )
    return f"'{path}' cannot be unpickled safely, or is damaged: {reason}"


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
