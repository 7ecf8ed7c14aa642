# SPDX-License-Identifier: MIT
"""`internimage predict`."""

import argparse
import io
import json
import sys

from ..analysis.points import draw_points
from ..engine.data import DataError
from ..engine.predict import Prediction, find_images, predict, read_image
from .arguments import load_model


def run(arguments: argparse.Namespace) -> int:
    files = find_images(path for path in arguments.images if path != "-")
    model, config, device, dtype = load_model(arguments)
    mode = "L" if config["input_size"][0] == 1 else "RGB"
    failures: list[str] = []

    def images():
        sources = [(str(file), file) for file in files]
        if "-" in arguments.images:
            sources.append(("-", io.BytesIO(sys.stdin.buffer.read())))
        for name, source in sources:
            try:
                yield name, read_image(source, name, mode)
            except DataError as error:
                failures.append(str(error))
                print(f"internimage predict: error: {error}", file=sys.stderr)

    kept = []

    def remembered():
        for name, image in images():
            if arguments.draw_points and len(kept) < 16:
                kept.append((name, image))
            yield name, image

    for prediction in predict(model, remembered(), config, arguments.topk, device, dtype):
        _print(prediction, arguments.json)
    if arguments.draw_points and kept:
        layer = draw_points(model, kept, config, arguments.draw_points, arguments.draw_layer)
        print(f"sampled points of {layer}: {arguments.draw_points}", file=sys.stderr)
    return 2 if failures else 0


def _print(prediction: Prediction, as_json: bool) -> None:
    if as_json:
        classes = [
            {"label": label, "index": index, "probability": round(probability, 6)}
            for label, index, probability in zip(prediction.labels, prediction.indices, prediction.probabilities)
        ]
        print(json.dumps({"image": prediction.name, "classes": classes}), flush=True)
        return
    print(prediction.name)
    for label, probability in zip(prediction.labels, prediction.probabilities):
        print(f"  {100 * probability:6.2f} %  {label}", flush=True)
