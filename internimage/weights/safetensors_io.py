# SPDX-License-Identifier: MIT
"""Safetensors files, tensor by tensor, with one in memory at a time.

safetensors' own `save_file` needs all tensors at once, and its `safe_open` maps the file, whose pages count as the
process's memory until it is closed. But it checks the header, so callers open the file with it first.

The format (https://github.com/huggingface/safetensors): the header's length in 8 bytes, little endian; the header, JSON
with the dtype, shape and offsets of each tensor; the tensors' bytes in that order.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import strict_json

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LONGEST_HEADER = 16 * 2**20  # bytes; a hundred thousand tensors. The specification allows 100 MB
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a tensor."""
    count = 1
    for side in shape:
        count *= side
    return count * dtype.itemsize


def read_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Each tensor's `dtype`, `shape` and `data_offsets`, and the position in the file that the offsets start from.

    For a file whose header safetensors has checked, after `check_length`.

    Raises:
        ValueError: It is not JSON, or describes a tensor twice.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = strict_json.parse(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def check_length(path: Path) -> None:
    """Check the length of a header before safetensors reads it, which takes fifty times as much memory.

    Raises:
        ValueError: It is longer than any model's.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > _LONGEST_HEADER:
        raise ValueError(f"its header of {length} bytes is longer than {_LONGEST_HEADER >> 20} MiB")


def read_tensor(path: Path, position: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Read a tensor at a position of a file.

    Raises:
        OSError: It cannot be read.
        EOFError: The file is too short.
    """
    tensor = torch.empty(shape, dtype=dtype, device="cpu")
    left = tensor.reshape(-1).view(torch.uint8).numpy().data
    with path.open("rb", buffering=0) as file:
        file.seek(position)
        while left:  # a system call reads at most 2 GB
            count = file.readinto(left)
            if not count:
                raise EOFError(f"'{path}' ends {len(left)} bytes early")
            left = left[count:]
    return tensor


def write_safetensors(
    path: Path,
    specs: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a file with no more than one tensor in memory.

    Args:
        path: The file; after an error, the caller removes it.
        specs: Name -> shape and dtype, in the order of writing.
        read: Name -> the tensor, on the CPU.
        metadata: Strings for the header; "format": "pt" is added.

    Raises:
        OSError: It cannot be written completely.
        ValueError: A tensor does not match `specs`.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    # the widest dtypes first, as in safetensors itself, so that each tensor is aligned to its dtype
    names = sorted(specs, key=lambda name: -specs[name][1].itemsize)
    offset = 0
    for name in names:
        shape, dtype = specs[name]
        end = offset + nbytes(shape, dtype)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in names:
            tensor = read(name)
            if (tuple(tensor.shape), tensor.dtype) != specs[name]:
                raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, announced as {specs[name]}")
            # as bytes, which numpy supports for every dtype; scalars have no last dimension to view
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
