# SPDX-License-Identifier: MIT
"""A finished run as one HTML file: no scripts, nothing fetched, readable in any browser and in twenty years."""

import base64
import html
import io
import math
import tempfile
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

from .. import __version__
from ..analysis.points import dcnv3_layers, draw_points
from ..files import write_text
from .config import dump
from .data import GuardedDataset
from .evaluate import Evaluation
from .settings import FinetuneConfig
from .training_log import read_steps

_MOST_IN_MATRIX = 40  # classes; with more, the pairs that are confused most are listed
_MISTAKES = 16
_WIDTH, _HEIGHT, _MARGIN = 520, 220, 48

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1120px;margin:2rem auto;padding:0 1rem;color:#1a1a1a;background:#fff}
h1{font-size:1.6rem}h2{font-size:1.2rem;margin-top:2.2rem;border-bottom:1px solid #ddd}
.curves,.mistakes{display:flex;flex-wrap:wrap;gap:1rem}figure{margin:0}figcaption{font-size:.85rem;max-width:470px}
table{border-collapse:collapse;font-size:.8rem}td,th{padding:.15rem .45rem;text-align:right}
th.name,td.name{text-align:left}.matrix td{min-width:1.8rem;border:1px solid #eee}
.matrix th{font-weight:normal;color:#555}.bar{background:#dbe7f5;width:240px;padding:0}
.bar div{background:#3b76af;height:.8rem}pre{background:#f6f6f6;padding:.8rem;overflow:auto;font-size:.8rem}
.big{font-size:2rem;font-weight:600}.pair{display:flex;gap:4px}.pair img{width:224px;height:224px;object-fit:contain;
image-rendering:pixelated;background:#f6f6f6}text{font:11px system-ui,sans-serif;fill:#555}
"""


def write_report(
    path: Path,
    config: FinetuneConfig,
    result: Evaluation,
    dataset: Dataset,
    names: list[str],
    epochs: list[dict],
    model: nn.Module | None,
    preprocessing: dict,
) -> None:
    """Write the report of a run.

    Args:
        path: The HTML file; the table of steps stands beside it.
        config: The settings.
        result: From `evaluate(..., keep_answers=True)` on the validation split.
        dataset: The validation split.
        names: The classes.
        epochs: A row an epoch.
        model: To draw its sampled points over the images; None draws none.
        preprocessing: From `data_config`.
    """
    matrix = torch.zeros(len(names), len(names), dtype=torch.long)
    for _, target, predicted, _ in result.answers:
        matrix[target, predicted] += 1
    steps = read_steps(path.parent)
    losses = [(float(row["step"]), float(row["loss"])) for row in steps]
    parts = [
        f"<h1>{html.escape(config.model)} on {len(names)} classes</h1>",
        f'<p><span class="big">{result.top1:.2f} %</span> top-1 on {result.images} validation images, '
        f"top-5 {result.top5:.2f} %, loss {result.loss:.4f}</p>",
        _skipped(result),
        '<h2 id="curves">Curves</h2><div class="curves">',
        _curve("training loss", "step", {"loss": losses, "mean of 5 %": _smooth(losses)}),
        _curve("learning rate", "step", {"lr": [(float(row["step"]), float(row["lr"])) for row in steps]}),
        _curve("validation top-1, %", "epoch", {"top-1": _column(epochs, "val_top1")}),
        _curve(
            "loss by epoch",
            "epoch",
            {"training": _column(epochs, "train_loss"), "validation": _column(epochs, "val_loss")},
        ),
        "</div>",
        '<h2 id="confusion">Confusion</h2>',
        _matrix(matrix, names) if len(names) <= _MOST_IN_MATRIX else _confused(matrix, names),
        '<h2 id="classes">Accuracy of each class</h2>',
        _classes(result),
        '<h2 id="mistakes">The worst mistakes</h2>',
        _mistakes(result, dataset, names, model, preprocessing),
        f'<h2 id="settings">Settings</h2><pre>{html.escape(dump(config))}</pre>',
        f"<p>internimage {__version__}, torch {torch.__version__}</p>",
    ]
    title = html.escape(f"{config.model}: {result.top1:.2f} %")
    write_text(
        path,
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n",
    )


def _skipped(result: Evaluation) -> str:
    if not result.skipped:
        return ""
    files = ", ".join(html.escape(f"{file} ({reason})") for file, reason in result.skipped[:10])
    return f"<p>{len(result.skipped)} images could not be read and do not count: {files}</p>"


def _column(rows: list[dict], name: str) -> list[tuple[float, float]]:
    return [(row["epoch"], row[name]) for row in rows if name in row]


def _smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    width = max(len(points) // 20, 1)
    good = [point for point in points if math.isfinite(point[1])]
    return [
        (good[i][0], sum(y for _, y in good[max(0, i - width + 1) : i + 1]) / min(i + 1, width))
        for i in range(0, len(good), max(1, len(good) // 400))
    ]


def _curve(title: str, unit: str, series: dict[str, list[tuple[float, float]]]) -> str:
    """A line plot as SVG; what is not finite is left out."""
    series = {name: [p for p in points if math.isfinite(p[1])] for name, points in series.items()}
    series = {name: points[:: max(1, len(points) // 1000)] for name, points in series.items() if points}
    if not series:
        return ""
    every = [point for points in series.values() for point in points]
    x0, x1 = min(x for x, _ in every), max(x for x, _ in every)
    y0, y1 = min(y for _, y in every), max(y for _, y in every)
    x1, y1 = x1 if x1 > x0 else x0 + 1, y1 if y1 > y0 else y0 + (abs(y0) or 1)

    def place(x: float, y: float) -> str:
        right = _MARGIN + (x - x0) / (x1 - x0) * (_WIDTH - _MARGIN - 12)
        return f"{right:.1f},{_HEIGHT - 28 - (y - y0) / (y1 - y0) * (_HEIGHT - 46):.1f}"

    colors = ("#9dbbd8", "#1f5d9b") if len(series) > 1 else ("#1f5d9b",)
    lines = []
    for i, (name, points) in enumerate(series.items()):
        path = " ".join(place(x, y) for x, y in points)
        if len(points) == 1:
            x, y = path.split(",")
            lines.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colors[i]}"/>')
        lines.append(f'<polyline fill="none" stroke="{colors[i]}" stroke-width="1.5" points="{path}"/>')
        lines.append(f'<text x="{_WIDTH - 120}" y="{14 + 14 * i}" style="fill:{colors[i]}">{html.escape(name)}</text>')
    return (
        f'<figure><svg width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-label="{html.escape(title)}">'
        f'<rect x="{_MARGIN}" y="18" width="{_WIDTH - _MARGIN - 12}" height="{_HEIGHT - 46}" '
        'fill="none" stroke="#ddd"/>'
        f'<text x="2" y="24">{y1:.4g}</text><text x="2" y="{_HEIGHT - 28}">{y0:.4g}</text>'
        f'<text x="{_MARGIN}" y="{_HEIGHT - 10}">{unit} {x0:g}</text>'
        f'<text x="{_WIDTH - 12}" y="{_HEIGHT - 10}" text-anchor="end">{x1:g}</text>'
        f"{''.join(lines)}</svg><figcaption>{html.escape(title)}</figcaption></figure>"
    )


def _matrix(matrix: torch.Tensor, names: list[str]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    rows = []
    for i, name in enumerate(names):
        whole = max(int(matrix[i].sum()), 1)
        cells = []
        for j, count in enumerate(matrix[i].tolist()):
            color = "44,110,170" if i == j else "200,60,40"
            share = count / whole
            ink = ";color:#fff" if share > 0.5 else ""
            shade = f' style="background:rgba({color},{0.15 + 0.85 * share:.2f}){ink}"' if count else ""
            cells.append(f"<td{shade}>{count or ''}</td>")
        rows.append(f'<tr><th class="name">{html.escape(name)}</th>{"".join(cells)}</tr>')
    return (
        "<p>Rows: what the image is. Columns: what was predicted.</p>"
        f'<table class="matrix"><tr><th></th>{head}</tr>{"".join(rows)}</table>'
    )


def _confused(matrix: torch.Tensor, names: list[str]) -> str:
    off = matrix.clone()
    off.fill_diagonal_(0)
    counts, places = off.flatten().topk(min(40, off.numel()))
    rows = [
        f'<tr><td class="name">{html.escape(names[place // len(names)])}</td>'
        f'<td class="name">{html.escape(names[place % len(names)])}</td><td>{count}</td></tr>'
        for count, place in zip(counts.tolist(), places.tolist())
        if count
    ]
    return (
        f"<p>The pairs that were confused most, of {len(names)} classes.</p>"
        f'<table><tr><th class="name">is</th><th class="name">predicted</th><th>images</th></tr>{"".join(rows)}</table>'
    )


def _classes(result: Evaluation) -> str:
    rows = [
        f'<tr><td class="name">{html.escape(str(entry["class"]))}</td><td>{entry["top1"]:.1f} %</td>'
        f'<td class="bar"><div style="width:{entry["top1"]:.1f}%"></div></td><td>{entry["images"]}</td></tr>'
        for entry in sorted(result.per_class, key=lambda entry: entry["top1"])
    ]
    head = '<tr><th class="name">class</th><th>top-1</th><th></th><th>images</th></tr>'
    return f"<table>{head}{''.join(rows)}</table>"


def _mistakes(
    result: Evaluation, dataset: Dataset, names: list[str], model: nn.Module | None, preprocessing: dict
) -> str:
    wrong = sorted((a for a in result.answers if a[1] != a[2]), key=lambda a: -a[3])[:_MISTAKES]
    shown, text = wrong, f"Wrong and most sure, {len(wrong)} of {sum(a[1] != a[2] for a in result.answers)}."
    if not wrong:
        shown, text = sorted(result.answers, key=lambda a: a[3])[:4], "No image was wrong. The least sure ones:"
    layers = dcnv3_layers(model) if model is not None else {}
    layer = next((name for name in layers if name.startswith("levels.1.")), None)
    if layer:
        text += (
            f" On the right, where the middle output pixel (cross) of {layer} samples: "
            "a colour a group, a size the weight."
        )
    guarded, figures = GuardedDataset(dataset, lambda image: image), []
    for index, target, predicted, sure in shown:
        image = guarded[index][0]
        if image is None:
            continue
        pictures = [_embed(image)]
        if layer:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "points.png"
                draw_points(model, [("", image)], preprocessing, file, layer)
                pictures.append(f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}")
        caption = f"{names[target]}, predicted {names[predicted]} ({100 * sure:.1f} %)"
        file = Path(guarded.name(index)).name
        images = "".join(f'<img alt="" src="{picture}">' for picture in pictures)
        figures.append(
            f'<figure><div class="pair">{images}</div>'
            f"<figcaption>{html.escape(caption)}<br>{html.escape(file)}</figcaption></figure>"
        )
    return f'<p>{html.escape(text)}</p><div class="mistakes">{"".join(figures)}</div>'


def _embed(image: Image.Image) -> str:
    image = image.convert("RGB")
    image.thumbnail((224, 224))
    data = io.BytesIO()
    image.save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
