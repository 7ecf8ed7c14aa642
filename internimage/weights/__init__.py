# SPDX-License-Identifier: MIT
"""Weights: from a name or a file to tensors, and back. Nothing here depends on a model class."""
