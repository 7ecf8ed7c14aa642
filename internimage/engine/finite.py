# SPDX-License-Identifier: MIT
"""Detection of NaN and infinity in outputs and weights: metrics of such outputs would mean nothing."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..errors import UserError, list_some
from .world import World


class NotFiniteError(UserError, ArithmeticError):
    """A model gave NaN or infinity.

    Attributes:
        weights: Whether its own weights are not finite, so that every input fails.
    """

    status = 1  # the input was good and the output is not

    def __init__(self, message: str, weights: bool = False) -> None:
        super().__init__(message)
        self.weights = weights


def output_problem(logits: Tensor, model: nn.Module, dtype: torch.dtype) -> NotFiniteError | None:
    """What is wrong with outputs, for the caller to raise; None if they are finite.

    Args:
        logits: The model's outputs.
        model: The model. Of sharded weights only this process's shard is checked, without communication.
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
        return NotFiniteError(
            f"the model's weights are not finite ({list_some(bad, 3)}){'' if nan else hint}", weights=True
        )
    return NotFiniteError(f"the model's outputs are not finite, though its weights are{hint}")


def finite_weights(model: nn.Module) -> set[str]:
    """Names of the tensors that are entirely finite: others, such as masks, may be infinite on purpose."""
    return {name for name, tensor in _weights(model) if tensor.isfinite().all()}


def weights_problem(model: nn.Module, names: set[str], world: World) -> str | None:
    """Which of the named tensors have infinities or NaN, in words; None if none does.

    To be called in all processes at once; returns the same in each.
    """
    bad = [(name, int((~tensor.isfinite()).sum())) for name, tensor in _weights(model) if name in names]
    bad = [(name, count) for name, count in bad if count]
    found = next((found for found in world.gather(bad) if found), None)
    if found is None:
        return None
    (name, count), *others = found
    more = f", and some in {len(others)} other tensors," if others else ""
    return f"{count} elements of '{name}'{more} are not finite"


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Saved parameters and floating-point buffers; of sharded ones, this process's shard."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            yield name, tensor.to_local() if isinstance(tensor, DTensor) else tensor
