# SPDX-License-Identifier: MIT
"""Images and datasets: which files are images, how they are decoded, and checks of a whole dataset."""
