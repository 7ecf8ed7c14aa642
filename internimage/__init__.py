# SPDX-License-Identifier: MIT
"""InternImage for timm: the DCNv3 operator and the models built on it.

Importing this package registers the models, so that `timm.create_model("internimage_tiny.ogvl_in1k")` finds them.
"""

import timm

from . import models, ops
from .models import CheckpointError

__version__ = "0.1.0"

__all__ = ["CheckpointError", "__version__", "list_models", "models", "ops"]


def list_models(pretrained: bool = False) -> list[str]:
    """Names for `timm.create_model`.

    Args:
        pretrained: The released weights, as `name.tag`; else the architectures.
    """
    return timm.list_models("internimage_*", module="internimage", pretrained=pretrained)
