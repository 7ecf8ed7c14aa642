# SPDX-License-Identifier: MIT
"""The generator of images of shapes: geometry, COCO's format, splits, and errors.

What is drawn is told from the background in the images as written: it is brighter than any background.
"""

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from internimage.data.datasets import class_names, open_dataset

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "shapes.py"
if not SCRIPT.exists():
    pytest.skip("needs the sources, not an installed package", allow_module_level=True)
sys.path.insert(0, str(SCRIPT.parent))

import shapes  # noqa: E402
from shapes import Request, ShapesError, write_shapes  # noqa: E402

CLASSES = ["circle", "square", "star", "triangle"]
SPLITS = ["train", "val", "test"]
LEFT, RIGHT = 0, 1  # color channels


def stand_in() -> list[np.ndarray]:
    """Two photographs that are red in the left and green in the right half; the second also has blue."""
    photographs = [np.zeros((427, 640, 3), np.uint8) for _ in range(2)]
    for photograph in photographs:
        photograph[:, :320, LEFT] = 200
        photograph[:, 320:, RIGHT] = 200
    photographs[1][..., 2] = 100
    return photographs


def read(folder: Path, split: str) -> list[tuple[np.ndarray, dict, list[dict]]]:
    """The images of a split in order: pixels (H, W, 3), entry, annotations."""
    content = json.loads((folder / "annotations" / f"{split}.json").read_text())
    return [
        (
            np.asarray(Image.open(folder / image["file_name"])),
            image,
            [one for one in content["annotations"] if one["image_id"] == image["id"]],
        )
        for image in content["images"]
    ]


def drawn(pixels: np.ndarray) -> np.ndarray:
    """bool (H, W): the backgrounds' values are at most 0.3 * 255, those of shapes at least 160."""
    assert not ((pixels > 76) & (pixels < 160)).any()
    return pixels.max(2) >= 160


def in_box(mask: np.ndarray, box: list[int]) -> np.ndarray:
    left, top, width, height = box
    return mask[top : top + height, left : left + width]


def winding(polygon: np.ndarray, points: np.ndarray) -> np.ndarray:
    """How often a polygon turns around complex points, by the sum of the angles at which they see its edges."""
    seen = [complex(*corner) - points for corner in polygon]
    return sum(np.angle(after / before) for before, after in zip(seen, [*seen[1:], seen[0]])) / (2 * math.pi)


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("single") / "data"
    write_shapes(folder, Request(train=160, val=7, test=9, seed=3), stand_in())
    return folder


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("several")  # exists and is empty
    write_shapes(folder, Request(train=8, val=4, test=4, image_size=150, shapes=(2, 7), radius=(6.0, 20.5)), stand_in())
    return folder


# ---- geometry


@pytest.mark.parametrize("index", range(8))
def test_pixels_are_those_whose_centers_are_inside_the_polygon(single, index):
    """Two of each class. The winding number of a center is 1 or 0: none lies on an edge, where it would be between."""
    pixels, _, [shape] = read(single, "train")[index]
    polygon = np.array(shape["segmentation"][0]).reshape(-1, 2)
    centers = np.arange(64) + 0.5
    around = winding(polygon, centers + 1j * centers[:, None])
    assert np.allclose(np.abs(around), np.round(np.abs(around)), atol=1e-6)
    assert (drawn(pixels) == (np.abs(around) > 0.5)).all()


def test_polygons_have_the_form_of_their_class(single):
    """Radii and angles from the corners alone, each up to their rounding to hundredths."""
    for _, image, [shape] in read(single, "train"):
        name = CLASSES[shape["category_id"] - 1]
        assert image["file_name"].split("/")[1] == name
        polygon = np.array(shape["segmentation"][0]).reshape(-1, 2)
        corners = polygon - polygon.mean(0)
        radii, angles = np.hypot(*corners.T), np.degrees(np.arctan2(*corners.T[::-1]))
        outer = radii[::2] if name == "star" else radii
        assert len(polygon) == {"circle": 64, "square": 4, "star": 10, "triangle": 3}[name]
        assert np.ptp(outer) < 0.04 and 8.98 < outer.min() and outer.max() < 20.02
        # one corner of a triangle or star is up, at -90 degrees; a square's are at 45 and so on; circles have no turn
        first = {"square": 45, "star": -90, "triangle": -90}.get(name)
        if first is not None:
            assert abs((angles[0] - first + 180) % 360 - 180) < math.degrees(0.3) + 0.2
        if name == "star":
            assert np.ptp(radii[1::2]) < 0.04 and radii[1::2].max() < 0.5 * outer.min()


def test_areas_are_those_of_the_polygons_and_close_to_the_number_of_pixels(single):
    """An area by the sum of the triangles from a corner, signed.

    Only pixels that the outline passes through can make count and area differ: by half a pixel where a straight edge
    passes, by one at a corner. An edge of lengths dx and dy passes through at most dx + dy + 3 pixels. The placement is
    uniform, so the mean difference is 0: five standard errors allow for chance, and a mask that is half a pixel too
    wide would be off by half the perimeter, 26 pixels or more.
    """
    differences = []
    for pixels, _, [shape] in read(single, "train"):
        polygon = np.array(shape["segmentation"][0]).reshape(-1, 2)
        first, rest = polygon[0], polygon[1:] - polygon[0]
        area = sum(a[0] * b[1] - a[1] * b[0] for a, b in zip(rest, rest[1:])) / 2
        assert first.min() > 0 and abs(shape["area"] - abs(area)) <= 0.0051
        edges = np.abs(polygon - np.roll(polygon, -1, axis=0))
        difference = drawn(pixels).sum() - abs(area)
        assert abs(difference) <= (edges.sum() + 3 * len(polygon)) / 2 + len(polygon) / 2
        differences.append(difference)
    assert abs(np.mean(differences)) <= 5 * np.std(differences) / math.sqrt(len(differences)) < 5


def test_boxes_enclose_the_pixels_and_shapes_do_not_touch(single, several):
    """Every pixel drawn is in one box, and each edge of a box has pixels of its shape, which has one color."""
    for folder in (single, several):
        for pixels, _, annotations in (one for split in SPLITS for one in read(folder, split)):
            mask, covered = drawn(pixels), np.zeros(pixels.shape[:2], int)
            colors = set()
            for shape in annotations:
                inside = in_box(mask, shape["bbox"])
                in_box(covered, shape["bbox"])[...] += 1
                assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
                assert len(found := set(map(tuple, in_box(pixels, shape["bbox"])[inside]))) == 1
                colors |= found
                corners = np.array(shape["segmentation"][0]).reshape(-1, 2)
                left, top, width, height = shape["bbox"]
                assert (corners.min(0) <= [left + 0.5, top + 0.5]).all()  # centers of the outermost pixels
                assert (corners.max(0) >= [left + width - 0.5, top + height - 0.5]).all()
            assert len(colors) == len(annotations)
            assert covered.max() == 1 and (covered[mask] == 1).all()


def test_several_shapes(several):
    counts = Counter()
    for _, image, annotations in (one for split in SPLITS for one in read(several, split)):
        counts[len(annotations)] += 1
        corners = [np.array(shape["segmentation"][0]).reshape(-1, 2) for shape in annotations]
        radii = [np.hypot(*(polygon - polygon.mean(0)).T).max() for polygon in corners]
        # the class folder is that of the first annotation, which has the largest radius, up to rounded corners
        assert radii[0] >= max(radii) - 0.02
        assert image["file_name"].split("/")[1] == CLASSES[annotations[0]["category_id"] - 1]
    assert set(counts) <= set(range(2, 8)) and len(counts) > 2


# ---- format


def test_structure_of_the_annotations(single, several):
    for folder in (single, several):
        for split in SPLITS:
            content = json.loads((folder / "annotations" / f"{split}.json").read_text())
            assert [one["name"] for one in content["categories"]] == CLASSES
            assert [one["id"] for one in content["categories"]] == [1, 2, 3, 4]
            for key in ("images", "annotations"):
                ids = [one["id"] for one in content[key]]
                assert len(set(ids)) == len(ids) and all(type(one) is int for one in ids)
            assert {one["image_id"] for one in content["annotations"]} == {one["id"] for one in content["images"]}
            assert all(one["iscrowd"] == 0 and one["area"] > 0 for one in content["annotations"])
            licenses = {one["id"]: one for one in content["licenses"]}
            for image in content["images"]:
                with Image.open(folder / image["file_name"]) as file:
                    assert file.size == (image["width"], image["height"]) and file.mode == "RGB"
                assert licenses[image["license"]]["url"] == "https://creativecommons.org/licenses/by/2.0/"
                assert image["flickr_url"] in content["info"]["description"]
            assert {path.relative_to(folder).as_posix() for path in (folder / split).rglob("*.png")} == {
                image["file_name"] for image in content["images"]
            }
        assert {path.name for path in folder.iterdir()} == {*SPLITS, "annotations"}


def test_the_package_reads_the_class_folders(single):
    for split, count in zip(SPLITS, (160, 7, 9)):
        dataset = open_dataset(single, split)
        assert class_names(dataset) == CLASSES and len(dataset) == count
        labels = {Path(dataset.filename(i)).stem: dataset[i][1] for i in range(count)}
        annotated = {Path(image["file_name"]).stem: own[0]["category_id"] - 1 for _, image, own in read(single, split)}
        assert labels == annotated
        numbers = Counter(labels.values())
        assert len(numbers) == 4 and max(numbers.values()) - min(numbers.values()) <= 1


# ---- splits and seeds


def test_backgrounds_are_dark_and_those_of_test_are_apart(single, several):
    for folder in (single, several):
        for split in SPLITS:
            seen, unseen = (RIGHT, LEFT) if split == "test" else (LEFT, RIGHT)
            blue = set()
            for pixels, image, _ in read(folder, split):
                around = pixels[~drawn(pixels)]
                assert (around[:, seen] == 60).all() and (around[:, unseen] == 0).all()  # 0.3 of 200
                blue.add((int(around[0, 2]), image["flickr_url"].split("/")[4]))
                assert len(set(around[:, 2].tolist())) == 1
            assert blue == {(0, "danielbuechele"), (30, "vultilion")}, "both photographs, and each with its author"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_same_seed_same_bytes(tmp_path, single):
    noise = [np.random.default_rng(i).integers(0, 256, (100, 180, 3), dtype=np.uint8) for i in range(2)]
    for name, request in {
        "first": Request(8, 4, 4, shapes=(1, 1), seed=1),
        "second": Request(8, 4, 4, shapes=(1, 1), seed=1),
        "other": Request(8, 4, 4, seed=2),
        "longer": Request(12, 4, 4, seed=1),
    }.items():
        write_shapes(tmp_path / name, request, noise)
    first, other, longer = (contents(tmp_path / name) for name in ("first", "other", "longer"))
    assert first == contents(tmp_path / "second")
    pictures = [name for name in first if name.endswith(".png")]
    assert len(pictures) == 16 and all(first[name] != other[name] for name in pictures)
    assert all(first[name] == longer[name] for name in pictures), "an image does not depend on how many there are"
    assert len({first[name] for name in pictures}) == 16, "the splits have different images"


# ---- errors


@pytest.mark.parametrize(
    "options, words",
    [
        ({"val": 3}, "val must be at least 4, an image of each class, got 3"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"shapes": (0, 1)}, "shapes must be at least 1, the smaller number first, got 0 1"),
        ({"shapes": (3, 2)}, "the smaller number first, got 3 2"),
        ({"radius": (3.9, 20.0)}, "radius must be at least 4, the smaller one first, got 3.9 20"),
        ({"radius": (9.0, 8.0)}, "the smaller one first, got 9 8"),
        ({"radius": (9.0, math.nan)}, "radius must be at least 4"),
        ({"radius": (9.0, math.inf)}, "radius must be at least 4"),
        ({"image_size": 41}, "image_size must be at least 42 for 1 shape of radius 20, got 41"),
        ({"shapes": (1, 5)}, "image_size must be at least 126 for 5 shapes of radius 20, got 64"),
        ({"image_size": 321}, "image_size must be at most 320, to fit into half a photograph, got 321"),
    ],
)
def test_requests_that_cannot_be_met(tmp_path, options, words):
    with pytest.raises(ShapesError, match=words):
        write_shapes(tmp_path / "data", Request(**options), stand_in())
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("size, most", [(42, (1, 1)), (126, (9, 9)), (320, (1, 1))])
def test_the_limits_themselves_can_be_met(tmp_path, size, most):
    write_shapes(tmp_path, Request(4, 4, 4, image_size=size, shapes=most, radius=(20.0, 20.0)), stand_in())
    assert all(len(own) == most[1] for _, _, own in read(tmp_path, "test"))


def test_a_folder_with_files_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(ShapesError, match="exists and is not an empty folder: remove it or give another one"):
            write_shapes(path, Request(4, 4, 4), stand_in())
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_a_full_disk_leaves_an_empty_folder(tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shapes, "sample_photographs", stand_in)
    monkeypatch.setattr(Path, "write_text", full)
    assert shapes.main([str(tmp_path / "data"), "--train", "4", "--val", "4", "--test", "4"]) == 2
    assert capsys.readouterr().err == "shapes.py: error: [Errno 28] No space left on device\n"
    assert list((tmp_path / "data").iterdir()) == []


def test_without_scikit_learn_the_package_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert shapes.main([str(tmp_path / "data")]) == 2
    error = capsys.readouterr().err
    assert error.endswith("not installed: pip install scikit-learn\n") and error.count("\n") == 1
    assert not (tmp_path / "data").exists()


# ---- the photographs


def test_the_command_uses_the_photographs_of_scikit_learn(tmp_path):
    """The upper left corners of the backgrounds are found in the halves of the photographs that they shall be from."""
    datasets = pytest.importorskip("sklearn.datasets", reason="needs the photographs of scikit-learn")
    run = [sys.executable, str(SCRIPT), str(tmp_path / "data"), "--train", "8", "--val", "4", "--test", "8"]
    result = subprocess.run(run, capture_output=True, text=True, check=True)
    for words in ("danielbuechele", "vultilion", "CC BY 2.0", "creativecommons.org/licenses/by/2.0/", "darkened"):
        assert words in result.stdout
    images = datasets.load_sample_images()
    authors = {"china.jpg": "danielbuechele", "flower.jpg": "vultilion"}
    found = {}
    for path, photograph in zip(images.filenames, images.images):
        author = authors[Path(path).name]
        # 2 rows and 10 columns at every place, in whole numbers: 0.3 of a value in floating point can be one less
        found[author] = sliding_window_view(photograph.astype(int) * 3 // 10, (2, 10, 3))[:, :, 0]
    for split in SPLITS:
        for pixels, image, _ in read(tmp_path / "data", split):
            corner = pixels[:2, :10].astype(int)
            assert not drawn(pixels)[:2, :10].any(), "choose a seed whose shapes leave the corner free"
            places = (np.abs(found[image["flickr_url"].split("/")[4]] - corner) <= 1).all((2, 3, 4))
            rows, columns = np.nonzero(places)
            assert len(rows), "the background is in no photograph, or another than its author's"
            inside = columns >= 320 if split == "test" else columns + 64 <= 320
            assert (inside & (rows + 64 <= 427)).any()
