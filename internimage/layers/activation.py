# SPDX-License-Identifier: MIT
"""Activations by timm's names."""

from collections.abc import Callable
from reprlib import repr  # shortens, so that a message stays on one line whatever a file contains
from typing import Any

from timm.layers import get_act_layer
from torch import nn


def activation_class(act_layer: Any) -> Callable[..., nn.Module]:
    """The class of an activation.

    Args:
        act_layer: timm's name of it, or the class itself.

    Raises:
        ValueError: It is neither.
    """
    try:
        known = get_act_layer(act_layer)
    except (KeyError, TypeError):
        known = None
    if not callable(known):  # timm returns None for an empty name, and anything that is not a name as it is
        raise ValueError(f"act_layer must be timm's name of an activation, such as 'gelu', got {repr(act_layer)}")
    return known
