# SPDX-License-Identifier: MIT
"""`internimage finetune`."""

import argparse
import os
import sys

from ..engine.run import Outcome, Preempted
from ..tasks.classification.evaluate import Evaluation
from ..tasks.classification.finetune import finetune
from ..terminal import say


def run(arguments: argparse.Namespace) -> int:
    first = os.environ.get("RANK", "0") == "0"  # in a torchrun launch, only the first process prints
    try:
        outcome = finetune(arguments.config)
    except Preempted as stopped:
        if first:
            say(stopped)
        return 0
    if first:
        _print(outcome)
    return 0 if outcome.complete else 1


def _print(outcome: Outcome[Evaluation]) -> None:
    """Print the accuracy, and where model and report are."""
    if outcome.result is not None:
        result = outcome.result
        say(f"top-1 {result.top1:.2f} % on {result.images} validation images, loss {result.loss:.4f}")
        if result.skipped:
            say(f"validation images that could not be read and are not counted: {len(result.skipped)}", sys.stderr)
    elif outcome.complete:
        say("there are no validation images (DATA/val/CLASS/IMAGE), so the accuracy is unknown")
    say(f"model: {outcome.output}")
    if outcome.report is not None:
        say(f"report: {outcome.report}")
