# SPDX-License-Identifier: MIT
"""A model as a file of torch.export, or as an AOTInductor package."""

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
    except Exception as error:  # torch's own errors have no common type
        raise ExportError(f"torch cannot export this model: {cause_of(error)}") from error
    return program


def own_operators(program: ExportedProgram) -> list[str]:
    """The operators of this package that a program calls."""
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    return sorted(name for name in names if name.startswith("internimage."))


def save(program: ExportedProgram, path: Path, description: Description) -> None:
    """Write a program with its description."""
    with silence():
        torch.export.save(program, str(path), extra_files={EXTRA_FILE: json.dumps(description.properties())})


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
