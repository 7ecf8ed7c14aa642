# SPDX-License-Identifier: MIT
"""`internimage evaluate`."""

import argparse
import sys

from torch import nn

from ..data.datasets import MapDataset, open_dataset, read_as_gray
from ..data.imagenet import open_labelled_folder, protocol
from ..engine.create import pick_device
from ..engine.world import World, join, leave
from ..errors import UserError
from ..models.attributes import pretrained_cfg
from ..tasks.classification.evaluate import evaluate
from ..terminal import say
from ..weights.released import PUBLISHED
from .arguments import load_model
from .evaluation_report import report

_TOLERANCE = 0.1  # of --expect, in percentage points


def run(arguments: argparse.Namespace) -> int:
    world = join(pick_device(arguments.device))
    try:
        return _run(arguments, world)
    finally:
        leave()


def _run(arguments: argparse.Namespace, world: World) -> int:
    # data and arguments are checked before the model is loaded, which may mean a download
    expected = None if arguments.expect == "published" else arguments.expect
    with world.raise_on_all_ranks():  # errors are the same in all processes, and one of them prints
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
                raise UserError(f"no ImageNet-1k top-1 is published for '{arguments.model}' with these options")
            expected = published
        counting = protocol(arguments.variant, model, dataset, arguments.real_labels)
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
        protocol=counting,
    )
    wrong = expected is not None and abs(result.top1 - expected) > _TOLERANCE + 1e-9
    if world.first:
        report(arguments, result, config, str(world.device), published)
        if wrong:
            say(f"top-1 is {result.top1:.2f} %, expected {expected} within {_TOLERANCE}", sys.stderr)
    return 1 if wrong or (arguments.strict and result.skipped) else 0


def _published_top1(model: nn.Module, arguments: argparse.Namespace) -> float | None:
    """The top-1 that upstream published for these weights, if they are upstream's and measured as upstream did."""
    if arguments.checkpoint is not None or arguments.num_classes is not None:
        return None
    if arguments.variant not in (None, "imagenet", "real"):  # the others are other images
        return None
    cfg = pretrained_cfg(model)
    published = PUBLISHED.get(f"{cfg.get('architecture')}.{cfg.get('tag')}")
    return None if published is None or cfg.get("source") else published.top1
