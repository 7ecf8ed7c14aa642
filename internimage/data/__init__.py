# SPDX-License-Identifier: MIT
"""Images: where they are, how they are read, and what a set of them is."""
