# SPDX-License-Identifier: MIT
"""Accuracy of a classifier on a dataset."""

import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from timm.data import create_transform
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .data import DataError, GuardedDataset, class_names


@dataclass
class Evaluation:
    """Counts and rates of one run. Accuracies in percent of the images that could be read."""

    images: int = 0
    top1: float = 0.0
    top5: float = 0.0
    loss: float = 0.0  # mean cross entropy, nats
    seconds: float = 0.0  # wall time, loading included
    images_per_second: float = 0.0
    skipped: list[tuple[str, str]] = field(default_factory=list)  # file, reason
    per_class: list[dict] = field(default_factory=list)  # class, images, top1


def _check_classes(model: nn.Module, dataset: Dataset) -> list[str]:
    names = class_names(dataset)
    if names is None:
        return [str(i) for i in range(model.num_classes)]
    trained = getattr(model, "pretrained_cfg", {}).get("label_names")
    if len(names) > model.num_classes:
        raise DataError(f"the dataset has {len(names)} classes and the model {model.num_classes}")
    if trained and len(trained) == model.num_classes and list(trained) != names:
        odd = next((a, b) for a, b in zip(list(trained) + [None], names + [None]) if a != b)
        raise DataError(
            f"the dataset's classes are not those that the model was trained on (there '{odd[0]}', here '{odd[1]}'): "
            f"pass a class map"
        )
    if len(names) < model.num_classes:
        raise DataError(
            f"the dataset has {len(names)} classes and the model {model.num_classes}, so their indices need not agree: "
            f"pass a class map (a file of 'CLASS INDEX' lines)"
        )
    return names


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    dataset: Dataset,
    config: dict,
    batch_size: int = 64,
    workers: int = 2,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    classes_from_map: bool = False,
    progress: bool = True,
) -> Evaluation:
    """Top-1, top-5 and loss over a whole dataset. Every image counts once; unreadable ones are listed.

    Args:
        model: Gives (N, num_classes) logits. Is moved to `device` and `dtype` and left in eval mode.
        dataset: From `open_dataset`.
        config: timm's preprocessing, from `internimage.engine.model.data_config`.
        batch_size: Images a step.
        workers: Loader processes; 0 loads in this one.
        device, dtype: Where and in what the model runs; metrics are computed in float32.
        classes_from_map: The dataset's indices come from a class map, so its number of classes need not be the model's.
        progress: Show a bar on stderr.

    Raises:
        DataError: The dataset's classes are not the model's, or a label lies outside them.
    """
    count = model.num_classes
    names = [str(i) for i in range(count)] if classes_from_map else _check_classes(model, dataset)
    model = model.to(device=device, dtype=dtype).eval()
    guarded = GuardedDataset(dataset, create_transform(**config, is_training=False))
    loader = DataLoader(
        guarded,
        batch_size,
        num_workers=workers,
        collate_fn=GuardedDataset.collate,
        pin_memory=torch.device(device).type == "cuda",
    )
    result = Evaluation()
    seen, right = torch.zeros(count, dtype=torch.long), torch.zeros(count, dtype=torch.long)
    right5, loss = 0, 0.0
    start = time.perf_counter()
    bar = tqdm(total=len(guarded), unit="img", desc="evaluate", disable=not progress)
    for batch in loader:
        result.skipped += batch.failures
        bar.update(len(batch.failures))
        if batch.images is None:
            continue
        targets = batch.targets
        if targets.min() < 0 or targets.max() >= count:
            odd = next(t for t in targets.tolist() if not 0 <= t < count)
            raise DataError(f"the dataset has label {odd}; the model's classes are 0 to {count - 1}")
        logits = model(batch.images.to(device=device, dtype=dtype, non_blocking=True)).float().cpu()
        loss += F.cross_entropy(logits, targets, reduction="sum").item()
        order = logits.topk(min(5, count)).indices
        hit = order == targets[:, None]
        right5 += int(hit.any(1).sum())
        seen += torch.bincount(targets, minlength=count)
        right += torch.bincount(targets[hit[:, 0]], minlength=count)
        result.images += len(targets)
        bar.update(len(targets))
        bar.set_postfix(top1=f"{100 * right.sum().item() / result.images:.2f}", refresh=False)
    bar.close()
    if result.images == 0:
        raise DataError(f"no image of {len(guarded)} could be read; the first: {result.skipped[0]}")
    result.seconds = time.perf_counter() - start
    result.images_per_second = result.images / result.seconds
    result.top1 = 100 * right.sum().item() / result.images
    result.top5 = 100 * right5 / result.images
    result.loss = loss / result.images
    result.per_class = [
        {"class": names[i], "images": seen[i].item(), "top1": 100 * right[i].item() / seen[i].item()}
        for i in range(count)
        if seen[i] > 0
    ]
    return result
