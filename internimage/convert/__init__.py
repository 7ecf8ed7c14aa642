# SPDX-License-Identifier: MIT
"""Weights of any format to a folder for timm, transformers and the Hub, and its upload."""
