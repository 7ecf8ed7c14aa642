# SPDX-License-Identifier: MIT
"""The checks that need a GPU, in stages: gpu_check.py runs them."""
