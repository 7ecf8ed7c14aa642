# SPDX-License-Identifier: MIT
"""`internimage finetune`."""

import argparse
import csv
import dataclasses
import inspect
import os
import re

from ..engine.config import load_config
from ..engine.finetune import Preempted, finetune
from ..engine.output import LOG_FILE, REPORT_FILE
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
        output = finetune(load_config(FinetuneConfig, path, overrides))
    except Preempted as stopped:
        if first:
            print(stopped)
        return 0
    if not first:
        return 0
    with (output / LOG_FILE).open(newline="") as file:
        *_, last = csv.DictReader(file)
    print(", ".join(f"{key} {value}" for key, value in last.items() if value))
    print(f"model and settings: {output}")
    if (output / REPORT_FILE).is_file():
        print(f"report: {output / REPORT_FILE}")
    return 0
