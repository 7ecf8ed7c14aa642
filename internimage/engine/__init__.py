# SPDX-License-Identifier: MIT
"""Evaluation, prediction and fine-tuning: what joins timm's parts for the command line and for scripts."""

from ..settings import FinetuneConfig
from .data import DataError, open_dataset
from .evaluate import Evaluation, evaluate
from .finetune import Preempted, finetune
from .model import create_model
from .predict import Prediction, predict

__all__ = [
    "DataError",
    "Evaluation",
    "FinetuneConfig",
    "Prediction",
    "Preempted",
    "create_model",
    "evaluate",
    "finetune",
    "open_dataset",
    "predict",
]
