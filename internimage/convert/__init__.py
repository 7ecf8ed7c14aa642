# SPDX-License-Identifier: MIT
"""Released weights to a folder that timm, transformers and the Hub take, and from there to the Hub."""
