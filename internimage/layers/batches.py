# SPDX-License-Identifier: MIT
"""A batch in groups of images, whose tensors stay in the cache from one layer to the next in CPU inference.

Images do not depend on each other, and a result does not depend on the group. The memory allocator gains, too: it keeps
blocks of this size, while it returns larger ones to the system, whose fresh pages take as long as a layer.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_BYTES = 5 << 18  # of a tensor, per thread; together the tensors of a layer then fit an L2 cache of 2 MiB, more or less


def in_groups(function: Callable[[Tensor], Tensor], x: Tensor, image_bytes: int) -> Tensor:
    """function(x), computed group by group.

    Args:
        function: Of a batch of images, which it treats one by one.
        x: The batch.
        image_bytes: Size of a tensor between the layers of the function, per image.
    """
    largest = max(1, round(_BYTES * torch.get_num_threads() / image_bytes))
    groups = -(-len(x) // largest)
    if groups <= 1:
        return function(x)
    return torch.cat([function(group) for group in x.split(-(-len(x) // groups))])
