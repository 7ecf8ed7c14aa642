# SPDX-License-Identifier: MIT
"""Image classification."""
