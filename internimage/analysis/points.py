# SPDX-License-Identifier: MIT
"""Where a layer samples, as numbers."""

import torch
from torch import Tensor, nn

from ..models.attributes import name_of
from ..models.parts import NoSuchParts, sampling_layers, sampling_layers_of_stage


@torch.inference_mode()
def sampled_points(model: nn.Module, images: Tensor, layer: str | None = None) -> tuple[str, Tensor, Tensor]:
    """Where a layer samples, in pixels of the model's input.

    Args:
        model: A model with layers that sample at learned offsets, such as DCNv3.
        images: (N, C, H, W), preprocessed.
        layer: Name of the layer; None takes the last one of stage 3.

    Returns:
        The layer's name; locations (N, Ho, Wo, groups, P, 2) as (x, y), where 0 is the center of the first pixel; and
        weights (N, Ho, Wo, groups, P).

    Raises:
        UserError: The model has no such layer.
    """
    layers = sampling_layers(model)
    if not layers:
        raise NoSuchParts(f"'{name_of(model)}' has no layers that sample at learned offsets, such as DCNv3")
    if layer is None:
        layer = (sampling_layers_of_stage(model, 3) or list(layers))[-1]
    if layer not in layers:
        raise NoSuchParts(
            f"'{name_of(model)}' has no sampling layer '{layer}'; it has {', '.join(list(layers)[:3])}, ..."
        )
    seen = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        model(images)
    finally:
        handle.remove()
    (x,) = seen
    location, weight = layers[layer].sampling(x)
    # a feature pixel covers `stride` image pixels, with its center in their middle
    height, width = layers[layer].input_size(x)
    stride = torch.tensor([images.shape[3] / width, images.shape[2] / height], device=location.device)
    return layer, (location.float() + 0.5) * stride - 0.5, weight.float()
