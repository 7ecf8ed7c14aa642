# SPDX-License-Identifier: MIT
"""Analysis of a model: where its layers sample, and what a node inside it depends on.

A node is a vector or number inside a model: `Position`, `Logit` or `Pooled`. A view is a function that returns arrays.
"""

from .composed_points import ComposedPoints, LayerDilation, composed_points, effective_dilation
from .effective_points import EffectivePoints, LayerPoints, effective_points
from .inspection import NotFiniteView
from .maps import LayerMap, NodeError
from .nodes import Logit, Node, OpenNode, Pooled, Position, map_of, predicted_class
from .points import sampled_points
from .receptive_field import ReceptiveField, effective_receptive_field
from .saliency import SaliencyRegion, saliency_region
from .sheet import draw_points

__all__ = [
    "ComposedPoints", "EffectivePoints", "LayerDilation", "LayerMap", "LayerPoints", "Logit", "Node", "NodeError",
    "NotFiniteView", "OpenNode", "Pooled", "Position", "ReceptiveField", "SaliencyRegion", "composed_points",
    "draw_points", "effective_dilation", "effective_points", "effective_receptive_field", "map_of", "predicted_class",
    "sampled_points", "saliency_region",
]  # fmt: skip
