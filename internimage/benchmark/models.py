# SPDX-License-Identifier: MIT
"""InternImage-T on the CPU against the official model and other models of its size, with random weights.

Inference in float32 and bfloat16, a training step in float32 (forward, cross entropy, backward, plain SGD), and peak
memory. The official model gets our weights, and its logits are compared with ours before anything is timed. timm models
are timed in both memory formats; the faster one counts, and the rows name it.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from . import MODEL_PEERS as PEERS
from . import memory
from .contender import DTYPES, OFFICIAL, OURS, Contender, inference, training_step
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
def _errors_of(contender: Contender) -> Iterator[None]:
    """Context in which errors of other models become messages; one may not support the image size, for example."""
    try:
        yield
    except BenchmarkError:
        raise
    except Exception as error:
        if contender.name == OURS:
            raise
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        size = f"{contender.img_size} pixels"
        raise BenchmarkError(f"'{contender.name}' does not run at {size}: {reason}") from error


def contenders(peers: Sequence[str], checkout: Path | None, dtypes: Sequence[str], img_size: int) -> list[Contender]:
    """Ours in each dtype, the official model in float32, and timm models in each dtype and memory format.

    Raises:
        BenchmarkError: timm has no model of a name, or "official" is among the peers without a checkout.
    """
    if unknown := [name for name in peers if name != "official" and not timm.is_model(name)]:
        raise BenchmarkError(
            f"timm has no model {', '.join(map(repr, unknown))}; --peers takes 'official' and timm models"
        )
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
    """Check that the official model, and ours in bfloat16, compute the logits of ours in float32.

    Raises:
        BenchmarkError: They deviate by more than `TOLERANCE`.
    """
    logits: dict[Contender, Tensor] = {}
    for contender, model in models.items():
        with torch.inference_mode(), _errors_of(contender):
            logits[contender] = model(contender.images(2)).float()
    expected = next(value for c, value in logits.items() if c.name == OURS and c.dtype == "fp32")
    for contender, value in logits.items():
        if contender.name in (OURS, OFFICIAL):
            deviation = ((value - expected).abs().max() / expected.abs().max()).item()
            allowed = TOLERANCE["official" if contender.name == OFFICIAL else "bf16"]
            if not deviation <= allowed:
                raise BenchmarkError(
                    f"{contender.name} {contender.dtype}: the logits deviate from ours in float32 by {deviation:.1e} "
                    f"of the largest, allowed {allowed:.0e}; the times would not be comparable"
                )


# ---- rows

COLUMNS = ["what", "who", "dtype", "batch", "img_size", "of", "value", "unit", "memory_format", *facts()]


Row = dict[str, Any]  # column -> value


def rows(times: Times[Contender], what: str, batch: int, about: Row) -> list[Row]:
    """Images per second, then speedups of ours over the others: in the same dtype, and of bfloat16 over the official
    float32 model."""
    result: list[Row] = []
    for how in ("min", "median"):
        fastest: dict[tuple[str, str], tuple[float, Contender]] = {}
        for contender in times.seconds:
            seconds = times.pick(contender, how)
            key = contender.name, contender.dtype
            if key not in fastest or seconds < fastest[key][0]:
                fastest[key] = seconds, contender
        common = {"what": what, "batch": batch, "of": how}

        for (name, dtype), (seconds, contender) in fastest.items():
            named = {**common, **_settings(contender), "who": name, "dtype": dtype}
            result.append(_in_order({**named, "value": significant(batch / seconds), "unit": "images/s", **about}))
        for (name, dtype), (seconds, contender) in fastest.items():
            for own in ("fp32", "bf16"):
                if name != OURS and (own == dtype or name == OFFICIAL) and (OURS, own) in fastest:
                    dtypes = own if own == dtype else f"{own} / {dtype}"
                    named = {**common, **_settings(contender), "who": f"{OURS} / {name}", "dtype": dtypes}
                    ratio = significant(seconds / fastest[OURS, own][0])
                    result.append(_in_order({**named, "value": ratio, "unit": "x", **about}))
    return result


def _settings(contender: Contender) -> Row:
    memory_format = "channels_last" if contender.channels_last else "default"
    return {"img_size": contender.img_size, "memory_format": memory_format}


def memory_rows(peaks: dict[Contender, float], what: str, batch: int, about: Row) -> list[Row]:
    """Peaks in MB, and ratios of ours to the others."""
    result: list[Row] = []
    common = {"what": what, "batch": batch, "of": "once", "memory_format": "default"}
    own = next(value for c, value in peaks.items() if c.name == OURS)
    for c, value in peaks.items():
        named = {**common, "dtype": c.dtype, "img_size": c.img_size, **about}
        result.append(_in_order({**named, "who": c.name, "value": significant(value), "unit": "MB"}))
        if c.name != OURS:
            ratio = significant(own / value)
            result.append(_in_order({**named, "who": f"{OURS} / {c.name}", "value": ratio, "unit": "x"}))
    return result


def _in_order(row: Row) -> Row:
    return {column: row[column] for column in COLUMNS}


def table(entries: Sequence[Row]) -> str:
    """Rows of one clock as a Markdown table: values of the fastest round and, in parentheses, of the median round."""
    medians = {_key(row): row["value"] for row in entries if row["of"] == "median"}
    lines = []
    for row in entries:
        if row["of"] != "median":
            value = f"{row['value']:g}" + (f" ({medians[_key(row)]:g})" if _key(row) in medians else "")
            format = "" if row["memory_format"] == "default" else f", {row['memory_format']}"
            lines.append([f"{row['what']}, {row['dtype']}", row["who"] + format, row["unit"], row["batch"], value])
    return markdown(["work", "who", "unit", "batch", "value"], lines, names=3)


def _key(row: Row) -> tuple[Any, ...]:
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
) -> list[Row]:
    """Time InternImage-T against other models and measure its memory.

    Args:
        checkout: The user's checkout of OpenGVLab/InternImage, for "official".
        peers: Models to time against: "official" and names of timm models.
        batches: Batch sizes of inference.
        training_batch: Batch size of a training step; 0 skips training.
        rounds: Number of timed calls per model, kind of work and clock.
        wall_threads: Number of threads for wall times, the second clock; 0 skips these.
        with_memory: Also measure peak memory, each model in a separate process.
        img_size: Side of the images in pixels.
        csv: File to append the rows to.
        report: Called with the printed tables.

    Returns:
        The rows, by column.

    Raises:
        BenchmarkError: A model is not available or computes something else, or the file has other columns.
    """
    if csv is not None:
        check_csv(csv, COLUMNS)
    result: list[Row] = []

    def finish(entries: list[Row], head: str) -> None:
        if csv is not None:
            append_csv(csv, entries)
        report(f"\n{head}\n\n{table(entries)}")
        result.extend(entries)

    if with_memory:
        memory.check_system()
    models: dict[Contender, nn.Module] = {}
    for contender in contenders(peers, checkout, DTYPES, img_size):
        with _errors_of(contender):
            models[contender] = contender.build()
    check(models)
    fp32_models = {c: m for c, m in models.items() if c.dtype == "fp32"}
    if training_batch > 0:
        for contender, model in fp32_models.items():
            with _errors_of(contender):  # before anything is timed
                training_step(model.train(), contender.images(training_batch))()
    phases: list[tuple[str, int, dict[Contender, nn.Module], Callable[[nn.Module, Tensor], Callable[[], Tensor]]]] = [
        ("inference", batch, models, inference) for batch in batches
    ]
    if training_batch > 0:
        phases.append(("training step", training_batch, fp32_models, training_step))
    for what, batch, timed, work in phases:
        for clock in clocks(wall_threads):
            for model in timed.values():
                model.train(work is training_step)
            functions = {c: work(m, c.images(batch)) for c, m in timed.items()}
            times = interleave(functions, rounds, clock, settle=False, name=what)
            entries = rows(times, what, batch, facts(clock, times))
            head = describe(entries[0])
            finish(entries, f"{what}, batch {batch}, {img_size} px: {head}\n{HOW}")
    del models, fp32_models, timed, functions
    if with_memory:
        for what, batch in (("inference", max(batches)), ("training step", training_batch)):
            if batch > 0:
                alone = [c for c in contenders(peers, checkout, ["fp32"], img_size) if not c.channels_last]
                peaks = {c: memory.peak(c, batch, what == "training step") for c in alone}
                about = facts(Clock("", memory.THREADS))
                entries = memory_rows(peaks, f"peak memory, {what}", batch, about)
                finish(
                    entries,
                    f"peak memory, {what}: growth of resident memory, without weights, in separate processes",
                )
    return result
