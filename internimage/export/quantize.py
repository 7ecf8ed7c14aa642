# SPDX-License-Identifier: MIT
"""int8 versions of an ONNX file, by onnxruntime.quantization."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .description import ExportError, cause_of
from .packages import required
from .silence import silence

KINDS = ("dynamic", "static")
LEAST_IMAGES = 2  # of calibration: one image has no range of activations to speak of


def quantize(source: Path, target: Path, kind: str, images: Sequence[Tensor]) -> None:
    """Write an int8 version of an ONNX file.

    "dynamic" quantizes the weights of matrix products, and their inputs when they are computed. "static" quantizes
    products and convolutions with ranges of activations that were seen on images.

    Args:
        source: The file, in float32.
        target: The file to write.
        kind: One of `KINDS`.
        images: (1, C, H, W) each, preprocessed, to calibrate a static version.

    Raises:
        ExportError: onnxruntime cannot quantize the model, or there are too few images.
    """
    required("onnx", "onnxruntime")
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    if kind == "static" and len(images) < LEAST_IMAGES:
        raise ExportError(f"calibration needs at least {LEAST_IMAGES} images, got {len(images)}")
    prepared = target.with_name(f"prepared-{target.name}")
    try:
        with silence():
            quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
            if kind == "dynamic":
                quantization.quantize_dynamic(
                    str(prepared), str(target), op_types_to_quantize=["MatMul"], per_channel=True,
                    weight_type=quantization.QuantType.QInt8,
                )  # fmt: skip
            else:
                quantization.quantize_static(
                    str(prepared), str(target), _Reader(images), op_types_to_quantize=["MatMul", "Conv"],
                    quant_format=quantization.QuantFormat.QDQ, per_channel=True,
                    activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
                )  # fmt: skip
    except Exception as error:  # onnxruntime's own errors have no common type
        raise ExportError(f"onnxruntime cannot quantize this model: {cause_of(error)}") from error
    finally:
        prepared.unlink(missing_ok=True)


class _Reader:
    """What `quantize_static` reads images by."""

    def __init__(self, images: Sequence[Tensor]) -> None:
        self._images = iter(images)

    def get_next(self) -> dict[str, Any] | None:
        """The next input; None at the end."""
        image = next(self._images, None)
        return None if image is None else {"image": image.numpy()}
