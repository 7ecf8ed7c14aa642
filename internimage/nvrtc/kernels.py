# SPDX-License-Identifier: MIT
"""From a kernel's name to an image that the driver can load: `torch.ops.internimage.cuda_kernel`."""

import logging
import os
import threading

import numpy as np
import torch
from torch import Tensor

from ..progress import message
from . import cache
from .compiler import OPTIONS, CompileError, Nvrtc, Target, load
from .parts import Missing, Parts, find, fingerprint

_logger = logging.getLogger(__name__)

VARIABLE = "INTERNIMAGE_NVRTC"  # 0: never; 1: also where nvcc's module is installed; unset: where it is not
VARIANTS = "INTERNIMAGE_CUDA_VARIANTS"  # kernels that only this way has; csrc/cuda/gather/variants.h reads their names
_lock = threading.Lock()
_from_cache: set[tuple[str, str]] = set()  # kernels and targets whose image was not compiled by this process
_in_memory: dict[tuple[str, str], tuple[bytes, str]] = {}  # images that cannot be kept on disk, for other devices
_failed: dict[tuple[str, str], str] = {}  # kernels and targets that are not tried again, and why
_said: set[str] = set()  # messages that were printed
problems: dict[int, str] = {}  # device -> why plain torch serves there, for `internimage info`


def option_error() -> str:
    """What is wrong with the value of INTERNIMAGE_NVRTC; empty if nothing is."""
    value = os.environ.get(VARIABLE, "")
    return "" if value in ("", "0", "1") else f"{VARIABLE} must be 0 or 1, got '{value}'"


def cuda_kernel(kernel: str, argument_bytes: int, device: int, refusal: str) -> tuple[Tensor, Tensor]:
    """The operator. The compiled module calls it when it needs a kernel for the first time; it never raises.

    Args:
        kernel: Its name, such as "forward_kernel<float, 8, 9, true, uint32_t>".
        argument_bytes: Size of its first argument according to the compiler of the module.
        device: Index of the GPU.
        refusal: What the driver said of the image of the call before; empty at first.

    Returns:
        The image and the kernel's name in it, as bytes: torch's stable ABI takes no results of two types. Without an
        image plain torch is to serve, or, if the name is not empty, that is an error to raise.
    """
    if error := option_error():
        return _tensor(b""), _tensor(error.encode())
    try:
        with _lock:
            return _image(kernel, argument_bytes, device, refusal)
    except (Missing, OSError) as error:
        problems[device] = str(error)
        _say(f"{error}: plain torch serves DCNv3 on cuda:{device}, which is much slower", warn=True)
        return _tensor(b""), _tensor(b"")


def _image(kernel: str, argument_bytes: int, device: int, refusal: str) -> tuple[Tensor, Tensor]:
    parts = find()
    nvrtc = load(parts.library)
    gpu, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    target = nvrtc.target(capability)
    if target is None:
        oldest = "{}.{}".format(*divmod(nvrtc.supported[0], 10))
        version = "{}.{}".format(*capability)
        raise Missing(f"NVRTC {nvrtc.version} compiles for compute capability {oldest} and newer; {gpu} has {version}")
    one = (kernel, str(target))
    if one in _failed:
        raise Missing(_failed[one])
    if refusal and one not in _from_cache:
        _failed[one] = f"the CUDA driver does not take what NVRTC {nvrtc.version} compiles for {gpu}: {refusal}"
        raise Missing(_failed[one])
    key = cache_key(parts, kernel, argument_bytes, target)
    found = None if refusal else _kept(key, one)
    if found is None:
        with cache.turn(key):
            found = None if refusal else _kept(key, one)  # another process may have compiled it meanwhile
            if found is None:
                found = _compile(parts, nvrtc, gpu, kernel, argument_bytes, target)
                _from_cache.discard(one)
                if not cache.write(key, *found):
                    _in_memory[one] = found
    problems.pop(device, None)
    return _tensor(found[0]), _tensor(found[1].encode())


def _kept(key: dict[str, str | int], one: tuple[str, str]) -> tuple[bytes, str] | None:
    """An image that was compiled before, and its name."""
    if (found := cache.read(key)) is not None:
        _from_cache.add(one)
        return found
    return _in_memory.get(one)


def _compile(
    parts: Parts, nvrtc: Nvrtc, gpu: str, kernel: str, argument_bytes: int, target: Target
) -> tuple[bytes, str]:
    where = cache.folder()
    kept = "" if where is None else f", and keeps them in '{where}'"
    _say(f"NVRTC {nvrtc.version} compiles the CUDA kernels that {gpu} needs, in seconds each{kept}")
    try:
        return nvrtc.compile(parts, kernel, argument_bytes, target)
    except CompileError as error:
        problem = f"NVRTC {nvrtc.version} does not compile {kernel} for {gpu}: {error}"
        _failed[kernel, str(target)] = problem
        raise Missing(problem) from error


def cache_key(parts: Parts, kernel: str, argument_bytes: int, target: Target) -> dict[str, str | int]:
    """All that an image depends on."""
    return {
        "kernel": kernel,
        "argument_bytes": argument_bytes,
        "target": str(target),
        "options": " ".join(OPTIONS),
        "nvrtc": load(parts.library).version,
        "nvrtc_bytes": parts.library.stat().st_size,  # the version has no patch level
        "sources": fingerprint(parts),
    }


def _tensor(image: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(image, np.uint8).copy())


def _say(text: str, warn: bool = False) -> None:
    """Once a process."""
    if text in _said:
        return
    _said.add(text)
    if warn:
        _logger.warning("internimage: %s", text)
    else:
        message(f"internimage: {text}")


def _after_fork() -> None:
    """Another thread of the parent may hold the lock, and does not exist in the child."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
