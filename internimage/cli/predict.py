# SPDX-License-Identifier: MIT
"""`internimage predict`."""

import argparse
import io
import json
import sys
from typing import BinaryIO

from ..analysis.points import draw_points
from ..data.images import DataError
from ..engine.finite import NotFiniteError
from ..tasks.classification.predict import Prediction, find_images, predict, read_image
from ..terminal import joined, say
from .arguments import load_model

MOST_ON_STDIN = 1 << 28  # bytes of an image on standard input, which may have no end


def run(arguments: argparse.Namespace) -> int:
    files = find_images(path for path in arguments.images if path != "-")
    model, config, device, dtype = load_model(arguments)
    mode = "L" if config["input_size"][0] == 1 else "RGB"
    failures: list[str] = []
    not_finite: list[str] = []

    def images():
        sources = [(str(file), file) for file in files]
        if "-" in arguments.images:
            sources.append(("-", sys.stdin.buffer))
        for name, source in sources:
            try:
                if name == "-":
                    source = _read_all(source)
                yield name, read_image(source, name, mode)
            except DataError as error:
                failures.append(name)
                _fail(error)

    def failed(name: str, problem: NotFiniteError | DataError) -> None:
        if isinstance(problem, DataError):
            kept.pop(name, None)
            failures.append(name)
            _fail(problem)
        else:
            not_finite.append(name)
            _fail(f"'{name}': {problem}")

    kept = {}

    def remembered():
        for name, image in images():
            if arguments.draw_points is not None and len(kept) < 16:
                kept[name] = image
            yield name, image

    for prediction in predict(model, remembered(), config, arguments.topk, device, dtype, failed):
        _print(prediction, arguments.json)
    if arguments.draw_points is not None and kept:
        layer = draw_points(model, list(kept.items()), config, arguments.draw_points, arguments.draw_layer)
        say(f"sampled points of {layer}: {arguments.draw_points}", sys.stderr)
    if failures:
        return 2
    return 1 if not_finite else 0


def _read_all(stream: BinaryIO) -> BinaryIO:
    data = stream.read(MOST_ON_STDIN + 1)
    if len(data) > MOST_ON_STDIN:
        raise DataError(f"'-' cannot be read: more than {MOST_ON_STDIN >> 20} MiB come on standard input; give a file")
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
