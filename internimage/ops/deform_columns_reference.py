# SPDX-License-Identifier: MIT
"""The columns of deformable convolution in plain torch: the specification of `deform_columns`.

The sampling and its derivatives are those of `gather_reference`, in the order of deformable convolution v1 and v2:
points row by row, offsets (y, x). The arguments of the four functions are those of the schema, already checked; see
`registration.Reference` for the others.
"""

from collections.abc import Sequence
from typing import Any

from .gather_reference import Functions, Gather
from .sampling import CONVOLUTION, Geometry


def _gather(arguments: Sequence[Any]) -> Gather:
    kernel_size, stride, padding, dilation, offset_groups = arguments
    geometry = Geometry(kernel_size, stride, padding, dilation, offset_groups, 1.0, False, False)
    return Gather(geometry, columns=True, order=CONVOLUTION)


_functions = Functions(_gather)
forward, backward = _functions.forward, _functions.backward
double_backward, jvp = _functions.double_backward, _functions.jvp
