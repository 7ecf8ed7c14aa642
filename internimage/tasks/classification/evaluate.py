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

from ...data.datasets import Batch, DataError, EvaluationTransform, GuardedDataset, class_difference, class_names
from ...data.imagenet import Protocol
from ...data.workers import signals_for_us, worker_signals
from ...engine.finite import NotFiniteError, output_problem
from ...engine.world import World
from ...errors import some
from ...progress import message, progress_bar

try:
    import resource
except ImportError:  # Windows
    resource = None

_MOST_TOLD = 20  # unreadable images that a process names; the rest would only push them off the screen


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
    answers: list[tuple[int, int, int, float]] = field(
        default_factory=list
    )  # index, target, predicted, its probability


def _check_classes(model: nn.Module, dataset: Dataset) -> list[str]:
    names = class_names(dataset)
    if names is None:
        return [str(i) for i in range(model.num_classes)]
    trained = _trained_classes(model)
    if len(names) > model.num_classes:
        raise DataError(
            f"the dataset has {len(names)} classes and the model {model.num_classes}{_unknown(names, trained)}"
        )
    if trained and trained != names:
        odd = next((a, b) for a, b in zip([*trained, None], [*names, None]) if a != b)
        raise DataError(
            f"the dataset's classes are not those that the model was trained on (there '{odd[0]}', here '{odd[1]}'; "
            f"{class_difference(names, trained)}): pass a class map"
        )
    if len(names) < model.num_classes:
        raise DataError(
            f"the dataset has {len(names)} classes and the model {model.num_classes}, so their indices need not agree: "
            f"pass a class map (a file with a class a line, in the model's order), or name the dataset with --variant "
            f"if it is one of ImageNet's"
        )
    return names


def _trained_classes(model: nn.Module) -> list[str] | None:
    """The classes that were stored with the weights, in the order of the outputs."""
    trained = getattr(model, "pretrained_cfg", {}).get("label_names")
    return list(trained) if trained and len(trained) == model.num_classes else None


def _unknown(names: list[str], trained: list[str] | None) -> str:
    unknown = set(names) - set(trained or names)
    return f"; it does not know {some(unknown, 5)}" if unknown else ""


def _check_class_map(model: nn.Module, dataset: Dataset) -> list[str]:
    """A map has the last word on the classes' order, but not against the model's own record of it."""
    names, trained = class_names(dataset), _trained_classes(model)
    if names is None:
        return [str(i) for i in range(model.num_classes)]
    if len(names) > model.num_classes:
        raise DataError(
            f"the class map has {len(names)} classes and the model {model.num_classes}{_unknown(names, trained)}"
        )
    if trained:
        if _unknown(names, trained):
            raise DataError(f"the class map does not fit the model{_unknown(names, trained)}; {_first(trained)}")
        odd = next(((i, name) for i, name in enumerate(names) if trained[i] != name), None)
        if odd is not None:
            raise DataError(
                f"the class map is not in the model's order: '{odd[1]}' is class {odd[0]} of the map and class "
                f"{trained.index(odd[1])} of the model; {_first(trained)}"
            )
    return names + [str(i) for i in range(len(names), model.num_classes)]


def _first(trained: list[str]) -> str:
    more = f", ... ({len(trained)} in all)" if len(trained) > 5 else ""
    return f"the model's classes are, in order, {', '.join(trained[:5])}{more}"


class _Clock:
    """Time in the model, and memory."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.images = device, 0.0, 0
        self.tracks = device.type == "cuda"
        if self.tracks:
            torch.cuda.reset_peak_memory_stats(device)

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def run(self, model: nn.Module, images: Tensor, flip: bool) -> tuple[Tensor, NotFiniteError | None]:
        self._wait()
        start = time.perf_counter()
        given = logits = model(images).float()
        if flip:
            mirrored = model(images.flip(-1)).float()
            given = torch.cat([logits, mirrored])
            mean = (logits.softmax(-1) + mirrored.softmax(-1)).div(2)
            logits = mean.clamp_min(torch.finfo(mean.dtype).tiny).log()  # a probability of 0 has no finite loss
        self._wait()
        self.seconds += time.perf_counter() - start
        self.images += len(images)
        return logits.cpu(), output_problem(given, model, images.dtype)

    def peak(self) -> int:
        if self.tracks:
            return torch.cuda.max_memory_allocated(self.device)
        if resource is None:
            return 0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _shares(guarded: GuardedDataset, batch_size: int, workers: int, world: World, pin: bool) -> Iterator[Batch | None]:
    """This process's batches; None where it has no more and another may have."""
    indices = range(world.rank, len(guarded), world.size)
    loader = DataLoader(
        Subset(guarded, indices),
        batch_size,
        num_workers=workers,
        collate_fn=GuardedDataset.collate,
        pin_memory=pin,
        worker_init_fn=worker_signals,
        generator=torch.Generator(),  # else it draws from the global one, which training may be using
    )
    with signals_for_us():
        batches = iter(loader)
    yield from batches
    most = -(-len(range(0, len(guarded), world.size)) // batch_size)
    yield from [None] * (most - len(loader))


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
    keep_answers: bool = False,
    told: set[str] | None = None,
) -> Evaluation:
    """Top-1, top-5 and loss over a whole dataset. Every image counts once; unreadable ones are told and listed.

    Several processes share the images, one after the other; each image goes to one of them, whatever the remainder,
    and all return the same counts.

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
        keep_answers: Return what was predicted for every image.
        told: Files that are known to be unreadable and are not named again on stderr; is added to.

    Raises:
        DataError: The dataset's classes are not the model's, or a label lies outside them.
        internimage.engine.finite.NotFiniteError: The model gave NaN or infinity.
    """
    world, device = world or World(), torch.device(device)
    protocol = protocol or Protocol()
    if protocol.classes is not None:
        count, names = len(protocol.classes), protocol.names
    else:
        count = model.num_classes
        with world.together():
            names = _check_class_map(model, dataset) if classes_from_map else _check_classes(model, dataset)
    parameter = next(model.parameters(), None)
    if parameter is None or parameter.device != device or parameter.dtype != dtype:
        model = model.to(device=device, dtype=dtype)
    model = model.eval()
    # published accuracies on ImageNet were measured without a look at Exif data
    upright = False if protocol.classes is not None else None
    guarded = GuardedDataset(dataset, EvaluationTransform(config), upright)
    told, named = set() if told is None else told, 0
    blank = torch.zeros(1, *config["input_size"], device=device, dtype=dtype)
    result = Evaluation(processes=world.size)
    seen, right = torch.zeros(count, dtype=torch.long), torch.zeros(count, dtype=torch.long)
    right5, real = 0, torch.zeros(3, dtype=torch.long)  # images, top-1, top-5
    loss, position, skipped = 0.0, world.rank, []
    problem: DataError | NotFiniteError | None = None
    clock = _Clock(device)
    start = time.perf_counter()
    bar = progress_bar(len(guarded), "evaluate", "img", shown=progress and world.first)
    for batch in _shares(guarded, batch_size, workers, world, device.type == "cuda"):
        places = []
        if batch is not None:
            every = len(batch.places) + len(batch.failures)
            failed = (i for i in range(every) if i not in batch.places)
            skipped += [(position + world.size * i, *failure) for i, failure in zip(failed, batch.failures)]
            for file, reason in batch.failures:
                if file not in told:
                    told.add(file)
                    named += 1
                    _tell_unreadable(file, reason, named)
            places = [position + world.size * i for i in batch.places]
            position += world.size * every
            bar.update(min(world.size * every, bar.total - bar.n))
            odd = next((t for t in batch.targets.tolist() if not 0 <= t < count), None)
            if odd is not None:
                problem = DataError(f"the dataset has label {odd}; the model's classes are 0 to {count - 1}")
                if world.size == 1:
                    break
        if not places or problem is not None:
            if world.size > 1:
                for _ in range(1 + flip):
                    model(blank)  # sharded weights are gathered by all processes together
            continue
        targets = batch.targets
        logits, problem = clock.run(model, batch.images.to(device=device, dtype=dtype, non_blocking=True), flip)
        if problem is not None:
            if world.size == 1:
                break
            continue  # the others' model calls may need this process's
        if protocol.classes is not None:
            logits = logits[:, protocol.classes]
        loss += F.cross_entropy(logits, targets, reduction="sum").item()
        order = logits.topk(min(5, count)).indices
        hit = order == targets[:, None]
        right5 += int(hit.any(1).sum())
        seen += torch.bincount(targets, minlength=count)
        right += torch.bincount(targets[hit[:, 0]], minlength=count)
        if protocol.real is not None:
            real += _real_hits(protocol.real, [guarded.name(i) for i in places], order)
        if keep_answers:
            sure = logits.softmax(-1).gather(1, order[:, :1])[:, 0]
            result.answers += list(zip(places, targets.tolist(), order[:, 0].tolist(), sure.tolist()))
        result.images += len(targets)
        bar.set_postfix(top1=f"{100 * right.sum().item() / result.images:.2f}", refresh=False)
    bar.close()
    world.agree(problem)
    parts = world.gather(
        (result.images, seen, right, right5, loss, real, skipped, result.answers, clock.seconds, clock.images,
         clock.peak())
    )  # fmt: skip
    images, seen, right, right5, loss, real, skipped, answers, model_seconds, model_images, peaks = zip(*parts)
    result.images, right5, loss = sum(images), sum(right5), sum(loss)
    seen, right, real = sum(seen), sum(right), sum(real)
    result.skipped = [(file, reason) for _, file, reason in sorted(failure for part in skipped for failure in part)]
    result.answers = sorted(answer for part in answers for answer in part)
    if result.images == 0:
        file, reason = result.skipped[0]
        raise DataError(f"no image of {len(guarded)} could be read; the first is '{file}' ({reason})")
    result.seconds = time.perf_counter() - start
    result.images_per_second = result.images / result.seconds
    result.model_images_per_second = sum(n / s for n, s in zip(model_images, model_seconds) if s)
    result.peak_memory = max(peaks)
    result.top1 = 100 * right.sum().item() / result.images
    result.top5 = 100 * right5 / result.images
    result.loss = loss / result.images
    if protocol.real is not None:
        result.real_images = int(real[0])
        if result.real_images == 0:
            raise DataError("no image has a ReaL label; they are found by names such as ILSVRC2012_val_00000001.JPEG")
        result.real_top1, result.real_top5 = (100 * real[i].item() / result.real_images for i in (1, 2))
    result.per_class = [
        {"class": names[i], "images": seen[i].item(), "top1": 100 * right[i].item() / seen[i].item()}
        for i in range(count)
        if seen[i] > 0
    ]
    return result


def _tell_unreadable(file: str, reason: str, count: int) -> None:
    if count <= _MOST_TOLD:
        message(f"'{file}' cannot be read ({reason}); it does not count")
    elif count == _MOST_TOLD + 1:
        message("more images cannot be read; they are counted, and not named here")


def _real_hits(labels: dict[str, list[int]], files: list[str], order: Tensor) -> Tensor:
    """Images with a label, right ones, right ones within five; an image may have several labels or none."""
    counts = torch.zeros(3, dtype=torch.long)
    for file, best in zip(files, order.tolist()):
        allowed = labels.get(file.replace("\\", "/").rsplit("/", 1)[-1])
        if allowed:
            counts += torch.tensor([1, best[0] in allowed, any(i in allowed for i in best)])
    return counts
