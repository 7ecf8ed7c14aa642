# SPDX-License-Identifier: MIT
"""CUDA sources of the benchmarks: compiled by NVRTC, launched by the driver on torch's current stream."""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch

from internimage.nvrtc import compiler, parts

RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


class DriverError(Exception):
    """The driver refuses something; the message is one line."""


def compile_source(source: Path, expressions: list[str], capability: tuple[int, int]) -> tuple[bytes, dict[str, str]]:
    """An image for a GPU, and each expression's name in it.

    Raises:
        parts.Missing: There is no NVRTC, or it does not know the GPU.
        compiler.CompileError: NVRTC rejects the source.
    """
    there = parts.find()
    nvrtc = compiler.load(there.library)
    target = nvrtc.target(capability)
    if target is None:
        raise parts.Missing(f"NVRTC {nvrtc.version} does not compile for compute capability {capability}")
    image, names, _ = nvrtc.build(there, source.read_text(encoding="utf-8"), expressions, target)
    return image, dict(zip(expressions, names))


class Module:
    """A compiled source on the current GPU."""

    def __init__(self, source: Path, expressions: list[str]) -> None:
        image, self.names = compile_source(source, expressions, torch.cuda.get_device_capability())
        torch.empty(1, device="cuda")  # makes the context, but does not always make it this thread's
        self._driver = ctypes.CDLL("libcuda.so.1")
        context = ctypes.c_void_p()
        self._check("cuCtxGetCurrent", self._driver.cuCtxGetCurrent(ctypes.byref(context)))
        if context.value is None:
            device = torch.cuda.current_device()
            status = self._driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
            self._check("cuDevicePrimaryCtxRetain", status)
            self._check("cuCtxSetCurrent", self._driver.cuCtxSetCurrent(context))
        self._module = ctypes.c_void_p()
        mode = ctypes.c_int(RELAXED)  # loading is not allowed while a thread captures a graph, unless this one says so
        self._driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
        status = self._driver.cuModuleLoadData(ctypes.byref(self._module), image)
        self._driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
        self._check("cuModuleLoadData", status)
        self._functions: dict[str, ctypes.c_void_p] = {}

    def launch(self, expression: str, blocks: int, threads: int, arguments: Sequence[ctypes._SimpleCData]) -> None:
        """Launch a kernel; does not wait for it."""
        function = self._functions.get(expression)
        if function is None:
            function = ctypes.c_void_p()
            name = self.names[expression].encode()
            status = self._driver.cuModuleGetFunction(ctypes.byref(function), self._module, name)
            self._check("cuModuleGetFunction", status)
            self._functions[expression] = function
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(value) for value in arguments))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        status = self._driver.cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, 0, stream, pointers, None)
        self._check("cuLaunchKernel", status)

    def _check(self, function: str, status: int) -> None:
        if status != 0:
            name = ctypes.c_char_p()
            self._driver.cuGetErrorName(status, ctypes.byref(name))
            raise DriverError(f"{function}: {name.value.decode() if name.value else status}")
