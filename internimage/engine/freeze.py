# SPDX-License-Identifier: MIT
"""Training part of a model: which modules are frozen."""

from torch import nn

from ..config import ConfigError
from ..models.attributes import classifier_of, name_of
from ..models.parts import NoSuchParts, stem_and_stages


def frozen_parts(model: nn.Module, freeze: int) -> list[nn.Module]:
    """The modules that `freeze` freezes: the stem and that many stages, or with 5 all but the classifier.

    Raises:
        ConfigError: The model has no stages, or fewer.
    """
    if not freeze:
        return []
    if freeze == 5:
        classifier = classifier_of(model)
        return [part for part in model.children() if part is not classifier]
    try:
        stem, stages = stem_and_stages(model)
    except NoSuchParts as error:
        raise ConfigError(f"'freeze' of 1 to 4 is for models with stages: {error}; 5 works with every model") from error
    if freeze > len(stages):
        raise ConfigError(f"'freeze' cannot be {freeze}: '{name_of(model)}' has {len(stages)} stages")
    return [*stem, *(module for stage in stages[:freeze] for module in stage)]
