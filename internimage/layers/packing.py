# SPDX-License-Identifier: MIT
"""Packed weights: copies in the layout in which they are multiplied, which CPU inference keeps between calls.

That is oneDNN's own for convolutions and linear layers, and channels last for deformable convolutions. A weight is
otherwise brought into it in every call, which takes a few percent of the call's time for many pixels and up to three
quarters for few. The copies take as much memory as the weights. They are made in eval mode only,
dropped by `train()` and `to()`, and neither copied nor saved with a model.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

_Layer = TypeVar("_Layer", bound="PacksWeights")


class Snapshot:
    """The state of tensors, to tell whether they changed.

    Args:
        tensors: What is watched: contiguous CPU tensors that were not made in inference mode, which has no versions.
        sampled: Those of them of which copies were made.
    """

    def __init__(self, tensors: Sequence[Tensor], sampled: Sequence[Tensor]) -> None:
        self._tensors, self._sampled = list(tensors), list(sampled)
        self._state, self._values = self._read(), self._fingerprint()

    def _read(self) -> list[int]:
        return [t._version for t in self._tensors] + [t.data_ptr() for t in self._tensors]

    def _fingerprint(self) -> int:
        return torch.ops.internimage.fingerprint.default(self._sampled) if self._sampled else 0

    def is_current(self) -> bool:
        """Whether the tensors are unchanged.

        A change through `tensor.data` or a NumPy array is one that torch does not count. It is noticed if it reaches
        one of a few elements of a sampled tensor, as a change of the whole tensor does.
        """
        try:
            return self._read() == self._state and self._fingerprint() == self._values
        except RuntimeError:  # a tensor has another layout than before, in the same memory
            return False


class PacksWeights(nn.Module):
    """Base of layers that keep packed weights between calls of inference."""

    pack_weights = True  # see `set_weight_packing`

    def clear_packed(self) -> None:
        """Drop the packed weights; the next call in eval mode makes new ones."""
        raise NotImplementedError

    @torch.jit.ignore
    def train(self: _Layer, mode: bool = True) -> _Layer:
        if mode:
            self.clear_packed()
        return super().train(mode)

    def _apply(self: _Layer, *arguments: Any, **keywords: Any) -> _Layer:
        self.clear_packed()  # on another device, or in another dtype, nothing would drop them
        return super()._apply(*arguments, **keywords)


def set_weight_packing(model: nn.Module, enabled: bool) -> None:
    """Turn packed weights on (the default) or off in all layers of a model.

    Without them CPU inference takes less memory and, with few pixels, more time. The results are the same up to
    rounding.

    Args:
        model: A model of this package, or any module that contains one.
        enabled: Whether to keep them. Those that are there are dropped in any case.
    """
    for module in model.modules():
        if isinstance(module, PacksWeights):
            module.pack_weights = enabled
            module.clear_packed()


@contextmanager
def weights_not_packed(model: nn.Module) -> Iterator[None]:
    """Context in which no layer of a model keeps packed weights; afterwards they are kept or not as before."""
    before = [(module, module.pack_weights) for module in model.modules() if isinstance(module, PacksWeights)]
    set_weight_packing(model, False)
    try:
        yield
    finally:
        for module, enabled in before:
            module.pack_weights = enabled
