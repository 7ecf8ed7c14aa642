# SPDX-License-Identifier: MIT
"""An exported file as a model that can be evaluated: its outputs by its own runtime, its classes and preprocessing."""

import json
import os
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .description import Description, ExportError, cause_of
from .packages import required
from .run_file import is_package
from .silence import silence

SUFFIXES = (".onnx", ".pt2")
EXTRA_FILE = "internimage.json"  # the description in a .pt2 file
_DEFORM_CONV_SINCE = (1, 25)  # onnxruntime


def is_exported(name: str) -> bool:
    """Whether the name of a model is that of an exported file."""
    return name.lower().endswith(SUFFIXES)


class ExportedModel(nn.Module):
    """A model without parameters whose outputs are those of an exported file.

    Args:
        file: Its name, for messages.
        description: Of the file.
        call: Images of its dtype, on the CPU -> outputs.
    """

    def __init__(self, file: str, description: Description, call: Any) -> None:
        super().__init__()
        self.file, self.description, self._call = file, description, call
        self.num_classes = len(description.classes)
        self.in_chans = description.input_size[0]
        self.pretrained_cfg = {
            **description.data_config(),
            "architecture": description.architecture,
            "label_names": list(description.classes),
        }

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, classes), float32."""
        images = images.to("cpu", getattr(torch, self.description.dtype))
        try:
            if "batch" in self.description.open:
                outputs: Tensor = self._call(images)
            else:  # made for a batch of one
                outputs = torch.cat([self._call(image) for image in images.split(1)])
        except Exception as error:  # of the runtime, which has no common type
            raise ExportError(f"'{self.file}' cannot run on images {tuple(images.shape)}: {cause_of(error)}") from error
        return outputs.float()


def open_exported(path: str | Path) -> ExportedModel:
    """A classifier from a file that `internimage export` has written.

    Args:
        path: .onnx or .pt2.

    Raises:
        ExportError: The file is not there, damaged, not ours, of features, has its preprocessing inside, or needs
            another or newer runtime.
    """
    file = Path(path)
    if not file.is_file():
        raise ExportError(f"there is no file '{path}'")
    description, call = _open_onnx(file) if file.suffix.lower() == ".onnx" else _open_program(file)
    if description.features:
        raise ExportError(f"'{path}' gives the maps of the stages, so it has no classes to evaluate")
    if description.preprocessed:
        raise ExportError(
            f"'{path}' resizes and normalizes images by itself (--with-preprocess): export the model without that to "
            f"evaluate it"
        )
    return ExportedModel(str(path), description, call)


def _open_onnx(file: Path) -> tuple[Description, Any]:
    required("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what goes wrong is an exception as well
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own errors have no common type
        raise ExportError(_reason(file, error, onnxruntime.__version__)) from error
    description = Description.from_properties(session.get_modelmeta().custom_metadata_map, str(file))

    def call(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"image": images.numpy()})[0])

    return description, call


def _reason(file: Path, error: Exception, version: str) -> str:
    """Why onnxruntime cannot open a file, in the user's terms."""
    text = str(error)
    if "DeformConv" in text and tuple(map(int, version.split(".")[:2])) < _DEFORM_CONV_SINCE:
        return (
            f"'{file}' has the operator DeformConv, which onnxruntime has from 1.25 on, and this is {version}: pip "
            f"install -U onnxruntime, or export with --operator grid-sample"
        )
    data = re.search(r"[^/\\\s\"']+\.data\b", text)
    if data is not None and not file.with_name(data[0]).exists():
        return f"the weights of '{file}' are in '{data[0]}', which is not beside it"
    return f"'{file}' cannot be read by onnxruntime {version}: {cause_of(error)}"


def _open_program(file: Path) -> tuple[Description, Any]:
    try:
        package = is_package(str(file))
    except (zipfile.BadZipFile, OSError) as error:
        raise ExportError(f"'{file}' is damaged, or no file of torch.export: {cause_of(error)}") from error
    return _open_package(file) if package else _open_exported_program(file)


def _open_exported_program(file: Path) -> tuple[Description, Any]:
    extra = {EXTRA_FILE: ""}
    try:
        with silence():  # torch prints a traceback, and refers to it
            program = torch.export.load(str(file), extra_files=extra)
    except Exception as error:  # torch's own errors have no common type
        raise ExportError(
            f"'{file}' cannot be read by torch {torch.__version__}: it is damaged, or was made by another version"
        ) from error
    properties = json.loads(extra[EXTRA_FILE]) if extra[EXTRA_FILE] else {}
    return Description.from_properties(properties, str(file)), torch.no_grad()(program.module())


def _open_package(file: Path) -> tuple[Description, Any]:
    description = Description.from_properties(_package_properties(file), str(file))
    if description.device and description.device != "cpu":  # before it is loaded, which may need its device
        raise ExportError(f"'{file}' was built for {description.device}, and exported files are evaluated on the CPU")
    os.environ["AOTI_RUNTIME_CHECK_INPUTS"] = "1"  # else a wrong shape is answered from foreign memory
    try:
        with silence():
            package = torch._inductor.aoti_load_package(str(file))
    except Exception as error:  # torch's own errors have no common type
        raise ExportError(f"'{file}' cannot be read by torch {torch.__version__}: {cause_of(error)}") from error
    return description, torch.no_grad()(package)


def _package_properties(file: Path) -> dict[str, str]:
    """The metadata of an AOTInductor package: a file of JSON beside the compiled model."""
    try:
        with zipfile.ZipFile(file) as archive:
            name = next((name for name in archive.namelist() if name.endswith("_metadata.json")), None)
            found = {} if name is None else json.loads(archive.read(name))
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError, RecursionError) as error:
        raise ExportError(f"'{file}' is damaged: {cause_of(error)}") from error
    return {key: value for key, value in found.items() if isinstance(value, str)} if isinstance(found, dict) else {}
