# SPDX-License-Identifier: MIT
"""Runs an exported file, as a program of its own: without internimage, unless the file needs its operator.

    python run_file.py FILE INPUTS.npz OUTPUTS.npz [--import internimage]

INPUTS has arrays input0, input1, ...; OUTPUTS gets, input by input, the arrays output0.0, output0.1, ... This file
imports nothing of the package, so that it shows what a reader of the exported file has.
"""

import importlib
import os
import sys
import zipfile
from typing import Any

import numpy as np


def run_onnx(path: str, inputs: list[Any]) -> list[list[Any]]:
    """Outputs of an ONNX file in onnxruntime, on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return [session.run(None, {name: each}) for each in inputs]


def run_program(path: str, inputs: list[Any]) -> list[list[Any]]:
    """Outputs of a file of torch.export, or of an AOTInductor package."""
    import torch

    call: Any
    if is_package(path):
        os.environ["AOTI_RUNTIME_CHECK_INPUTS"] = "1"  # else a wrong shape is answered from foreign memory
        call = torch._inductor.aoti_load_package(path)
    else:
        call = torch.export.load(path).module()
    found = []
    with torch.no_grad():
        for each in inputs:
            outputs = call(torch.from_numpy(each))
            outputs = outputs if isinstance(outputs, (tuple, list)) else [outputs]
            found.append([output.float().cpu().numpy() for output in outputs])
    return found


def is_package(path: str) -> bool:
    """Whether a .pt2 file is an AOTInductor package."""
    with zipfile.ZipFile(path) as archive:
        return any("/aotinductor/" in name for name in archive.namelist())


def main(arguments: list[str]) -> None:
    path, inputs_path, outputs_path, *more = arguments
    if more:
        importlib.import_module(more[1])
    with np.load(inputs_path) as stored:
        inputs = [stored[f"input{i}"] for i in range(len(stored.files))]
    outputs = run_onnx(path, inputs) if path.endswith(".onnx") else run_program(path, inputs)
    np.savez(
        outputs_path,
        **{f"output{i}.{k}": value for i, each in enumerate(outputs) for k, value in enumerate(each)},
        imported=np.array("internimage" in sys.modules),
    )


if __name__ == "__main__":
    sys.path.remove(os.path.dirname(os.path.abspath(__file__)))  # its modules, such as onnx.py, are not the real ones
    main(sys.argv[1:])
