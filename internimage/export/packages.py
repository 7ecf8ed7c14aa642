# SPDX-License-Identifier: MIT
"""The optional packages of export: whether they are installed, and new enough."""

import importlib.util
from importlib import metadata

from .description import ExportError

EXTRA = "pip install 'internimage[export]'"
RUNTIMES = ("onnx", "onnxscript", "onnxruntime", "openvino", "tensorrt")
NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "pt2": (), "aoti": ()}  # beyond torch; to export and to verify


def version(package: str) -> str | None:
    """The version of an installed package; None without it."""
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def required(*packages: str) -> None:
    """Check that packages are installed.

    Raises:
        ExportError: One is missing; the message says how to get it.
    """
    missing = [package for package in packages if version(package) is None]
    if missing:
        raise ExportError(
            f"this needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: {EXTRA}"
        )
