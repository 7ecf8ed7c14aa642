# SPDX-License-Identifier: MIT
"""Files of torch.save, read tensor by tensor; nothing in them is imported, called or trusted.

Since torch 1.6 a file is a ZIP archive: `data.pkl` describes the tensors, and `data/KEY` is the storage KEY, not
compressed. Before, it was five pickles (a magic number, a version, the system, the data, the keys of the storages)
followed by the storages, each preceded by its number of elements.
"""

import sys
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import CheckpointError
from .archive import Archive, ArchiveError
from .safe_pickle import MOST_BYTES, RefusedError, Unpickler, refusal, shown
from .stored import PickleError, Storage, StoredTensor

_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001  # of the format before torch 1.6
# The memory that the tensors of a file may take beyond its size. More means expanded views of a few elements, or
# compressed zeros.
_ALLOWANCE = 2**28
_MOST_INFLATION = 4  # compression saves a tenth of weights, and half of bfloat16 values in float32


class _Storages(Protocol):
    """The bytes of storages. Raises ArchiveError or PickleError if something is wrong with them."""

    little_endian: bool
    stored: int  # bytes of all storages, once they are inflated

    def check(self, tensor: StoredTensor) -> None: ...
    def read(self, storage: Storage, start: int, target: memoryview) -> None: ...


class TorchFile:
    """The content of a file of torch.save, with a `StoredTensor` for each tensor.

    Args:
        path: The file.

    Attributes:
        data: Its content.

    Raises:
        CheckpointError: Unpickling it would call something, which the message names; or it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with path.open("rb") as file:
                archived = file.read(4) == b"PK\x03\x04"
            opened: tuple[Any, _Storages] = _open_archive(path) if archived else _open_pickles(path)
            self.data, self._storages = opened
        except (ArchiveError, PickleError) as error:
            raise self._damaged(error) from error
        except OSError as error:
            raise CheckpointError(f"'{path}' cannot be read: {error.strerror or error}") from error

    def check(self, tensors: Iterable[StoredTensor]) -> None:
        """Check that the file has the data of some tensors, and that they do not take much more memory than it has.

        Raises:
            CheckpointError: It does not, or they do; the message says which.
        """
        claimed = 0
        try:
            for tensor in tensors:
                if not tensor.problem:
                    self._storages.check(tensor)
                    claimed += tensor.nbytes
        except (ArchiveError, PickleError) as error:
            raise self._damaged(error) from error
        stored = self._storages.stored
        if claimed > stored + _ALLOWANCE:
            raise CheckpointError(
                f"'{self._path}' was refused: its tensors would take {claimed / 1e9:.1f} GB, and it stores "
                f"{stored / 1e9:.1f} GB; save tensors that were expanded after .contiguous()"
            )

    def read(self, tensor: StoredTensor) -> Tensor:
        """Read a tensor that has no problem; returns a contiguous copy.

        Raises:
            CheckpointError: Its bytes are damaged, or cannot be read.
        """
        size = tensor.dtype.itemsize
        raw = torch.empty(tensor.span * size, dtype=torch.uint8, device="cpu")
        try:
            if tensor.span and tensor.storage is not None:
                self._storages.read(tensor.storage, tensor.offset * size, raw.numpy().data)
        except (ArchiveError, PickleError) as error:
            raise self._damaged(error) from error
        except OSError as error:
            raise CheckpointError(f"'{self._path}' cannot be read: {error.strerror or error}") from error
        if self._storages.little_endian != (sys.byteorder == "little"):
            size //= 2 if tensor.dtype.is_complex else 1
            raw = raw.view(-1, size).flip(1).view(-1)
        flat = raw.view(tensor.dtype)
        if not tensor.span:
            return flat.reshape(tensor.shape)
        return flat.as_strided(tensor.shape, tensor.stride).contiguous()

    def _damaged(self, error: Exception) -> CheckpointError:
        if isinstance(error, RefusedError):
            return CheckpointError(f"'{self._path}' {error}")
        return CheckpointError(f"'{self._path}' is damaged, truncated or no torch checkpoint: {error}")


def _shown(storage: Storage) -> str:
    return f"'{shown(storage.key[:50])}'"


# ---- since torch 1.6


class _Archived:
    def __init__(self, archive: Archive, prefix: str, little_endian: bool) -> None:
        self.little_endian = little_endian
        self._archive, self._prefix = archive, prefix
        self.stored = sum(record.size for record in archive.records.values())

    def check(self, tensor: StoredTensor) -> None:
        storage = tensor.storage
        if storage is None:  # it has a problem
            return
        record = self._archive.records.get(f"{self._prefix}data/{storage.key}")
        if record is None:
            raise PickleError(f"the record of its storage {_shown(storage)} is missing")
        if record.size != storage.nbytes:
            raise PickleError(
                f"the record of its storage {_shown(storage)} has {record.size} bytes, and {storage.nbytes} are needed"
            )
        if record.is_compressed and tensor.span * tensor.dtype.itemsize != record.size:
            raise ArchiveError("its ZIP archive is compressed, and its tensors are parts of others; pack it without")

    def read(self, storage: Storage, start: int, target: memoryview) -> None:
        record = self._archive.records[f"{self._prefix}data/{storage.key}"]
        if len(target) == record.size:
            self._archive.read_into(record, target)
        else:
            self._archive.read_part(record, start, target)


def _open_archive(path: Path) -> tuple[Any, _Archived]:
    archive = Archive(path)
    records = archive.records
    if any(PurePosixPath(name).name == "constants.pkl" for name in records):
        raise PickleError("it is a TorchScript archive, which holds code; save the state_dict of the model alone")
    found = [name for name in records if PurePosixPath(name).name == "data.pkl" and name.count("/") == 1]
    if len(found) != 1:
        raise PickleError("it is a ZIP archive, but written not by torch.save")
    prefix = found[0].removesuffix("data.pkl")
    stored, size = (sum(getattr(record, what) for record in records.values()) for what in ("stored", "size"))
    if size > _MOST_INFLATION * stored + _ALLOWANCE:
        raise ArchiveError(f"its ZIP archive would become {size / 1e9:.1f} GB of {stored / 1e6:.1f} MB")
    if records[found[0]].size > MOST_BYTES:
        raise PickleError(f"its pickle is larger than {MOST_BYTES >> 20} MiB, though tensors are stored outside of it")
    byteorder = records.get(f"{prefix}byteorder")
    order = b"little" if byteorder is None or byteorder.size > 10 else archive.read(byteorder)
    data = archive.read(records[found[0]])
    unpickler = Unpickler(data)
    try:
        content = unpickler.load()
    except RefusedError as error:
        raise RefusedError(refusal(error, data)) from error
    return content, _Archived(archive, prefix, order != b"big")


# ---- before torch 1.6


class _Appended:
    def __init__(self, path: Path, start: int, storages: Iterable[Storage], little_endian: bool) -> None:
        self.little_endian = little_endian
        self._path = path
        self._places: dict[str, int] = {}
        size = path.stat().st_size
        with path.open("rb") as file:
            for storage in storages:
                file.seek(start)
                count = int.from_bytes(file.read(8), "little" if little_endian else "big")
                if start + 8 + storage.nbytes > size:
                    raise PickleError("it ends too early")
                if count != storage.count:
                    raise PickleError(
                        f"its storage {_shown(storage)} has {count} elements, and {storage.count} are needed"
                    )
                self._places[storage.key] = start + 8
                start += 8 + storage.nbytes
        self.stored = size

    def check(self, tensor: StoredTensor) -> None:
        """All was compared with the file when it was opened."""

    def read(self, storage: Storage, start: int, target: memoryview) -> None:
        with self._path.open("rb", buffering=0) as file:
            file.seek(self._places[storage.key] + start)
            while target:  # a system call reads 2 GB at most
                count = file.readinto(target)
                if not count:
                    raise PickleError("it ends too early")
                target = target[count:]


def _open_pickles(path: Path) -> tuple[Any, _Appended]:
    with path.open("rb") as file:
        data = file.read(MOST_BYTES)
    unpickler = Unpickler(data)
    starts = [0]

    def load() -> Any:
        content = unpickler.load()
        starts.append(unpickler.position)
        return content

    try:
        first = load()
        if first != _MAGIC or type(first) is not int or load() != _VERSION:
            raise PickleError("it is a pickle, but written not by torch.save")
        system, content, keys = load(), load(), load()
    except RefusedError as error:
        raise RefusedError(refusal(error, data, tuple(starts))) from error
    if not isinstance(system, dict) or not isinstance(keys, list):
        raise PickleError("it is a pickle, but written not by torch.save")
    storages = unpickler.storages
    if len(keys) != len(storages) or not all(type(key) is str for key in keys) or set(keys) != set(storages):
        raise PickleError("its list of storages is not that of its tensors")
    little_endian = system.get("little_endian") is not False
    return content, _Appended(path, unpickler.position, [storages[key] for key in keys], little_endian)
