# SPDX-License-Identifier: MIT
"""Deformable convolution v2 on the CPU against torchvision's operator: its layers in a ResNet-50, and the whole model.

The layers are the thirteen of dcnv2_resnet50 at 224 px. torchvision is timed in both memory formats, and in each layer
the faster one counts. Its results are compared with ours before anything is timed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.deform_columns import apply_deform_columns
from ..ops.deform_conv import deform_conv2d
from . import THREADS, memory
from .contender import Contender
from .models import COLUMNS, Row, peaks, table, timings
from .ops import KINKS, Results, compare
from .timing import HOW, Times, append_csv, check_csv, clocks, describe, facts, interleave, significant

MODEL = "dcnv2_resnet50"
OFFSET_SCALE = 1.0  # standard deviation of the offsets, in pixels
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of the deviation, relative to the largest value
FORMATS = {"default": torch.contiguous_format, "channels_last": torch.channels_last}
ALL = "all"  # what the sums over the layers are called


@dataclass(frozen=True)
class Layer:
    """Equal layers of the model: 3x3, as many output channels as input channels, one offset group, padding 1."""

    channels: int
    side: int  # of the output, in pixels
    stride: int
    count: int

    @property
    def name(self) -> str:
        return f"{self.channels} channels, {self.side}x{self.side}, stride {self.stride}"


LAYERS = (
    Layer(128, 28, 2, 1), Layer(128, 28, 1, 3),
    Layer(256, 14, 2, 1), Layer(256, 14, 1, 5),
    Layer(512, 7, 2, 1), Layer(512, 7, 1, 2),
)  # fmt: skip


@dataclass
class Tensors:
    """The tensors of a layer, in one memory format and dtype."""

    input: Tensor
    offset: Tensor
    mask: Tensor
    weight: Tensor
    grad: Tensor  # of the output

    @classmethod
    def draw(cls, layer: Layer, batch: int) -> "Tensors":
        generator = torch.Generator().manual_seed(0)
        c, side, whole = layer.channels, layer.side, layer.side * layer.stride
        offset = torch.randn(batch, 18, side, side, generator=generator) * OFFSET_SCALE
        below = offset.floor()
        return cls(
            torch.randn(batch, c, whole, whole, generator=generator),
            below + (offset - below).clamp(KINKS, 1 - KINKS),
            torch.rand(batch, 9, side, side, generator=generator),
            torch.randn(c, c, 3, 3, generator=generator) / (3 * c**0.5),
            torch.randn(batch, c, side, side, generator=generator),
        )

    def to(self, memory_format: torch.memory_format = torch.contiguous_format, dtype: Any = torch.float32) -> "Tensors":
        return Tensors(*(t.to(dtype).contiguous(memory_format=memory_format) for t in vars(self).values()))


Key = tuple[Layer, str, str, str, str]  # layer, what, who, dtype, memory format


def torchvision_core(input: Tensor, offset: Tensor, weight: Tensor, stride: int, mask: Tensor) -> Tensor:
    from torchvision.ops import deform_conv2d as peer

    output: Tensor = peer(input, offset, weight, stride=stride, padding=1, mask=mask)
    return output


def our_core(input: Tensor, offset: Tensor, weight: Tensor, stride: int, mask: Tensor) -> Tensor:
    return deform_conv2d(input, offset, weight, stride=stride, padding=1, mask=mask)


def forward(core: Callable[..., Tensor], t: Tensors, stride: int) -> Callable[[], Results]:
    return lambda: (core(t.input, t.offset, t.weight, stride, t.mask),)


def forward_backward(core: Callable[..., Tensor], t: Tensors, stride: int) -> Callable[[], Results]:
    leaves = [tensor.clone().requires_grad_() for tensor in (t.input, t.offset, t.mask, t.weight)]

    def run() -> Results:
        output = core(leaves[0], leaves[1], leaves[3], stride, leaves[2])
        return output, *torch.autograd.grad(output, leaves, t.grad)

    return run


def sampling_and_product(t: Tensors, stride: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """The two halves of our forward pass: the columns of one image after the other, and the product of all with the
    weight."""
    last = [tensor.permute(0, 2, 3, 1) for tensor in (t.input, t.offset, t.mask)]
    arguments = ((3, 3), (stride, stride), (1, 1), (1, 1), 1)
    rows = apply_deform_columns(*last, *arguments).flatten(0, 2)
    matrix = t.weight.permute(0, 2, 3, 1).flatten(1)
    images = list(zip(*(tensor.split(1) for tensor in last)))

    def sample() -> None:  # more images at once would be a measurement of fresh memory
        for image in images:
            apply_deform_columns(*image, *arguments)

    return sample, lambda: F.linear(rows, matrix)


def contenders(batch: int, layers: Sequence[Layer]) -> dict[Key, Callable[[], object]]:
    """The functions to time, after a check of their results.

    Raises:
        BenchmarkError: torchvision, or ours in bfloat16, deviates from ours.
    """
    functions: dict[Key, Callable[[], object]] = {}
    for layer in layers:
        drawn = Tensors.draw(layer, batch)
        expected = forward_backward(our_core, drawn, layer.stride)()
        for name, memory_format in FORMATS.items():
            tensors = drawn.to(memory_format)
            for who, core in (("ours", our_core), ("torchvision", torchvision_core)):
                both = forward_backward(core, tensors, layer.stride)
                compare(f"{who}, {name}, {layer.name}", both(), expected, TOLERANCE[torch.float32])
                functions[layer, "forward", who, "fp32", name] = forward(core, tensors, layer.stride)
                functions[layer, "forward+backward", who, "fp32", name] = both
        half, last = drawn.to(torch.channels_last, torch.bfloat16), drawn.to(torch.channels_last)
        in_half = forward(our_core, half, layer.stride)
        compare(f"ours, bf16, {layer.name}", in_half(), expected, TOLERANCE[torch.bfloat16])
        functions[layer, "forward", "ours", "bf16", "channels_last"] = in_half
        sampling, product = sampling_and_product(last, layer.stride)
        functions[layer, "sampling", "ours", "fp32", "channels_last"] = sampling
        functions[layer, "product", "torch", "fp32", "channels_last"] = product
    return functions


# ---- rows


def rows(times: Times[Key], batch: int, about: Row) -> list[Row]:
    """Times in ms of each layer and of all, then ratios of torchvision's to ours. torchvision's sampling is its forward
    pass less torch's product."""
    return [row for how in ("min", "median") for row in _rows(times, how, {"batch": batch, "img_size": 224, **about})]


def _rows(times: Times[Key], how: str, about: Row) -> list[Row]:
    layers = list(dict.fromkeys(layer for layer, *_ in times.seconds))
    kinds = list(dict.fromkeys(key[1:] for key in times.seconds))
    ms = {kind: {layer: 1e3 * times.pick((layer, *kind), how) for layer in layers} for kind in kinds}
    result: list[Row] = []

    def add(kind: tuple[str, str, str, str], values: dict[str, float], unit: str) -> None:
        what, who, dtype, memory_format = kind
        named = {"who": who, "dtype": dtype, "memory_format": memory_format, "of": how, "unit": unit, **about}
        for layer, value in values.items():
            full = {**named, "what": f"{what}: {layer}", "value": significant(value)}
            result.append({column: full[column] for column in COLUMNS})

    for kind, values in ms.items():
        add(kind, _with_all(values), "ms")
    peer = {
        what: {layer: min(ms[what, "torchvision", "fp32", name][layer] for name in FORMATS) for layer in layers}
        for what in ("forward", "forward+backward")
    }
    product = ms["product", "torch", "fp32", "channels_last"]
    sampling = {layer: value - product[layer] for layer, value in peer["forward"].items()}

    def compare_with(what: str, who: str, dtype: str, name: str, above: dict[Layer, float], ours: str) -> None:
        below = _with_all(ms[what, "ours", ours, name])
        ratios = {layer: value / below[layer] for layer, value in _with_all(above).items()}
        add((what, who, dtype, name), ratios, "x")

    for what, values in peer.items():
        for name in FORMATS:
            compare_with(what, "torchvision / ours", "fp32", name, values, "fp32")
    compare_with("sampling", "torchvision / ours", "fp32", "channels_last", sampling, "fp32")
    single = ms["forward", "ours", "fp32", "channels_last"]
    compare_with("forward", "ours fp32 / ours bf16", "bf16", "channels_last", single, "bf16")
    return result


def _with_all(values: dict[Layer, float]) -> dict[str, float]:
    """By the name of the layer, and the sum over the model's layers."""
    named = {layer.name: value for layer, value in values.items()}
    return {**named, ALL: sum(layer.count * value for layer, value in values.items())}


def benchmark_deform(
    batch: int = 4,
    inference_batch: int = 2,
    training_batch: int = 4,
    rounds: int = 9,
    threads: Sequence[int] = THREADS,
    with_models: bool = True,
    with_memory: bool = True,
    img_size: int = 224,
    layers: Sequence[Layer] = LAYERS,
    csv: Path | None = None,
    report: Callable[[str], None] = print,
) -> list[Row]:
    """Time deformable convolution and dcnv2_resnet50 against the same on torchvision's operator.

    Args:
        batch: Batch size of the layers.
        inference_batch, training_batch: Batch sizes of the model.
        rounds: Number of timed calls per function and clock.
        threads: Numbers of threads to measure with: 1 for its CPU time, more for the wall time of so many.
        with_models: Also time the model.
        with_memory: Also measure the model's peak memory, in separate processes.
        img_size: Side of the model's images in pixels.
        layers: Which layers to time.
        csv: File to append the rows to.
        report: Called with the printed tables.

    Returns:
        The rows, by column.

    Raises:
        BenchmarkError: torchvision computes something else, or the file has other columns.
    """
    if csv is not None:
        check_csv(csv, COLUMNS)
    if with_models and with_memory:
        memory.check_system()
    result: list[Row] = []

    def finish(head: str, entries: list[Row], formats_apart: bool = False) -> None:
        if csv is not None:
            append_csv(csv, entries)
        report(f"\n{head}\n\n{table(entries, formats_apart)}")
        result.extend(entries)

    functions = contenders(batch, layers)
    for clock in clocks(threads):
        times = interleave(functions, rounds, clock, settle=True, name="deformable convolution")
        entries = rows(times, batch, facts(clock, times))
        finish(f"deformable convolution v2, batch {batch}: {describe(entries[0])}\n{HOW}", entries, True)
    if with_models:
        timed = [
            Contender(MODEL, channels_last=last, img_size=img_size, on_torchvision=peer)
            for peer in (False, True)
            for last in (False, True)
        ]
        for tables in timings(MODEL, timed, [inference_batch], training_batch, rounds, threads):
            finish(*tables)
        if with_memory:
            alone = [contender for contender in timed if not contender.channels_last]
            for tables in peaks(MODEL, alone, inference_batch, training_batch):
                finish(*tables)
    return result
