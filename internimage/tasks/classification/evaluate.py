# SPDX-License-Identifier: MIT
"""Accuracy of a classifier on a dataset."""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from ...data.datasets import Batch, EvaluationTransform, GuardedDataset, MapDataset, collate
from ...data.imagenet import EvaluationProtocol
from ...data.images import DataError
from ...data.workers import block_worker_signals, init_worker_signals
from ...engine.finite import NotFiniteError, output_problem
from ...engine.world import World
from ...errors import UserError
from ...progress import message, progress_bar
from .labels import check_class_map, check_classes

if sys.platform != "win32":
    import resource

_MOST_NAMED = 20  # unreadable images that a process names; more would scroll everything else off the screen


@dataclass
class Evaluation:
    """Result of an evaluation. Accuracies are percentages of the images that could be read."""

    images: int = 0  #: that could be read
    top1: float = 0.0  #: percent
    top5: float = 0.0  #: percent
    loss: float = 0.0  #: mean cross entropy, nats
    real_images: int = 0  #: that have ImageNet-ReaL labels
    real_top1: float | None = None  #: percent
    real_top5: float | None = None  #: percent
    seconds: float = 0.0  #: wall time, including loading
    images_per_second: float = 0.0  #: including loading, all processes together
    model_images_per_second: float = 0.0  #: without loading, all processes together
    #: bytes of device memory, or of resident memory on a CPU, in the process that used the most; 0 if unknown
    peak_memory: int = 0
    processes: int = 1  #: that shared the images
    #: file and reason of each image that could not be read
    skipped: list[tuple[str, str]] = field(default_factory=list)
    #: class, images and top1 of each class that has images
    per_class: list[dict[str, Any]] = field(default_factory=list)
    #: index, target, predicted class and its probability, for each image, if asked for
    predictions: list[tuple[int, int, int, float]] = field(default_factory=list)


@torch.no_grad()  # not inference mode: sharded weights gathered under it could not be trained afterwards
def evaluate(
    model: nn.Module,
    dataset: MapDataset,
    config: dict[str, Any],
    batch_size: int = 64,
    workers: int = 2,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    classes_from_map: bool = False,
    progress: bool = True,
    world: World | None = None,
    flip: bool = False,
    protocol: EvaluationProtocol | None = None,
    keep_predictions: bool = False,
    reported: set[str] | None = None,
) -> Evaluation:
    """Top-1, top-5 and loss over a whole dataset. Every image counts once; unreadable ones are reported and listed.

    Several processes share the images: process r of n evaluates images r, r + n, r + 2n and so on, without padding. All
    of them return the same result.

    Args:
        model: Returns (N, num_classes) logits. Is moved to `device` and `dtype` and left in eval mode.
        dataset: From `open_dataset`.
        config: timm's preprocessing, from `internimage.engine.create.data_config`.
        batch_size: Images per step of a process.
        workers: Loader processes; 0 loads in this one.
        device, dtype: Of the model; metrics are computed in float32.
        classes_from_map: The dataset's indices come from a class map, so it may have fewer classes than the model.
        progress: Show a bar on stderr.
        world: The processes, from `internimage.engine.world.join`; None for this one alone.
        flip: Average the probabilities of each image and its mirror image.
        protocol: How accuracy on a variant of ImageNet is computed, from `internimage.data.imagenet.protocol`.
        keep_predictions: Return the prediction for every image.
        reported: Unreadable files that have been reported on stderr already; new ones are added.

    Raises:
        DataError: The dataset's classes are not the model's, a label is not a class, or no image could be read.
        internimage.engine.finite.NotFiniteError: The model returned NaN or infinity.
    """
    world, device = world or World(), torch.device(device)
    protocol = protocol or EvaluationProtocol()
    if protocol.classes is not None:
        names = protocol.names
    else:
        with world.raise_on_all_ranks():
            names = check_class_map(model, dataset) if classes_from_map else check_classes(model, dataset)
    parameter = next(model.parameters(), None)
    if parameter is None or parameter.device != device or parameter.dtype != dtype:
        model = model.to(device=device, dtype=dtype)
    # published accuracies on ImageNet were measured without Exif orientation
    upright = False if protocol.classes is not None else None
    guarded = GuardedDataset(dataset, EvaluationTransform(config), upright)
    timed = _TimedModel(model.eval(), device, flip)
    counter = _Counter(names, protocol, guarded, keep_predictions)
    failures = _Failures(set() if reported is None else reported)
    blank = torch.zeros(1, *config["input_size"], device=device, dtype=dtype)
    problem: UserError | None = None
    start = time.perf_counter()
    bar = progress_bar(len(guarded), "evaluate", "img", shown=progress and world.first)
    done = 0
    first = world.rank  # index of the batch's first sample; the others follow at a distance of world.size
    for batch in _batches(guarded, batch_size, workers, world, device.type == "cuda"):
        failures.add(batch, first, world.size)
        images = min(world.size * batch.size, len(guarded) - done)
        bar.update(images)
        done += images
        problem = problem or counter.problem_with(batch.targets)
        if batch.images is not None and problem is None:
            logits, problem = timed.run(batch.images.to(device=device, dtype=dtype, non_blocking=True))
            if problem is None:
                counter.add(logits, batch.targets, [first + world.size * i for i in batch.positions])
                bar.set_postfix(top1=f"{counter.top1:.2f}", refresh=False)
        elif world.size > 1:
            timed.run_blank(blank)  # the processes gather sharded weights together
        first += world.size * batch.size
        if problem is not None and world.size == 1:
            break
    bar.close()
    world.raise_any(problem)
    result = counter.gather(world)
    result.skipped = failures.gather(world)
    if result.images == 0:
        file, reason = result.skipped[0]
        raise DataError(f"none of {len(guarded)} images could be read; the first is '{file}' ({reason})")
    if protocol.real is not None and result.real_images == 0:
        raise DataError("no image has a ReaL label; they are looked up by names such as ILSVRC2012_val_00000001.JPEG")
    result.seconds = time.perf_counter() - start
    result.images_per_second = result.images / result.seconds
    result.model_images_per_second, result.peak_memory = timed.gather(world)
    return result


def _batches(
    guarded: GuardedDataset[Tensor], batch_size: int, workers: int, world: World, pin: bool
) -> Iterator[Batch]:
    """This process's batches; then empty ones, as long as another process may have more."""
    loader = DataLoader(
        Subset(guarded, range(world.rank, len(guarded), world.size)),
        batch_size,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
        worker_init_fn=init_worker_signals,
        generator=torch.Generator(),  # otherwise it draws from the global one, which training may be using
    )
    with block_worker_signals():
        batches = iter(loader)
    yield from batches
    most = -(-len(range(0, len(guarded), world.size)) // batch_size)
    for _ in range(most - len(loader)):
        yield collate([])


class _TimedModel:
    """The model in evaluation, with its time and memory.

    Args:
        model: In eval mode, on its device.
        device: That device.
        flip: Average the probabilities of each image and its mirror image.
    """

    def __init__(self, model: nn.Module, device: torch.device, flip: bool) -> None:
        self.model, self.device, self.flip = model, device, flip
        self.seconds, self.images = 0.0, 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def run(self, images: Tensor) -> tuple[Tensor, NotFiniteError | None]:
        """Logits on the CPU in float32, and an error if they are not finite."""
        self._synchronize()
        start = time.perf_counter()
        outputs = logits = self.model(images).float()
        if self.flip:
            mirrored = self.model(images.flip(-1)).float()
            outputs = torch.cat([logits, mirrored])
            mean = (logits.softmax(-1) + mirrored.softmax(-1)).div(2)
            logits = mean.clamp_min(torch.finfo(mean.dtype).tiny).log()  # the log of 0 would not be finite
        self._synchronize()
        self.seconds += time.perf_counter() - start
        self.images += len(images)
        return logits.cpu(), output_problem(outputs, self.model, images.dtype)

    def run_blank(self, image: Tensor) -> None:
        """Call the model as often as `run` does."""
        for _ in range(1 + self.flip):
            self.model(image)

    def gather(self, world: World) -> tuple[float, int]:
        """Images per second without loading, all processes together; and the largest peak memory in bytes."""
        seconds, images, peaks = zip(*world.gather((self.seconds, self.images, self._peak_memory())))
        return sum(n / s for n, s in zip(images, seconds) if s), max(peaks)

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def _peak_memory(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if sys.platform == "win32":
            return 0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


@dataclass
class _Counts:
    """Counts of a process."""

    seen: Tensor  # (classes,) images of each class
    correct: Tensor  # (classes,) top-1
    real: Tensor  # (3,) images with ReaL labels, their top-1 and top-5
    correct5: int = 0  # top-5
    loss: float = 0.0  # sum
    predictions: list[tuple[int, int, int, float]] = field(default_factory=list)


class _Counter:
    """Counts correct predictions.

    Args:
        names: The classes.
        protocol: Which outputs count, and ReaL labels.
        guarded: For the names of files.
        keep_predictions: Keep the prediction for every image.
    """

    def __init__(
        self,
        names: list[str],
        protocol: EvaluationProtocol,
        guarded: GuardedDataset[Tensor],
        keep_predictions: bool,
    ) -> None:
        self.names, self.protocol, self.guarded, self.keep_predictions = names, protocol, guarded, keep_predictions
        seen, correct, real = (torch.zeros(size, dtype=torch.long) for size in (len(names), len(names), 3))
        self.counts = _Counts(seen, correct, real)

    def problem_with(self, targets: Tensor) -> DataError | None:
        """An error if a label is not a class."""
        for target in targets.tolist():
            if not 0 <= target < len(self.names):
                return DataError(f"the dataset has label {target}; the model's classes are 0 to {len(self.names) - 1}")
        return None

    def add(self, logits: Tensor, targets: Tensor, indices: list[int]) -> None:
        """Count a batch.

        Args:
            logits: (N, outputs).
            targets: (N,).
            indices: Of the N samples in the dataset.
        """
        counts, classes = self.counts, len(self.names)
        if self.protocol.classes is not None:
            logits = logits[:, self.protocol.classes]
        counts.loss += F.cross_entropy(logits, targets, reduction="sum").item()
        ranked = logits.topk(min(5, classes)).indices
        hits = ranked == targets[:, None]
        counts.correct5 += int(hits.any(1).sum())
        counts.seen += torch.bincount(targets, minlength=classes)
        counts.correct += torch.bincount(targets[hits[:, 0]], minlength=classes)
        if self.protocol.real is not None:
            counts.real += _real_hits(self.protocol.real, [self.guarded.name(i) for i in indices], ranked)
        if self.keep_predictions:
            probabilities = logits.softmax(-1).gather(1, ranked[:, :1])[:, 0]
            counts.predictions += zip(indices, targets.tolist(), ranked[:, 0].tolist(), probabilities.tolist())

    @property
    def top1(self) -> float:
        """Of this process, in percent."""
        return 100 * self.counts.correct.sum().item() / max(self.counts.seen.sum().item(), 1)

    def gather(self, world: World) -> Evaluation:
        """The result of all processes."""
        parts = world.gather(self.counts)
        seen, correct, real = (
            torch.stack([getattr(part, name) for part in parts]).sum(0) for name in ("seen", "correct", "real")
        )
        result = Evaluation(images=int(seen.sum()), processes=world.size)
        result.predictions = sorted(prediction for part in parts for prediction in part.predictions)
        if result.images == 0:
            return result
        result.top1 = 100 * correct.sum().item() / result.images
        result.top5 = 100 * sum(part.correct5 for part in parts) / result.images
        result.loss = sum(part.loss for part in parts) / result.images
        result.real_images = int(real[0])
        if result.real_images:
            result.real_top1, result.real_top5 = (100 * real[i].item() / result.real_images for i in (1, 2))
        result.per_class = [
            {"class": name, "images": images, "top1": 100 * hits / images}
            for name, images, hits in zip(self.names, seen.tolist(), correct.tolist())
            if images > 0
        ]
        return result


class _Failures:
    """Images that a process could not read.

    Args:
        reported: Files that are not reported again; new ones are added.
    """

    def __init__(self, reported: set[str]) -> None:
        self.reported, self.named = reported, 0
        self.found: list[tuple[int, str, str]] = []  # index, file, reason

    def add(self, batch: Batch, first: int, stride: int) -> None:
        """Collect and report the unreadable images of a batch; its samples are `first`, `first + stride` and so on."""
        failed = (i for i in range(batch.size) if i not in batch.positions)
        self.found += [(first + stride * i, *failure) for i, failure in zip(failed, batch.failures)]
        for file, reason in batch.failures:
            if file not in self.reported:
                self.reported.add(file)
                self.named += 1
                if self.named <= _MOST_NAMED:
                    message(f"'{file}' cannot be read ({reason}); it does not count")
                elif self.named == _MOST_NAMED + 1:
                    message("more images cannot be read; they are counted, but not named here")

    def gather(self, world: World) -> list[tuple[str, str]]:
        """Files and reasons of all processes, in the dataset's order."""
        found = sorted(failure for part in world.gather(self.found) for failure in part)
        return [(file, reason) for _, file, reason in found]


def _real_hits(labels: dict[str, list[int]], files: list[str], ranked: Tensor) -> Tensor:
    """Counts of images that have ReaL labels, and of those that are correct in top-1 and in top-5.

    Args:
        labels: By file name. An image may have several labels, all of which are correct, or none.
        files: Of the N images.
        ranked: (N, 5), the most likely classes, best first.
    """
    counts = torch.zeros(3, dtype=torch.long)
    for file, best in zip(files, ranked.tolist()):
        allowed = labels.get(file.replace("\\", "/").rsplit("/", 1)[-1])
        if allowed:
            counts += torch.tensor([1, best[0] in allowed, any(i in allowed for i in best)])
    return counts
