# SPDX-License-Identifier: MIT
"""`internimage predict`."""

import argparse
import io
import json
import sys

from ..analysis.points import draw_points
from ..engine.finite import NotFiniteError
from ..engine.images import DataError
from ..engine.predict import Prediction, find_images, predict, read_image
from .arguments import load_model


def run(arguments: argparse.Namespace) -> int:
    files = find_images(path for path in arguments.images if path != "-")
    model, config, device, dtype = load_model(arguments)
    mode = "L" if config["input_size"][0] == 1 else "RGB"
    failures: list[str] = []
    not_finite: list[str] = []

    def images():
        sources = [(str(file), file) for file in files]
        if "-" in arguments.images:
            sources.append(("-", io.BytesIO(sys.stdin.buffer.read())))
        for name, source in sources:
            try:
                yield name, read_image(source, name, mode)
            except DataError as error:
                failures.append(str(error))
                _say(error)

    def failed(name: str, problem: NotFiniteError) -> None:
        not_finite.append(name)
        _say(f"'{name}': {problem}")

    kept = []

    def remembered():
        for name, image in images():
            if arguments.draw_points is not None and len(kept) < 16:
                kept.append((name, image))
            yield name, image

    for prediction in predict(model, remembered(), config, arguments.topk, device, dtype, failed):
        _print(prediction, arguments.json)
    if arguments.draw_points is not None and kept:
        layer = draw_points(model, kept, config, arguments.draw_points, arguments.draw_layer)
        print(f"sampled points of {layer}: {arguments.draw_points}", file=sys.stderr)
    if failures:
        return 2
    return 1 if not_finite else 0


def _say(problem: Exception | str) -> None:
    print(f"internimage predict: error: {problem}", file=sys.stderr)


def _print(prediction: Prediction, as_json: bool) -> None:
    if as_json:
        classes = [
            {"label": label, "index": index, "probability": round(probability, 6)}
            for label, index, probability in zip(prediction.labels, prediction.indices, prediction.probabilities)
        ]
        print(json.dumps({"image": prediction.name, "classes": classes}, allow_nan=False), flush=True)
        return
    print(prediction.name.encode("utf-8", "backslashreplace").decode())  # a file's name may be any bytes
    for label, probability in zip(prediction.labels, prediction.probabilities):
        print(f"  {100 * probability:6.2f} %  {label}", flush=True)
