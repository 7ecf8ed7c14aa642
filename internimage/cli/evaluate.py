# SPDX-License-Identifier: MIT
"""`internimage evaluate`."""

import argparse
import csv
import io
import json
import sys

from .. import __version__
from ..data.datasets import MapDataset, open_dataset, read_as_gray
from ..data.imagenet import open_labelled_folder, protocol
from ..engine.create import pick_device
from ..engine.world import World, join, leave
from ..errors import UserError
from ..files import is_stdout, write_text, writing
from ..tasks.classification.evaluate import Evaluation, evaluate
from ..terminal import printable, say
from ..weights.released import PUBLISHED
from .arguments import load_model

_TOLERANCE = 0.1  # percent, of --expect


def run(arguments: argparse.Namespace) -> int:
    world = join(pick_device(arguments.device))
    try:
        return _run(arguments, world)
    finally:
        leave()


def _run(arguments: argparse.Namespace, world: World) -> int:
    # the data and the other arguments first: a model may have to be downloaded
    expected = None if arguments.expect == "published" else arguments.expect
    with world.raise_on_all_ranks():  # what is wrong is wrong in all processes, and one of them says it
        dataset: MapDataset
        if arguments.labels is not None:
            dataset = open_labelled_folder(arguments.data, arguments.labels)
        else:
            dataset = open_dataset(arguments.data, arguments.split, arguments.dataset, arguments.class_map)
        model, config, _, dtype = load_model(arguments)
        if config["input_size"][0] == 1:
            read_as_gray(dataset)
        published = _published_top1(model, arguments)
        if arguments.expect == "published":
            if published is None:
                raise UserError(
                    f"no top-1 on ImageNet-1k was published for '{arguments.model}' as it is asked for here"
                )
            expected = published
        counted = protocol(arguments.variant, model, dataset, arguments.real_labels)
    result = evaluate(
        model,
        dataset,
        config,
        arguments.batch_size,
        arguments.workers,
        world.device,
        dtype,
        classes_from_map=arguments.class_map is not None,
        world=world,
        flip=arguments.flip,
        protocol=counted,
    )
    wrong = expected is not None and abs(result.top1 - expected) > _TOLERANCE + 1e-9
    if world.first:
        _report(arguments, result, config, world.device, published)
        if wrong:
            say(f"top-1 is {result.top1:.2f} %, expected {expected} within {_TOLERANCE}", sys.stderr)
    return 1 if wrong or (arguments.strict and result.skipped) else 0


def _report(arguments: argparse.Namespace, result: Evaluation, config: dict, device, published: float | None) -> None:
    row = {
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
        "device": str(device),
        "dtype": arguments.dtype,
        "internimage": __version__,
    }
    out = sys.stderr if is_stdout(arguments.json) or is_stdout(arguments.csv) else sys.stdout
    _print(result, row, arguments, out)
    if arguments.json is not None:
        report = {**row, "skipped_files": [{"file": f, "reason": r} for f, r in result.skipped]}
        if arguments.per_class:
            report["per_class"] = result.per_class
        write_text(arguments.json, json.dumps(report, indent=2, allow_nan=False) + "\n")
    if arguments.csv is not None:
        text = io.StringIO()
        writer = csv.DictWriter(text, row, lineterminator="\n")
        writer.writeheader()
        writer.writerow(row)
        with writing(arguments.csv) as file:
            file.write(text.getvalue().encode(errors="surrogateescape"))  # names of files, byte for byte


def _published_top1(model, arguments: argparse.Namespace) -> float | None:
    """What upstream published for these weights, if they are upstream's and this is what upstream measured."""
    if arguments.checkpoint is not None or arguments.num_classes is not None:
        return None
    if arguments.variant not in (None, "imagenet", "real"):  # other images
        return None
    cfg = getattr(model, "pretrained_cfg", {})
    published = PUBLISHED.get(f"{cfg.get('architecture')}.{cfg.get('tag')}")
    return None if published is None or cfg.get("source") else published.top1


def _print(result: Evaluation, row: dict, arguments: argparse.Namespace, out) -> None:
    top1 = f"top-1 {result.top1:.2f} %"
    if row["published_top1"] is not None:
        top1 += f" (published, ImageNet-1k: {row['published_top1']} %)"
    say(f"{top1}   top-5 {result.top5:.2f} %   loss {result.loss:.4f}", out)
    if result.real_top1 is not None:
        real = f"ReaL top-1 {result.real_top1:.2f} %   top-5 {result.real_top5:.2f} %"
        say(f"{real}   of {result.real_images} images that have a label", out)
    processes = f" in {result.processes} processes" if result.processes > 1 else ""
    memory = f", at most {result.peak_memory / 2**30:.2f} GiB" if result.peak_memory else ""
    say(
        f"{result.images} images at {row['img_size']} px, {result.images_per_second:.1f} images/s with loading, "
        f"{result.model_images_per_second:.1f} without, {row['device']}, {row['dtype']}{processes}{memory}",
        file=out,
    )
    if arguments.per_class:
        classes = [printable(entry["class"]) for entry in result.per_class]
        width = max(map(len, classes))
        for name, entry in zip(classes, result.per_class):
            say(f"  {name:<{width}}  {entry['top1']:6.2f} %  of {entry['images']}", out)
    if result.skipped:
        files = f"{len(result.skipped)} image{'s' if len(result.skipped) > 1 else ''}"
        say(f"{files} could not be read and do not count (the report of --json lists them all)", sys.stderr)
