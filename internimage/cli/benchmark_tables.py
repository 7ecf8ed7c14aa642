# SPDX-License-Identifier: MIT
"""The options of each benchmark, with their types and ranges, and which have no effect with others."""

from .. import benchmark
from ..values import Choice, Text, Whole
from .options import Option, OutputFile, Threads

_BATCH = Whole(1)
_OFFICIAL = Option("--official", "your checkout of OpenGVLab/InternImage, to time its code", Text(), metavar="PATH")


def _benchmark_options(rounds: int, threads: tuple[int, ...] = benchmark.THREADS) -> tuple[Option, ...]:
    return (
        Option("--rounds", "timed calls per function", Whole(1), default=rounds, excludes=("--quick",)),
        Option(
            "--threads",
            "with how many threads to measure: 1 for its CPU time, more for the wall time of so many",
            Threads(1, benchmark.CORES),
            default=threads,
            nargs="+",
        ),
        Option("--csv", "append the rows to this file", OutputFile(), metavar="FILE"),
        Option("--quick", "smoke test: one round with little work"),
    )


def _batches(what: str, default: tuple[int, ...]) -> Option:
    help = f"images per call{what}, one or more batch sizes"
    return Option("--batches", help, _BATCH, default=default, nargs="+", excludes=("--quick",))


def _img_size(least: int) -> Option:
    return Option("--img-size", "image size", Whole(least, 16384), default=224, metavar="PIXELS", excludes=("--quick",))


def _models(what: str) -> Option:
    help = f"internimage_SIZE, one or more, each to {what} against the peers"
    return Option("--models", help, Text(), default=benchmark.MODELS, metavar="NAME", nargs="+")


def _peers(help: str, default: tuple[str, ...]) -> Option:
    return Option("--peers", help, Text(), default=default, metavar="NAME", nargs="*")


OPS = (
    _OFFICIAL,
    *_benchmark_options(rounds=9),
    Option("--batch", "images per call", _BATCH, default=8, excludes=("--quick",)),
    Option("--peers", "implementations to time", Choice(benchmark.OPS_PEERS), default=benchmark.OPS_PEERS, nargs="*"),
)

DEFORM = (
    *_benchmark_options(rounds=9),
    Option("--batch", "images per call of a layer", _BATCH, default=4, excludes=("--quick",)),
    Option("--no-models", "time the layers alone, not a whole model"),
    Option("--no-memory", "do not measure peak memory", excludes=("--no-models",)),
)

MODELS = (
    _OFFICIAL,
    *_benchmark_options(rounds=7),
    _batches(" of inference", (8, 1)),
    Option("--training-batch", "images per training step; 0 skips training", Whole(0), default=4),
    _img_size(32),
    _models("time"),
    _peers("models to time them against: official, and names of timm models", benchmark.MODEL_PEERS),
    Option("--no-packed-weights", "time our models without the packed weights of inference"),
    Option("--no-bf16", "do not time bfloat16, which takes minutes on processors without its products"),
    Option("--no-memory", "do not measure peak memory"),
)

EXPORT = (
    *_benchmark_options(rounds=12, threads=(1,)),
    _batches("", (1, 8)),
    _img_size(33),  # torch.export keeps sides open from 33 pixels on
    _models("export and to time"),
    _peers("timm models to export to ONNX and to time them against", benchmark.EXPORT_PEERS),
    Option("--no-aoti", "do not time an AOTInductor package, which takes minutes to compile", excludes=("--quick",)),
)
