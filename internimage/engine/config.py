# SPDX-License-Identifier: MIT
"""`internimage.config`, which stands on the ground floor so that the command line can read settings without torch."""

from ..config import ConfigError, dump, from_dict, load_config

__all__ = ["ConfigError", "dump", "from_dict", "load_config"]
