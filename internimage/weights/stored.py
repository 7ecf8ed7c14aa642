# SPDX-License-Identifier: MIT
"""Tensors as a torch file describes them: views of storages, whose bytes are elsewhere in the file."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

MOST_DIMENSIONS = 64  # torch's own limit for most operations
_STORAGES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexDouble": torch.complex128, "ComplexFloat": torch.complex64,
    "QUInt8": torch.quint8, "QInt8": torch.qint8, "QInt32": torch.qint32, "QUInt4x2": torch.quint4x2,
    "QUInt2x4": torch.quint2x4, "Untyped": None,
}  # fmt: skip
_STORAGE_NAME = re.compile(r"torch\.(?:storage\.|cuda\.)?(\w+)Storage")
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
# float8 without scales and complex numbers are not accepted as weights, but can be read
_READABLE = {torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz} | {
    dtype for dtype in _STORAGES.values() if dtype is not None and not str(dtype).startswith("torch.q")
} | {torch.uint16, torch.uint32, torch.uint64}  # fmt: skip
_OLD_TENSOR = re.compile(r"torch\.(?:cuda\.|sparse\.|cuda\.sparse\.)?\w*Tensor")
PARAMETER = "torch.nn.parameter.Parameter"


class PickleError(ValueError):
    """A pickle that is damaged, or contains an invalid tensor. The message is a clause: "its ... is ..."."""


@dataclass(frozen=True)
class Named:
    """A name in a module, such as a class; it is not imported."""

    name: str


@dataclass(frozen=True, eq=False)
class Made:
    """A call of a named class or function; it is not executed."""

    name: str
    arguments: tuple[Any, ...] = ()

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Storage:
    """Consecutive elements under a key of the file; bytes if there is no dtype."""

    key: str
    dtype: torch.dtype | None
    count: int

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return self.count * (1 if self.dtype is None else self.dtype.itemsize)


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor that has not been read: a view within the bounds of a storage.

    Attributes:
        shape, stride: As of a tensor.
        dtype: Of its elements.
        storage: None if there is a problem.
        offset: Of its first element, in elements.
        problem: Why it is not an ordinary dense tensor; it cannot be read then.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    storage: Storage | None = None
    offset: int = 0
    stride: tuple[int, ...] = ()
    problem: str = ""

    @property
    def nbytes(self) -> int:
        """Size in memory, once it is read."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def span(self) -> int:
        """Number of elements of the storage from its first to its last element."""
        return span(self.shape, self.stride)


def span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Number of elements from the first to the last of a view."""
    if 0 in shape:
        return 0
    return 1 + sum((side - 1) * step for side, step in zip(shape, stride, strict=True))


def dtype_named(name: str) -> torch.dtype | None:
    """`torch.float32` for "torch.float32"; None if it is not a dtype."""
    return _DTYPES.get(name)


def is_storage_type(name: str) -> bool:
    """Whether a class is a type of storages, which determines their dtype."""
    return _storage_kind(name) in _STORAGES


def _storage_kind(name: str) -> str:
    found = _STORAGE_NAME.fullmatch(name)
    return "" if found is None else found[1]


def storage_of(pid: Any, storages: dict[str, Storage]) -> Storage:
    """The storage that a persistent id refers to; is added to `storages`.

    Args:
        pid: `("storage", class, key, device, number of elements)`; before torch 1.6 with a sixth item, a view of the
            storage or None.
        storages: Those referred to before, by key.

    Raises:
        PickleError: It is not such a reference, or contradicts an earlier one.
    """
    if not (isinstance(pid, tuple) and len(pid) in (5, 6) and pid[0] == "storage" and isinstance(pid[1], Named)):
        raise PickleError("it refers to something else than the numbers of a tensor")
    kind, key, count = pid[1].name, pid[2], pid[4]
    if not (is_storage_type(kind) and isinstance(key, str) and _is_count(count)):
        raise PickleError("it refers to the numbers of a tensor in a way that torch.save does not")
    if len(pid) == 6 and pid[5] is not None:
        raise PickleError("it was written before torch 0.4; load it with a newer torch and save it again")
    storage = Storage(key, _STORAGES[_storage_kind(kind)], count)
    if storages.setdefault(key, storage) != storage:
        raise PickleError("it describes the same numbers in two ways")
    return storage


def can_rebuild(name: str) -> bool:
    """Whether `rebuild` knows a function or class."""
    return name in _REBUILD or name == PARAMETER or _OLD_TENSOR.fullmatch(name) is not None


def rebuild(name: str, arguments: tuple[Any, ...]) -> StoredTensor:
    """The tensor that one of torch's functions would return for its arguments in a pickle.

    Raises:
        PickleError: It would fail, or return a tensor that exceeds its storage.
    """
    if name not in _REBUILD and name != PARAMETER:
        return _unreadable((), torch.float32, "written before torch 0.4; load it with a newer torch and save it again")
    least, function = _REBUILD.get(name, (1, _same))
    if len(arguments) < least:
        raise PickleError("it has a tensor that is not described whole")
    return function(*arguments)


def _view(
    storage: Any,
    offset: Any,
    shape: Any,
    stride: Any,
    _grad: Any = None,
    _hooks: Any = None,
    metadata: Any = None,
    *_: Any,
) -> StoredTensor:
    if not isinstance(storage, Storage) or storage.dtype is None:
        raise PickleError("it has a tensor without numbers")
    return _checked(storage, storage.dtype, storage.count, offset, shape, stride, metadata)


def _view_of_bytes(
    storage: Any,
    offset: Any,
    shape: Any,
    stride: Any,
    _grad: Any,
    _hooks: Any,
    dtype: Any,
    metadata: Any = None,
    *_: Any,
) -> StoredTensor:
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
        raise PickleError("it has a tensor without numbers")
    return _checked(storage, dtype, storage.nbytes // dtype.itemsize, offset, shape, stride, metadata)


def _checked(
    storage: Storage, dtype: torch.dtype, count: int, offset: Any, shape: Any, stride: Any, metadata: Any
) -> StoredTensor:
    shape, stride = _sides(shape), _sides(stride)
    if not _is_count(offset) or len(shape) != len(stride):
        raise PickleError("it has a tensor whose shape and strides do not go together")
    if offset + span(shape, stride) > count:
        raise PickleError(f"its tensor of shape {shape} reaches beyond its {count} numbers")
    if dtype not in _READABLE:
        return _unreadable(shape, dtype, f"of {dtype}, which no weights are")
    if isinstance(metadata, dict) and any(metadata.values()):
        return _unreadable(
            shape, dtype, "conjugated or negated when it is read; save it after .resolve_conj().resolve_neg()"
        )
    return StoredTensor(shape, dtype, storage, offset, stride)


def _same(data: Any, *_: Any) -> StoredTensor:
    if not isinstance(data, StoredTensor):
        raise PickleError("it has a parameter that is no tensor")
    return data


def _of_type(function: Any, kind: Any, arguments: Any, *_: Any) -> StoredTensor:
    known = isinstance(function, Named) and function.name in _REBUILD and function.name != _OF_TYPE
    if not known or not isinstance(kind, Named) or not isinstance(arguments, tuple):
        raise PickleError("it has a tensor of a class that torch.save does not write")
    tensor = rebuild(function.name, arguments)
    if kind.name in ("torch.Tensor", PARAMETER):
        return tensor
    return replace(tensor, problem=tensor.problem or f"a {kind.name}, not a plain torch.Tensor")


def _on_device(data: Any, dtype: Any, *_: Any) -> StoredTensor:
    tensor = _same(data)
    if tensor.dtype == dtype:
        return tensor
    return replace(tensor, problem=tensor.problem or f"of {tensor.dtype} in the file and another dtype in memory")


def _sparse(layout: Any, data: Any, *_: Any) -> StoredTensor:
    parts = data if isinstance(data, tuple) else ()
    values = [part for part in parts if isinstance(part, StoredTensor)]
    sizes = [part for part in parts if isinstance(part, tuple)]
    if not values or not sizes:
        raise PickleError("it has a sparse tensor that is not described whole")
    name = layout.arguments[0] if isinstance(layout, Made) and layout.arguments else ""
    name = name.removeprefix("torch.") if type(name) is str and len(name) < 30 and name.isprintable() else "unknown"
    return _unreadable(_sides(sizes[0]), values[-1].dtype, f"sparse ({name}); save it after .to_dense()")


def _quantized(storage: Any, offset: Any, shape: Any, *_: Any) -> StoredTensor:
    dtype = storage.dtype if isinstance(storage, Storage) else None
    return _unreadable(_sides(shape), dtype or torch.qint8, "quantized; save it after .dequantize()")


def _meta(dtype: Any, shape: Any, *_: Any) -> StoredTensor:
    dtype = dtype if isinstance(dtype, torch.dtype) else torch.float32
    return _unreadable(_sides(shape), dtype, "on the meta device, so it holds no numbers")


def _unreadable(shape: tuple[int, ...], dtype: torch.dtype, problem: str) -> StoredTensor:
    return StoredTensor(shape, dtype, problem=problem)


def _sides(sides: Any) -> tuple[int, ...]:
    if not isinstance(sides, tuple) or len(sides) > MOST_DIMENSIONS or not all(map(_is_count, sides)):
        raise PickleError("it has a tensor whose shape is none")
    return sides


def _is_count(number: Any) -> bool:
    return type(number) is int and 0 <= number < 2**63


_OF_TYPE = "torch._tensor._rebuild_from_type_v2"
# function -> the minimum of arguments, and what interprets them
_REBUILD: dict[str, tuple[int, Callable[..., StoredTensor]]] = {
    "torch._utils._rebuild_tensor": (4, _view),
    "torch._utils._rebuild_tensor_v2": (4, _view),
    "torch._utils._rebuild_tensor_v3": (7, _view_of_bytes),
    "torch._utils._rebuild_parameter": (1, _same),
    "torch._utils._rebuild_parameter_with_state": (1, _same),
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": (2, _on_device),
    "torch._utils._rebuild_sparse_tensor": (2, _sparse),
    "torch._utils._rebuild_qtensor": (3, _quantized),
    "torch._utils._rebuild_meta_tensor_no_storage": (2, _meta),
    _OF_TYPE: (3, _of_type),
}
