# SPDX-License-Identifier: MIT
"""Models, registered with timm on import."""

from ..errors import CheckpointError
from ..weights.released import PUBLISHED, Published
from . import internimage  # noqa: F401  (registers the models)
from .classifier import InternImage
from .dcn_resnet import DCNResNet
from .deformable import DeformError, deform_convolutions

__all__ = [
    "PUBLISHED", "CheckpointError", "DCNResNet", "DeformError", "InternImage", "Published", "deform_convolutions",
]  # fmt: skip
