# SPDX-License-Identifier: MIT
"""Times DCNv3 on the CPU against its peers, in interleaved rounds of one process; prints and appends csv rows.

One thread and its CPU time (`time.thread_time`), so that what else runs on the machine matters least; minimum, median
of the rounds. Shapes: the four stages of InternImage-T at 224 px; the last rows weight them by its depths, 4/4/18/4.
Peers: our plain-torch reference, and with `--official PATH` the PyTorch function of a checkout of OpenGVLab/InternImage
of your own. malloc settings matter (glibc returns large blocks to the system, and page faults follow);
the row says whether MALLOC_MMAP_THRESHOLD_ was set.
"""

import argparse
import csv
import importlib.util
import os
import platform
import statistics
import sys
import time
import types
from pathlib import Path

import torch

import internimage  # noqa: F401  (registers the operator)
from internimage.ops import reference

STAGES = [(56, 4, 4), (28, 8, 4), (14, 16, 18), (7, 32, 4)]  # side, groups, blocks of InternImage-T
GROUP_CHANNELS = 16


def official_function(checkout: Path):
    """The checkout's `dcnv3_core_pytorch`, without its compiled module."""
    path = checkout / "classification" / "ops_dcnv3" / "functions" / "dcnv3_func.py"
    sys.modules.setdefault("DCNv3", types.ModuleType("DCNv3"))
    stand_in = types.ModuleType("pkg_resources")  # gone from setuptools since 82
    stand_in.get_distribution = lambda name: types.SimpleNamespace(version="1.1")
    sys.modules.setdefault("pkg_resources", stand_in)
    spec = importlib.util.spec_from_file_location("official_dcnv3_func", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.dcnv3_core_pytorch


def cases(batch: int, side: int, groups: int, official) -> dict:
    """Name -> function, all of the same work, for one stage."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    channels = groups * GROUP_CHANNELS
    x, offset = randn(batch, side, side, channels), randn(batch, side, side, groups * 18)
    logits, grad = randn(batch, side, side, groups * 9), randn(batch, side, side, channels)
    geometry = ([3, 3], [1, 1], [1, 1], [1, 1], groups, 1.0, False)
    op, backward = torch.ops.internimage.dcnv3, torch.ops.internimage.dcnv3_backward
    half = [t.bfloat16() for t in (x, offset, logits)]
    leaves = [t.clone().requires_grad_() for t in (x, offset, logits)]
    result = {
        "ours forward": lambda: op(x, offset, logits, *geometry, False),
        "ours softmax+forward": lambda: op(x, offset, logits, *geometry, True),
        "ours softmax+forward bf16": lambda: op(*half, *geometry, True),
        "ours forward+backward": lambda: torch.autograd.grad(op(*leaves, *geometry, False), leaves, grad),
        "ours backward": lambda: backward(grad, x, offset, logits, *geometry, False, False, [True] * 3),
        "reference forward": lambda: reference.dcnv3(x, offset, logits, *geometry, False),
    }
    if official is not None:
        rest = (3, 3, 1, 1, 1, 1, 1, 1, groups, GROUP_CHANNELS, 1.0, False)

        def softmax(mask):
            return mask.view(batch, side, side, groups, 9).softmax(-1).flatten(-2)

        result |= {
            "official forward": lambda: official(x, offset, logits, *rest),
            "official softmax+forward": lambda: official(x, offset, softmax(logits), *rest),
            "official forward+backward": lambda: torch.autograd.grad(official(*leaves, *rest), leaves, grad),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, metavar="PATH", help="your checkout of OpenGVLab/InternImage")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="append the rows to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    official = official_function(arguments.official) if arguments.official else None
    times: dict[tuple[int, str], list[float]] = {}
    functions = {
        (side, name): function
        for side, groups, _ in STAGES
        for name, function in cases(arguments.batch, side, groups, official).items()
    }
    for round in range(arguments.rounds + 1):
        for key, function in functions.items():
            function()  # untimed: the round before it left other data in the caches and other blocks to malloc
            start = time.thread_time()
            function()
            if round > 0:  # the first warms up
                times.setdefault(key, []).append(time.thread_time() - start)

    about = {
        "machine": processor(),
        "torch": torch.__version__,
        "capability": torch.ops.internimage.cpu_capability(),
        "batch": arguments.batch,
        "malloc": os.environ.get("MALLOC_MMAP_THRESHOLD_", "default"),
    }
    names = list(dict.fromkeys(name for _, name in times))
    rows = []
    for name in names:
        for pick, measure in (("min", min), ("median", statistics.median)):
            row = {"what": name, "of": pick, "unit": "ms"}
            for side, _, _ in STAGES:
                row[f"{side}x{side}"] = round_to(1e3 * measure(times[side, name]))
            row["weighted"] = round_to(sum(blocks * 1e3 * measure(times[side, name]) for side, _, blocks in STAGES))
            rows.append(row)
            print("  ".join(f"{v}" for v in row.values()))
    pairs = [("forward",) * 2, ("softmax+forward",) * 2, ("forward+backward",) * 2]
    pairs.append(("softmax+forward bf16", "softmax+forward"))
    for ours, theirs in pairs if official is not None else []:
        for pick in ("min", "median"):
            a = next(r for r in rows if r["what"] == f"official {theirs}" and r["of"] == pick)
            b = next(r for r in rows if r["what"] == f"ours {ours}" and r["of"] == pick)
            row = {"what": f"official {theirs} / ours {ours}", "of": pick, "unit": "ratio"}
            row |= {key: round_to(a[key] / b[key]) for key in a if key not in ("what", "of", "unit")}
            rows.append(row)
            print("  ".join(f"{v}" for v in row.values()))
    if arguments.csv:
        new = not arguments.csv.exists()
        with arguments.csv.open("a", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], *about], lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerows({**row, **about} for row in rows)


def processor() -> str:
    """The processor's name, where Linux tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())


def round_to(value: float) -> float:
    return float(f"{value:.3g}")


if __name__ == "__main__":
    main()
