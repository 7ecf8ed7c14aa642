# SPDX-License-Identifier: MIT
"""Benchmarks of the operator and the models on this machine, against other implementations of the same work."""

import os

# defined here, so that the command line does not import torch for them
MODELS = ("internimage_tiny",)  # ours to time
OPS_PEERS = ("reference", "torchvision", "official")  # the other implementations
MODEL_PEERS = ("official", "swin_tiny_patch4_window7_224", "convnext_tiny")
EXPORT_PEERS = ("convnext_tiny",)
CORES = os.cpu_count() or 1
THREADS = (1, 2) if CORES > 1 else (1,)  # with how many to measure
