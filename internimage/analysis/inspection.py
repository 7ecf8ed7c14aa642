# SPDX-License-Identifier: MIT
"""A model as views look into it: in eval mode, its parameters fixed, its weights and the image checked."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, list_some
from ..models.attributes import name_of, pretrained_cfg
from ..models.parts import check_image_size
from .maps import NodeError


class NotFiniteView(UserError, ArithmeticError):
    """A view of NaN or infinity: of weights, of an image, or of what a model makes of it. It would mean nothing."""

    status = 1  # the arguments were good


@contextmanager
def inspected(model: nn.Module, image: Tensor) -> Iterator[Tensor]:
    """Hold a model in eval mode with fixed parameters, without recomputing activations; autograd is on.

    Afterwards the model is as before.

    Args:
        model: Any model.
        image: (C, H, W) or (1, C, H, W), preprocessed as for the model.

    Yields:
        The image (1, C, H, W) on the device and in the dtype of the model.

    Raises:
        NodeError: It is no image, or none that the model takes.
        NotFiniteView: There is NaN or infinity in the weights or in the image.
    """
    with torch.inference_mode(False), torch.enable_grad():
        batch = _checked_image(model, image)
        _check_weights(model)
        modes = [(module, module.training) for module in model.modules()]
        recomputing: list[Any] = [module for module in model.modules() if getattr(module, "grad_checkpointing", False)]
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        try:
            model.eval()
            for module in recomputing:
                module.grad_checkpointing = False  # a block would be computed again in each backward pass
            for parameter in trained:
                parameter.requires_grad_(False)
            yield batch
        finally:
            for module, mode in modes:
                module.training = mode
            for module in recomputing:
                module.grad_checkpointing = True
            for parameter in trained:
                parameter.requires_grad_(True)


def _checked_image(model: nn.Module, image: Tensor) -> Tensor:
    """The image as a batch of its own memory, where the model is."""
    if not isinstance(image, Tensor) or not image.is_floating_point():
        found = str(image.dtype) if isinstance(image, Tensor) else type(image).__name__
        raise NodeError(f"image must be a floating-point tensor (C, H, W), preprocessed, got {found}")
    batch = image[None] if image.dim() == 3 else image
    if batch.dim() != 4 or batch.shape[0] != 1 or 0 in batch.shape:
        raise NodeError(f"image must be one image, (C, H, W) or (1, C, H, W), got {tuple(image.shape)}")
    channels = getattr(model, "in_chans", None) or (pretrained_cfg(model).get("input_size") or (None,))[0]
    if channels is not None and batch.shape[1] != channels:
        raise NodeError(f"'{name_of(model)}' takes images of {channels} channels, got {batch.shape[1]}")
    try:
        check_image_size(model, batch.shape[2], batch.shape[3])
    except ValueError as error:
        raise NodeError(str(error)) from error
    if not torch.isfinite(batch).all():
        raise NotFiniteView("the image has NaN or infinity: a view of it would mean nothing")
    like = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), batch)
    return batch.detach().to(like.device, like.dtype, copy=True)


@torch.no_grad()
def _check_weights(model: nn.Module) -> None:
    # a sum is not finite if a term is not; buffers, such as masks, may be infinite on purpose
    bad = [
        name
        for name, tensor in model.named_parameters()
        if tensor.is_floating_point() and not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all()
    ]
    bad += [name for name, tensor in model.named_buffers() if tensor.is_floating_point() and tensor.isnan().any()]
    if bad:
        raise NotFiniteView(
            f"the weights of '{name_of(model)}' have NaN or infinity ({list_some(bad, 3)}): a view would mean nothing"
        )


def check_finite(tensor: Tensor, what: str, dtype: torch.dtype) -> None:
    """Check what a model made of a finite image by finite weights.

    Args:
        tensor: Values or gradients.
        what: They are, for the message.
        dtype: In which the model runs.

    Raises:
        NotFiniteView: There is NaN or infinity.
    """
    if torch.isfinite(tensor).all():
        return
    half = dtype in (torch.float16, torch.bfloat16)
    hint = f": {str(dtype).removeprefix('torch.')} overflows, take float32" if half else ""
    raise NotFiniteView(f"{what} is not finite, though image and weights are{hint}")
