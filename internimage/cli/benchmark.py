# SPDX-License-Identifier: MIT
"""`internimage benchmark`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..benchmark.models import PEERS as MODEL_PEERS
from ..benchmark.models import benchmark_models
from ..benchmark.ops import PEERS as OPS_PEERS
from ..benchmark.ops import benchmark_ops

HELP = "Times of the operator and of InternImage-T on this CPU, beside their peers."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    whats = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    add_ops_arguments(_sub(whats, parser, "ops", "DCNv3 against our reference, torchvision and the official function"))
    add_models_arguments(_sub(whats, parser, "models", "InternImage-T against the official model and models of timm"))


def _sub(whats, parser: argparse.ArgumentParser, name: str, text: str) -> argparse.ArgumentParser:
    return whats.add_parser(name, help=text, description=text, formatter_class=parser.formatter_class)


def _add_common_arguments(parser: argparse.ArgumentParser, rounds: int) -> None:
    parser.add_argument(
        "--official", type=Path, metavar="PATH", help="your checkout of OpenGVLab/InternImage, for its code as a peer"
    )
    parser.add_argument("--rounds", type=_at_least(1), default=rounds, metavar="N", help="timed calls of each")
    parser.add_argument(
        "--wall-threads", type=_at_least(0), default=2, metavar="N", help="threads of the wall times; 0 leaves them out"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="append the rows to this file")
    parser.add_argument("--quick", action="store_true", help="one round of little: whether it works, not how fast")


def add_ops_arguments(parser: argparse.ArgumentParser) -> None:
    _add_common_arguments(parser, rounds=9)
    parser.add_argument("--batch", type=_at_least(1), default=8, metavar="N", help="images")
    parser.add_argument("--peers", nargs="*", choices=OPS_PEERS, default=list(OPS_PEERS), help="those to time")
    parser.set_defaults(benchmark=_ops)


def add_models_arguments(parser: argparse.ArgumentParser) -> None:
    _add_common_arguments(parser, rounds=7)
    parser.add_argument("--batches", type=_at_least(1), nargs="+", default=[8, 1], metavar="N", help="of inference")
    parser.add_argument("--training-batch", type=_at_least(0), default=4, metavar="N", help="0 leaves training out")
    parser.add_argument("--img-size", type=_at_least(32), default=224, metavar="PIXELS", help="image side")
    parser.add_argument(
        "--peers", nargs="*", default=list(MODEL_PEERS), metavar="NAME", help="official, and names of timm models"
    )
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.set_defaults(benchmark=_models)


def _at_least(minimum: int):
    def integer(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {value}")
        return value

    return integer


def _peers(arguments: argparse.Namespace, every: Sequence[str]) -> list[str]:
    """Those to time. Where none were chosen, the official code is left out without a checkout, and a message tells."""
    if arguments.official is not None or list(arguments.peers) != list(every):
        return list(arguments.peers)
    print("without the official code: --official PATH names your checkout of it", file=sys.stderr)
    return [peer for peer in every if peer != "official"]


def _ops(arguments: argparse.Namespace) -> None:
    quick = arguments.quick
    benchmark_ops(
        arguments.official,
        _peers(arguments, OPS_PEERS),
        1 if quick else arguments.batch,
        1 if quick else arguments.rounds,
        arguments.wall_threads,
        arguments.csv,
    )


def _models(arguments: argparse.Namespace) -> None:
    quick = arguments.quick
    benchmark_models(
        arguments.official,
        _peers(arguments, MODEL_PEERS),
        [1] if quick else arguments.batches,
        min(arguments.training_batch, 1) if quick else arguments.training_batch,
        1 if quick else arguments.rounds,
        arguments.wall_threads,
        not arguments.no_memory,
        64 if quick else arguments.img_size,
        arguments.csv,
    )


def run(arguments: argparse.Namespace) -> int:
    arguments.benchmark(arguments)
    return 0
