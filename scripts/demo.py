# SPDX-License-Identifier: MIT
"""The demo: fine-tunes and evaluates the smallest model on real images, by the commands that a user would type.

The images are scikit-learn's digits: 1797 scans of handwriting at 8x8 pixels, which are part of that package. The last
360 in file order are held out; most of them were written by other people than the rest.
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
    """Write the digits as folder/{train,val}/{0..9}/NNNN.png; exits if the folder contains other files."""
    digits = load_digits()
    images = {}
    for i, (image, label) in enumerate(zip(digits.images, digits.target)):
        images[folder / ("train" if i < TRAIN else "val") / str(label) / f"{i:04d}.png"] = image
    others = [path for path in folder.rglob("*") if not path.is_dir() and path not in images]
    if others:  # the run would train on them
        sys.exit(f"'{folder}' contains other files than the demo's ({others[0]}): remove them or set another --folder")
    for path, image in images.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * (255 / 16)).round().astype("uint8")).save(path)


def internimage(*arguments: str) -> None:
    """Run a command of the package, printed as a user would type it; exits if it fails."""
    print("\n$ internimage " + " ".join(map(shlex.quote, arguments)), flush=True)
    status = subprocess.run([sys.executable, "-m", "internimage", *arguments]).returncode
    if status:
        print(f"the demo stops: this command failed with status {status}", file=sys.stderr)
        sys.exit(status)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="output folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run each")
    arguments = parser.parse_args()
    # threads that spin while waiting starve each other if another process needs a core
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    start = time.perf_counter()
    data = arguments.folder / "digits"
    write_digits(data)
    print(f"1797 images of digits are in {data}: {TRAIN} for training, {1797 - TRAIN} held out")

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
  picture     {picture} (where a DCNv3 layer samples)
  numbers     {numbers}
"""
    )
    if mean < TARGET:
        print(f"the accuracy is below the {TARGET} % that the demo should reach", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
