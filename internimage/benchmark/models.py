# SPDX-License-Identifier: MIT
"""InternImage-T on the CPU against the official model and against others of its size, with random weights.

Inference in float32 and bfloat16, a training step in float32 (forward, cross entropy, backward, plain SGD), and peak
memory. The official model has our weights, and its logits are compared with ours before anything is timed. Models of
timm run in both memory formats, and the faster one counts; the rows name it.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dtypes import torch_dtype
from . import MODEL_PEERS as PEERS
from . import memory
from .official import NO_CHECKOUT, official_model
from .timing import (
    HOW,
    BenchmarkError,
    Clock,
    Times,
    append_csv,
    check_csv,
    clocks,
    describe,
    facts,
    interleave,
    markdown,
)
from .timing import significant as short

OURS = "internimage_tiny"
OFFICIAL = "official InternImage-T"
DTYPES = ("fp32", "bf16")  # as rows name them
# deviation of the logits of the largest: the official operator rounds in its normalised coordinates, block after block
TOLERANCE = {"official": 1e-3, "bf16": 0.1}


@dataclass(frozen=True)
class Contender:
    """A model as it is run."""

    name: str
    dtype: str = "fp32"
    channels_last: bool = False
    checkout: Path | None = None  # for the official model
    img_size: int = 224

    def build(self) -> nn.Module:
        """The model, always with the same weights, for evaluation."""
        torch.manual_seed(0)
        if self.checkout is not None:
            model = official_model(
                self.checkout, channels=64, depths=[4, 4, 18, 4], groups=[4, 8, 16, 32], drop_path_rate=0.0
            )
            # the official names of the parameters are ours
            model.load_state_dict(replace(self, name=OURS, checkout=None).build().state_dict())
        else:
            cfg = timm.get_pretrained_cfg(self.name, allow_unregistered=True)
            fixed = self.name.startswith("swin") or (cfg is not None and cfg.fixed_input_size)
            extra = {"img_size": self.img_size} if fixed else {}
            try:
                model = timm.create_model(self.name, drop_path_rate=0.0, **extra)
            except TypeError as error:  # the model has no drop path
                if "drop_path_rate" not in str(error):
                    raise
                model = timm.create_model(self.name, **extra)
            if self.name == OURS:
                spread_points(model)
        model = model.eval().to(torch_dtype(self.dtype))
        return model.to(memory_format=torch.channels_last) if self.channels_last else model

    def images(self, batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(batch, 3, self.img_size, self.img_size, generator=generator).to(torch_dtype(self.dtype))
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images


def spread_points(model: nn.Module) -> None:
    """Give offset and mask, which begin at zero, weights: the points leave the pixel centres as trained ones do."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith((".dcn.offset.weight", ".dcn.mask.weight")):
            with torch.no_grad():
                parameter.normal_(0, 1 / math.sqrt(parameter.shape[1]), generator=generator)


@contextlib.contextmanager
def _blamed(contender: Contender) -> Iterator[None]:
    """Context in which whatever a peer's code raises becomes a message: its name or size may be no good for it."""
    try:
        yield
    except BenchmarkError:
        raise
    except Exception as error:
        if contender.name == OURS:
            raise
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        size = f"{contender.img_size} pixels"
        raise BenchmarkError(f"the peer '{contender.name}' does not run at {size}: {reason}") from error


def contenders(peers: Sequence[str], checkout: Path | None, dtypes: Sequence[str], img_size: int) -> list[Contender]:
    """Ours in each dtype, and the peers: the official one in float32, timm's in each dtype and memory format.

    Raises:
        BenchmarkError: timm has no model of a peer's name, or there is no checkout of the official one.
    """
    if unknown := [name for name in peers if name != "official" and not timm.is_model(name)]:
        raise BenchmarkError(f"timm has no model {', '.join(map(repr, unknown))}; a peer is 'official' or a timm model")
    if "official" in peers and checkout is None:
        raise BenchmarkError(NO_CHECKOUT)
    result = [Contender(OURS, dtype, img_size=img_size) for dtype in dtypes]
    if "official" in peers:
        result.append(Contender(OFFICIAL, checkout=checkout, img_size=img_size))
    for name in peers:
        if name != "official":
            result += [Contender(name, d, last, img_size=img_size) for d in dtypes for last in (False, True)]
    return result


def check(models: dict[Contender, nn.Module]) -> None:
    """Whether the models that should agree do.

    Raises:
        BenchmarkError: The official model's logits are not ours, or ours in bfloat16 are far from those in float32.
    """
    logits = {}
    for contender, model in models.items():
        with torch.inference_mode(), _blamed(contender):
            logits[contender] = model(contender.images(2)).float()
    right = next(value for c, value in logits.items() if c.name == OURS and c.dtype == "fp32")
    for contender, value in logits.items():
        if contender.name in (OURS, OFFICIAL):
            deviation = ((value - right).abs().max() / right.abs().max()).item()
            allowed = TOLERANCE["official" if contender.name == OFFICIAL else "bf16"]
            if not deviation <= allowed:
                raise BenchmarkError(
                    f"{contender.name} {contender.dtype}: the logits deviate from ours in float32 by {deviation:.1e} "
                    f"of the largest, allowed {allowed:.0e}; the times would not be of the same work"
                )


def inference(model: nn.Module, images: Tensor) -> Callable[[], object]:
    def run():
        with torch.inference_mode():
            return model(images)

    return run


def training_step(model: nn.Module, images: Tensor) -> Callable[[], object]:
    """Forward, loss, backward and update; the rate is so small that the model stays what it is."""
    labels = torch.arange(len(images)) % 1000
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def run():
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss

    return run


# ---- rows

COLUMNS = ["what", "who", "dtype", "batch", "img_size", "of", "value", "unit", "memory_format", *facts()]


def rows(times: Times, what: str, batch: int, about: dict) -> list[dict]:
    """Images a second, then ratios to the peers: how many times as fast ours is, in the same dtype and in bfloat16
    against the official float32 model."""
    result: list[dict] = []
    for how in ("min", "median"):
        fastest: dict[tuple[str, str], tuple[float, Contender]] = {}
        for contender in times.seconds:
            seconds = times.pick(contender, how)
            key = contender.name, contender.dtype
            if key not in fastest or seconds < fastest[key][0]:
                fastest[key] = seconds, contender
        common = {"what": what, "batch": batch, "of": how}

        def row(who, dtype, value, unit, contender, common=common):
            format = "channels_last" if contender.channels_last else "default"
            named = {**common, "who": who, "dtype": dtype, "img_size": contender.img_size, "value": short(value)}
            return _in_order({**named, "unit": unit, "memory_format": format, **about})

        for (name, dtype), (seconds, contender) in fastest.items():
            result.append(row(name, dtype, batch / seconds, "images/s", contender))
        for (name, dtype), (seconds, contender) in fastest.items():
            for own in ("fp32", "bf16"):
                if name != OURS and (own == dtype or name == OFFICIAL) and (OURS, own) in fastest:
                    dtypes = own if own == dtype else f"{own} / {dtype}"
                    ratio = seconds / fastest[OURS, own][0]
                    result.append(row(f"{OURS} / {name}", dtypes, ratio, "x", contender))
    return result


def memory_rows(peaks: dict[Contender, float], what: str, batch: int, about: dict) -> list[dict]:
    """Peaks in MB, and ours as a share of the peers'."""
    result = []
    common = {"what": what, "batch": batch, "of": "once", "memory_format": "default"}
    own = next(value for c, value in peaks.items() if c.name == OURS)
    for c, value in peaks.items():
        named = {**common, "dtype": c.dtype, "img_size": c.img_size, **about}
        result.append(_in_order({**named, "who": c.name, "value": short(value), "unit": "MB"}))
        if c.name != OURS:
            result.append(_in_order({**named, "who": f"{OURS} / {c.name}", "value": short(own / value), "unit": "x"}))
    return result


def _in_order(row: dict) -> dict:
    return {column: row[column] for column in COLUMNS}


def table(entries: Sequence[dict]) -> str:
    """Rows of one clock as a Markdown table: of the fastest round and, in parentheses, of the median."""
    medians = {_key(row): row["value"] for row in entries if row["of"] == "median"}
    lines = []
    for row in entries:
        if row["of"] != "median":
            value = f"{row['value']:g}" + (f" ({medians[_key(row)]:g})" if _key(row) in medians else "")
            format = "" if row["memory_format"] == "default" else f", {row['memory_format']}"
            lines.append([f"{row['what']}, {row['dtype']}", row["who"] + format, row["unit"], row["batch"], value])
    return markdown(["work", "who", "unit", "batch", "value"], lines, names=3)


def _key(row: dict) -> tuple:
    return row["what"], row["who"], row["dtype"], row["batch"], row["unit"]


def benchmark_models(
    checkout: Path | None = None,
    peers: Sequence[str] = PEERS[1:],
    batches: Sequence[int] = (8, 1),
    training_batch: int = 4,
    rounds: int = 7,
    wall_threads: int = 2,
    with_memory: bool = True,
    img_size: int = 224,
    csv: Path | None = None,
    report: Callable[[str], None] = print,
) -> list[dict]:
    """Time InternImage-T against its peers and measure its memory; returns, reports and appends rows.

    Args:
        checkout: The user's checkout of OpenGVLab/InternImage, for the peer "official".
        peers: "official" and names of timm models.
        batches: Images of an inference.
        training_batch: Images of a training step; 0 leaves training out.
        rounds: Timed calls of each model, work and clock.
        wall_threads: Threads of the second clock, wall time; 0 leaves it out.
        with_memory: Measure peak memory, too: ours against the official model, each in a process of its own.
        img_size: Side of the images.
        csv: File to append the rows to.
        report: Takes text for people.

    Raises:
        BenchmarkError: A peer cannot be had or computes something else; the file has other columns.
    """
    if csv is not None:
        check_csv(csv, COLUMNS)
    result: list[dict] = []

    def finish(entries: list[dict], head: str) -> None:
        if csv is not None:
            append_csv(csv, entries)
        report(f"\n{head}\n\n{table(entries)}")
        result.extend(entries)

    if with_memory:
        memory.check_system()
    models = {}
    for contender in contenders(peers, checkout, DTYPES, img_size):
        with _blamed(contender):
            models[contender] = contender.build()
    check(models)
    wide = {c: m for c, m in models.items() if c.dtype == "fp32"}
    if training_batch > 0:
        for contender, model in wide.items():
            with _blamed(contender):  # now, and not after the inferences were timed
                training_step(model.train(), contender.images(training_batch))()
    phases: list[tuple[str, int, dict[Contender, nn.Module], Callable]] = [
        ("inference", batch, models, inference) for batch in batches
    ]
    if training_batch > 0:
        phases.append(("training step", training_batch, wide, training_step))
    for what, batch, own, work in phases:
        for clock in clocks(wall_threads):
            for model in own.values():
                model.train(work is training_step)
            functions = {c: work(m, c.images(batch)) for c, m in own.items()}
            times = interleave(functions, rounds, clock, settle=False, name=what)
            entries = rows(times, what, batch, facts(clock, times))
            head = describe(entries[0])
            finish(entries, f"{what}, batch {batch}, {img_size} px: {head}\n{HOW}")
    del models, wide, own, functions
    if with_memory:
        for what, batch in (("inference", max(batches)), ("training step", training_batch)):
            if batch > 0:
                alone = [c for c in contenders(peers, checkout, ["fp32"], img_size) if not c.channels_last]
                peaks = {c: memory.peak(c, batch, what == "training step") for c in alone}
                about = facts(Clock("", memory.THREADS))
                entries = memory_rows(peaks, f"peak memory, {what}", batch, about)
                finish(
                    entries, f"peak memory, {what}: growth of resident memory, weights not counted, a process for each"
                )
    return result
