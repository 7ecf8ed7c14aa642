# SPDX-License-Identifier: MIT
"""Sharded checkpoints: torch's distributed format with checksums, read without running code from it.

torch unpickles the index of such a folder, and the entries that are not tensors, without restrictions. Here the index
is read with an allow-list of opcodes and names, validated, and handed to torch; entries are loaded with
`weights_only=True`.
"""

import io
import math
import os
import pathlib
import pickle
import re
import struct
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo
from torch.distributed.checkpoint.planner import ReadItem
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
_SHARD_NAME = re.compile(r"__\d+_\d+\.distcp")

Checksums = dict[str, tuple[int, int]]  # file name -> size in bytes, CRC-32


def write(folder: Path, model: nn.Module, ema: nn.Module | None, optimizer: torch.optim.Optimizer) -> Checksums:
    """Write this process's shards of a checkpoint; an error in one process is raised in all.

    Args:
        folder: Of the checkpoint; exists.
        model: Whose weights to write.
        ema: The moving average of its weights, or None.
        optimizer: Whose state to write.

    Returns:
        The checksums of the files that this process has written.
    """
    writer = dcp.FileSystemWriter(folder)
    writer.fs = file_system = _ChecksumFileSystem()
    with _unwrap_errors():
        dcp.save(_state_dict(model, ema, optimizer), storage_writer=writer)
    return file_system.checksums


def check(folder: Path, checksums: Any, world: World) -> dcp_metadata.Metadata:
    """Check a sharded checkpoint; communicates with no other process and changes nothing.

    Every process checks the index and a part of the shards: the checkpoint is intact if no process raises.

    Args:
        folder: Of the checkpoint.
        checksums: The merged results of `write` in all processes. None for a checkpoint of an older version, whose
            shards are checked by the checksums of their ZIP archives.
        world: The processes.

    Returns:
        The index, for `read`.

    Raises:
        DamagedError: It is not what was written.
        OSError: It cannot be read.
    """
    content = integrity.read_whole(folder / INDEX_FILE)
    if checksums is not None:
        _check_checksums(checksums)
        if checksums[INDEX_FILE] != [len(content), integrity.checksum_of(content)]:
            raise DamagedError(f"its '{INDEX_FILE}' has another checksum than when it was written")
    index = _read_index(content)
    entries = sorted((entry.relative_path, entry.offset, entry.length) for entry in index.storage_data.values())
    names = sorted({name for name, _, _ in entries})
    if checksums is not None and not set(names) <= checksums.keys():
        raise DamagedError(f"its '{INDEX_FILE}' names files without checksums")
    for name in names:
        if not (folder / name).is_file():
            raise DamagedError(f"its '{name}' is missing")
    if checksums is not None:
        for name in names[world.rank :: world.size]:
            integrity.check_file(folder / name, *checksums[name])
    else:
        for name, offset, length in entries[world.rank :: world.size]:
            integrity.check_archive(integrity.read_slice(folder / name, offset, length), length)
    return index


def read(
    folder: Path,
    index: dcp_metadata.Metadata,
    model: nn.Module,
    ema: nn.Module | None,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Read a sharded checkpoint; the number of processes may differ from that of the writers.

    Args:
        folder: Of the checkpoint.
        index: From `check`.
        model, ema, optimizer: To read into.
    """
    state = _state_dict(model, ema, optimizer)
    with _unwrap_errors():
        dcp.load(state, storage_reader=_Reader(folder, index), planner=_SafePlanner())
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    if ema is not None:
        set_model_state_dict(ema, state["average"])


def _state_dict(model: nn.Module, ema: nn.Module | None, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state: dict[str, Any] = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    if ema is not None:
        state["average"] = get_model_state_dict(ema)
    return state


@contextmanager
def _unwrap_errors() -> Iterator[None]:
    """Raise the first error of torch's collection of all processes' errors, which is not an Exception itself."""
    try:
        yield
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        if isinstance(cause.__context__, OSError):
            raise cause.__context__ from None
        if "inline_container" in str(cause):  # torch's writer, in another process, which does not pass on its cause
            raise OSError("a file could not be written completely, as on a full disk") from None
        if isinstance(cause, (OSError, RuntimeError)):
            raise cause from None
        raise RuntimeError(f"{type(cause).__name__}: {cause}") from None


class _ChecksumFileSystem(FileSystem):
    """torch's file system for checkpoints, with the checksum of each file that is written."""

    def __init__(self) -> None:
        self.checksums: Checksums = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        with super().create_stream(path, mode) as stream:
            writer = integrity.ChecksumWriter(cast(BinaryIO, stream))
            yield cast(io.IOBase, writer)
        self.checksums[Path(path).name] = (writer.size, writer.checksum)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.checksums[Path(new_path).name] = self.checksums.pop(Path(path).name)


class _Reader(dcp.FileSystemReader):
    """torch's reader, with an index that has been read before."""

    def __init__(self, folder: Path, index: dcp_metadata.Metadata) -> None:
        super().__init__(folder)
        self._index = index

    def read_metadata(self, *_: Any, **__: Any) -> dcp_metadata.Metadata:
        return self._index


class _SafePlanner(dcp.DefaultLoadPlanner):
    """torch's planner, which loads entries that are not tensors with `weights_only=True`."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        *path, last = self.mappings[read_item.dest_index.fqn]
        container: Any = self.original_state_dict
        for key in path:
            container = container[key]
        container[last] = torch.load(value, map_location="cpu", weights_only=True)


# ---- the index


def _check_checksums(checksums: Any) -> None:
    valid = isinstance(checksums, dict) and INDEX_FILE in checksums
    for name, pair in checksums.items() if valid else ():
        valid &= isinstance(name, str) and (name == INDEX_FILE or _SHARD_NAME.fullmatch(name) is not None)
        valid &= isinstance(pair, list) and [type(number) for number in pair] == [int, int]
    if not valid:
        raise DamagedError("its table of checksums is invalid")


def _ignore_path(*_: Any) -> None:
    """Unpickles a path, which is where the folder was when it was written, as None."""


def _layout(name: str) -> torch.layout:
    if name != "torch.strided":
        raise pickle.UnpicklingError(f"layout {name}")
    return torch.strided


def _enum_member(kind: Any, name: Any) -> Any:
    """Replaces `getattr`, with which Python 3.11.0 to 3.11.3 pickle members of enumerations."""
    if kind is not dcp_metadata._MEM_FORMAT_ENCODING:
        raise pickle.UnpicklingError("an attribute")
    return kind[name]


_CLASSES = (
    dcp_metadata.Metadata, dcp_metadata.MetadataIndex, dcp_metadata.StorageMeta, dcp_metadata.TensorStorageMetadata,
    dcp_metadata.BytesStorageMetadata, dcp_metadata.ChunkStorageMetadata, dcp_metadata.TensorProperties, _StorageInfo,
)  # fmt: skip
_PATHS = [name for name in dir(pathlib) if "Path" in name]
_GLOBALS: dict[tuple[str, str], Any] = {
    **{(kind.__module__, kind.__name__): kind for kind in (*_CLASSES, dcp_metadata._MEM_FORMAT_ENCODING)},
    **{(module, name): _ignore_path for module in ("pathlib", "pathlib._local") for name in _PATHS},
    **{("torch", name): dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)},
    ("torch", "Size"): torch.Size,
    ("builtins", "getattr"): _enum_member,
    ("torch.serialization", "_get_layout"): _layout,
}  # fmt: skip
_OPCODES = (
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 SHORT_BINUNICODE BINUNICODE EMPTY_TUPLE "
    "TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS MEMOIZE BINGET LONG_BINGET "
    "STACK_GLOBAL REDUCE NEWOBJ BUILD"
).split()


class _IndexUnpickler(pickle._Unpickler):
    """Reads what `pickle.dump` writes for an index, and nothing else.

    It is based on the implementation in Python, whose table of opcodes can be reduced: the remaining ones allocate no
    more than the size of the file, call only what is in `_GLOBALS`, and set only fields of its classes.
    """

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _GLOBALS[module, name]
        except KeyError:
            raise _ForbiddenName(f"{module}.{name}") from None

    def load_build(self) -> None:
        state = self.stack.pop()
        instance = self.stack[-1]
        if type(instance) is dcp_metadata.TensorProperties:
            instance.__setstate__(state)
        elif type(instance) in _CLASSES and state.keys() <= {field.name for field in fields(instance)}:
            vars(instance).update(state)
        else:
            raise pickle.UnpicklingError(f"a state for {type(instance).__name__}")

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1][_check_key(key)] = value

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self.stack[-1].update((_check_key(key), value) for key, value in zip(items[::2], items[1::2], strict=True))

    dispatch: ClassVar[dict[int, Any]] = {
        code: function
        for code, function in pickle._Unpickler.dispatch.items()
        if code in {getattr(pickle, name)[0] for name in _OPCODES}
    } | {pickle.BUILD[0]: load_build, pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems}


class _ForbiddenName(pickle.UnpicklingError):
    """An index names a class or function that does not belong in one."""


def _check_key(key: Any) -> Any:
    """A key of a dict. Hashing tuples nested thousands of levels deep would crash the process."""
    if (
        type(key) is dcp_metadata.MetadataIndex
        and type(key.fqn) is str
        and type(key.offset) in (torch.Size, type(None))
    ):
        return key
    if type(key) is str:
        return key
    raise pickle.UnpicklingError(f"{type(key).__name__} for a key")


def _read_index(content: bytes) -> dcp_metadata.Metadata:
    """The index of a sharded checkpoint, validated.

    Raises:
        DamagedError: It is not a valid index; no code in it was run.
    """
    try:
        index = _IndexUnpickler(io.BytesIO(content)).load()
        valid = _is_valid(index)
    except _ForbiddenName as error:
        raise DamagedError(
            f"its '{INDEX_FILE}' names '{error}', which does not belong there; no code was run"
        ) from error
    except (
        pickle.UnpicklingError, struct.error, EOFError, MemoryError, ArithmeticError, LookupError, ValueError,
        TypeError, AttributeError, RuntimeError, AssertionError,
    ) as error:  # fmt: skip
        raise DamagedError(f"its '{INDEX_FILE}' is damaged") from error
    if not valid:
        raise DamagedError(f"its '{INDEX_FILE}' is damaged")
    return index


def _is_valid(index: Any) -> bool:
    """Whether torch can load the tensors of an index; clears its fields that are not needed for this."""
    if type(index) is not dcp_metadata.Metadata or not all(
        type(table) is dict for table in (index.state_dict_metadata, index.storage_data)
    ):
        return False
    index.storage_meta = index.planner_data = None  # where it was written and from what
    for key, info in index.storage_data.items():
        if not (
            type(key) is dcp_metadata.MetadataIndex
            and type(info) is _StorageInfo
            and _SHARD_NAME.fullmatch(info.relative_path)
            and _are_sizes(info.offset, info.length)
            and info.transform_descriptors is None
        ):
            return False
    for name, entry in index.state_dict_metadata.items():
        if type(entry) is dcp_metadata.BytesStorageMetadata:
            keys = [dcp_metadata.MetadataIndex(name)]
        elif type(entry) is dcp_metadata.TensorStorageMetadata and _is_complete(entry):
            keys = [dcp_metadata.MetadataIndex(name, chunk.offsets) for chunk in entry.chunks]
        else:
            return False
        if type(name) is not str or any(key not in index.storage_data for key in keys):
            return False
    return True


def _is_complete(entry: dcp_metadata.TensorStorageMetadata) -> bool:
    """Whether the chunks of a tensor cover it: torch would silently leave the rest of the tensor unchanged."""
    if type(entry.properties) is not dcp_metadata.TensorProperties:
        return False
    if type(entry.size) is not torch.Size or not _are_sizes(*entry.size) or type(entry.chunks) is not list:
        return False
    count, starts = 0, []
    for chunk in entry.chunks:
        if type(chunk) is not dcp_metadata.ChunkStorageMetadata or not _are_sizes(*chunk.offsets, *chunk.sizes):
            return False
        ends = [offset + size for offset, size in zip(chunk.offsets, chunk.sizes, strict=True)]
        if len(ends) != len(entry.size) or any(end > size for end, size in zip(ends, entry.size)):
            return False
        if math.prod(chunk.sizes):  # several processes may have an empty chunk of a small tensor
            count += math.prod(chunk.sizes)
            starts.append(chunk.offsets)
    return count == math.prod(entry.size) and len(set(starts)) == len(starts)


def _are_sizes(*numbers: Any) -> bool:
    return all(type(number) is int and number >= 0 for number in numbers)
