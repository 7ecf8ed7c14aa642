# SPDX-License-Identifier: MIT
"""Names of a model's files, in folders and on the Hub."""

INDEX_SUFFIX = ".index.json"  # of a shard index, see `shard_index`
CONFIG = "config.json"  # timm's, beside the weights
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = WEIGHTS + INDEX_SUFFIX
WEIGHT_FILES = (WEIGHTS, WEIGHTS_INDEX, "pytorch_model.bin", "pytorch_model.bin" + INDEX_SUFFIX)  # preferred first
