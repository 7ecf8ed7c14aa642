# SPDX-License-Identifier: MIT
"""Outputs that are not finite: no class is the largest of them, so nothing is counted or said of them."""

import torch
from torch import Tensor, nn

from ..errors import UserError, some


class NotFiniteError(UserError, ArithmeticError):
    """A model gave NaN or infinity.

    Attributes:
        weights: Whether its own weights are not finite, so that no image will fare better.
    """

    status = 1  # the input was good and the answer is not

    def __init__(self, message: str, weights: bool = False) -> None:
        super().__init__(message)
        self.weights = weights


def not_finite(logits: Tensor, model: nn.Module, dtype: torch.dtype) -> NotFiniteError | None:
    """What is wrong with outputs, for the caller to raise; None if they are finite.

    Args:
        logits: As the model gave them; where a class is impossible a probability may be 0, an output is finite.
        model: That gave them. Of sharded weights this process's part is looked at: no exchange is made.
        dtype: What it runs in.
    """
    if torch.isfinite(logits).all():
        return None
    half = dtype in (torch.float16, torch.bfloat16)
    hint = ""
    if half:
        instead = "bfloat16 or float32" if dtype == torch.float16 else "float32"
        hint = f": {str(dtype).removeprefix('torch.')} overflows, try {instead}"
    bad, nan = [], False
    for name, tensor in model.state_dict().items():
        tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad.append(name)
            nan = nan or bool(torch.isnan(tensor).any())
    if bad:
        # a conversion to float16 makes infinities of large weights, and no NaN
        return NotFiniteError(f"the model's weights are not finite ({some(bad, 3)}){'' if nan else hint}", weights=True)
    return NotFiniteError(f"the model's outputs are not finite, though its weights are{hint}")
