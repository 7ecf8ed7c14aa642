# SPDX-License-Identifier: MIT
"""Safetensors files tensor by tensor: one in memory at a time, and no more.

safetensors' own `save_file` wants all of them at once, and its `safe_open` maps the file, whose pages count as the
process's memory until it is closed. It does check the header, and is for that called before anything here.

The format (https://github.com/huggingface/safetensors): the header's length in 8 bytes, little endian; the header, json
of each tensor's dtype, shape and place; the tensors' bytes in that order.
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
_LONGEST_HEADER = 16 * 2**20  # bytes; a hundred thousand tensors. The specification lets 100 MB pass
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a tensor."""
    count = 1
    for side in shape:
        count *= side
    return count * dtype.itemsize


def read_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Each tensor's `dtype`, `shape` and `data_offsets`, and where in the file these count from.

    For a file whose header safetensors has checked, if `check_length` has let it pass.

    Raises:
        ValueError: It is not JSON, or describes a tensor twice.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = strict_json.parse(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def check_length(path: Path) -> None:
    """Before safetensors reads a header, which takes fifty times its length.

    Raises:
        ValueError: It is longer than a model's.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > _LONGEST_HEADER:
        raise ValueError(f"its header of {length} bytes is longer than {_LONGEST_HEADER >> 20} MiB")


def read_tensor(path: Path, position: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor from its place in a file.

    Raises:
        OSError: It cannot be read.
        EOFError: The file ends before it does.
    """
    tensor = torch.empty(shape, dtype=dtype, device="cpu")
    left = tensor.reshape(-1).view(torch.uint8).numpy().data
    with path.open("rb", buffering=0) as file:
        file.seek(position)
        while left:  # a system call reads 2 GB at most
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
    """Write a file holding no more than one tensor in memory.

    Args:
        path: The file; what is left of it after an error is for the caller to remove.
        specs: Name -> shape and dtype, in the order of writing.
        read: Name -> the tensor, on the CPU.
        metadata: Strings for the header; "format": "pt" is added.

    Raises:
        OSError: It cannot be written whole.
        ValueError: A tensor is not what `specs` says.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    # the widest first, as safetensors itself does: each tensor's bytes are then aligned to its dtype
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
            # as bytes, which numpy has for every dtype; scalars have no last dimension to view
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
