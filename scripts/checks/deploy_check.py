# SPDX-License-Identifier: MIT
"""Exported files in other runtimes, in a virtual environment that has neither torch nor internimage.

`internimage export` writes internimage_tiny with random weights and offsets of about a pixel as both operators. Then
OpenVINO runs it in float32, at sizes and batches that were neither traced nor verified by the export; it may be as far
from the float64 model as an exported file may in onnxruntime. And the code of the files' cards is run as it stands, for
each runtime.

The environment is made under --work, and reused by later runs. pip's variables (PIP_INDEX_URL, PIP_CONFIG_FILE) select
the index.
"""

import argparse
import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from internimage.benchmark.contender import Contender
from internimage.engine.create import data_config
from internimage.export.verify import Verification, compare
from internimage.models.timm_folder import save_model

ROOT = Path(__file__).resolve().parents[2]
RUNTIMES = ("onnxruntime", "openvino")
ABSENT = ("torch", "internimage", "onnx")  # from the environment
MODEL = "internimage_tiny"
FILES = {"deform.onnx": ("deform-conv", ("onnxruntime",)), "grid.onnx": ("grid-sample", RUNTIMES)}
SHAPES = [(1, 3, 192, 320), (4, 3, 97, 161), (3, 3, 256, 256)]


def environment(folder: Path, packages: tuple[str, ...]) -> Path:
    """The interpreter of a virtual environment with some packages and what they depend on, made the first time.

    Raises:
        CalledProcessError: pip cannot install them, such as without a network; its output has the reason.
    """
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
    subprocess.run(pip, check=True, capture_output=True, text=True, env=variables())
    look = f"import importlib.util as i; print(*[name for name in {ABSENT} if i.find_spec(name)])"
    there = run(python, "-c", look, cwd=folder).split()
    assert not there, f"the environment '{folder}' has {', '.join(there)}"
    return python


def variables() -> dict[str, str]:
    """The variables of this process, without those that would show its packages to another."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def run(*command, **kwargs) -> str:
    """Run a command without the packages of this process and return what it prints; on failure, exit with that."""
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=variables(), **kwargs
    )
    if result.returncode != 0:
        sys.exit(f"{result.stdout}\ndeploy_check: command failed: {' '.join(map(str, command[:2]))}")
    return result.stdout


def code_of(card: Path, runtime: str) -> str:
    """The Python code in a card that imports a runtime."""
    blocks = re.findall(r"```python\n(.*?)```", card.read_text(encoding="utf-8"), re.DOTALL)
    (found,) = [block for block in blocks if f"import {runtime}\n" in block]
    return found


def export(folder: Path, path: Path, operator: str) -> None:
    """Export the model in a folder by the command that a user would type."""
    command = ["export", "--model", folder, "--output", path, "--operator", operator, "--overwrite"]
    print("\n$ internimage", *command, flush=True)
    subprocess.run([sys.executable, "-m", "internimage", *command], check=True)


@torch.no_grad()
def in_openvino(python: Path, file: Path, model: nn.Module, work: Path) -> Verification:
    """Run a file in OpenVINO and compare it with the model in float64."""
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(shape, generator=generator) for shape in SHAPES]
    given, got = work / "inputs.npz", work / "outputs.npz"
    np.savez(given, **{f"input{i}": image.numpy() for i, image in enumerate(images)})
    run(python, ROOT / "scripts" / "checks" / "run_openvino.py", file, given, got, cwd=work)
    with np.load(got) as stored:
        answers = [[torch.from_numpy(stored[f"output{i}"])] for i in range(len(images))]
    double = copy.deepcopy(model).double()
    eager, exact = [[model(image)] for image in images], [[double(image.double())] for image in images]
    return compare(answers, eager, exact, SHAPES)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "deploy", help="folder for environment and files")
    work = parser.parse_args().work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    python = environment(work / "environment", (*RUNTIMES, "numpy"))
    versions = "from importlib.metadata import version as v; print(*[f'{n} {v(n)}' for n in ('%s', '%s', 'numpy')])"
    print(f"{work / 'environment'}: {run(python, '-c', versions % RUNTIMES).strip()}; not {', '.join(ABSENT)}")

    model = Contender(MODEL).build()  # with offsets of about a pixel, so that a mistake in their order shows
    folder = work / "model"
    folder.mkdir(exist_ok=True)
    save_model(model, folder, [f"class {i}" for i in range(model.num_classes)], data_config(model))
    for name, (operator, runtimes) in FILES.items():
        export(folder, work / name, operator)
        for runtime in runtimes:
            code = code_of(work / f"{name}.md", runtime) + "print(logits.shape, logits.dtype)\n"
            print(f"the card's code for {runtime}: {run(python, '-c', code, cwd=work).strip()}", flush=True)

    found = in_openvino(python, work / "grid.onnx", model, work)
    print(f"\nOpenVINO, float32, {found.text}")
    return 0 if found.good else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        sys.exit(f"{error.stderr or ''}deploy_check: command failed: {' '.join(map(str, error.cmd))}")
