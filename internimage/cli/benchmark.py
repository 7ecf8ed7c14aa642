# SPDX-License-Identifier: MIT
"""`internimage benchmark`."""

import argparse
from pathlib import Path

from ..benchmark.models import benchmark_models
from ..benchmark.ops import benchmark_ops


def _ops(arguments: argparse.Namespace) -> None:
    quick = arguments.quick
    benchmark_ops(
        _path(arguments.official),
        arguments.peers,
        1 if quick else arguments.batch,
        1 if quick else arguments.rounds,
        arguments.wall_threads,
        _path(arguments.csv),
    )


def _models(arguments: argparse.Namespace) -> None:
    quick = arguments.quick
    benchmark_models(
        _path(arguments.official),
        arguments.peers,
        [1] if quick else arguments.batches,
        min(arguments.training_batch, 1) if quick else arguments.training_batch,
        1 if quick else arguments.rounds,
        arguments.wall_threads,
        not arguments.no_memory,
        64 if quick else arguments.img_size,
        _path(arguments.csv),
    )


def run(arguments: argparse.Namespace) -> int:
    {"ops": _ops, "models": _models}[arguments.what](arguments)
    return 0


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)
