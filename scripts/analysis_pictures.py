# SPDX-License-Identifier: MIT
"""What the analysis views show of a model that looks at shapes, in numbers, beside the same model without training.

    OMP_NUM_THREADS=1 python scripts/analysis_pictures.py FOLDER --csv docs/benchmarks/analysis.csv

For each seed: images of shapes by `shapes.py`; a model trained on them by `internimage finetune configs/shapes.yaml`,
and evaluated by `internimage evaluate` on the images of the test split, whose backgrounds it has never seen. Then the
views of the first of these images, for the trained model and for the weights that its training began with: the control.
A number that the control reaches too says nothing about what the model has learned.

    FOLDER/seedN/shapes           the images
    FOLDER/seedN/run              the trained model
    FOLDER/seedN/evaluation.json  its accuracy
    FOLDER/seedN/values.json      the numbers of each image; a seed that has it is not measured again

The same seed gives the same numbers, apart from times, on the same machine with the same number of threads.
"""

import argparse
import html
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import shapes  # noqa: E402
import torch  # noqa: E402
from analysis_figures import draw_figures  # noqa: E402
from analysis_measures import (  # noqa: E402
    BOUND,
    CELL,
    FILLS,
    PROJECTIONS,
    RELATIVE,
    Held,
    from_json,
    measure,
    read_images,
    summary,
    to_json,
)
from torch import nn  # noqa: E402

from internimage.benchmark.timing import append_csv, check_csv, facts, markdown  # noqa: E402
from internimage.config import load_config  # noqa: E402
from internimage.engine.create import create_model, data_config  # noqa: E402
from internimage.engine.rng import seed_run  # noqa: E402
from internimage.engine.run_folder import is_finished  # noqa: E402
from internimage.errors import UserError  # noqa: E402
from internimage.files import write_text  # noqa: E402
from internimage.progress import progress_bar  # noqa: E402
from internimage.tasks.classification.config import FinetuneConfig  # noqa: E402
from internimage.tasks.classification.task import ClassificationTask  # noqa: E402

RECIPE = ROOT / "configs" / "shapes.yaml"
MODELS = ("trained", "control")
ACCURACY, TARGET = "accuracy on the test split, %", 98.0
# quantity and part; of the mean over images and seeds, what the trained model should reach and the control should not
GOALS = (
    ("receptive field: energy on the object / its area", "", 2.0, 1.3),
    ("saliency: share of the region on the object", FILLS[0], 0.7, None),
    ("saliency: share of the region on the object", RELATIVE, 0.7, None),
)

Row = dict[str, object]


class AnalysisError(UserError):
    """Arguments that cannot be used, or a step that failed."""


def check(seeds: Sequence[int], images: int, budget: int) -> None:
    """Whether the arguments can be used.

    Raises:
        AnalysisError: They cannot.
    """
    most = shapes.Request().test
    if any(not 0 <= seed < 2**32 for seed in seeds):
        raise AnalysisError(f"a seed must be from 0 to {2**32 - 1}, got {' '.join(map(str, seeds))}")
    if len(set(seeds)) < len(seeds):
        raise AnalysisError(f"each seed may be given once, got {' '.join(map(str, seeds))}")
    if not 3 <= images <= most:
        raise AnalysisError(
            f"images must be from 3, which a correlation needs, to {most}, the test split, got {images}"
        )
    if budget < 3:
        raise AnalysisError(f"budget must be at least 3, got {budget}")


# ---- models


def internimage(*arguments: str) -> None:
    """Run a command of the package, printed as a user would type it.

    Raises:
        AnalysisError: It failed.
    """
    print("\n$ internimage " + " ".join(map(shlex.quote, arguments)), flush=True)
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "internimage", *arguments]
    status = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}).returncode
    if status:
        raise AnalysisError(f"this command failed with status {status}: internimage {' '.join(arguments)}")


def train(folder: Path, seed: int) -> float:
    """Write the images, train the model and evaluate it once, as far as this has not been done.

    Args:
        folder: Of the seed.
        seed: Of images and training.

    Returns:
        The accuracy on the test split, in percent.
    """
    data, run, evaluation = folder / "shapes", folder / "run", folder / "evaluation.json"
    if not (data / "annotations").is_dir():
        shapes.write_shapes(data, shapes.Request(seed=seed), shapes.sample_photographs())
    if not is_finished(run):
        recipe = os.path.relpath(RECIPE)
        internimage("finetune", recipe, f"data={data}", f"output={run}", f"seed={seed}")
    if not evaluation.is_file():
        internimage("evaluate", "--model", str(run), "--data", str(data), "--split", "test", "--json", str(evaluation))
    return float(json.loads(evaluation.read_text(encoding="utf-8"))["top1"])


def untrained(run: Path, data: Path) -> nn.Module:
    """The model that a run began with, before its first step.

    Args:
        run: Folder of a run of `internimage finetune`; its settings are read.
        data: The images that it was trained on.
    """
    task = ClassificationTask(load_config(FinetuneConfig, run / "finetune.yaml", [f"data={data}", f"output={run}"]))
    task.open_data()
    seed_run(task.config.seed)
    return task.create_model().eval()


def open_seed(folder: Path, images: int) -> tuple[dict[str, nn.Module], list[Held]]:
    """The models by their names in `MODELS`, and the images of the test split that they are looked at with.

    Args:
        folder: Of a seed that was trained.
        images: How many of the split.
    """
    trained = create_model(str(folder / "run")).eval()
    models = {"trained": trained, "control": untrained(folder / "run", folder / "shapes")}
    return models, read_images(folder / "shapes", "test", images, data_config(trained))


# ---- pictures


def write_pictures(folder: Path, images: int, target: Path) -> None:
    """Write the pictures of the docs, and a page of `internimage analyze` for the first star.

    Args:
        folder: Of a seed that was trained.
        images: How many of the test split to choose from.
        target: Folder for the files.
    """
    models, held = open_seed(folder, images)
    files = draw_figures(models, held, data_config(models["trained"]))
    star = next(one for one in held if one.label == "star")
    with tempfile.TemporaryDirectory() as name:
        image, output = folder / "shapes" / star.file, Path(name) / "analysis"
        options = ["--cell", str(CELL), "--bound", str(BOUND), "--class", star.label, "--output", str(output)]
        internimage("analyze", str(image), "--model", str(folder / "run"), "--control", *options)
        text = (output / "index.html").read_text(encoding="utf-8")
    attribution = f"<p>{html.escape(shapes.ATTRIBUTION)}</p>"
    files["page.html"] = text.replace("<footer>", f"{attribution}\n<footer>", 1).encode()
    target.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (target / name).write_bytes(content)


# ---- numbers


def run_seed(folder: Path, seed: int, images: int, budget: int) -> dict[str, Any]:
    """The numbers of a seed, measured or read again: what is in its values.json.

    Raises:
        AnalysisError: They were measured with other arguments.
    """
    path = folder / "values.json"
    arguments = {
        "seed": seed, "images": images, "budget": budget, "bound": BOUND, "cell": CELL, "projections": PROJECTIONS,
    }  # fmt: skip
    if path.is_file():
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if document["arguments"] != arguments:
            raise AnalysisError(
                f"'{path}' was measured with {document['arguments']}, not {arguments}: remove it or give another folder"
            )
        return document
    accuracy = train(folder, seed)
    models, held = open_seed(folder, images)
    found = {}
    for name, model in models.items():
        with progress_bar(len(held), f"seed {seed}, {name}", "img") as bar:
            found[name] = to_json(measure(model, held, budget, done=bar.update))
    about = facts() | {"threads": torch.get_num_threads()}
    document = {
        "arguments": arguments, ACCURACY: accuracy, "test images": shapes.Request().test,
        "about": {column: about[column] for column in about if column not in ("clock", "rounds", "others")},
        "files": [one.file for one in held], "models": found,
    }  # fmt: skip
    write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")
    return document


def rows(document: dict[str, Any]) -> list[Row]:
    """The rows of a seed: its accuracy, then each quantity of each model."""
    settings = dict(document["arguments"])
    before, after = {"seed": settings.pop("seed")}, {**settings, **document["about"]}
    del after["images"]  # a row has the number of those that it counts
    accuracy = {
        "quantity": ACCURACY, "of": "", "mean": document[ACCURACY], "std": "", "min": "", "max": "",
        "images": document["test images"],
    }  # fmt: skip
    result: list[Row] = [{**before, "model": "trained", **accuracy, **after}]
    for model in MODELS:
        result += [{**before, "model": model, **row, **after} for row in summary(from_json(document["models"][model]))]
    return result


def mean_over_seeds(entries: Sequence[Row], model: str, quantity: str, part: str) -> tuple[float, float, float, int]:
    """Of the rows' means, where defined: their mean, least and largest; and the number of images that were counted."""
    own = [row for row in entries if (row["model"], row["quantity"], row["of"]) == (model, quantity, part)]
    means = [float(str(row["mean"])) for row in own if math.isfinite(float(str(row["mean"])))]
    images = sum(int(str(row["images"])) for row in own)
    if not means:
        return math.nan, math.nan, math.nan, images
    return sum(means) / len(means), min(means), max(means), images


def _shown(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "undefined"


def table(entries: Sequence[Row]) -> str:
    """A Markdown table of the means over seeds, and the range of the seeds."""
    lines = []
    for quantity, part in dict.fromkeys((str(row["quantity"]), str(row["of"])) for row in entries):
        line: list[object] = [quantity, part]
        for model in MODELS:
            mean, least, largest, images = mean_over_seeds(entries, model, quantity, part)
            if images == 0 and not any(row["model"] == model and row["quantity"] == quantity for row in entries):
                line += ["", "", ""]
                continue
            spread = f"{least:.3g} to {largest:.3g}" if math.isfinite(mean) else ""
            line += [_shown(mean), spread, images]
        lines.append(line)
    header = ["quantity", "of", "trained", "its seeds", "images", "control", "its seeds", "images"]
    return markdown(header, lines, names=2)


def verdicts(entries: Sequence[Row]) -> list[str]:
    """A line for each goal: what was reached, what the control has, and whether that leaves anything to learn."""
    lines = []
    for quantity, part, least, most in GOALS:
        name = quantity + (f" ({part})" if part else "")
        (trained, *_, images), (control, *_, others) = (
            mean_over_seeds(entries, model, quantity, part) for model in MODELS
        )
        good = trained >= least and (most is None or control <= most)
        said = "met" if good else "MISSED"
        if good and control >= least:
            said = "reached by the control too, so it is no evidence"
        limit = "" if most is None else f", at most {most:g}"
        lines.append(
            f"{name}: trained {_shown(trained)} ({images} images), at least {least:g}; control {_shown(control)} "
            f"({others} images){limit}: {said}"
        )
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="for images, models and numbers")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    parser.add_argument("--images", type=int, default=64, metavar="N", help="of the test split; default: 64")
    parser.add_argument(
        "--budget", type=int, default=1000, metavar="N", help="evaluations for a saliency region; default: 1000"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="file to append the rows to")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="folder to write the pictures of the docs to")
    options = parser.parse_args(arguments)
    # threads that spin while waiting starve each other if another process needs a core
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    entries: list[Row] = []
    try:
        check(options.seeds, options.images, options.budget)
        if options.csv is not None:
            check_csv(options.csv, COLUMNS)
        for seed in options.seeds:
            entries += rows(run_seed(options.folder / f"seed{seed}", seed, options.images, options.budget))
        if options.csv is not None:
            append_csv(options.csv, entries)
        if options.pictures is not None:
            write_pictures(options.folder / f"seed{options.seeds[0]}", options.images, options.pictures)
    except (UserError, shapes.ShapesError, OSError) as error:
        print(f"analysis_pictures.py: error: {error}", file=sys.stderr)
        return 2
    print(f"\nMeans over images and seeds {' '.join(map(str, options.seeds))}:\n\n{table(entries)}\n")
    print("\n".join(verdicts(entries)))
    worst = min(float(str(row["mean"])) for row in entries if row["quantity"] == ACCURACY)
    if worst < TARGET:
        print(
            f"the accuracy of a seed, {worst:.2f} %, is below {TARGET:g} %: its numbers do not count", file=sys.stderr
        )
        return 1
    return 0


COLUMNS = [
    "seed", "model", "quantity", "of", "mean", "std", "min", "max", "images", "budget", "bound", "cell", "projections",
    *(column for column in facts() if column not in ("clock", "rounds", "others")),
]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
