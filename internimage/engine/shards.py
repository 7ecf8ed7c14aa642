# SPDX-License-Identifier: MIT
"""Sharded checkpoints: torch's distributed format, with checksums, and read without running code from it.

torch unpickles the index of such a folder and the entries that are no tensors without restriction. Here the index is
read by an allow-list of instructions and names, checked, and handed to torch; entries are loaded as data alone.
"""

import io
import math
import pathlib
import pickle
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import metadata as index
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from . import integrity
from .integrity import DamagedError
from .world import World

INDEX_FILE = ".metadata"
_PART_NAME = re.compile(r"__\d+_\d+\.distcp")

Checksums = dict[str, tuple[int, int]]  # of files, by name: size and checksum


def write(folder: Path, model: nn.Module, average: nn.Module | None, optimizer: torch.optim.Optimizer) -> Checksums:
    """Write this process's part of a sharded checkpoint; what goes wrong in one process is raised in all.

    Returns:
        Of the files that this process has written.
    """
    writer = dcp.FileSystemWriter(folder)
    writer.fs = files = _SummingFiles()
    with _plain_errors():
        dcp.save(_shards(model, average, optimizer), storage_writer=writer)
    return files.checksums


def check(folder: Path, checksums: Any, world: World) -> index.Metadata:
    """Check a sharded checkpoint; talks to no other process and changes nothing.

    The index is checked in every process, the parts by turns: a folder is whole if every process finds it whole.

    Args:
        folder: Of the checkpoint.
        checksums: From all `write`, gathered. None for a checkpoint of an older version: of its parts the checksums of
            ZIP archives are checked.
        world: The processes.

    Returns:
        The index, for `read`.

    Raises:
        DamagedError: It is not what was written.
        OSError: It cannot be read.
    """
    content = integrity.read(folder / INDEX_FILE)
    if checksums is not None:
        _check_checksums(checksums)
        if checksums[INDEX_FILE] != [len(content), integrity.checksum_of(content)]:
            raise DamagedError(f"the bytes of its '{INDEX_FILE}' are not those that were written")
    found = _read_index(content)
    entries = sorted((entry.relative_path, entry.offset, entry.length) for entry in found.storage_data.values())
    names = sorted({name for name, _, _ in entries})
    if checksums is not None and not set(names) <= checksums.keys():
        raise DamagedError(f"its '{INDEX_FILE}' names other files than were written")
    for name in names:
        if not (folder / name).is_file():
            raise DamagedError(f"its '{name}' is missing")
    if checksums is not None:
        for name in names[world.rank :: world.size]:
            integrity.check_file(folder / name, *checksums[name])
    else:
        for name, offset, length in entries[world.rank :: world.size]:
            integrity.check_archive(integrity.part(folder / name, offset, length), length)
    return found


def read(
    folder: Path,
    found: index.Metadata,
    model: nn.Module,
    average: nn.Module | None,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Read a sharded checkpoint; the number of processes need not be that of the writers.

    Args:
        folder: Of the checkpoint.
        found: Its index, from `check`.
        model, average, optimizer: To read into.
    """
    state = _shards(model, average, optimizer)
    with _plain_errors():
        dcp.load(state, storage_reader=_Reader(folder, found), planner=_Planner())
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    if average is not None:
        set_model_state_dict(average, state["average"])


def _shards(model: nn.Module, average: nn.Module | None, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    if average is not None:
        state["average"] = get_model_state_dict(average)
    return state


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Instead of torch's collection of all processes' errors, which is no Exception, the first of them."""
    try:
        yield
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        if isinstance(cause.__context__, OSError):
            raise cause.__context__ from None
        if "inline_container" in str(cause):  # torch's writer, in another process: what it met is not sent along
            raise OSError("a part could not be written to its end, as on a full disk") from None
        if isinstance(cause, (OSError, RuntimeError)):
            raise cause from None
        raise RuntimeError(f"{type(cause).__name__}: {cause}") from None


class _SummingFiles(FileSystem):
    """torch's way to the disk, which counts the bytes of each file."""

    def __init__(self) -> None:
        self.checksums: Checksums = {}

    @contextmanager
    def create_stream(self, path, mode):
        with super().create_stream(path, mode) as stream:
            summing = integrity.Summing(stream)
            yield summing
        self.checksums[Path(path).name] = (summing.size, summing.checksum)

    def rename(self, path, new_path) -> None:
        super().rename(path, new_path)
        self.checksums[Path(new_path).name] = self.checksums.pop(Path(path).name)


class _Reader(dcp.FileSystemReader):
    """torch's, with an index that was read before."""

    def __init__(self, folder: Path, found: index.Metadata) -> None:
        super().__init__(folder)
        self._found = found

    def read_metadata(self) -> index.Metadata:
        return self._found


class _Planner(dcp.DefaultLoadPlanner):
    """torch's, which unpickles entries that are no tensors as data alone."""

    def load_bytes(self, read_item, value: io.BytesIO) -> None:
        *path, last = self.mappings[read_item.dest_index.fqn]
        place = self.original_state_dict
        for key in path:
            place = place[key]
        place[last] = torch.load(value, map_location="cpu", weights_only=True)


# ---- the index


def _check_checksums(checksums: Any) -> None:
    valid = isinstance(checksums, dict) and INDEX_FILE in checksums
    for name, pair in checksums.items() if valid else ():
        valid &= isinstance(name, str) and (name == INDEX_FILE or _PART_NAME.fullmatch(name) is not None)
        valid &= isinstance(pair, list) and [type(number) for number in pair] == [int, int]
    if not valid:
        raise DamagedError("its table of checksums is not one")


def _nothing(*_: Any) -> None:
    """In place of a path, which is where the folder was when it was written."""


def _layout(name: str) -> torch.layout:
    if name != "torch.strided":
        raise pickle.UnpicklingError(f"layout {name}")
    return torch.strided


def _member(kind: Any, name: Any) -> Any:
    """In place of `getattr`, by which Python 3.11.0 to 3.11.3 pickle the member of an enumeration."""
    if kind is not index._MEM_FORMAT_ENCODING:
        raise pickle.UnpicklingError("an attribute")
    return kind[name]


_CLASSES = (
    index.Metadata, index.MetadataIndex, index.StorageMeta, index.TensorStorageMetadata, index.BytesStorageMetadata,
    index.ChunkStorageMetadata, index.TensorProperties, _StorageInfo,
)  # fmt: skip
_GLOBALS = {
    **{(kind.__module__, kind.__name__): kind for kind in (*_CLASSES, index._MEM_FORMAT_ENCODING)},
    **{(module, name): _nothing for module in ("pathlib", "pathlib._local") for name in dir(pathlib) if "Path" in name},
    **{("torch", name): dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)},
    ("torch", "Size"): torch.Size,
    ("builtins", "getattr"): _member,
    ("torch.serialization", "_get_layout"): _layout,
}  # fmt: skip
_INSTRUCTIONS = (
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 SHORT_BINUNICODE BINUNICODE EMPTY_TUPLE "
    "TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS MEMOIZE BINGET LONG_BINGET "
    "STACK_GLOBAL REDUCE NEWOBJ BUILD"
).split()


class _IndexUnpickler(pickle._Unpickler):
    """For what `pickle.dump` makes of an index, and nothing else.

    The implementation in Python, whose table of instructions can be cut down: those that are left allocate no more than
    the file has, call what `_GLOBALS` has, and set fields of its classes.
    """

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _GLOBALS[module, name]
        except KeyError:
            raise _ForeignName(f"{module}.{name}") from None

    def load_build(self) -> None:
        state = self.stack.pop()
        thing = self.stack[-1]
        if type(thing) is index.TensorProperties:
            thing.__setstate__(state)
        elif type(thing) in _CLASSES and state.keys() <= {field.name for field in fields(thing)}:
            vars(thing).update(state)
        else:
            raise pickle.UnpicklingError(f"a state for {type(thing).__name__}")

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1][_hashable(key)] = value

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self.stack[-1].update((_hashable(key), value) for key, value in zip(items[::2], items[1::2], strict=True))

    dispatch = {
        code: function
        for code, function in pickle._Unpickler.dispatch.items()
        if code in {getattr(pickle, name)[0] for name in _INSTRUCTIONS}
    } | {pickle.BUILD[0]: load_build, pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems}


class _ForeignName(pickle.UnpicklingError):
    """An index names what is no part of it."""


def _hashable(key: Any) -> Any:
    """A key of a table; a tuple of tuples, thousands deep, would end the process when it is hashed."""
    if type(key) is index.MetadataIndex and type(key.fqn) is str and type(key.offset) in (torch.Size, type(None)):
        return key
    if type(key) is str:
        return key
    raise pickle.UnpicklingError(f"{type(key).__name__} for a key")


def _read_index(content: bytes) -> index.Metadata:
    """The index of a sharded checkpoint, checked: what it says can be followed.

    Raises:
        DamagedError: It is none; nothing in it was run.
    """
    try:
        found = _IndexUnpickler(io.BytesIO(content)).load()
        valid = _is_valid(found)
    except _ForeignName as error:
        raise DamagedError(f"its '{INDEX_FILE}' names '{error}', which is no part of one; nothing was run") from error
    except (
        pickle.UnpicklingError, struct.error, EOFError, MemoryError, ArithmeticError, LookupError, ValueError,
        TypeError, AttributeError, RuntimeError, AssertionError,
    ) as error:  # fmt: skip
        raise DamagedError(f"its '{INDEX_FILE}' is damaged") from error
    if not valid:
        raise DamagedError(f"its '{INDEX_FILE}' is damaged")
    return found


def _is_valid(found: Any) -> bool:
    if type(found) is not index.Metadata or not all(
        type(table) is dict for table in (found.state_dict_metadata, found.storage_data)
    ):
        return False
    found.storage_meta = found.planner_data = None  # where it was written and from what, which nobody needs
    for key, entry in found.storage_data.items():
        if not (
            type(key) is index.MetadataIndex
            and type(entry) is _StorageInfo
            and _PART_NAME.fullmatch(entry.relative_path)
            and _is_size(entry.offset, entry.length)
            and entry.transform_descriptors is None
        ):
            return False
    for name, entry in found.state_dict_metadata.items():
        if type(entry) is index.BytesStorageMetadata:
            places = [index.MetadataIndex(name)]
        elif _is_tensor(entry):
            places = [index.MetadataIndex(name, chunk.offsets) for chunk in entry.chunks]
        else:
            return False
        if type(name) is not str or any(place not in found.storage_data for place in places):
            return False
    return True


def _is_tensor(entry: Any) -> bool:
    """Whether the parts of a tensor make a whole: torch would leave the rest as it is without a word."""
    if type(entry) is not index.TensorStorageMetadata or type(entry.properties) is not index.TensorProperties:
        return False
    if type(entry.size) is not torch.Size or not _is_size(*entry.size) or type(entry.chunks) is not list:
        return False
    count, starts = 0, []
    for chunk in entry.chunks:
        if type(chunk) is not index.ChunkStorageMetadata or not _is_size(*chunk.offsets, *chunk.sizes):
            return False
        ends = [offset + size for offset, size in zip(chunk.offsets, chunk.sizes, strict=True)]
        if len(ends) != len(entry.size) or any(end > size for end, size in zip(ends, entry.size)):
            return False
        if math.prod(chunk.sizes):  # of an uneven tensor, several processes have nothing
            count += math.prod(chunk.sizes)
            starts.append(chunk.offsets)
    return count == math.prod(entry.size) and len(set(starts)) == len(starts)


def _is_size(*numbers: Any) -> bool:
    return all(type(number) is int and number >= 0 for number in numbers)
