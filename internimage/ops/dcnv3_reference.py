# SPDX-License-Identifier: MIT
"""DCNv3 in plain torch: the specification that every kernel is tested against.

For output pixel o and group g, with the P sampling locations of `sampling.sampling_coordinates`::

    output[o, g] = sum_p  mask[o, g, p] * bilinear(input[:, g], location[o, g, p])

`gather_reference` has the sampling and its derivatives. The arguments of the four functions are those of
`internimage.ops.dcnv3`, in the schema's order and already checked; see `registration.Reference` for the others.
"""

from collections.abc import Sequence
from typing import Any

from .arguments import check_offset_scale
from .gather_reference import Functions, Gather
from .sampling import DCNV3, Geometry


def _gather(arguments: Sequence[Any]) -> Gather:
    geometry = Geometry(*arguments)
    check_offset_scale(geometry.offset_scale)  # as the compiled kernels do
    return Gather(geometry, columns=False, order=DCNV3)


_functions = Functions(_gather)
dcnv3, dcnv3_backward = _functions.forward, _functions.backward
dcnv3_double_backward, dcnv3_jvp = _functions.double_backward, _functions.jvp
