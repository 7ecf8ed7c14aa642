# SPDX-License-Identifier: MIT
"""Packed weights: copies in oneDNN's own layout, which CPU inference keeps between calls.

oneDNN otherwise brings a weight into this layout in every call, which takes a few percent of the call's time for many
pixels and up to three quarters for few. The copies take as much memory as the weights. They are made in eval mode only,
dropped by `train()`, and neither copied nor saved with a model.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Snapshot:
    """The state of tensors, to tell whether they changed.

    Args:
        tensors: What is watched: contiguous CPU tensors that were not made in inference mode, which has no versions.
        sampled: Those of them of which copies were made.
    """

    def __init__(self, tensors: Sequence[Tensor], sampled: Sequence[Tensor]) -> None:
        self._tensors, self._sampled = list(tensors), list(sampled)
        self._state = self._read()

    def _read(self) -> tuple[list[int], list[int], int]:
        versions = [t._version for t in self._tensors]
        addresses = [t.data_ptr() for t in self._tensors]
        return versions, addresses, torch.ops.internimage.fingerprint.default(self._sampled) if self._sampled else 0

    def is_current(self) -> bool:
        """Whether the tensors are unchanged.

        A change through `tensor.data` or a NumPy array is one that torch does not count. It is noticed if it reaches one
        of a few elements of a sampled tensor, as a change of the whole tensor does.
        """
        return self._read() == self._state


def set_weight_packing(model: nn.Module, enabled: bool) -> None:
    """Turn packed weights on (the default) or off in all layers of a model.

    Without them CPU inference takes less memory and, with few pixels, more time.
    """
    for module in model.modules():
        if hasattr(module, "pack_weights"):
            module.pack_weights = enabled
            module.clear_packed()
