# SPDX-License-Identifier: MIT
"""The demo: fine-tune and evaluate the smallest model on real images, through the commands that a user types.

The images are scikit-learn's digits: 1797 scans of handwriting, reduced to 8x8 pixels, which come inside that package.
The last 360 in file order are held out; most of them were written by people who did not write the others.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

TRAIN = 1437
TARGET = 97.0


def write_digits(folder: Path) -> None:
    """Write the digits as folder/{train,val}/{0..9}/NNNN.png; leaves the demo if the folder holds anything else."""
    digits = load_digits()
    images = {}
    for i, (image, label) in enumerate(zip(digits.images, digits.target)):
        images[folder / ("train" if i < TRAIN else "val") / str(label) / f"{i:04d}.png"] = image
    others = [path for path in folder.rglob("*") if not path.is_dir() and path not in images]
    if others:  # they would be trained on, or are somebody's
        sys.exit(f"'{folder}' holds files that are not the demo's ({others[0]}): remove them or set another --folder")
    for path, image in images.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * (255 / 16)).round().astype("uint8")).save(path)


def internimage(*arguments: str) -> None:
    """Run a command of the package, shown as a user would type it; leaves the demo where it fails."""
    print("\n$ internimage " + " ".join(map(shlex.quote, arguments)), flush=True)
    status = subprocess.run([sys.executable, "-m", "internimage", *arguments]).returncode
    if status:
        print(f"the demo stops here: this command ended with status {status}", file=sys.stderr)
        sys.exit(status)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where everything is written")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run each")
    arguments = parser.parse_args()
    # threads that wait by spinning starve each other where another process wants a core too
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    start = time.perf_counter()
    data = arguments.folder / "digits"
    write_digits(data)
    print(f"1797 images of digits are in {data}: {TRAIN} to train on, {1797 - TRAIN} held out")

    recipe = Path(os.path.relpath(Path(__file__).resolve().parent.parent / "configs" / "digits.yaml"))
    accuracies = []
    for seed in arguments.seeds:
        run = arguments.folder / f"run-seed{seed}"
        numbers = arguments.folder / f"evaluation-seed{seed}.json"
        internimage("finetune", str(recipe), f"data={data}", f"output={run}", f"seed={seed}", "overwrite=true")
        internimage("evaluate", "--model", str(run), "--data", str(data), "--per-class", "--json", str(numbers))
        accuracies.append(json.loads(numbers.read_text())["top1"])

    picture = arguments.folder / "points.png"
    some = [str(sorted((data / "val" / str(digit)).iterdir())[0]) for digit in range(8)]
    internimage(
        "predict", *some, "--model", str(run), "--topk", "1", "--draw-points", str(picture),
        "--draw-layer", "levels.0.blocks.0.dcn",
    )  # fmt: skip

    mean, worst = sum(accuracies) / len(accuracies), min(accuracies)
    runs = f", mean of {len(accuracies)} runs, the worst {worst:.2f} %" if len(accuracies) > 1 else ""
    print(
        f"""
The demo is done, in {time.perf_counter() - start:.0f} s.

  accuracy    {mean:.2f} % of the {1797 - TRAIN} held-out digits (top-1{runs})
  model       {run}
  report      {run / "report.html"} (open it in a browser)
  picture     {picture} (where a DCNv3 layer looks)
  numbers     {numbers}
"""
    )
    if mean < TARGET:
        print(f"the accuracy is below the {TARGET} % that the demo should reach", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
