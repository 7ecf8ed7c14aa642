# SPDX-License-Identifier: MIT
"""Exporting a model to a file that other runtimes read: traced, verified, described, and placed whole or not at all."""

import copy
import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..atomic import partial_folder
from ..models.attributes import name_of
from ..models.parts import check_image_size, sampling_layers
from . import onnx, program
from .card import card
from .description import OPEN, Description, ExportError, VerificationError, describe
from .features import Features
from .packages import required, version
from .preprocess import FromBytes
from .quantize import quantize
from .verify import Verification, other_inputs, verify

FORMATS = {"onnx": ".onnx", "pt2": ".pt2", "aoti": ".pt2"}
_LEAST_OPEN_SIDE = 64  # px, of what is traced
_OPEN_BATCH, _FIXED_BATCH = 2, 1  # that are traced; an open one of 1 would be taken for fixed


@dataclass(frozen=True)
class Request:
    """What to export.

    Attributes:
        format: One of `FORMATS`.
        operator: ONNX: "deform-conv" or "grid-sample".
        opset: ONNX; None for 20, or 18 of grid-sample.
        dtype: "float32" or "float16".
        features: The maps of the stages instead of logits.
        quantize: ONNX: "dynamic" or "static"; empty for neither.
        preprocess: ONNX: resize, crop and normalize within the file.
        decompose: pt2 and aoti: our operators in plain torch.
        dynamic: Whether batch, height and width are open. torch.export fixes sides of less than 33.
        size: (height, width) to trace at; None for the model's.
        external_data: ONNX: weights in a file beside it.
        verify: Whether to run the file and compare it.
        overwrite: Replace a file that is there.
    """

    format: str
    operator: str = "deform-conv"
    opset: int | None = None
    dtype: str = "float32"
    features: bool = False
    quantize: str = ""
    preprocess: bool = False
    decompose: bool = False
    dynamic: bool = True
    size: tuple[int, int] | None = None
    external_data: bool = False
    verify: bool = True
    overwrite: bool = False


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        files: The exported file first; then external data, and the card.
        description: Of the file.
        verification: None if it was not asked for.
    """

    files: tuple[Path, ...]
    description: Description
    verification: Verification | None


def check(path: Path, request: Request) -> None:
    """Check what can be checked without a model.

    Raises:
        ExportError: Something is missing, does not go together or cannot be written.
    """
    suffix = FORMATS[request.format]
    if path.suffix.lower() != suffix:
        raise ExportError(f"a file of format {request.format} ends in {suffix}, got '{path}'")
    if path.is_dir():
        raise ExportError(f"'{path}' is a folder; the result is a file")
    present = [each for each in (path, _card_of(path)) if each.exists()]
    if present and not request.overwrite:
        raise ExportError(f"'{present[0]}' exists; --overwrite replaces it")
    if request.format == "onnx":
        required("onnx", "onnxscript", *(["onnxruntime"] if request.verify or request.quantize else []))
        if request.opset is not None:
            onnx.check_opset(request.opset, request.operator)
    elif request.quantize or request.preprocess or request.external_data or request.opset is not None:
        raise ExportError(f"quantization, preprocessing, external data and an opset are for ONNX, not {request.format}")
    if request.quantize and (request.dtype != "float32" or request.features):
        raise ExportError("quantization starts from a classifier in float32: omit --dtype and --features")
    if request.preprocess and request.features:
        raise ExportError("preprocessing within the file ends in probabilities: omit --features")


def _card_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.md")


def export_model(
    model: nn.Module,
    config: Mapping[str, Any],
    weights: str,
    path: Path,
    request: Request,
    calibration: Sequence[Tensor] = (),
) -> Exported:
    """Export a model.

    Args:
        model: In float32; is left in eval mode.
        config: timm's preprocessing.
        weights: Where they are from, in words.
        path: The file to write; the card is written beside it.
        request: What to export.
        calibration: Images (1, C, H, W), preprocessed, for a static quantization and for its verification.

    Raises:
        ExportError: The model cannot be exported so, or the file failed its verification; nothing was written.
        OSError: The disk is full, for example; nothing was written.
    """
    check(path, request)
    model = model.eval()
    size = (config["input_size"][0], *(request.size or config["input_size"][1:]))
    try:
        check_image_size(model, *size[1:])
    except ValueError as error:
        raise ExportError(str(error)) from error
    traced = _wrapped(model, config, request)
    description = _description(model, traced, {**config, "input_size": size}, weights, request)
    parent = path.parent
    parent.mkdir(parents=True, exist_ok=True)
    with partial_folder(parent) as folder:
        staged = folder / path.name
        exported = _write(model, traced, staged, description, request, calibration)
        found = None
        if request.verify:
            found = _verified(model, traced, exported, staged, description, request, calibration)
            if not found.good:
                raise VerificationError(f"the exported file is not what the model is, and was removed: {found.text}")
            description = dataclasses.replace(description, verification=found.numbers)
            _redescribe(exported, staged, description, request)
        data = onnx.data_files(staged)
        bytes_ = sum(each.stat().st_size for each in (staged, *data))
        _card_of(staged).write_text(card(description, path.name, bytes_), encoding="utf-8")
        files = [*data, staged, _card_of(staged)]  # the weights first: the file itself is always beside its own
        for each in files:
            with each.open("rb") as file:
                os.fsync(file.fileno())
        before = onnx.data_files(path)
        for each in files:
            os.replace(each, parent / each.name)
        for each in before:
            if each.name not in [kept.name for kept in data]:
                each.unlink(missing_ok=True)
    placed = [parent / each.name for each in (staged, *data, _card_of(staged))]
    return Exported(tuple(placed), description, found)


def _wrapped(model: nn.Module, config: Mapping[str, Any], request: Request) -> nn.Module:
    """The module whose input and outputs are those of the file, in its dtype."""
    wrapped = Features(model) if request.features else FromBytes(model, config) if request.preprocess else model
    return wrapped if request.dtype == "float32" else copy.deepcopy(wrapped).to(getattr(torch, request.dtype))


def _description(
    model: nn.Module, traced: nn.Module, config: Mapping[str, Any], weights: str, request: Request
) -> Description:
    deformable = bool(sampling_layers(model))
    opset = 0
    operator = ""
    if request.format == "onnx":
        operator = request.operator if deformable else ""
        opset = request.opset or onnx.DEFAULT_OPSET[operator]
        onnx.check_opset(opset, operator)
    elif deformable:
        operator = "decomposed" if request.decompose else "internimage"
    classes: Any = getattr(model, "num_classes", 0)
    if not request.features and not classes:
        raise ExportError(f"'{name_of(model)}' has no classes: --features exports the maps of its stages")
    device = (
        next((parameter.device.type for parameter in model.parameters()), "cpu") if request.format == "aoti" else ""
    )
    found = describe(
        model, config, weights, format=request.format, operator=operator, dtype=request.dtype,
        quantization=request.quantize, opset=opset, features=getattr(traced, "names", ()), open=_open(config, request),
        preprocessed=request.preprocess, device=device,
    )  # fmt: skip
    if request.format != "onnx":
        return found
    made = {name: version(name) or "" for name in ("onnx", "onnxscript")}
    return dataclasses.replace(found, versions={**found.versions, **made})


def _open(config: Mapping[str, Any], request: Request) -> tuple[str, ...]:
    """Which dimensions of the input are open."""
    if not request.dynamic:
        return ()
    sides_too = request.format == "onnx" or min(config["input_size"][1:]) >= program.LEAST_SIDE
    return OPEN if sides_too else OPEN[:1]


def _batch(description: Description) -> int:
    return _OPEN_BATCH if description.open else _FIXED_BATCH


def _example(model: nn.Module, description: Description) -> Tensor:
    batch = _batch(description)
    if description.preprocessed:
        _, height, width = description.input_size
        return torch.zeros(batch, height + 32, width + 64, 3, dtype=torch.uint8)
    channels, height, width = description.input_size
    if description.format == "onnx" and description.open:
        height, width = _large_enough(model, height, width)
    return torch.zeros(batch, channels, height, width, dtype=getattr(torch, description.dtype))


def _large_enough(model: nn.Module, height: int, width: int) -> tuple[int, int]:
    """Multiples of sides that a model takes, large enough to be open: where the last map, 32 times smaller, has one
    pixel, the exporter takes that for fixed."""
    for times in range(-(-_LEAST_OPEN_SIDE // min(height, width)), 2 * _LEAST_OPEN_SIDE):
        try:
            check_image_size(model, times * height, times * width)
        except ValueError:
            continue
        return times * height, times * width
    return height, width


def _write(
    model: nn.Module,
    traced: nn.Module,
    staged: Path,
    description: Description,
    request: Request,
    calibration: Sequence[Tensor],
) -> Any:
    """Trace the model and write the file; returns the traced program."""
    image = _example(model, description)
    if request.format == "onnx":
        outputs = description.features or ("probabilities" if description.preprocessed else "logits",)
        found = onnx.trace(traced, image, description.operator, description.opset, outputs, bool(description.open))
        onnx.save(found, staged, description, request.external_data)
        if request.quantize:
            plain = staged.with_name(f"float32-{staged.name}")
            os.replace(staged, plain)
            quantize(plain, staged, request.quantize, calibration)
            for each in (plain, *onnx.data_files(staged)):  # an int8 file has its weights inside
                each.unlink()
            onnx.redescribe(staged, description)
        onnx.check_file(staged)
        return found
    parameter = next(traced.parameters(), None)
    if parameter is not None:
        image = image.to(parameter.device)
    table = program.decompositions(request.format, request.decompose)
    exported = program.trace(traced, image, description.open, table)
    if request.decompose and (own := program.own_operators(exported)):
        raise ExportError(f"the decomposed program still calls {', '.join(own)}")
    if request.format == "pt2":
        program.save(exported, staged, description)
    else:
        program.save_package(exported, staged, description)
    return exported


def _redescribe(exported: Any, staged: Path, description: Description, request: Request) -> None:
    """Store the description with its verification. A package keeps the one it was compiled with: the card has it."""
    if request.format == "onnx":
        onnx.redescribe(staged, description)
    elif request.format == "pt2":
        program.save(exported, staged, description)


def _verified(
    model: nn.Module,
    traced: nn.Module,
    exported: Any,
    staged: Path,
    description: Description,
    request: Request,
    calibration: Sequence[Tensor],
) -> Verification:
    if description.preprocessed:
        return verify(traced, traced, staged, description, _photographs(description))
    if description.quantization and calibration:
        return verify(model, traced, staged, description, [torch.cat(list(calibration))])
    reference = Features(model) if request.features else model
    inputs = other_inputs(model, description.input_size, description.open, _batch(description))
    return verify(reference, traced, staged, description, inputs)


def _photographs(description: Description) -> list[Tensor]:
    """Images of two sizes and batches, landscape and portrait, smooth as photographs are."""
    generator = torch.Generator().manual_seed(0)
    _, side, _ = description.input_size
    found = []
    for batch, height, width in ((1, side + 37, 2 * side), (3, 2 * side + 11, side + 60)):
        coarse = torch.rand(batch, 3, height // 16 + 2, width // 16 + 2, generator=generator)
        smooth = nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
        found.append((255 * smooth).round().byte().permute(0, 2, 3, 1).contiguous())
    return found
