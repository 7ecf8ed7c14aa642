# SPDX-License-Identifier: MIT
"""`internimage finetune`."""

import argparse
import os
import sys

from ..engine.run import Outcome, Preempted
from ..tasks.classification.finetune import finetune
from ..terminal import say


def run(arguments: argparse.Namespace) -> int:
    first = os.environ.get("RANK", "0") == "0"  # of a torchrun launch, one process speaks
    try:
        outcome = finetune(arguments.config)
    except Preempted as stopped:
        if first:
            say(stopped)
        return 0
    if first:
        _tell(outcome)
    return 0 if outcome.complete else 1


def _tell(outcome: Outcome) -> None:
    """How good the model is, and where everything lies."""
    if outcome.result is not None:
        result = outcome.result
        say(f"top-1 {result.top1:.2f} % on {result.images} validation images, loss {result.loss:.4f}")
        if result.skipped:
            say(f"validation images that could not be read and do not count: {len(result.skipped)}", sys.stderr)
    elif outcome.complete:
        say("there are no validation images, so the accuracy is not known (they go to DATA/val/CLASS/IMAGE)")
    say(f"model: {outcome.output}")
    if outcome.report is not None:
        say(f"report: {outcome.report}")
