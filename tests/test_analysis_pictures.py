# SPDX-License-Identifier: MIT
"""The demonstration of the analysis views in numbers: measures, control, rows, files and errors; without training.

The measures are compared with formulas on models whose views are known: a pooled feature that is a weighted sum of
pixels has the weights as its derivative.
"""

import csv
import json
import math
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from internimage.engine.run_folder import is_finished
from internimage.tasks.classification.config import FinetuneConfig
from internimage.tasks.classification.finetune import finetune

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "analysis_pictures.py"
if not SCRIPT.exists():
    pytest.skip("needs the sources, not an installed package", allow_module_level=True)
sys.path.insert(0, str(SCRIPT.parent))

import analysis_measures  # noqa: E402
import analysis_pictures  # noqa: E402
import shapes  # noqa: E402
from analysis_measures import CORRELATION, DILATION, RADIUS, RELATIVE, Held, correlation, measure, summary  # noqa: E402

CONFIG = {"input_size": (3, 64, 64), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0, "interpolation": "bicubic"}
LAYER = "levels.0.blocks.0.dcn"


class Weighted(nn.Module):
    """Pooled features that are two weighted sums of the pixels of the first color, and one of all, (N, 3).

    Args:
        weights: (H, W).
    """

    num_classes = 3

    def __init__(self, weights: torch.Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights)

    def forward_features(self, x):
        return x

    def forward_head(self, x, pre_logits=False):
        first = x[:, 0] * self.weights
        return torch.stack([first.sum((1, 2)), 2 * first.sum((1, 2)), torch.ones(len(x))], dim=1)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


def held(rows: slice, columns: slice, seed: int = 0) -> Held:
    """Noise of 16 x 16 pixels with an object that is a rectangle."""
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[rows, columns] = True
    image = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return Held(image, mask, f"test/square/{seed:05d}.png", "square")


@pytest.fixture(scope="module")
def photographs() -> list[np.ndarray]:
    return [np.random.default_rng(i).integers(0, 256, (100, 180, 3), dtype=np.uint8) for i in range(2)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, photographs) -> Path:
    """A seed's folder: images, and a run whose learning rate is zero, so that it ends with the weights it began with.

    One step: the optimizer, and everything else that could touch the weights, has run. Only the statistics of batch
    norm have changed.
    """
    folder = tmp_path_factory.mktemp("seed")
    shapes.write_shapes(folder / "shapes", shapes.Request(8, 4, 4, seed=5), photographs)
    config = FinetuneConfig(
        data=str(folder / "shapes"), output=str(folder / "run"), model="internimage_atto", pretrained=False,
        img_size=64, epochs=1, batch_size=8, workers=0, lr=0.0, warmup_lr=0.0, min_lr=0.0, warmup_epochs=0, seed=5,
        report=False,
    )  # fmt: skip
    finetune(config, progress=False)
    return folder


# ---- images


def test_images_and_masks_of_the_split(tmp_path, photographs):
    """The mask has the pixels that are brighter than any background; the image keeps its size and order."""
    shapes.write_shapes(tmp_path / "data", shapes.Request(4, 4, 8, seed=2), photographs)
    found = analysis_measures.read_images(tmp_path / "data", "test", 6, CONFIG)
    assert [one.label for one in found] == ["circle", "square", "star", "triangle", "circle", "square"]
    assert [one.file for one in found] == [f"test/{one.label}/{i:05d}.png" for i, one in enumerate(found)]
    for one in found:
        values = one.image * 0.5 + 0.5  # 0 to 1
        assert one.image.shape == (3, 64, 64)
        assert torch.equal(values.amax(0) >= 160 / 255 - 1e-6, one.mask)


# ---- measures


def test_energy_on_the_object():
    """The derivative of each feature is its weights in the first color: the energy is their square, up to a factor."""
    weights = torch.rand(16, 16, generator=torch.Generator().manual_seed(1))
    one = held(slice(2, 6), slice(4, 12))
    found = analysis_measures.of_receptive_field(Weighted(weights), one, 0)
    square = weights.double().square()
    expected = square[2:6, 4:12].sum() / square.sum() / (32 / 256)
    assert list(found.values()) == [pytest.approx(float(expected), rel=1e-5)]  # float32


def test_regions_of_a_model_that_sees_the_object_alone():
    """Cells of the object have weight, others none: no region that meets a bound needs another cell."""
    one = held(slice(4, 12), slice(4, 12))
    found = analysis_measures.of_saliency(Weighted(one.mask.float()), one, 200)
    for part in (*analysis_measures.FILLS, RELATIVE):
        empty = found["saliency: share of regions that are empty", part]
        share = found["saliency: share of the region on the object", part]
        assert share == 1 or (empty == 1 and math.isnan(share))
        size, covered = (
            found[f"saliency: {name}", part]
            for name in ("region's share of the image", "share of the object in the region")
        )
        assert size == pytest.approx(covered * 64 / 256)  # the region is in the object, of 64 pixels
        assert found["saliency: evaluations", part] <= 200 and found["saliency: CPU seconds", part] > 0
    assert found["saliency: share of regions that are empty", RELATIVE] == 0


def test_a_relative_bound_leaves_no_region_empty():
    """A feature that hardly depends on the image meets a fixed bound with nothing, and the relative one it does not."""
    one = held(slice(4, 12), slice(4, 12))
    found = analysis_measures.of_saliency(Weighted(1e-3 * one.mask.float()), one, 200)
    empty = "saliency: share of regions that are empty"
    assert [found[empty, part] for part in ("median", "blur", "zero", RELATIVE)] == [1, 1, 1, 0]
    masked = "saliency: error of the wholly masked image"
    assert 0 < found[masked, "median"] == found[masked, RELATIVE] < analysis_measures.BOUND


def test_object_of_an_image():
    found = analysis_measures.of_object(nn.Identity(), held(slice(0, 4), slice(0, 8)), 0)
    assert found == {RADIUS: pytest.approx(math.sqrt(32 / math.pi)), ("object's share of the image", ""): 32 / 256}


def test_layers_of_a_model_without_training(trained):
    """Offsets are zero: each kernel has the dilation of a plain one, and the correlation is not defined."""
    models, images = analysis_pictures.open_seed(trained, 4)
    measures = analysis_measures.of_object, analysis_measures.of_points, analysis_measures.of_dilation
    values = measure(models["control"], images, 3, measures)
    layers = [part for quantity, part in values if quantity == DILATION.format("object")]
    assert LAYER in layers and len(layers) == 6
    assert {len(numbers) for numbers in values.values()} == {4}
    for (quantity, _), numbers in values.items():
        defined = [number for number in numbers if math.isfinite(number)]
        if quantity.startswith("dilation"):
            assert defined == pytest.approx([1] * len(defined), abs=1e-6)
        if quantity.startswith("deviation"):
            assert defined == pytest.approx([0] * len(defined), abs=1e-6)
    strength = values["effective points: strength on the object / share of points", LAYER]
    assert all(0 < number < 1 / values["object's share of the image", ""][0] * 4 for number in strength)
    of = {(row["quantity"], row["of"]): row for row in summary(values)}
    row = of[CORRELATION.format("object"), LAYER]
    assert math.isnan(row["mean"]) and row["images"] == 4


def test_numbers_that_some_images_do_not_have():
    def one(model, image, budget):
        return {("a", ""): 1.0} | ({("b", "x"): 2.0} if image.label == "second" else {})

    images = [Held(torch.zeros(3, 1, 1), torch.ones(1, 1), "", label) for label in ("first", "second", "third")]
    seen = []
    values = measure(nn.Identity(), images, 3, [one], done=lambda: seen.append(1))
    assert values["a", ""] == [1, 1, 1] and len(seen) == 3
    assert np.array_equal(values["b", "x"], [math.nan, 2, math.nan], equal_nan=True)


# ---- the control


def test_the_control_has_the_weights_that_the_run_began_with(trained):
    """A run at a learning rate of zero keeps them: its result is read without the functions that are tested."""
    assert is_finished(trained / "run")
    kept = load_file(trained / "run" / "model.safetensors")
    models, images = analysis_pictures.open_seed(trained, 4)
    state, before = models["trained"].state_dict(), models["control"].state_dict()
    assert state.keys() == before.keys() == kept.keys()
    assert all(torch.equal(state[key], kept[key]) for key in kept)
    weights = {name for name, _ in models["control"].named_parameters()}
    assert all(torch.equal(before[key], kept[key]) for key in weights)
    # no batch has passed yet: mean 0, variance 1, count 0
    statistics = {key.rpartition(".")[2]: before[key] for key in kept.keys() - weights}
    assert set(statistics) == {"running_mean", "running_var", "num_batches_tracked"}
    assert [statistics[key].float().mean() for key in sorted(statistics)] == [0, 0, 1]
    assert not any(model.training for model in models.values())
    assert [one.label for one in images] == ["circle", "square", "star", "triangle"]


# ---- rows


def test_correlation():
    """Against the standard library's, where both numbers are defined."""
    generator = np.random.default_rng(0)
    x = generator.uniform(5, 20, 40)
    y = 1 + 0.01 * x + generator.normal(0, 0.1, 40)
    value, count = correlation(x, y)
    assert count == 40 and value == pytest.approx(statistics.correlation(x.tolist(), y.tolist()), abs=1e-12)
    y[3], x[7] = math.nan, math.nan
    rest = [i for i in range(40) if i not in (3, 7)]
    value, count = correlation(x, y)
    assert count == 38 and value == pytest.approx(statistics.correlation(x[rest].tolist(), y[rest].tolist()), abs=1e-12)


@pytest.mark.parametrize(
    "first, second, images",
    [
        ([1, 2], [1, 2], 2),  # always 1 or -1
        ([1, 2, 3, math.nan], [1, 2, math.nan, 4], 2),
        ([1, 2, 3], [1, 1, 1], 3),
        ([1, 2, 3], [1, 1 + 8e-6, 1 - 8e-6], 3),  # rounding of locations
        ([1, 2, 3], [math.nan] * 3, 0),
    ],
)
def test_correlations_that_are_not_defined(first, second, images):
    value, count = correlation(first, second)
    assert math.isnan(value) and count == images


def test_rows_of_values():
    dilation = DILATION.format("object"), "a.dcn"
    values = {
        RADIUS: [6.0, 8.0, 10.0, 20.0], dilation: [1.0, 1.5, math.nan, 2.0], ("other", "median"): [math.nan] * 4,
    }  # fmt: skip
    radius, kernels, other, correlated = summary(values)
    assert radius == {"quantity": RADIUS[0], "of": "", "mean": 11, "std": 5.38516, "min": 6, "max": 20, "images": 4}
    assert (kernels["mean"], kernels["min"], kernels["max"], kernels["images"]) == (1.5, 1, 2, 3)
    assert kernels["std"] == pytest.approx(math.sqrt(0.5 / 3), abs=1e-6)
    assert other["images"] == 0 and all(math.isnan(other[column]) for column in ("mean", "std", "min", "max"))
    expected = statistics.correlation([6, 8, 20], [1, 1.5, 2])
    assert correlated["mean"] == pytest.approx(expected, abs=1e-6)
    assert (correlated["quantity"], correlated["of"]) == (CORRELATION.format("object"), "a.dcn")
    assert (correlated["std"], correlated["images"]) == ("", 3)


def test_values_are_the_same_after_a_file():
    values = {("a", ""): [1.0, math.nan, 1 / 3], ("b", "x.y"): [2.0]}
    again = analysis_measures.from_json(json.loads(json.dumps(analysis_measures.to_json(values), allow_nan=False)))
    assert again.keys() == values.keys()
    assert all(np.array_equal(again[name], values[name], equal_nan=True) for name in values)


# ---- the command


def document(seed: int, energies: tuple[float, float], accuracy: float = 99.0, images: int = 3) -> dict:
    """The values.json of a seed of which only the receptive field was measured."""
    quantity, part, *_ = analysis_pictures.GOALS[0]
    models = {
        name: [
            {"quantity": quantity, "of": part, "values": [energy - 1, energy, energy + 1]},
            {"quantity": RADIUS[0], "of": "", "values": [5.0, 6.0, 7.0]},
            {"quantity": "saliency: share of the region on the object", "of": "median", "values": shares},
        ]
        for name, energy, shares in zip(("trained", "control"), energies, ([0.9, 0.8, None], [None] * 3))
    }
    about = {column: "x" for column in analysis_pictures.COLUMNS[13:]}
    arguments = {"seed": seed, "images": images, "budget": 1000, "bound": 0.05, "cell": 4, "projections": 8}
    return {
        "arguments": arguments, analysis_pictures.ACCURACY: accuracy, "test images": 512, "about": about, "files": [],
        "models": models,
    }  # fmt: skip


def write_documents(folder: Path, *documents: dict) -> None:
    for one in documents:
        seed = folder / f"seed{one['arguments']['seed']}"
        seed.mkdir(parents=True)
        (seed / "values.json").write_text(json.dumps(one))


def test_seeds_that_were_measured_are_read_again(tmp_path, capsys):
    """Rows of two seeds in a CSV file, and the means over seeds in the table: nothing is trained."""
    write_documents(tmp_path / "demo", document(0, (3, 1)), document(4, (5, 2)))
    path = tmp_path / "rows.csv"
    command = [str(tmp_path / "demo"), "--seeds", "0", "4", "--images", "3", "--csv", str(path)]
    assert analysis_pictures.main(command) == 0
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == analysis_pictures.COLUMNS and {row["machine"] for row in found} == {"x"}
    assert len(found) == 2 * (1 + 2 * 3)
    assert [row["mean"] for row in found if row["quantity"].startswith("accuracy")] == ["99.0", "99.0"]
    energy = [row for row in found if row["quantity"].startswith("receptive")]
    assert [(row["seed"], row["model"], float(row["mean"])) for row in energy] == [
        ("0", "trained", 3), ("0", "control", 1), ("4", "trained", 5), ("4", "control", 2),
    ]  # fmt: skip
    assert {(row["min"], row["max"], row["images"]) for row in energy[:1]} == {("2.0", "4.0", "3")}
    share = [row for row in found if row["quantity"].startswith("saliency") and row["model"] == "control"]
    assert {(row["of"], row["mean"], row["images"]) for row in share} == {("median", "nan", "0")}
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.startswith("| receptive")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[2:] == ["4", "3 to 5", "6", "1.5", "1 to 2", "6"]
    (line,) = [line for line in printed.splitlines() if line.startswith("| saliency")]
    assert "0.85" in line and "undefined" in line
    assert "trained 4 (6 images), at least 2; control 1.5 (6 images), at most 1.3: MISSED" in printed
    assert "trained 0.85 (4 images), at least 0.7; control undefined (0 images): met" in printed


def test_a_goal_that_the_control_reaches_is_no_evidence(tmp_path, capsys):
    one = document(0, (3, 1))
    for number in one["models"]["control"][2], one["models"]["trained"][2]:
        number["values"] = [0.9, 0.7, None]
    write_documents(tmp_path, one)
    assert analysis_pictures.main([str(tmp_path), "--seeds", "0", "--images", "3"]) == 0
    printed = capsys.readouterr().out
    assert "trained 3 (3 images), at least 2; control 1 (3 images), at most 1.3: met\n" in printed
    control = "control 0.8 (2 images): reached by the control too, so it is no evidence\n"
    assert f"trained 0.8 (2 images), at least 0.7; {control}" in printed


def test_an_accuracy_that_is_too_low_is_said(tmp_path, capsys):
    write_documents(tmp_path, document(0, (3, 1), accuracy=97.9))
    assert analysis_pictures.main([str(tmp_path), "--seeds", "0", "--images", "3"]) == 1
    error = capsys.readouterr().err
    assert error == "the accuracy of a seed, 97.90 %, is below 98 %: its numbers do not count\n"


@pytest.mark.parametrize(
    "options, words",
    [
        (["--seeds", "-1"], "a seed must be from 0 to 4294967295, got -1"),
        (["--seeds", "1", "2", "1"], "each seed may be given once, got 1 2 1"),
        (["--images", "2"], "images must be from 3, which a correlation needs, to 512, the test split, got 2"),
        (["--images", "513"], "to 512, the test split, got 513"),
        (["--budget", "2"], "budget must be at least 3, got 2"),
        (["--csv", "."], "is a folder"),
        (["--seeds", "0", "--images", "4"], "remove it or give another folder"),
    ],
)
def test_errors_are_one_line(options, words, tmp_path, capsys):
    write_documents(tmp_path / "demo", document(0, (3, 1)))
    assert analysis_pictures.main([str(tmp_path / "demo"), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("analysis_pictures.py: error: ") and words in error and error.count("\n") == 1


def test_other_columns_are_refused_before_anything_is_trained(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(analysis_pictures, "train", lambda *_: pytest.fail("it trains"))
    (tmp_path / "rows.csv").write_text("a,b\n")
    assert analysis_pictures.main([str(tmp_path / "demo"), "--csv", str(tmp_path / "rows.csv")]) == 2
    assert "has other columns" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_a_command_that_fails_ends_it(tmp_path, capfd, monkeypatch):
    """The command of the package itself, which does not find its recipe."""
    monkeypatch.setattr(shapes, "write_shapes", lambda *_: None)
    monkeypatch.setattr(shapes, "sample_photographs", list)
    monkeypatch.setattr(analysis_pictures, "RECIPE", tmp_path / "none.yaml")
    assert analysis_pictures.main([str(tmp_path / "demo"), "--seeds", "3"]) == 2
    output = capfd.readouterr()
    assert "$ internimage finetune" in output.out and "none.yaml" in output.out and "seed=3" in output.out
    assert output.err.splitlines()[-1].startswith(
        "analysis_pictures.py: error: this command failed with status 2: internimage finetune "
    )
