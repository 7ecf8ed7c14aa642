# SPDX-License-Identifier: MIT
"""Images of shapes on crops of photographs, for classification, detection and segmentation; the same for the same seed.

Each image is a crop of one of scikit-learn's two sample photographs, darkened to 30 %, with filled bright shapes on it:
circles, squares, triangles and stars, which do not touch each other. A model that tells them apart has to look at the
shape: the background says nothing about it. What is written:

    FOLDER/{train,val,test}/CLASS/NNNNN.png   class folders, as `internimage finetune data=FOLDER` reads them
    FOLDER/annotations/{train,val,test}.json  boxes and masks of the same images, in COCO's format

The backgrounds of train and val are crops of the left halves of the photographs, those of test of the right halves. If
an image has several shapes, its class folder is that of the shape with the largest radius. Classes take turns, so each
has the same number of images, up to one. Image NNNNN of a split does not depend on how many there are.

Of an annotation, `segmentation` is the shape's polygon (a circle has 64 corners), `area` is that of the polygon, and
`bbox` is the tight box of the shape's pixels: those whose centers are inside the polygon. As in COCO, pixel (x, y)
covers x to x + 1 and y to y + 1, and a box is (left, top, width, height).
"""

import argparse
import json
import math
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

CLASSES = ("circle", "square", "star", "triangle")  # class i + 1 of COCO is class i of the class folders
SPLITS = ("train", "val", "test")
HELD_OUT = "test"
BRIGHTNESS = 0.3  # of the background: its values are at most 76
BRIGHT = (160, 255)  # range of the three colors of a shape
TURN = 0.3  # radians, to either side
SMALLEST = 4.0  # radius, px: the narrowest shape, a star, then covers the centers of several pixels
GAP = 1.0  # px between a shape's circle and the edge of its cell

# after datasets/images/README.txt of scikit-learn, which names the first author for both, with these addresses
PHOTOGRAPHS = {
    "china.jpg": ("danielbuechele", "https://www.flickr.com/photos/danielbuechele/6061409035/"),
    "flower.jpg": ("vultilion", "https://www.flickr.com/photos/vultilion/6056698931/"),
}
LICENSE = ("Creative Commons Attribution 2.0 Generic (CC BY 2.0)", "https://creativecommons.org/licenses/by/2.0/")
ATTRIBUTION = (
    f"The backgrounds are crops, darkened to {BRIGHTNESS:.0%}, of "
    + " and ".join(f"{name} by {author} ({url})" for name, (author, url) in PHOTOGRAPHS.items())
    + f", from scikit-learn's sample images; license: {LICENSE[0]}, {LICENSE[1]}. Shapes were drawn on them."
)


class ShapesError(Exception):
    """A request that cannot be met. The message names what was wrong and what would be right."""


@dataclass(frozen=True)
class Request:
    """What to generate.

    Args:
        train: Number of images; `val` and `test` likewise.
        image_size: Height and width, px.
        shapes: Smallest and largest number of shapes of an image.
        radius: Smallest and largest radius of the circle around a shape, px.
        seed: Of everything that is drawn at random.
    """

    train: int = 4096
    val: int = 512
    test: int = 512
    image_size: int = 64
    shapes: tuple[int, int] = (1, 1)
    radius: tuple[float, float] = (9.0, 20.0)
    seed: int = 0


@dataclass(frozen=True)
class Shape:
    """A filled shape.

    Args:
        kind: Index into `CLASSES`.
        polygon: Its corners, float64 (N, 2) of x and y, px, rounded to hundredths.
        color: uint8 (3,).
    """

    kind: int
    polygon: np.ndarray
    color: np.ndarray


def check(request: Request, photographs: list[np.ndarray]) -> None:
    """Whether a request can be met.

    Raises:
        ShapesError: It cannot.
    """
    for split in SPLITS:
        if getattr(request, split) < len(CLASSES):
            raise ShapesError(
                f"{split} must be at least {len(CLASSES)}, an image of each class, got {getattr(request, split)}"
            )
    if request.seed < 0:
        raise ShapesError(f"seed must be at least 0, got {request.seed}")
    (fewest, most), (smallest, largest) = request.shapes, request.radius
    if not 1 <= fewest <= most:
        raise ShapesError(f"shapes must be at least 1, the smaller number first, got {fewest} {most}")
    if not SMALLEST <= smallest <= largest < math.inf:
        raise ShapesError(f"radius must be at least {SMALLEST:g}, the smaller one first, got {smallest:g} {largest:g}")
    # the largest shape in each of the cells of `draw`
    needed = math.ceil(2 * (largest + GAP)) * math.ceil(math.sqrt(most))
    if request.image_size < needed:
        raise ShapesError(
            f"image_size must be at least {needed} for {most} {'shape' if most == 1 else 'shapes'} of radius "
            f"{largest:g}, got {request.image_size}"
        )
    limit = min(min(image.shape[0], image.shape[1] // 2) for image in photographs)
    if request.image_size > limit:
        raise ShapesError(
            f"image_size must be at most {limit}, to fit into half a photograph, got {request.image_size}"
        )


def background(
    rng: np.random.Generator, photographs: list[np.ndarray], size: int, held_out: bool
) -> tuple[np.ndarray, int]:
    """A dark crop of the left half of a photograph, or of the right one if held out.

    Returns:
        uint8 (size, size, 3), and the index of the photograph.
    """
    which = int(rng.integers(len(photographs)))
    half = photographs[which].shape[1] // 2
    photograph = photographs[which][:, -half:] if held_out else photographs[which][:, :half]
    top = rng.integers(photograph.shape[0] - size + 1)
    left = rng.integers(half - size + 1)
    return (photograph[top : top + size, left : left + size] * BRIGHTNESS).astype(np.uint8), which


def outline(kind: int, center: np.ndarray, radius: float, turn: float) -> np.ndarray:
    """The corners of a shape, all in the circle around it: float64 (N, 2) of x and y, rounded to hundredths.

    Without a turn a square's sides are along the image's, and a triangle and a star point up.
    """
    name = CLASSES[kind]
    corners = {"circle": 64, "square": 4, "star": 10, "triangle": 3}[name]
    start = math.pi / 4 if name == "square" else -math.pi / 2
    angles = start + turn + 2 * math.pi / corners * np.arange(corners)
    radii = np.full(corners, radius)
    if name == "star":
        radii[1::2] *= 0.45
    return np.round(center + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1), 2)


def draw(rng: np.random.Generator, kind: int, request: Request) -> list[Shape]:
    """The shapes of an image: the first has the given kind, and the largest radius.

    The image is divided into the fewest cells, n by n, that are enough, and each shape lies in a cell of its own.
    """
    count = int(rng.integers(request.shapes[0], request.shapes[1] + 1))
    cells = math.ceil(math.sqrt(count))
    side = request.image_size / cells
    radii = np.sort(rng.uniform(*request.radius, count))[::-1]
    kinds = [kind, *rng.integers(len(CLASSES), size=count - 1).tolist()]
    shapes = []
    for kind, radius, cell in zip(kinds, radii.tolist(), rng.permutation(cells**2)[:count].tolist()):
        corner = side * np.array([cell % cells, cell // cells])
        center = corner + rng.uniform(radius + GAP, side - radius - GAP, 2)
        polygon = outline(kind, center, radius, rng.uniform(-TURN, TURN))
        shapes.append(Shape(kind, polygon, rng.integers(BRIGHT[0], BRIGHT[1] + 1, 3).astype(np.uint8)))
    return shapes


def inside(polygon: np.ndarray, size: int) -> np.ndarray:
    """The pixels whose centers are inside a polygon, by the even-odd rule: bool (size, size)."""
    centers = np.arange(size) + 0.5
    (x1, y1), (x2, y2) = polygon.T[:, :, None], np.roll(polygon, -1, axis=0).T[:, :, None]
    crosses = (y1 > centers) != (y2 > centers)  # edges, rows
    height = np.where(y1 == y2, 1.0, y2 - y1)  # no row crosses a level edge
    crossings = x1 + (centers - y1) / height * (x2 - x1)
    return np.logical_xor.reduce(crosses[:, :, None] & (centers < crossings[:, :, None]))


def annotation(shape: Shape, mask: np.ndarray, number: int, image: int) -> dict[str, Any]:
    """COCO's annotation of a shape with these pixels."""
    (x, y), (next_x, next_y) = shape.polygon.T, np.roll(shape.polygon, -1, axis=0).T
    columns, rows = np.flatnonzero(mask.any(0)).tolist(), np.flatnonzero(mask.any(1)).tolist()
    return {
        "id": number,
        "image_id": image,
        "category_id": shape.kind + 1,
        "segmentation": [shape.polygon.ravel().tolist()],
        "area": round(abs(float((x * next_y - next_x * y).sum())) / 2, 2),
        "bbox": [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]],
        "iscrowd": 0,
    }


def write_split(folder: Path, split: str, request: Request, photographs: list[np.ndarray]) -> None:
    """Write the images of a split and its annotations into a folder."""
    for name in CLASSES:
        (folder / split / name).mkdir(parents=True)
    size, names = request.image_size, list(PHOTOGRAPHS)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in tqdm(range(getattr(request, split)), split, unit=" images", leave=False, disable=None):
        rng = np.random.default_rng([request.seed, SPLITS.index(split), index])
        kind = index % len(CLASSES)
        pixels, which = background(rng, photographs, size, split == HELD_OUT)
        for shape in draw(rng, kind, request):
            mask = inside(shape.polygon, size)
            pixels[mask] = shape.color
            annotations.append(annotation(shape, mask, len(annotations) + 1, index + 1))
        file = f"{split}/{CLASSES[kind]}/{index:05d}.png"
        Image.fromarray(pixels).save(folder / file)
        source = PHOTOGRAPHS[names[which]][1]
        images.append(
            {"id": index + 1, "file_name": file, "width": size, "height": size, "license": 1, "flickr_url": source}
        )
    content = {
        "info": {"description": f"Shapes on photographs. {ATTRIBUTION}", "split": split, **asdict(request)},
        "licenses": [{"id": 1, "name": LICENSE[0], "url": LICENSE[1]}],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": name, "supercategory": "shape"} for i, name in enumerate(CLASSES)],
    }
    (folder / "annotations" / f"{split}.json").write_text(json.dumps(content) + "\n", encoding="utf-8")


def write_shapes(folder: Path, request: Request, photographs: list[np.ndarray]) -> None:
    """Write the images of all splits and their annotations.

    Args:
        folder: New or empty. If writing fails it is left empty.
        request: What to generate.
        photographs: Backgrounds in the order of `PHOTOGRAPHS`, uint8 (H, W, 3).

    Raises:
        ShapesError: The request cannot be met, or the folder is not empty.
        OSError: The disk is full, for example.
    """
    check(request, photographs)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ShapesError(f"'{folder}' exists and is not an empty folder: remove it or give another one")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as partial:
        (Path(partial) / "annotations").mkdir()
        for split in SPLITS:
            write_split(Path(partial), split, request, photographs)
        for name in (*SPLITS, "annotations"):
            (Path(partial) / name).rename(folder / name)


def sample_photographs() -> list[np.ndarray]:
    """scikit-learn's sample photographs in the order of `PHOTOGRAPHS`, uint8 (427, 640, 3)."""
    try:
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise ShapesError(
            "the photographs come with scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    return [load_sample_image(name) for name in PHOTOGRAPHS]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Request()
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="output folder, new or empty")
    for split in SPLITS:
        number = getattr(default, split)
        parser.add_argument(f"--{split}", type=int, default=number, metavar="N", help=f"images; default: {number}")
    size = default.image_size
    parser.add_argument("--image-size", type=int, default=size, metavar="PX", help=f"height and width; default: {size}")
    parser.add_argument(
        "--shapes", type=int, nargs=2, default=default.shapes, metavar=("MIN", "MAX"), help="an image; default: 1 1"
    )
    parser.add_argument(
        "--radius", type=float, nargs=2, default=default.radius, metavar=("MIN", "MAX"), help="px; default: 9 20"
    )
    parser.add_argument("--seed", type=int, default=default.seed, metavar="N", help="default: 0")
    options = vars(parser.parse_args(arguments))
    folder = options.pop("folder")
    options |= {"shapes": tuple(options["shapes"]), "radius": tuple(options["radius"])}
    request = Request(**options)
    try:
        write_shapes(folder, request, sample_photographs())
    except (ShapesError, OSError) as error:
        print(f"shapes.py: error: {error}", file=sys.stderr)
        return 2
    counts = ", ".join(f"{getattr(request, split)} {split}" for split in SPLITS)
    print(f"images of {request.image_size} x {request.image_size} pixels are in {folder}: {counts}\n{ATTRIBUTION}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
