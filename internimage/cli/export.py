# SPDX-License-Identifier: MIT
"""`internimage export`."""

import argparse
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from ..data.datasets import EvaluationTransform
from ..data.images import DataError
from ..engine.create import pick_device
from ..export.export import Request, check, export_model
from ..export.program import LEAST_SIDE
from ..export.quantize import LEAST_IMAGES
from ..files import check_writable
from ..models.attributes import pretrained_cfg
from ..progress import message
from ..tasks.classification.predict import find_images, image_mode, preprocess, read_image
from ..terminal import say
from .arguments import load_model


def run(arguments: argparse.Namespace) -> int:
    path = Path(arguments.output)
    request = Request(
        format=arguments.format,
        operator=arguments.operator or "deform-conv",
        opset=arguments.opset,
        dtype=arguments.dtype,
        features=arguments.features,
        quantize=arguments.quantize or "",
        preprocess=arguments.with_preprocess,
        decompose=arguments.decompose,
        dynamic=not arguments.static,
        size=arguments.size,
        external_data=arguments.external_data,
        verify=not arguments.no_verify,
        overwrite=arguments.overwrite,
    )
    check(path, request)
    check_writable(path)
    images = _find(arguments)
    arguments.dtype = "float32"  # of the model; the file's is the request's
    model, config, _, _ = load_model(arguments)
    device = pick_device(arguments.device if request.format == "aoti" else "cpu")
    if arguments.checkpoint is not None:
        pretrained_cfg(model).pop("license", None)  # of timm's own weights
    own = arguments.checkpoint or arguments.model
    source = Path(own).name if Path(own).exists() else pretrained_cfg(model).get("tag") or own  # a name, and no path
    calibration = _calibration(images, config) if images else []
    found = export_model(model.to(device), config, str(source), path, request, calibration)
    for file in found.files:
        size = file.stat().st_size
        say(f"{file}: {size / 2**20:.1f} MiB" if size >= 2**20 else f"{file}: {size / 2**10:.1f} KiB")
    if found.description.open == ("batch",):
        fixed = " x ".join(map(str, found.description.input_size[1:]))
        say(f"sides are fixed at {fixed}: torch.export keeps them open from {LEAST_SIDE} pixels on")
    if found.verification is not None:
        say(f"verified in another process; {found.verification.text}")
    else:
        message("not verified")
    if found.description.operator == "internimage":
        say("it needs `import internimage` before it is loaded; --decompose makes one that does not", sys.stdout)
    return 0


def _find(arguments: argparse.Namespace) -> list[Path]:
    """The images to calibrate with."""
    if arguments.calibrate is None:
        return []
    found = find_images([arguments.calibrate])
    if len(found) < LEAST_IMAGES:
        raise DataError(
            f"calibration needs at least {LEAST_IMAGES} images, and '{arguments.calibrate}' has {len(found)}"
        )
    step = max(len(found) // arguments.images, 1)  # spread over classes, whose folders follow each other
    return found[::step][: arguments.images]


def _calibration(files: list[Path], config: dict[str, Any]) -> list[Tensor]:
    transform, mode = EvaluationTransform(config), image_mode(config)
    return [preprocess(transform, read_image(file, str(file), mode), str(file))[None] for file in files]
