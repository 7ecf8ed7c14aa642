# SPDX-License-Identifier: MIT
"""`internimage benchmark`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..benchmark import MODEL_PEERS, OPS_PEERS
from ..benchmark.deform import LAYERS, benchmark_deform
from ..benchmark.export import benchmark_export
from ..benchmark.models import benchmark_models
from ..benchmark.ops import benchmark_ops
from ..terminal import say


def _peers(arguments: argparse.Namespace, every: Sequence[str]) -> list[str]:
    """The peers to time. By default, without a checkout, the official code is skipped with a message."""
    if arguments.official is not None or list(arguments.peers) != list(every):
        return list(arguments.peers)
    say("skipping the official code; --official PATH gives a checkout of it", sys.stderr)
    return [peer for peer in every if peer != "official"]


def _ops(arguments: argparse.Namespace) -> None:
    quick = arguments.quick
    benchmark_ops(
        _path(arguments.official),
        _peers(arguments, OPS_PEERS),
        1 if quick else arguments.batch,
        1 if quick else arguments.rounds,
        arguments.threads,
        _path(arguments.csv),
    )


def _models(arguments: argparse.Namespace) -> None:
    quick = arguments.quick
    benchmark_models(
        _path(arguments.official),
        _peers(arguments, MODEL_PEERS),
        arguments.models,
        [1] if quick else arguments.batches,
        min(arguments.training_batch, 1) if quick else arguments.training_batch,
        1 if quick else arguments.rounds,
        arguments.threads,
        not arguments.no_packed_weights,
        not arguments.no_memory,
        64 if quick else arguments.img_size,
        not arguments.no_bf16,
        _path(arguments.csv),
    )


def _deform(arguments: argparse.Namespace) -> None:
    quick = arguments.quick
    benchmark_deform(
        1 if quick else arguments.batch,
        1 if quick else 2,
        1 if quick else 4,
        1 if quick else arguments.rounds,
        arguments.threads,
        not arguments.no_models,
        not arguments.no_memory,
        64 if quick else 224,
        LAYERS[-1:] if quick else LAYERS,
        _path(arguments.csv),
    )


def _export(arguments: argparse.Namespace) -> None:
    quick = arguments.quick
    benchmark_export(
        arguments.models,
        arguments.peers,
        [1] if quick else arguments.batches,
        1 if quick else arguments.rounds,
        arguments.threads,
        64 if quick else arguments.img_size,
        not (quick or arguments.no_aoti),
        _path(arguments.csv),
    )


def run(arguments: argparse.Namespace) -> int:
    {"ops": _ops, "deform": _deform, "models": _models, "export": _export}[arguments.what](arguments)
    return 0


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)
