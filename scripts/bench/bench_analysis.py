# SPDX-License-Identifier: MIT
"""CPU time of the analysis views on InternImage-T, and how well random projections estimate the receptive field.

    python scripts/bench/bench_analysis.py --csv docs/benchmarks/analysis_cpu.csv

The model has random weights, with offsets of standard deviation 1; the image is one of scikit-learn's photographs, at
224 px. One thread, all views in turn, round after round, after a round that does not count; creating the model is not
timed. The correlation is of sensitivities over the image's pixels, with those of all 256 channels.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import timm  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from sklearn.datasets import load_sample_image  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import internimage  # noqa: E402, F401
from internimage.analysis import Position, effective_points, effective_receptive_field, saliency_region  # noqa: E402
from internimage.benchmark.timing import Clock, append_csv, describe, facts, interleave, markdown  # noqa: E402
from internimage.data.datasets import EvaluationTransform  # noqa: E402
from internimage.engine.create import data_config  # noqa: E402
from internimage.layers.dcnv3 import DCNv3  # noqa: E402

STAGE3, STAGE4 = Position(3), Position(4)
SEEDS = 5  # of the projections whose correlation is measured


def random_model() -> nn.Module:
    """InternImage-T whose offsets have a standard deviation of about 1."""
    torch.manual_seed(0)
    model = timm.create_model("internimage_tiny").eval()
    for module in model.modules():
        if isinstance(module, DCNv3):
            nn.init.normal_(module.offset.bias)
            nn.init.normal_(module.offset.weight, std=0.05)
    return model


def photograph(model: nn.Module) -> Tensor:
    """A photograph, preprocessed for the model."""
    return EvaluationTransform(data_config(model))(Image.fromarray(load_sample_image("china.jpg")))


def views(model: nn.Module, image: Tensor) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    return {
        "receptive field, 1 projection, stage 3": lambda: effective_receptive_field(model, image, STAGE3, 1),
        "receptive field, 8 projections, stage 3": lambda: effective_receptive_field(model, image, STAGE3, 8),
        "effective points, all layers before stage 4": lambda: effective_points(model, image, STAGE4, 1),
        "saliency region, stage 3, 14 x 14 cells": lambda: saliency_region(model, image, STAGE3),
    }


def correlations(model: nn.Module, image: Tensor) -> list[float]:
    """Of 8 projections with all channels, for several seeds."""
    exact = effective_receptive_field(model, image, STAGE3, None).sensitivity.flatten()
    found = []
    for seed in range(SEEDS):
        estimate = effective_receptive_field(model, image, STAGE3, 8, seed).sensitivity.flatten()
        found.append(float(torch.corrcoef(torch.stack([exact, estimate]))[0, 1]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="file to append the rows to")
    arguments = parser.parse_args()
    model = random_model()
    image = photograph(model)
    clock = Clock("cpu", 1)
    times = interleave(views(model, image), arguments.rounds, clock, settle=False, name="views")
    about = facts(clock, times)
    rows = []
    for view, seconds in times.seconds.items():
        for of, value in (("min", min(seconds)), ("median", statistics.median(seconds))):
            rows.append({"view": view, "of": of, "value": f"{value:.3g}", "unit": "s", **about})
    torch.set_num_threads(1)
    found = correlations(model, image)
    for of, value in (("min", min(found)), ("median", statistics.median(found))):
        rows.append(
            {"view": f"8 projections: correlation with all channels, {SEEDS} seeds", "of": of, "value": f"{value:.4f}",
             "unit": "", **about}
        )  # fmt: skip
    print(describe(about))
    print(
        markdown(
            ["view", "of", "value", "unit"], [[row[c] for c in ("view", "of", "value", "unit")] for row in rows], 2
        )
    )
    if arguments.csv is not None:
        append_csv(arguments.csv, rows)


if __name__ == "__main__":
    main()
