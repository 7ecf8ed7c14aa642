# SPDX-License-Identifier: MIT
"""The options of each benchmark, with their types and ranges, and which have no effect with others."""

from .. import benchmark
from ..values import Choice, Text, Whole
from .options import Option, OutputFile, Threads

_BATCH = Whole(1)
_QUICK = Option("--quick", "smoke test: one round with little work")


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
        _QUICK,
    )


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
    Option(
        "--batches",
        "images per call of inference, one or more batch sizes",
        _BATCH,
        default=(8, 1),
        nargs="+",
        excludes=("--quick",),
    ),
    Option("--training-batch", "images per training step; 0 skips training", Whole(0), default=4),
    Option("--img-size", "image size", Whole(32, 16384), default=224, metavar="PIXELS", excludes=("--quick",)),
    Option(
        "--models",
        "internimage_SIZE, one or more, each to time against the peers",
        Text(),
        default=benchmark.MODELS,
        metavar="NAME",
        nargs="+",
    ),
    Option(
        "--peers",
        "models to time them against: official, and names of timm models",
        Text(),
        default=benchmark.MODEL_PEERS,
        metavar="NAME",
        nargs="*",
    ),
    Option("--no-packed-weights", "time our models without the packed weights of inference"),
    Option("--no-bf16", "do not time bfloat16, which takes minutes on processors without its products"),
    Option("--no-memory", "do not measure peak memory"),
)

EXPORT = (
    *_benchmark_options(rounds=12, threads=(1,)),
    Option(
        "--batches",
        "images per call, one or more batch sizes",
        _BATCH,
        default=(1, 8),
        nargs="+",
        excludes=("--quick",),
    ),
    # torch.export keeps sides open from 33 pixels on
    Option("--img-size", "image size", Whole(33, 16384), default=224, metavar="PIXELS", excludes=("--quick",)),
    Option(
        "--models",
        "internimage_SIZE, one or more, each to export and to time against the peers",
        Text(),
        default=benchmark.MODELS,
        metavar="NAME",
        nargs="+",
    ),
    Option(
        "--peers",
        "timm models to export to ONNX and to time them against",
        Text(),
        default=benchmark.EXPORT_PEERS,
        metavar="NAME",
        nargs="*",
    ),
    Option("--no-aoti", "do not time an AOTInductor package, which takes minutes to compile", excludes=("--quick",)),
)
