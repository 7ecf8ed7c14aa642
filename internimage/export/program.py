# SPDX-License-Identifier: MIT
"""A model as a file of torch.export, or as an AOTInductor package."""

import io
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..ops import dcnv3_reference, deform_columns_reference, deform_conv_reference
from .description import Description, ExportError, cause_of
from .runtime import EXTRA_FILE
from .silence import silence

LEAST_SIDE = 33  # torch's convolutions ask whether the last map, which is 32 times smaller, has one pixel


def decompositions(format: str, plain: bool) -> dict[Any, Callable[..., Any]]:
    """What operators of this package are written out as.

    Args:
        format: "pt2" or "aoti".
        plain: Whether in plain torch, so that the program runs where internimage is not installed. Without it a package
            calls the operators that have compiled kernels, and so needs no Python.
    """
    operators = torch.ops.internimage
    convolution = {operators.deform_conv2d.default: deform_conv_reference.forward_at_once}
    if not plain:
        return convolution if format == "aoti" else {}
    return {
        **convolution,
        operators.dcnv3.default: dcnv3_reference.dcnv3,
        operators.deform_columns.default: deform_columns_reference.forward,
    }


def trace(
    model: nn.Module, image: Tensor, open_: Collection[str], decompositions: dict[Any, Callable[..., Any]]
) -> ExportedProgram:
    """The program of a model, as torch.export makes it.

    Args:
        model: In eval mode.
        image: An example of the input.
        open_: Which of "batch", "height" and "width" are open: any batch, and sides of at least `LEAST_SIDE`.
        decompositions: Operators, and what they are written out as.

    Raises:
        ExportError: torch cannot export the model.
    """
    shapes = {axis: Dim.DYNAMIC for axis, name in ((0, "batch"), (2, "height"), (3, "width")) if name in open_}
    try:
        with torch.no_grad(), silence():
            program = torch.export.export(model, (image,), dynamic_shapes=(shapes,), strict=False)
            if decompositions:
                program = program.run_decompositions(decompositions)
        for module in program.graph_module.modules():
            for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
                node.meta.pop("stack_trace", None)  # lines of source code, with the paths of this machine
    except Exception as error:  # torch's own errors have no common type
        raise ExportError(f"torch cannot export this model: {cause_of(error)}") from error
    return program


def own_operators(program: ExportedProgram) -> list[str]:
    """The operators of this package that a program calls."""
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    return sorted(name for name in names if name.startswith("internimage."))


class _File(io.FileIO):
    """A file whose first error is kept: where a write fails, such as on a full disk, torch would end the process."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while self.error is None and rest:
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.error = error
        return size


def save(program: ExportedProgram, path: Path, description: Description) -> None:
    """Write a program with its description.

    Raises:
        OSError: The disk is full, for example.
    """
    with silence(), _File(str(path), "w+") as file:
        torch.export.save(program, file, extra_files={EXTRA_FILE: json.dumps(description.properties())})
    if file.error is not None:
        raise file.error


def save_package(program: ExportedProgram, path: Path, description: Description) -> None:
    """Compile a program by AOTInductor, for the device of its weights, and write the package with its description.

    Raises:
        ExportError: AOTInductor cannot compile it, such as without a C++ compiler.
    """
    configs = {
        "aot_inductor.metadata": description.properties(),
        "aot_inductor.check_lowerbound": False,  # else its check of inputs refuses a batch of 1
    }
    try:
        with torch.no_grad(), silence():
            torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=configs)
    except Exception as error:  # torch's own errors have no common type
        raise ExportError(f"AOTInductor cannot compile this model: {cause_of(error)}") from error
