# SPDX-License-Identifier: MIT
"""`internimage finetune`."""

import argparse
import csv
import os

from ..engine.finetune import Preempted, finetune
from ..engine.output import LOG_FILE, REPORT_FILE


def run(arguments: argparse.Namespace) -> int:
    first = os.environ.get("RANK", "0") == "0"  # of a torchrun launch, one process speaks
    try:
        output = finetune(arguments.config)
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
