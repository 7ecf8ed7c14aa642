# SPDX-License-Identifier: MIT
"""Accuracy of a classifier on a dataset."""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from ...data.datasets import Batch, DataError, EvaluationTransform, GuardedDataset
from ...data.imagenet import Protocol
from ...data.workers import signals_for_us, worker_signals
from ...engine.finite import NotFiniteError, output_problem
from ...engine.world import World
from ...errors import UserError
from ...progress import message, progress_bar
from .labels import check_class_map, check_classes

try:
    import resource
except ImportError:  # Windows
    resource = None

_MOST_REPORTED = 20  # unreadable images that a process names; the rest would only push them off the screen


@dataclass
class Evaluation:
    """Counts and rates of one run. Accuracies in percent of the images that could be read."""

    images: int = 0
    top1: float = 0.0
    top5: float = 0.0
    loss: float = 0.0  # mean cross entropy, nats
    real_images: int = 0  # with ImageNet-ReaL labels: those that have one
    real_top1: float | None = None
    real_top5: float | None = None
    seconds: float = 0.0  # wall time, loading included
    images_per_second: float = 0.0
    model_images_per_second: float = 0.0  # without loading, all processes together
    peak_memory: int = 0  # bytes, the largest of the processes: of the device, or on the CPU of the process; 0: unknown
    processes: int = 1
    skipped: list[tuple[str, str]] = field(default_factory=list)  # file, reason
    per_class: list[dict] = field(default_factory=list)  # class, images, top1
    predictions: list[tuple[int, int, int, float]] = field(default_factory=list)  # index, target, class, probability


@torch.no_grad()  # not inference mode: sharded weights gathered in that could not be trained on afterwards
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
    world: World | None = None,
    flip: bool = False,
    protocol: Protocol | None = None,
    keep_predictions: bool = False,
    reported: set[str] | None = None,
) -> Evaluation:
    """Top-1, top-5 and loss over a whole dataset. Every image counts once; unreadable ones are reported and listed.

    Several processes share the images in turns; each image goes to one of them, whatever the remainder, and all return
    the same counts.

    Args:
        model: Gives (N, num_classes) logits. Is moved to `device` and `dtype` and left in eval mode.
        dataset: From `open_dataset`.
        config: timm's preprocessing, from `internimage.engine.create.data_config`.
        batch_size: Images a step of a process.
        workers: Loader processes; 0 loads in this one.
        device, dtype: Where and in what the model runs; metrics are computed in float32.
        classes_from_map: The dataset's indices come from a class map, so its number of classes may be less than the
            model's.
        progress: Show a bar on stderr.
        world: The processes, from `internimage.engine.world.join`; None is this one alone.
        flip: Average the probabilities of each image and its mirror image.
        protocol: How a variant of ImageNet is counted, from `internimage.data.imagenet.protocol`.
        keep_predictions: Return what was predicted for every image.
        reported: Unreadable files that are not named again on stderr; is added to.

    Raises:
        DataError: The dataset's classes are not the model's, or a label lies outside them.
        internimage.engine.finite.NotFiniteError: The model gave NaN or infinity.
    """
    world, device = world or World(), torch.device(device)
    protocol = protocol or Protocol()
    if protocol.classes is not None:
        names = protocol.names
        count = len(protocol.classes)
    else:
        with world.raise_on_all_ranks():
            names = check_class_map(model, dataset) if classes_from_map else check_classes(model, dataset)
        count = model.num_classes
    parameter = next(model.parameters(), None)
    if parameter is None or parameter.device != device or parameter.dtype != dtype:
        model = model.to(device=device, dtype=dtype)
    # published accuracies on ImageNet were measured without a look at Exif data
    upright = False if protocol.classes is not None else None
    guarded = GuardedDataset(dataset, EvaluationTransform(config), upright)
    timed = _Model(model.eval(), device, flip)
    counts = _Counts(count, protocol, guarded, keep_predictions)
    failures = _Failures(set() if reported is None else reported)
    blank = torch.zeros(1, *config["input_size"], device=device, dtype=dtype)
    problem: UserError | None = None
    start = time.perf_counter()
    bar = progress_bar(len(guarded), "evaluate", "img", shown=progress and world.first)
    position = world.rank
    for batch in _batches(guarded, batch_size, workers, world, device.type == "cuda"):
        indices: list[int] = []
        if batch is not None:
            every = len(batch.places) + len(batch.failures)
            indices = [position + world.size * i for i in batch.places]
            failures.add(batch, position, world.size)
            position += world.size * every
            bar.update(min(world.size * every, bar.total - bar.n))
            problem = problem or counts.problem_with(batch.targets)
        if indices and problem is None:
            logits, problem = timed.run(batch.images.to(device=device, dtype=dtype, non_blocking=True))
            if problem is None:
                counts.add(logits, batch.targets, indices)
                bar.set_postfix(top1=f"{counts.top1:.2f}", refresh=False)
        elif world.size > 1:
            timed.run_blank(blank)  # all processes gather sharded weights together
        if problem is not None and world.size == 1:
            break
    bar.close()
    world.raise_any(problem)
    result = counts.gather(world, names)
    result.skipped = failures.gather(world)
    if result.images == 0:
        file, reason = result.skipped[0]
        raise DataError(f"no image of {len(guarded)} could be read; the first is '{file}' ({reason})")
    if protocol.real is not None and result.real_images == 0:
        raise DataError("no image has a ReaL label; they are found by names such as ILSVRC2012_val_00000001.JPEG")
    result.seconds = time.perf_counter() - start
    result.images_per_second = result.images / result.seconds
    result.model_images_per_second, result.peak_memory = timed.gather(world)
    return result


def _batches(guarded: GuardedDataset, batch_size: int, workers: int, world: World, pin: bool) -> Iterator[Batch | None]:
    """This process's batches; None where it has no more and another may have."""
    indices = range(world.rank, len(guarded), world.size)
    loader = DataLoader(
        Subset(guarded, indices),
        batch_size,
        num_workers=workers,
        collate_fn=GuardedDataset.collate,
        pin_memory=pin,
        worker_init_fn=worker_signals,
        generator=torch.Generator(),  # otherwise it draws from the global one, which training may be using
    )
    with signals_for_us():
        batches = iter(loader)
    yield from batches
    most = -(-len(range(0, len(guarded), world.size)) // batch_size)
    yield from [None] * (most - len(loader))


class _Model:
    """The model in evaluation: its logits, the time it takes, and memory.

    Args:
        model: In eval mode, on its device.
        device: That device.
        flip: Average the probabilities of each image and its mirror image.
    """

    def __init__(self, model: nn.Module, device: torch.device, flip: bool) -> None:
        self.model, self.device, self.flip = model, device, flip
        self.seconds, self.images = 0.0, 0
        self.tracks = device.type == "cuda"
        if self.tracks:
            torch.cuda.reset_peak_memory_stats(device)

    def run(self, images: Tensor) -> tuple[Tensor, NotFiniteError | None]:
        """Logits on the CPU in float32, and what is wrong with them."""
        self._wait()
        start = time.perf_counter()
        given = logits = self.model(images).float()
        if self.flip:
            mirrored = self.model(images.flip(-1)).float()
            given = torch.cat([logits, mirrored])
            mean = (logits.softmax(-1) + mirrored.softmax(-1)).div(2)
            logits = mean.clamp_min(torch.finfo(mean.dtype).tiny).log()  # a probability of 0 has no finite loss
        self._wait()
        self.seconds += time.perf_counter() - start
        self.images += len(images)
        return logits.cpu(), output_problem(given, self.model, images.dtype)

    def run_blank(self, image: Tensor) -> None:
        """As many calls of the model as `run` makes."""
        for _ in range(1 + self.flip):
            self.model(image)

    def gather(self, world: World) -> tuple[float, int]:
        """Images a second without loading, all processes together; and the largest peak of memory."""
        seconds, images, peaks = zip(*world.gather((self.seconds, self.images, self._peak())))
        return sum(n / s for n, s in zip(images, seconds) if s), max(peaks)

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def _peak(self) -> int:
        if self.tracks:
            return torch.cuda.max_memory_allocated(self.device)
        if resource is None:
            return 0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


class _Counts:
    """What was right, of the images of a process.

    Args:
        classes: Their number.
        protocol: Which outputs count, and other labels.
        guarded: For the names of files.
        keep_predictions: Remember what was predicted for every image.
    """

    def __init__(self, classes: int, protocol: Protocol, guarded: GuardedDataset, keep_predictions: bool) -> None:
        self.classes, self.protocol, self.guarded, self.keep_predictions = classes, protocol, guarded, keep_predictions
        self.seen = torch.zeros(classes, dtype=torch.long)
        self.right = torch.zeros(classes, dtype=torch.long)
        self.right5, self.loss = 0, 0.0
        self.real = torch.zeros(3, dtype=torch.long)  # images, top-1, top-5
        self.predictions: list[tuple[int, int, int, float]] = []

    def problem_with(self, targets: Tensor) -> DataError | None:
        """A label that is no class."""
        for target in targets.tolist():
            if not 0 <= target < self.classes:
                return DataError(f"the dataset has label {target}; the model's classes are 0 to {self.classes - 1}")
        return None

    def add(self, logits: Tensor, targets: Tensor, indices: list[int]) -> None:
        """Count a batch: (N, outputs), (N,), and which samples they are."""
        if self.protocol.classes is not None:
            logits = logits[:, self.protocol.classes]
        self.loss += F.cross_entropy(logits, targets, reduction="sum").item()
        order = logits.topk(min(5, self.classes)).indices
        hit = order == targets[:, None]
        self.right5 += int(hit.any(1).sum())
        self.seen += torch.bincount(targets, minlength=self.classes)
        self.right += torch.bincount(targets[hit[:, 0]], minlength=self.classes)
        if self.protocol.real is not None:
            self.real += _real_hits(self.protocol.real, [self.guarded.name(i) for i in indices], order)
        if self.keep_predictions:
            best = order[:, 0]
            sure = logits.softmax(-1).gather(1, order[:, :1])[:, 0]
            self.predictions += list(zip(indices, targets.tolist(), best.tolist(), sure.tolist()))

    @property
    def top1(self) -> float:
        """Of this process, in percent."""
        return 100 * self.right.sum().item() / max(self.seen.sum().item(), 1)

    def gather(self, world: World, names: list[str]) -> Evaluation:
        """The counts of all processes."""
        shares = world.gather((self.seen, self.right, self.right5, self.loss, self.real, self.predictions))
        seen, right, right5, loss, real, predictions = zip(*shares)
        seen, right, real = sum(seen), sum(right), sum(real)
        result = Evaluation(images=int(seen.sum()), processes=world.size)
        result.predictions = sorted(prediction for share in predictions for prediction in share)
        if result.images == 0:
            return result
        result.top1 = 100 * right.sum().item() / result.images
        result.top5 = 100 * sum(right5) / result.images
        result.loss = sum(loss) / result.images
        result.real_images = int(real[0])
        if result.real_images:
            result.real_top1, result.real_top5 = (100 * real[i].item() / result.real_images for i in (1, 2))
        result.per_class = [
            {"class": names[i], "images": seen[i].item(), "top1": 100 * right[i].item() / seen[i].item()}
            for i in range(self.classes)
            if seen[i] > 0
        ]
        return result


class _Failures:
    """Images that could not be read, of a process."""

    def __init__(self, reported: set[str]) -> None:
        self.reported, self.named = reported, 0
        self.found: list[tuple[int, str, str]] = []  # index, file, reason

    def add(self, batch: Batch, position: int, stride: int) -> None:
        """Note and report those of a batch, whose samples are `stride` apart."""
        every = len(batch.places) + len(batch.failures)
        failed = (i for i in range(every) if i not in batch.places)
        self.found += [(position + stride * i, *failure) for i, failure in zip(failed, batch.failures)]
        for file, reason in batch.failures:
            if file not in self.reported:
                self.reported.add(file)
                self.named += 1
                if self.named <= _MOST_REPORTED:
                    message(f"'{file}' cannot be read ({reason}); it does not count")
                elif self.named == _MOST_REPORTED + 1:
                    message("more images cannot be read; they are counted, and not named here")

    def gather(self, world: World) -> list[tuple[str, str]]:
        """Files and reasons of all processes, in the dataset's order."""
        return [(file, reason) for _, file, reason in sorted(f for share in world.gather(self.found) for f in share)]


def _real_hits(labels: dict[str, list[int]], files: list[str], order: Tensor) -> Tensor:
    """Images with a label, right ones, right ones within five; an image may have several labels or none."""
    counts = torch.zeros(3, dtype=torch.long)
    for file, best in zip(files, order.tolist()):
        allowed = labels.get(file.replace("\\", "/").rsplit("/", 1)[-1])
        if allowed:
            counts += torch.tensor([1, best[0] in allowed, any(i in allowed for i in best)])
    return counts
