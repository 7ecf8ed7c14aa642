# SPDX-License-Identifier: MIT
"""`internimage.settings`, which stands on the ground floor so that the command line can read settings without torch."""

from ..settings import FinetuneConfig

__all__ = ["FinetuneConfig"]
