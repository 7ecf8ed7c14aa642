# SPDX-License-Identifier: MIT
"""Training a part of a model: which modules keep their weights."""

from torch import nn

from ..config import ConfigError


def frozen_parts(model: nn.Module, freeze: int) -> list[nn.Module]:
    """The modules that `freeze` keeps as they are.

    Raises:
        ConfigError: The model has no stages.
    """
    if not freeze:
        return []
    if freeze == 5:
        classifier = model.get_classifier()
        return [part for part in model.children() if part is not classifier]
    if not hasattr(model, "levels"):
        raise ConfigError("'freeze' of 1 to 4 is for InternImage models; 5 works with every model")
    return [model.patch_embed, *list(model.levels)[:freeze]]
