# SPDX-License-Identifier: MIT
"""Fine-tuning of a classifier on a folder of images."""

from ...engine.run import Outcome, train
from .config import FinetuneConfig
from .evaluate import Evaluation
from .task import ClassificationTask


def finetune(config: FinetuneConfig, progress: bool = True) -> Outcome[Evaluation]:
    """Train a classifier on the classes of a folder; `internimage.engine.run.train` says how.

    `config.output` is then a folder for `timm.create_model("local-dir:...")`, `evaluate` and `predict`.

    Args:
        config: The settings.
        progress: Show a bar and a line for each epoch on stderr.

    Raises:
        UserError: See `train`.
    """
    return train(ClassificationTask(config), progress)
