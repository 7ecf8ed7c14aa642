# SPDX-License-Identifier: MIT
"""Benchmarks of the operator and the models on this machine, against other implementations of the same work."""

# the other implementations; defined here, so that the command line does not import torch for them
OPS_PEERS = ("reference", "torchvision", "official")
MODEL_PEERS = ("official", "swin_tiny_patch4_window7_224", "convnext_tiny")
