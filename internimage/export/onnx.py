# SPDX-License-Identifier: MIT
"""A model as an ONNX file: traced, with readable names, dynamic sizes, and its description inside."""

import ast
import contextlib
import hashlib
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import operator_form
from .description import Description, ExportError, cause_of
from .packages import required, version
from .silence import silence

DEFAULT_OPSET = {"deform-conv": 20, "grid-sample": 18, "": 20}
_LEAST_OPSET = {"deform-conv": 19, "grid-sample": 18, "": 18}
_MOST_BYTES = 2 * 10**9  # of a file without external data; protobuf's limit is 2 GiB
_SCOPES = "pkg.torch.onnx.name_scopes"  # torch's note at a node: the modules that it is in, and its name
_NO_SCOPE = "_empty_nn_module_stack_from_metadata_hook"  # what torch says for a size of the input
_FOLD = 1 << 40  # bytes: constants of any size are computed before they are stored


def check_opset(opset: int, operator: str) -> None:
    """Check an opset before anything is traced.

    Args:
        opset: Of ONNX.
        operator: A form of the operator; empty for a model without deformable layers.

    Raises:
        ExportError: The operator does not exist in it, or means something else there, or it is not known here.
    """
    import onnx

    if operator == "deform-conv" and opset < 19:
        raise ExportError(
            f"the operator DeformConv is in opset 19 and later, got {opset}: torch would write an invalid file without "
            f"an error; --operator grid-sample is for opset 18"
        )
    if operator == "grid-sample" and opset > 19:
        raise ExportError(
            f"--operator grid-sample is for opset 18 and 19, got {opset}: TensorRT reads GridSample of opset 20 as "
            f"nearest-neighbor, without an error"
        )
    if opset < _LEAST_OPSET[operator]:
        raise ExportError(f"opset must be at least {_LEAST_OPSET[operator]}, got {opset}")
    if opset > onnx.defs.onnx_opset_version():
        raise ExportError(
            f"opset must be at most {onnx.defs.onnx_opset_version()}, which onnx {onnx.__version__} knows"
        )


def trace(model: nn.Module, image: Tensor, operator: str, opset: int, outputs: tuple[str, ...], dynamic: bool) -> Any:
    """The ONNX program of a model, as torch's exporter makes it.

    Args:
        model: In eval mode.
        image: An example of the input.
        operator: A form of the operator; empty for a model without deformable layers.
        opset: As `check_opset` allows.
        outputs: Names of the outputs.
        dynamic: Whether batch, height and width are open; they are named so.

    Raises:
        ExportError: torch cannot export the model.
    """
    required("onnx", "onnxscript")
    batched = (
        {0: "batch", 1: "height", 2: "width"} if image.dtype == torch.uint8 else {0: "batch", 2: "height", 3: "width"}
    )
    with contextlib.ExitStack() as stack:
        if operator:
            stack.enter_context(operator_form(operator))
        stack.enter_context(torch.no_grad())
        stack.enter_context(silence())
        try:
            program = torch.onnx.export(
                model,
                (image,),
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=["image"],
                output_names=list(outputs),
                dynamic_shapes=(batched,) if dynamic else None,
            )
        except Exception as error:  # torch's own errors have no common type
            raise ExportError(f"torch cannot export this model to ONNX opset {opset}: {cause_of(error)}") from error
    assert program is not None
    if (written := program.model.opset_imports.get("")) != opset:  # without an error, at one that it does not know
        raise ExportError(
            f"the exporter of torch {torch.__version__} and onnxscript {version('onnxscript')} does not know opset "
            f"{opset}, and wrote {written}: take a lower --opset, or update them"
        )
    _fold(program)
    own = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    _rename(program.model.graph, own)
    return program


def _fold(program: Any) -> None:
    """Compute what depends on weights alone: the exporter stops at small constants."""
    import onnxscript

    onnxscript.optimizer.optimize_ir(program.model, input_size_limit=_FOLD, output_size_limit=_FOLD)


def _rename(graph: Any, own: set[str]) -> None:
    """Name nodes by the modules that they are of, and what they compute by the nodes, for those who look at the file.

    The second MatMul of a module "levels.0.blocks.0.dcn" is "levels.0.blocks.0.dcn/MatMul_1", its output
    "levels.0.blocks.0.dcn/MatMul_1_output"; weights that were folded are "levels.0.blocks.0.dcn/MatMul_1_input_1". What
    torch has written beside each node goes: lines of source code, with the paths of this machine.

    Args:
        graph: Of onnx_ir.
        own: The model's parameters and buffers, which keep their names.
    """
    counts: Counter[str] = Counter()
    kept = {id(value) for value in (*graph.inputs, *graph.outputs)}
    kept |= {id(value) for name, value in graph.initializers.items() if name in own}
    for node in graph:
        scopes = ["", *ast.literal_eval(node.metadata_props.get(_SCOPES, "['']"))]
        scope = scopes[-2]
        name = f"{scope}/{node.op_type}" if scope and scope != _NO_SCOPE else node.op_type
        node.name = f"{name}_{counts[name]}" if counts[name] else name
        counts[name] += 1
        node.doc_string = None
        node.metadata_props.clear()
        several = len(node.outputs) > 1
        names = [(value, f"{node.name}_output{f'_{i}' if several else ''}") for i, value in enumerate(node.outputs)]
        names += [(value, f"{node.name}_input_{i}") for i, value in enumerate(node.inputs) if value is not None]
        for value, name in names:
            value.metadata_props.clear()
            if id(value) not in kept:
                value.name = name
                kept.add(id(value))
    graph.metadata_props.clear()


def save(program: Any, path: Path, description: Description, external_data: bool) -> None:
    """Write an ONNX program with its description.

    Args:
        program: From `trace`.
        path: The file.
        description: Is stored in the file's metadata.
        external_data: Write weights to a file beside it; larger ones than 2 GB are in any case.
    """
    import onnx_ir

    program.model.metadata_props.update(description.properties())
    program.model.producer_name = "internimage"
    size = sum(value.const_value.nbytes for value in program.model.graph.initializers.values() if value.const_value)
    external = external_data or size > _MOST_BYTES
    onnx_ir.save(program.model, str(path), external_data=data_name(path, description) if external else None)


def data_name(path: Path, description: Description) -> str:
    """The file of the external data, named by what is in it: one that replaces another has another name, so that at
    any time a file is beside its own weights."""
    content = f"{description.checksum} {description.dtype} {description.operator} {description.opset}"
    return f"{path.name}.{hashlib.sha256(content.encode()).hexdigest()[:8]}.data"


def data_files(path: Path) -> list[Path]:
    """The files of external data beside an ONNX file, of this or an earlier export."""
    pattern = re.compile(re.escape(path.name) + r"\.[0-9a-f]{8}\.data")
    return [each for each in path.parent.iterdir() if pattern.fullmatch(each.name)]


def check_file(path: Path) -> None:
    """ONNX's own check of a file, with the shapes of all values.

    Raises:
        ExportError: It is not valid.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise ExportError(f"the exported file is not valid ONNX: {cause_of(error)}") from error


def redescribe(path: Path, description: Description) -> None:
    """Replace the description in an ONNX file; external data stays where it is."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, description.properties())
    path.write_bytes(model.SerializeToString())
