# SPDX-License-Identifier: MIT
"""The keyword arguments with which layers create their parameters."""

from typing import TypedDict

import torch


class FactoryKwargs(TypedDict):
    """`device` and `dtype` of new parameters; None means torch's default. Passed on as `**dd`, as in timm."""

    device: torch.device | str | None
    dtype: torch.dtype | None
