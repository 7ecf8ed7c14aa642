# SPDX-License-Identifier: MIT
"""Outputs and weights that are not finite: no class is the largest of such outputs, so nothing is counted of them."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..errors import UserError, some
from .world import World


class NotFiniteError(UserError, ArithmeticError):
    """A model gave NaN or infinity.

    Attributes:
        weights: Whether its own weights are not finite, so that no image will fare better.
    """

    status = 1  # the input was good and the answer is not

    def __init__(self, message: str, weights: bool = False) -> None:
        super().__init__(message)
        self.weights = weights


def output_problem(logits: Tensor, model: nn.Module, dtype: torch.dtype) -> NotFiniteError | None:
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
    for name, tensor in _weights(model):
        if not torch.isfinite(tensor).all():
            bad.append(name)
            nan = nan or bool(torch.isnan(tensor).any())
    if bad:
        # a conversion to float16 makes infinities of large weights, and no NaN
        return NotFiniteError(f"the model's weights are not finite ({some(bad, 3)}){'' if nan else hint}", weights=True)
    return NotFiniteError(f"the model's outputs are not finite, though its weights are{hint}")


def finite_weights(model: nn.Module) -> set[str]:
    """Names of the tensors that are finite as a whole: a mask may be infinite by intent."""
    return {name for name, tensor in _weights(model) if tensor.isfinite().all()}


def weights_problem(model: nn.Module, names: set[str], world: World) -> str | None:
    """What of the named tensors is infinite or NaN, for a sentence; None where nothing is.

    To be called in all processes at once; the same in each.
    """
    bad = [(name, int((~tensor.isfinite()).sum())) for name, tensor in _weights(model) if name in names]
    bad = [(name, count) for name, count in bad if count]
    found = next((found for found in world.gather(bad) if found), None)
    if found is None:
        return None
    (name, count), *others = found
    more = f", and some in {len(others)} other tensors," if others else ""
    return f"{count} numbers in '{name}'{more} are not finite"


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and floating-point buffers that are saved, of sharded ones this process's part."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            yield name, tensor.to_local() if isinstance(tensor, DTensor) else tensor
