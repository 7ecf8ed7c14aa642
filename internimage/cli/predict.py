# SPDX-License-Identifier: MIT
"""`internimage predict`."""

import argparse
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from ..analysis.sheet import draw_points
from ..data.images import DataError
from ..engine.finite import NotFiniteError
from ..tasks.classification.predict import Prediction, find_images, image_mode, predict, read_image
from ..terminal import joined, say
from .arguments import load_model

MOST_ON_STDIN = 1 << 28  # bytes of an image on standard input, which may be endless
_MOST_DRAWN = 16  # images with sampling points


def run(arguments: argparse.Namespace) -> int:
    files = find_images(path for path in arguments.images if path != "-")
    model, config, device, dtype = load_model(arguments)
    mode = image_mode(config)
    unreadable: list[str] = []
    not_finite: list[str] = []
    drawn: dict[str, Image.Image] = {}

    def images() -> Iterator[tuple[str, Image.Image]]:
        sources: list[tuple[str, Path | None]] = [(str(file), file) for file in files]
        if "-" in arguments.images:
            sources.append(("-", None))
        for name, file in sources:
            try:
                image = read_image(_read_stdin() if file is None else file, name, mode)
            except DataError as error:
                failed(name, error)
                continue
            if arguments.draw_points is not None and len(drawn) < _MOST_DRAWN:
                drawn[name] = image
            yield name, image

    def failed(name: str, problem: NotFiniteError | DataError) -> None:
        if isinstance(problem, DataError):
            drawn.pop(name, None)
            unreadable.append(name)
            _fail(problem)
        else:
            not_finite.append(name)
            _fail(f"'{name}': {problem}")

    for prediction in predict(model, images(), config, arguments.topk, device, dtype, failed):
        _print(prediction, arguments.json)
    if arguments.draw_points is not None and drawn:
        layer = draw_points(model, list(drawn.items()), config, arguments.draw_points, arguments.draw_layer)
        say(f"sampling points of {layer}: {arguments.draw_points}", sys.stderr)
    if unreadable:
        return 2
    return 1 if not_finite else 0


def _read_stdin() -> BinaryIO:
    data = sys.stdin.buffer.read(MOST_ON_STDIN + 1)
    if len(data) > MOST_ON_STDIN:
        raise DataError(f"'-' cannot be read: more than {MOST_ON_STDIN >> 20} MiB on standard input; use a file")
    return io.BytesIO(data)


def _fail(problem: Exception | str) -> None:
    say(f"internimage predict: error: {joined(problem)}", sys.stderr)


def _print(prediction: Prediction, as_json: bool) -> None:
    if as_json:
        classes = [
            {"label": label, "index": index, "probability": round(probability, 6)}
            for label, index, probability in zip(prediction.labels, prediction.indices, prediction.probabilities)
        ]
        print(json.dumps({"image": prediction.name, "classes": classes}, allow_nan=False), flush=True)
        return
    say(prediction.name)
    for label, probability in zip(prediction.labels, prediction.probabilities):
        say(f"  {100 * probability:6.2f} %  {label}", flush=True)
