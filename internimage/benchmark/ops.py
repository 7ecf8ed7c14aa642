# SPDX-License-Identifier: MIT
"""DCNv3 on the CPU against other implementations, on the four stage shapes of InternImage-T at 224 px.

The others are our plain-torch reference, `torchvision.ops.deform_conv2d` as a depthwise convolution with weights of
one, and the official PyTorch function from the user's own checkout. Their results are compared with ours before
anything is timed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..ops import dcnv3_reference as reference
from . import OPS_PEERS as PEERS
from . import THREADS
from .official import NO_CHECKOUT, official_function
from .timing import (
    HOW,
    BenchmarkError,
    Times,
    append_csv,
    check_csv,
    clocks,
    describe,
    facts,
    interleave,
    markdown,
    significant,
)

STAGES = [(56, 4, 4), (28, 8, 4), (14, 16, 18), (7, 32, 4)]  # side, groups, number of blocks in InternImage-T
GROUP_CHANNELS = 16
KINKS = 2e-3  # minimum distance of offsets from integers, where the derivative jumps and rounding decides which side
WORKS = ("forward", "softmax+forward", "forward+backward")  # timed for every implementation
HALF_WORKS = ("forward bf16", "softmax+forward bf16")  # timed for ours only
# of the deviation, relative to the largest value; the official function normalizes coordinates to [-1, 1] in float32
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 2e-2}


@dataclass
class Tensors:
    """The tensors of one stage: N images, 3x3 points, stride and padding 1."""

    input: Tensor  # (N, side, side, groups * GROUP_CHANNELS)
    offset: Tensor  # (N, side, side, groups * 18), of standard deviation 1
    mask: Tensor  # (N, side, side, groups * 9), logits
    grad: Tensor  # of the output, in input's shape
    groups: int

    @classmethod
    def draw(cls, batch: int, side: int, groups: int) -> "Tensors":
        generator = torch.Generator().manual_seed(0)
        channels = (groups * GROUP_CHANNELS, groups * 18, groups * 9, groups * GROUP_CHANNELS)
        input, offset, mask, grad = (torch.randn(batch, side, side, c, generator=generator) for c in channels)
        whole = offset.floor()
        offset = whole + (offset - whole).clamp(KINKS, 1 - KINKS)
        return cls(input, offset, mask, grad, groups)

    def to(self, dtype: torch.dtype) -> "Tensors":
        return Tensors(
            self.input.to(dtype), self.offset.to(dtype), self.mask.to(dtype), self.grad.to(dtype), self.groups
        )

    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of input, offset and mask that require gradients."""
        return (
            self.input.clone().requires_grad_(),
            self.offset.clone().requires_grad_(),
            self.mask.clone().requires_grad_(),
        )


class Core(Protocol):
    """An implementation of DCNv3 for 3x3 points, stride and padding 1."""

    def __call__(self, input: Tensor, offset: Tensor, mask: Tensor, groups: int, softmax: bool) -> Tensor: ...


Results = tuple[Tensor, ...]  # the output; with a backward pass, also the gradients of input, offset and mask
Key = tuple[int, str, str]  # side, who, work


def ours(input: Tensor, offset: Tensor, mask: Tensor, groups: int, softmax: bool) -> Tensor:
    return torch.ops.internimage.dcnv3(input, offset, mask, [3, 3], [1, 1], [1, 1], [1, 1], groups, 1.0, False, softmax)


def reference_calls(tensors: Tensors) -> dict[str, Callable[[], Results]]:
    """`calls` for our plain-torch reference, whose backward pass is a function and not an autograd rule."""
    t = tensors
    inputs, geometry = (t.input, t.offset, t.mask), ([3, 3], [1, 1], [1, 1], [1, 1], t.groups, 1.0, False)

    def forward_backward() -> Results:
        output = reference.dcnv3(*inputs, *geometry, False)
        return output, *reference.dcnv3_backward(t.grad, *inputs, *geometry, False, False, [True] * 3)

    return {
        "forward": lambda: (reference.dcnv3(*inputs, *geometry, False),),
        "softmax+forward": lambda: (reference.dcnv3(*inputs, *geometry, True),),
        "forward+backward": forward_backward,
    }


def separate_softmax(mask: Tensor, groups: int) -> Tensor:
    """The softmax over the points as a separate operator, for implementations that do not fuse it."""
    return mask.unflatten(-1, (groups, 9)).softmax(-1).flatten(-2)


def torchvision_core() -> Core:
    """DCNv3 by torchvision's deformable convolution, on tensors in its layout.

    `to_torchvision` converts them, which is not timed.
    """
    from torchvision.ops import deform_conv2d

    def core(input: Tensor, offset: Tensor, mask: Tensor, groups: int, softmax: bool) -> Tensor:
        channels = input.shape[1]
        if softmax:
            mask = mask.unflatten(1, (groups, 9)).softmax(2).flatten(1, 2)
        return deform_conv2d(input, offset, input.new_ones(channels, 1, 3, 3), padding=1, mask=mask)

    return core


def to_torchvision(tensors: Tensors) -> Tensors:
    """The same tensors in torchvision's layout: NCHW, points in y-major order, offsets as (y, x)."""
    n, h, w, _ = tensors.offset.shape
    offset = tensors.offset.view(n, h, w, tensors.groups, 3, 3, 2)  # x-major points, (x, y)
    mask = tensors.mask.view(n, h, w, tensors.groups, 3, 3)
    return Tensors(
        tensors.input.permute(0, 3, 1, 2).contiguous(),
        offset.permute(0, 3, 5, 4, 6, 1, 2).flip(4).reshape(n, -1, h, w),
        mask.permute(0, 3, 5, 4, 1, 2).reshape(n, -1, h, w),
        tensors.grad.permute(0, 3, 1, 2).contiguous(),
        tensors.groups,
    )


def from_torchvision(results: Results, groups: int) -> Results:
    """The inverse of `to_torchvision`, for results."""
    output, *grads = results
    n, _, h, w = output.shape
    output = output.permute(0, 2, 3, 1)
    if not grads:
        return (output,)
    input, offset, mask = grads
    return (
        output,
        input.permute(0, 2, 3, 1),
        offset.view(n, groups, 3, 3, 2, h, w).flip(4).permute(0, 5, 6, 1, 3, 2, 4).reshape(n, h, w, -1),
        mask.view(n, groups, 3, 3, h, w).permute(0, 4, 5, 1, 3, 2).reshape(n, h, w, -1),
    )


def official_core(checkout: Path) -> Core:
    function = official_function(checkout)

    def core(input: Tensor, offset: Tensor, mask: Tensor, groups: int, softmax: bool) -> Tensor:
        if softmax:
            mask = separate_softmax(mask, groups)
        return function(input, offset, mask, 3, 3, 1, 1, 1, 1, 1, 1, groups, GROUP_CHANNELS, 1.0, False)

    return core


def calls(core: Core, tensors: Tensors, works: Sequence[str]) -> dict[str, Callable[[], Results]]:
    """Kind of work -> function that does it."""
    t, half, leaves = tensors, tensors.to(torch.bfloat16), tensors.leaves()

    def forward_backward() -> Results:
        output = core(*leaves, t.groups, False)
        return output, *torch.autograd.grad(output, leaves, t.grad)

    every: dict[str, Callable[[], Results]] = {
        "forward": lambda: (core(t.input, t.offset, t.mask, t.groups, False),),
        "softmax+forward": lambda: (core(t.input, t.offset, t.mask, t.groups, True),),
        "forward+backward": forward_backward,
        "forward bf16": lambda: (core(half.input, half.offset, half.mask, t.groups, False),),
        "softmax+forward bf16": lambda: (core(half.input, half.offset, half.mask, t.groups, True),),
    }
    return {work: every[work] for work in works}


def contenders(batch: int, peers: Sequence[str], checkout: Path | None) -> dict[Key, Callable[[], Results]]:
    """(side, who, work) -> function, after a check of its results.

    Raises:
        BenchmarkError: An implementation deviates from ours, or "official" is among the peers without a checkout.
    """
    official = None
    if "official" in peers:
        if checkout is None:
            raise BenchmarkError(NO_CHECKOUT)
        official = official_core(checkout)
    functions: dict[Key, Callable[[], Results]] = {}
    for side, groups, _ in STAGES:
        tensors = Tensors.draw(batch, side, groups)
        stage = {"ours": calls(ours, tensors, (*WORKS, *HALF_WORKS))}
        if "reference" in peers:
            stage["reference"] = reference_calls(tensors)
        if "torchvision" in peers:
            stage["torchvision"] = calls(torchvision_core(), to_torchvision(tensors), WORKS)
        if official is not None:
            stage["official"] = calls(official, tensors, WORKS)
        check(stage, tensors)
        functions |= {(side, who, work): f for who, own in stage.items() for work, f in own.items()}
    return functions


def check(stage: dict[str, dict[str, Callable[[], Results]]], tensors: Tensors) -> None:
    """Check that all compute the same: the others against ours, and ours in bfloat16 against ours in float32.

    Raises:
        BenchmarkError: One deviates by more than `TOLERANCE`.
    """
    expected = {work: stage["ours"][work]() for work in WORKS}
    rounded = tensors.to(torch.bfloat16).to(torch.float32)
    wide = calls(ours, rounded, WORKS[:2])
    for work in HALF_WORKS:
        compare(f"ours, {work}", stage["ours"][work](), wide[work.removesuffix(" bf16")](), TOLERANCE[torch.bfloat16])
    for who, own in stage.items():
        for work in own.keys() & expected.keys():
            results = own[work]()
            if who == "torchvision":
                results = from_torchvision(results, tensors.groups)
            compare(f"{who}, {work}", results, expected[work], TOLERANCE[torch.float32])


def compare(name: str, results: Results, expected: Results, tolerance: float) -> None:
    """Raise BenchmarkError if a result deviates by more than a share of the largest value."""
    whats = ("output", "gradient of input", "of offset", "of mask", "of weight")
    for what, result, right in zip(whats, results, expected):
        deviation = ((result.float() - right).abs().max() / right.abs().max()).item()
        if not deviation <= tolerance:  # also NaN
            raise BenchmarkError(
                f"{name}: the {what} deviates from ours by {deviation:.1e} of the largest value, "
                f"allowed {tolerance:.0e}; the times would not be comparable"
            )


# ---- rows


Row = dict[str, Any]  # column -> value


def rows(times: Times[Key], about: Row) -> list[Row]:
    """Times in ms, then ratios to ours, of minima and of medians; `weighted` is the sum over the blocks of
    InternImage-T."""
    result: list[Row] = []
    keys = list(dict.fromkeys((who, work) for _, who, work in times.seconds))
    for how in ("min", "median"):
        table = {(who, work): _stages(times, who, work, how) for who, work in keys}
        for (who, work), ms in table.items():
            result.append({"what": work, "who": who, "of": how, "unit": "ms", **_rounded(ms), **about})
        for (who, work), ms in table.items():
            for own in (work, f"{work} bf16"):
                if who != "ours" and ("ours", own) in table:
                    ratio = {column: ms[column] / value for column, value in table["ours", own].items()}
                    what = work if own == work else f"{work}, ours in bf16"
                    named = {"what": what, "who": f"{who} / ours", "of": how, "unit": "x"}
                    result.append({**named, **_rounded(ratio), **about})
    return result


def _stages(times: Times[Key], who: str, work: str, how: str) -> dict[str, float]:
    ms = {f"{side}x{side}": 1e3 * times.pick((side, who, work), how) for side, _, _ in STAGES}
    return ms | {"weighted": sum(blocks * ms[f"{side}x{side}"] for side, _, blocks in STAGES)}


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {key: significant(value) for key, value in values.items()}


COLUMNS = [
    "what", "who", "of", "unit", *(f"{side}x{side}" for side, _, _ in STAGES), "weighted", "batch", *facts(),
]  # fmt: skip


def table(entries: Sequence[Row]) -> str:
    """Rows of one clock as two Markdown tables, of times and of ratios: minima and, in parentheses, medians."""
    stages = [f"{side}x{side}" for side, _, _ in STAGES] + ["weighted"]
    medians = {(row["what"], row["who"]): row for row in entries if row["of"] == "median"}
    tables = []
    for unit, name in (("ms", "ms"), ("x", "times as long")):
        lines = []
        for row in entries:
            if row["of"] == "min" and row["unit"] == unit:
                median = medians[row["what"], row["who"]]
                cells = [f"{row[stage]:g} ({median[stage]:g})" for stage in stages]
                lines.append([row["what"], row["who"], *cells])
        if lines:
            tables.append(markdown([name, "who", *stages], lines, names=2))
    return "\n\n".join(tables)


def benchmark_ops(
    checkout: Path | None = None,
    peers: Sequence[str] = PEERS[:-1],
    batch: int = 8,
    rounds: int = 9,
    threads: Sequence[int] = THREADS,
    csv: Path | None = None,
    report: Callable[[str], None] = print,
) -> list[Row]:
    """Time the operator against other implementations.

    Args:
        checkout: The user's checkout of OpenGVLab/InternImage, for "official".
        peers: Implementations to time against: "reference", "torchvision", "official".
        batch: Batch size.
        rounds: Number of timed calls per function and clock.
        threads: Numbers of threads to measure with: 1 for its CPU time, more for the wall time of so many.
        csv: File to append the rows to.
        report: Called with the printed tables.

    Returns:
        The rows, by column.

    Raises:
        BenchmarkError: An implementation is not available or computes something else, or the file has other columns.
    """
    if csv is not None:
        check_csv(csv, COLUMNS)
    functions = contenders(batch, peers, checkout)
    result: list[Row] = []
    for clock in clocks(threads):
        times = interleave(functions, rounds, clock, settle=True, name="DCNv3")
        entries = rows(times, {"batch": batch, **facts(clock, times)})
        if csv is not None:
            append_csv(csv, entries)
        report(f"\nDCNv3, batch {batch}: {describe(entries[0])}\n{HOW}\n")
        report(table(entries))
        result += entries
    return result
