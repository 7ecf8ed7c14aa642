# SPDX-License-Identifier: MIT
"""The maps of a model's stages as the outputs of an exported file."""

from typing import Any

from torch import Tensor, nn

from ..models.attributes import name_of
from .description import ExportError


class Features(nn.Module):
    """The maps of the stages, NCHW, the finest first.

    Args:
        model: A timm model with `forward_intermediates` and `feature_info`.

    Raises:
        ExportError: It has no maps.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        info: Any = getattr(model, "feature_info", None)
        if not info or not callable(getattr(model, "forward_intermediates", None)):
            raise ExportError(
                f"'{name_of(model)}' has no maps of stages (timm's feature_info), so no features to export"
            )
        self.model = model
        entries = [info[i] for i in range(len(info))] if not isinstance(info, list) else info
        self.names = tuple(f"stride{entry['reduction']}" for entry in entries)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        model: Any = self.model
        return tuple(model.forward_intermediates(image, intermediates_only=True))
