# SPDX-License-Identifier: MIT
"""Models in the formats of other runtimes."""

from ..ops.onnx_forms import operator_form

__all__ = ["operator_form"]
