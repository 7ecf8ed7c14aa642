# SPDX-License-Identifier: MIT
"""Models, registered with timm on import."""

from ..errors import CheckpointError
from ..weights.released import PUBLISHED, Published
from . import internimage  # noqa: F401  (registers the models)
from .classifier import InternImage

__all__ = ["PUBLISHED", "CheckpointError", "InternImage", "Published"]
