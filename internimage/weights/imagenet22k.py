# SPDX-License-Identifier: MIT
"""The rows of an ImageNet-22k classifier that are ImageNet-1k's classes, by timm's lists of synsets."""

from collections.abc import Sequence
from functools import cache

from timm.data import ImageNetInfo

from ..errors import CheckpointError, list_some

NUM_CLASSES = 21841
# ImageNet-1k's class 850, a teddy, is not among the 22k; upstream takes the row of class 849, a teapot, for both
_ABSENT = {"n04399382": 11136}


def imagenet_1k() -> list[str]:
    """The synsets of ImageNet-1k in the order of its classes."""
    return ImageNetInfo("imagenet-1k").label_names()


@cache
def _row_of() -> dict[str, int]:
    synsets = ImageNetInfo("imagenet-22k").label_names()
    return {**{synset: row for row, synset in enumerate(synsets)}, **_ABSENT}


def rows(synsets: Sequence[str]) -> list[int]:
    """The row of each synset, such as "n01440764".

    Raises:
        CheckpointError: Some are no classes of ImageNet-22k; the message names them.
    """
    row_of = _row_of()
    unknown = [synset for synset in synsets if synset not in row_of]
    if unknown:
        raise CheckpointError(
            f"a head can be taken from ImageNet-22k for classes named by its synsets, such as n01440764; "
            f"{len(unknown)} of {len(synsets)} are not: {list_some(unknown, 5)}"
        )
    return [row_of[synset] for synset in synsets]
