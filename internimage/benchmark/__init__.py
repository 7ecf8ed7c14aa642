# SPDX-License-Identifier: MIT
"""How fast the operator and the models are on this machine, beside what else there is for the same work."""

# beside whom; here, so that the command line knows them without torch
OPS_PEERS = ("reference", "torchvision", "official")
MODEL_PEERS = ("official", "swin_tiny_patch4_window7_224", "convnext_tiny")
