# SPDX-License-Identifier: MIT
"""Analysis of a model: where its layers sample."""

from .points import draw_points, sampled_points

__all__ = ["draw_points", "sampled_points"]
