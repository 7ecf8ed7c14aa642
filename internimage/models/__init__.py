# SPDX-License-Identifier: MIT
"""Models, registered with timm on import."""

from ..errors import CheckpointError
from .internimage import InternImage
from .published import PUBLISHED, Published

__all__ = ["PUBLISHED", "CheckpointError", "InternImage", "Published"]
