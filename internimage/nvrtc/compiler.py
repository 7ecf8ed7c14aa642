# SPDX-License-Identifier: MIT
"""NVRTC, called by ctypes: C++ in, an image for the CUDA driver out. Needs no GPU and no driver."""

import ctypes
import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import one_line
from .parts import Missing, Parts

# What the sources use of C++ headers, which NVRTC does not have.
_STANDARD_HEADERS = {
    "cstdint": """#pragma once
using int32_t = int;
using int64_t = long long;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
using uintptr_t = unsigned long long;
""",
    "type_traits": """#pragma once
namespace std {
template <class, class> struct is_same { static constexpr bool value = false; };
template <class T> struct is_same<T, T> { static constexpr bool value = true; };
}
""",
}
OPTIONS = ("-std=c++17", "-default-device")


class CompileError(Exception):
    """NVRTC rejected a kernel; the message is one line."""


@dataclass(frozen=True)
class Target:
    """What to compile for: `sm_90` gives machine code, `compute_90` PTX, which the driver compiles for newer GPUs."""

    kind: str
    number: int  #: ten times the compute capability

    def __str__(self) -> str:
        return f"{self.kind}_{self.number}"


class Nvrtc:
    """An NVRTC library.

    Raises:
        Missing: It cannot be loaded.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._library = ctypes.CDLL(str(path))
            self.version = "{}.{}".format(*self._numbers("nvrtcVersion", 2))
            (count,) = self._numbers("nvrtcGetNumSupportedArchs", 1)
            supported = (ctypes.c_int * count)()
            self._check(self._library.nvrtcGetSupportedArchs(supported))
        except (OSError, AttributeError, CompileError) as error:
            raise Missing(f"'{path.name}' cannot be used: {one_line(error)}") from error
        self.supported = sorted(supported)

    def target(self, capability: tuple[int, int]) -> Target | None:
        """What runs on a GPU of a compute capability; None if it is older than all that NVRTC knows."""
        major, minor = capability
        own = 10 * major + minor
        known = [number for number in self.supported if number <= own]
        if not known:
            return None
        best = max(known)  # machine code runs on all later minor versions
        return Target("sm" if best // 10 == major else "compute", best)

    def compile(self, parts: Parts, kernel: str, argument_bytes: int, target: Target) -> tuple[bytes, str]:
        """One kernel.

        Args:
            parts: Where the sources and headers are.
            kernel: Such as "forward_kernel<float, 8, 9, true, uint32_t>".
            argument_bytes: Size of its first argument, `Arguments`, according to the host's compiler; another one in
                the kernel is an error.
            target: What to compile for.

        Returns:
            The image, and the kernel's name in it.

        Raises:
            CompileError: NVRTC rejects it.
        """
        expressions = [f"internimage::cuda::{kernel}"]
        image, (name,), _ = self.build(parts, _program(kernel, argument_bytes), expressions, target)
        return image, name

    def build(
        self, parts: Parts, source: str, expressions: list[str], target: Target, *more_options: str
    ) -> tuple[bytes, list[str], str]:
        """A program, and the kernels that are instantiated in it.

        Returns:
            The image, the name of each expression in it, and NVRTC's log.

        Raises:
            CompileError: NVRTC rejects it.
        """
        program = ctypes.c_void_p()
        names, texts = list(_STANDARD_HEADERS), list(_STANDARD_HEADERS.values())
        text, label = source.encode(), b"internimage.cu"
        headers = len(names), _strings(texts), _strings(names)
        self._check(self._library.nvrtcCreateProgram(ctypes.byref(program), text, label, *headers))
        try:
            for expression in expressions:
                self._check(self._library.nvrtcAddNameExpression(program, expression.encode()))
            options = [
                *OPTIONS,
                f"--gpu-architecture={target}",
                f"--include-path={parts.sources}",
                f"--include-path={parts.include}",
                *more_options,
            ]
            status = self._library.nvrtcCompileProgram(program, len(options), _strings(options))
            log = self._bytes(program, "nvrtcGetProgramLog").decode(errors="replace").strip("\0\n ")
            if status != 0:
                raise CompileError(_first_error(log) or self._error(status))
            image = self._bytes(program, "nvrtcGetCUBIN" if target.kind == "sm" else "nvrtcGetPTX")
            return image, [self._lowered(program, expression) for expression in expressions], log
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _lowered(self, program: ctypes.c_void_p, expression: str) -> str:
        name = ctypes.c_char_p()
        self._check(self._library.nvrtcGetLoweredName(program, expression.encode(), ctypes.byref(name)))
        return (name.value or b"").decode()

    def _numbers(self, function: str, count: int) -> list[int]:
        values = [ctypes.c_int() for _ in range(count)]
        self._check(getattr(self._library, function)(*map(ctypes.byref, values)))
        return [value.value for value in values]

    def _bytes(self, program: ctypes.c_void_p, function: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._library, f"{function}Size")(program, ctypes.byref(size)))
        content = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._library, function)(program, content))
        return content.raw

    def _check(self, status: int) -> None:
        if status != 0:
            raise CompileError(self._error(status))

    def _error(self, status: int) -> str:
        function = self._library.nvrtcGetErrorString
        function.restype = ctypes.c_char_p
        return (function(status) or b"unknown error").decode()


@functools.cache
def load(path: Path) -> Nvrtc:
    """The library at a path, once a process."""
    return Nvrtc(path)


def _program(kernel: str, argument_bytes: int) -> str:
    """A translation unit with what a kernel is instantiated from."""
    arguments = kernel[kernel.index("<") + 1 : -1].split(", ")
    compute = "double" if arguments[0] == "double" else "float"
    index = next(argument for argument in arguments if argument.startswith("uint"))
    return (
        f'#include "cuda/gather/{kernel.partition("_")[0]}.cuh"\n'
        f"static_assert(sizeof(internimage::cuda::Arguments<{compute}, {index}>) == {argument_bytes}, "
        '"the host lays out the arguments differently");\n'
    )


def _strings(values: list[str]) -> Any:
    return (ctypes.c_char_p * len(values))(*(value.encode() for value in values))


def _first_error(log: str) -> str:
    """The first error of a log, without the path of the file."""
    for line in log.splitlines():
        found = re.search(r"([^/\\]+\(\d+\): )?(catastrophic |fatal )?error.*", line)
        if found is not None:
            return one_line(Exception(found.group(0)))
    return one_line(Exception(log)) if log else ""
