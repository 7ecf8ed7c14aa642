# SPDX-License-Identifier: MIT
"""Exports modules to ONNX, as anybody does, and runs the files in onnxruntime."""

import contextlib
import warnings
from collections import Counter
from pathlib import Path

import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from internimage.export import operator_form

DYNAMIC = torch.export.Dim.DYNAMIC


class Many(nn.Module):
    """Several modules as one, each with arguments of its own: exporting takes a second, whatever it is."""

    def __init__(self, parts) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, arguments: list[tuple[Tensor, ...]]) -> list[Tensor]:
        return [part(*tensors) for part, tensors in zip(self.parts, arguments, strict=True)]


class File:
    """An exported file, which the checker accepts.

    Args:
        module: What is exported.
        arguments: The example.
        folder: Where the file is written.
        form: For `operator_form`; None: without it.
        dynamo: Which of torch's exporters.
        options: Of `torch.onnx.export`.
    """

    def __init__(
        self, module: nn.Module, arguments: tuple, folder: Path, form: str | None = None, dynamo=True, **options
    ):
        path = folder / "exported.onnx"
        chosen = operator_form(form) if form else contextlib.nullcontext()
        with chosen, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that one exporter is old, and what the other one has skipped
            torch.onnx.export(module, arguments, path, dynamo=dynamo, **options)
        self.path = path
        self.model = onnx.load(path)
        onnx.checker.check_model(self.model, full_check=True)
        self.nodes = list(self.model.graph.node)
        self.opset = {entry.domain: entry.version for entry in self.model.opset_import}
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = settings.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        names = [entry.name for entry in self.session.get_inputs()]
        inputs = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        return [torch.from_numpy(output) for output in self.session.run(None, inputs)]

    def counts(self) -> Counter:
        """Nodes by type, with the domain of those that are not of ONNX itself."""
        return Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in self.nodes)

    def on_activations(self, *types: str) -> list[str]:
        """Names of the nodes of some types whose first input is neither a parameter, nor a constant, nor a shape."""
        constant = {entry.name for entry in self.model.graph.initializer}
        constant |= {name for node in self.nodes if node.op_type in ("Constant", "Shape") for name in node.output}
        return [node.name for node in self.nodes if node.op_type in types and node.input[0] not in constant]
