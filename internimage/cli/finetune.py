# SPDX-License-Identifier: MIT
"""`internimage finetune`."""

import argparse
import dataclasses
import inspect
import os
import re
import sys

from ..engine.config import load_config
from ..engine.finetune import Outcome, Preempted, train
from ..engine.settings import FinetuneConfig

HELP = "Train a classifier on a folder of images."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "settings",
        nargs="+",
        metavar="CONFIG.yaml | KEY=VALUE",
        help="a recipe, settings, or a recipe and settings that go before it",
    )
    parser.epilog = "settings:\n" + _describe_settings()


def _describe_settings() -> str:
    """One line a setting, from the comments behind the fields."""
    comments = dict(re.findall(r"^    (\w+): [^#\n]*(?:  # (.*))?$", inspect.getsource(FinetuneConfig), re.MULTILINE))
    lines = []
    for field in dataclasses.fields(FinetuneConfig):
        default = "required" if field.default is dataclasses.MISSING else f"default {field.default}"
        comment = comments.get(field.name)
        lines.append(f"  {field.name:<20}{comment + '; ' if comment else ''}{default}")
    return "\n".join(lines)


def run(arguments: argparse.Namespace) -> int:
    path, *overrides = arguments.settings
    if "=" in path:
        path, overrides = None, arguments.settings
    first = os.environ.get("RANK", "0") == "0"  # of a torchrun launch, one process speaks
    try:
        outcome = train(load_config(FinetuneConfig, path, overrides))
    except Preempted as stopped:
        if first:
            print(stopped)
        return 0
    if first:
        _tell(outcome)
    return 0 if outcome.complete else 1


def _tell(outcome: Outcome) -> None:
    """How good the model is, and where everything lies."""
    if outcome.result is not None:
        result = outcome.result
        print(f"top-1 {result.top1:.2f} % on {result.images} validation images, loss {result.loss:.4f}")
        if result.skipped:
            print(f"validation images that could not be read and do not count: {len(result.skipped)}", file=sys.stderr)
    elif outcome.complete:
        print("there are no validation images, so the accuracy is not known (they go to DATA/val/CLASS/IMAGE)")
    print(f"model: {outcome.output}")
    if outcome.report is not None:
        print(f"report: {outcome.report}")
