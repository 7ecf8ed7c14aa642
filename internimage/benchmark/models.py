# SPDX-License-Identifier: MIT
"""Models of this package on the CPU against the official ones and others of their size, with random weights.

Inference in float32 and bfloat16, a training step in float32 (forward, cross entropy, backward, plain SGD), and peak
memory. The official model gets our weights, and its logits are compared with ours before anything is timed. timm models
are timed in both memory formats; the faster one counts, and the rows name it. Several models of this package are timed
one after the other, each in turns with all peers.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ..models.families import families
from . import MODEL_PEERS as PEERS
from . import MODELS, THREADS, memory
from .contender import DTYPES, Contender, inference, training_step
from .official import NO_CHECKOUT
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
    significant,
)

# of logits, relative to the largest one; the official operator rounds its normalized coordinates in each block
TOLERANCE = {"official": 1e-3, "bf16": 0.1}


@contextlib.contextmanager
def errors_of(contender: Contender) -> Iterator[None]:
    """Context in which errors of other models become messages; one may not support the image size, for example."""
    try:
        yield
    except BenchmarkError:
        raise
    except Exception as error:
        if contender.ours and not isinstance(error, ValueError):  # which an image size may be the reason of
            raise
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        size = f"{contender.img_size} pixels"
        raise BenchmarkError(f"'{contender.who}' does not run at {size}: {reason}") from error


def check_names(models: Sequence[str], peers: Sequence[str], checkout: Path | None, has_official: bool = True) -> None:
    """Check that there are all models; `has_official`: whether "official" may be a peer.

    Raises:
        BenchmarkError: This package has no such model, or timm no such peer; a model is its own peer; or "official" is
            among the peers without a checkout.
    """
    ours = [name for family in families() for name in family.architectures]
    if unknown := [name for name in models if name not in ours]:
        raise BenchmarkError(
            f"this package has no model {', '.join(map(repr, unknown))}; --models takes {', '.join(ours)}"
        )
    if same := [name for name in models if name in peers]:
        raise BenchmarkError(f"'{same[0]}' is among both --models and --peers: omit it from one of them")
    if unknown := [name for name in peers if not (has_official and name == "official") and not timm.is_model(name)]:
        taken = "'official' and timm models" if has_official else "timm models"
        raise BenchmarkError(f"timm has no model {', '.join(map(repr, unknown))}; --peers takes {taken}")
    if "official" in peers and checkout is None:
        raise BenchmarkError(NO_CHECKOUT)


def contenders(
    model: str, peers: Sequence[str], checkout: Path | None, dtypes: Sequence[str], img_size: int, packed: bool = True
) -> list[Contender]:
    """Ours in each dtype, the official model in float32, and timm models in each dtype and memory format."""
    result = [Contender(model, dtype, img_size=img_size, packed=packed) for dtype in dtypes]
    if "official" in peers:
        result.append(Contender(model, checkout=checkout, img_size=img_size))
    for name in peers:
        if name != "official":
            variants = [(dtype, last) for dtype in dtypes for last in (False, True)]
            result += [Contender(name, *variant, img_size=img_size, packed=packed) for variant in variants]
    return result


def check(models: dict[Contender, nn.Module], model: str) -> None:
    """Check that other implementations of a model, and ours in bfloat16, compute the logits of ours in float32.

    Raises:
        BenchmarkError: They deviate by more than `TOLERANCE`.
    """
    logits: dict[Contender, Tensor] = {}
    for contender, module in models.items():
        with torch.inference_mode(), errors_of(contender):
            logits[contender] = module(contender.images(2)).float()
    expected = next(value for c, value in logits.items() if c.ours and c.dtype == "fp32")
    for contender, value in logits.items():
        if contender.model == model:
            allowed = TOLERANCE["bf16" if contender.ours else "official"]
            compare_logits(f"{contender.who} {contender.dtype}", value, expected, "ours in float32", allowed)


def compare_logits(name: str, logits: Tensor, expected: Tensor, whose: str, allowed: float) -> None:
    """Raise BenchmarkError if logits deviate from expected ones, which are `whose`, by more than a share of the
    largest."""
    deviation = ((logits - expected).abs().max() / expected.abs().max()).item()
    if not deviation <= allowed:  # also NaN
        raise BenchmarkError(
            f"{name}: the logits deviate from {whose} by {deviation:.1e} of the largest, allowed {allowed:.0e}; the "
            f"times would not be comparable"
        )


# ---- rows

COLUMNS = ["what", "who", "dtype", "batch", "img_size", "of", "value", "unit", "memory_format", *facts()]


Row = dict[str, Any]  # column -> value


def rows(times: Times[Contender], model: str, what: str, batch: int, about: Row) -> list[Row]:
    """Images per second, then speedups of our model over the others: in the same dtype, and of bfloat16 over the
    official implementation in float32."""
    result: list[Row] = []
    for how in ("min", "median"):
        fastest: dict[tuple[str, str], tuple[float, Contender]] = {}
        for contender in times.seconds:
            seconds = times.pick(contender, how)
            key = contender.who, contender.dtype
            if key not in fastest or seconds < fastest[key][0]:
                fastest[key] = seconds, contender
        common = {"what": what, "batch": batch, "of": how}
        own = {dtype: (seconds, c.who) for (_, dtype), (seconds, c) in fastest.items() if c.ours and c.model == model}

        for (who, dtype), (seconds, contender) in fastest.items():
            named = {**common, **_settings(contender), "who": who, "dtype": dtype}
            result.append(_in_order({**named, "value": significant(batch / seconds), "unit": "images/s", **about}))
        for (who, dtype), (seconds, contender) in fastest.items():
            for own_dtype, (own_seconds, own_who) in own.items():
                if who != own_who and (own_dtype == dtype or contender.checkout is not None):
                    dtypes = own_dtype if own_dtype == dtype else f"{own_dtype} / {dtype}"
                    named = {**common, **_settings(contender), "who": f"{own_who} / {who}", "dtype": dtypes}
                    ratio = significant(seconds / own_seconds)
                    result.append(_in_order({**named, "value": ratio, "unit": "x", **about}))
    return result


def _settings(contender: Contender) -> Row:
    memory_format = "channels_last" if contender.channels_last else "default"
    return {"img_size": contender.img_size, "memory_format": memory_format}


def memory_rows(peaks: dict[Contender, float], model: str, what: str, batch: int, about: Row) -> list[Row]:
    """Peaks in MB, and ratios of our model, with packed weights and without, to the others."""
    result: list[Row] = []
    common = {"what": what, "batch": batch, "of": "once", "memory_format": "default"}
    own = {c.who: value for c, value in peaks.items() if c.ours and c.model == model}
    for c, value in peaks.items():
        named = {**common, "dtype": c.dtype, "img_size": c.img_size, **about}
        result.append(_in_order({**named, "who": c.who, "value": significant(value), "unit": "MB"}))
        for who, own_value in own.items() if c.who not in own else ():
            ratio = significant(own_value / value)
            result.append(_in_order({**named, "who": f"{who} / {c.who}", "value": ratio, "unit": "x"}))
    return result


def _in_order(row: Row) -> Row:
    return {column: row[column] for column in COLUMNS}


def table(entries: Sequence[Row], formats_apart: bool = False) -> str:
    """Rows of one clock as a Markdown table: values of the fastest round and, in parentheses, of the median round.

    formats_apart: Whether there are rows of both memory formats, and not of the faster one.
    """

    def key(row: Row) -> tuple[Any, ...]:
        return row["what"], row["who"], row["dtype"], row["batch"], row["unit"], formats_apart and row["memory_format"]

    medians = {key(row): row["value"] for row in entries if row["of"] == "median"}
    lines = []
    for row in entries:
        if row["of"] != "median":
            value = f"{row['value']:g}" + (f" ({medians[key(row)]:g})" if key(row) in medians else "")
            format = "" if row["memory_format"] == "default" else f", {row['memory_format']}"
            lines.append([f"{row['what']}, {row['dtype']}", row["who"] + format, row["unit"], row["batch"], value])
    return markdown(["work", "who", "unit", "batch", "value"], lines, names=3)


def benchmark_models(
    checkout: Path | None = None,
    peers: Sequence[str] = PEERS[1:],
    models: Sequence[str] = MODELS,
    batches: Sequence[int] = (8, 1),
    training_batch: int = 4,
    rounds: int = 7,
    threads: Sequence[int] = THREADS,
    packed_weights: bool = True,
    with_memory: bool = True,
    img_size: int = 224,
    bfloat16: bool = True,
    csv: Path | None = None,
    report: Callable[[str], None] = print,
) -> list[Row]:
    """Time models of this package against others and measure their memory.

    Args:
        checkout: The user's checkout of OpenGVLab/InternImage, for "official".
        peers: Models to time against: "official", the official implementation of each model, and names of timm models.
        models: Models of this package. One after the other is timed against all peers.
        batches: Batch sizes of inference.
        training_batch: Batch size of a training step; 0 skips training.
        rounds: Number of timed calls per model, kind of work and clock.
        threads: Numbers of threads to measure with: 1 for its CPU time, more for the wall time of so many.
        packed_weights: Whether inference of our models keeps packed weights. Its memory is measured without them, too.
        with_memory: Also measure peak memory, each model in a separate process.
        img_size: Side of the images in pixels.
        bfloat16: Also time inference in bfloat16, which other models take minutes for on a processor without its
            products.
        csv: File to append the rows to.
        report: Called with the printed tables.

    Returns:
        The rows, by column.

    Raises:
        BenchmarkError: A model is not available or computes something else, or the file has other columns.
    """
    check_names(models, peers, checkout)
    if csv is not None:
        check_csv(csv, COLUMNS)
    if with_memory:
        memory.check_system()
    result: list[Row] = []

    def finish(head: str, entries: list[Row]) -> None:
        if csv is not None:
            append_csv(csv, entries)
        report(f"\n{head}\n\n{table(entries)}")
        result.extend(entries)

    for model in models:
        timed = contenders(model, peers, checkout, DTYPES if bfloat16 else DTYPES[:1], img_size, packed_weights)
        for tables in timings(model, timed, batches, training_batch, rounds, threads):
            finish(*tables)
        if with_memory:
            alone = [c for c in timed if c.dtype == "fp32" and not c.channels_last]
            for tables in peaks(model, alone, max(batches), training_batch):
                finish(*tables)
    return result


def timings(
    model: str,
    timed: Sequence[Contender],
    batches: Sequence[int],
    training_batch: int,
    rounds: int,
    threads: Sequence[int],
) -> Iterator[tuple[str, list[Row]]]:
    """For each kind of work, batch size and clock what stands above the table, and the rows."""
    models: dict[Contender, nn.Module] = {}
    for contender in timed:
        with errors_of(contender):
            models[contender] = contender.build()
    check(models, model)
    fp32_models = {c: m for c, m in models.items() if c.dtype == "fp32"}
    if training_batch > 0:
        for contender, module in fp32_models.items():
            with errors_of(contender):  # before anything is timed
                training_step(module.train(), contender.images(training_batch))()
    phases: list[tuple[str, int, dict[Contender, nn.Module], Callable[[nn.Module, Tensor], Callable[[], Tensor]]]] = [
        ("inference", batch, models, inference) for batch in batches
    ]
    if training_batch > 0:
        phases.append(("training step", training_batch, fp32_models, training_step))
    for what, batch, candidates, work in phases:
        for clock in clocks(threads):
            for module in candidates.values():
                module.train(work is training_step)
            functions = {c: work(m, c.images(batch)) for c, m in candidates.items()}
            times = interleave(functions, rounds, clock, settle=False, name=f"{model} {what}")
            entries = rows(times, model, what, batch, facts(clock, times))
            yield f"{what}, batch {batch}, {timed[0].img_size} px: {describe(entries[0])}\n{HOW}", entries


def peaks(model: str, alone: Sequence[Contender], batch: int, training_batch: int) -> Iterator[tuple[str, list[Row]]]:
    """For inference and for a training step what stands above the table, and the rows."""
    about = facts(Clock("", memory.THREADS))
    for what, number in (("inference", batch), ("training step", training_batch)):
        if number > 0:
            both = {c for c in alone if c.ours and c.packed and what == "inference"}  # training has no packed weights
            measured = [each for c in alone for each in ((c, replace(c, packed=False)) if c in both else (c,))]
            measured_peaks = {c: memory.peak(c, number, what == "training step") for c in measured}
            head = f"peak memory, {what}: growth of resident memory over two calls, in separate processes"
            yield head, memory_rows(measured_peaks, model, f"peak memory, {what}", number, about)
