# SPDX-License-Identifier: MIT
"""Settings of the C library's allocator for commands that run models."""

import ctypes
import os
import sys

SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES", "LD_PRELOAD")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let this process keep memory that it has freed, instead of returning it to the system.

    A model frees and allocates the same tensors in every step, and glibc returns large ones to the system; their fresh
    pages take 5 to 15 % of a training step. Memory that is kept is at most what the process once used. Nothing happens
    with another C library, or if the user has set one of `SETTINGS`.

    Returns:
        Whether the settings were made.
    """
    if sys.platform != "linux" or any(os.environ.get(name) for name in SETTINGS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    # larger blocks than 1 GiB are still mapped one by one
    return bool(mallopt(_M_MMAP_THRESHOLD, 1 << 30) == 1 and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1) == 1)
