# SPDX-License-Identifier: MIT
"""Models, registered with timm on import."""

from ..errors import CheckpointError
from . import internimage  # noqa: F401  (registers the models)
from .backbone import InternImage
from .published import PUBLISHED, Published

__all__ = ["PUBLISHED", "CheckpointError", "InternImage", "Published"]
