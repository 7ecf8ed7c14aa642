# SPDX-License-Identifier: MIT
"""Weights that are not numbers any more."""

from collections.abc import Iterator
from itertools import chain

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .distributed import World


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights and floating-point buffers, of sharded ones this process's part."""
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_floating_point():
            yield name, tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def finite_names(model: nn.Module) -> set[str]:
    """Names of the tensors that are finite as a whole: a mask may be infinite by intent."""
    return {name for name, tensor in _tensors(model) if tensor.isfinite().all()}


def not_finite(model: nn.Module, names: set[str], world: World) -> str | None:
    """What of the named tensors is infinite or nan, for a sentence; None where nothing is.

    To be called in all processes at once; the same in each.
    """
    bad = [(name, int((~tensor.isfinite()).sum())) for name, tensor in _tensors(model) if name in names]
    bad = [(name, count) for name, count in bad if count]
    found = next((found for found in world.gather(bad) if found), None)
    if found is None:
        return None
    (name, count), *others = found
    more = f", and some in {len(others)} other tensors," if others else ""
    return f"{count} numbers in '{name}'{more} are not finite"
