# SPDX-License-Identifier: MIT
"""The report of `internimage evaluate`: on the terminal, as JSON and as a CSV row."""

import argparse
import csv
import io
import json
import sys
from typing import Any, TextIO

from .. import __version__
from ..files import is_stdout, write_text, writing
from ..tasks.classification.evaluate import Evaluation
from ..terminal import printable, say

Row = dict[str, Any]  # column -> value


def report(
    arguments: argparse.Namespace, result: Evaluation, config: dict[str, Any], device: str, published: float | None
) -> None:
    """Print a result, and write the files of --json and --csv.

    Args:
        arguments: Of the command line.
        result: The result.
        config: Preprocessing, as timm has it.
        device: Name of the device.
        published: The published top-1 of the weights in percent, if there is one.
    """
    row = _row(arguments, result, config, device, published)
    stdout_is_taken = is_stdout(arguments.json) or is_stdout(arguments.csv)
    _print(result, row, arguments.per_class, sys.stderr if stdout_is_taken else sys.stdout)
    if arguments.json is not None:
        document = {**row, "skipped_files": [{"file": f, "reason": r} for f, r in result.skipped]}
        if arguments.per_class:
            document["per_class"] = result.per_class
        write_text(arguments.json, json.dumps(document, indent=2, allow_nan=False) + "\n")
    if arguments.csv is not None:
        text = io.StringIO()
        writer = csv.DictWriter(text, row, lineterminator="\n")
        writer.writeheader()
        writer.writerow(row)
        with writing(arguments.csv) as file:
            file.write(text.getvalue().encode(errors="surrogateescape"))  # names of files, byte for byte


def _row(
    arguments: argparse.Namespace, result: Evaluation, config: dict[str, Any], device: str, published: float | None
) -> Row:
    return {
        "model": arguments.model,
        "checkpoint": arguments.checkpoint,
        "data": arguments.data,
        "images": result.images,
        "skipped": len(result.skipped),
        "top1": round(result.top1, 4),
        "top5": round(result.top5, 4),
        "loss": round(result.loss, 6),
        "real_top1": None if result.real_top1 is None else round(result.real_top1, 4),
        "real_top5": None if result.real_top5 is None else round(result.real_top5, 4),
        "real_images": result.real_images,
        "published_top1": published,
        "images_per_second": round(result.images_per_second, 2),
        "model_images_per_second": round(result.model_images_per_second, 2),
        "peak_memory": result.peak_memory,
        "processes": result.processes,
        "variant": arguments.variant,
        "flip": arguments.flip,
        "img_size": config["input_size"][-1],
        "crop_pct": config["crop_pct"],
        "interpolation": config["interpolation"],
        "device": device,
        "dtype": arguments.dtype,
        "internimage": __version__,
    }


def _print(result: Evaluation, row: Row, per_class: bool, out: TextIO) -> None:
    top1 = f"top-1 {result.top1:.2f} %"
    if row["published_top1"] is not None:
        top1 += f" (published, ImageNet-1k: {row['published_top1']} %)"
    say(f"{top1}   top-5 {result.top5:.2f} %   loss {result.loss:.4f}", out)
    if result.real_top1 is not None:
        real = f"ReaL top-1 {result.real_top1:.2f} %   top-5 {result.real_top5:.2f} %"
        say(f"{real}   of {result.real_images} images with a ReaL label", out)
    processes = f" in {result.processes} processes" if result.processes > 1 else ""
    memory = f", peak memory {result.peak_memory / 2**30:.2f} GiB" if result.peak_memory else ""
    say(
        f"{result.images} images at {row['img_size']} px, {result.images_per_second:.1f} images/s with loading, "
        f"{result.model_images_per_second:.1f} without, {row['device']}, {row['dtype']}{processes}{memory}",
        file=out,
    )
    if per_class:
        classes = [printable(entry["class"]) for entry in result.per_class]
        width = max(map(len, classes))
        for name, entry in zip(classes, result.per_class):
            say(f"  {name:<{width}}  {entry['top1']:6.2f} %  of {entry['images']}", out)
    if result.skipped:
        files = f"{len(result.skipped)} image{'s' if len(result.skipped) > 1 else ''}"
        say(f"{files} could not be read and are not counted (--json lists them)", sys.stderr)
