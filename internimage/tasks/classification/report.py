# SPDX-License-Identifier: MIT
"""What the report of a classifier shows: accuracy, confusion, and the worst mistakes."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from ...analysis.sheet import point_tiles
from ...data.datasets import GuardedDataset, MapDataset
from ...engine.curves import curve
from ...engine.report import Page, column
from ...html_page import data_uri, escape, png
from ...models.parts import sampling_layers_of_stage
from .evaluate import Evaluation

_MOST_IN_MATRIX = 40  # classes; with more, the pairs that are confused most are listed
_MISTAKES = 16
_SIDE = 224  # pixels of a picture's longer side

_STYLE = """
.matrix td{min-width:2.2rem;text-align:center;border:1px solid var(--rule)}
.matrix th{font-weight:400;color:var(--pale);text-align:center}.matrix th.up{vertical-align:bottom;padding:.4rem .2rem}
.matrix th.up span{writing-mode:vertical-rl;transform:rotate(180deg)}
.matrix th.name{text-align:left;position:sticky;left:0;background:var(--page);
max-width:min(40vw,24rem);overflow:hidden;text-overflow:ellipsis}
.matrix .hit{background:rgba(var(--right),var(--share))}.matrix .miss{background:rgba(var(--wrong),var(--share))}
.matrix .full{color:#fff}
td.bar{width:min(280px,32vw);min-width:6rem;padding:0}.bar div{background:var(--main);height:.8rem;border-radius:2px}
td.bar{background:linear-gradient(var(--box),var(--box)) center/100% .8rem no-repeat}
.mistakes{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,452px),1fr));gap:1.5rem}
.single .mistakes{grid-template-columns:repeat(auto-fill,minmax(min(100%,224px),1fr))}
.pair{display:flex;gap:4px}.pair img{display:block;flex:0 1 224px;min-width:0;max-width:224px;aspect-ratio:1;
object-fit:contain;background:var(--box)}
"""


def report_page(
    model_name: str,
    result: Evaluation,
    dataset: MapDataset,
    names: list[str],
    epochs: list[dict[str, Any]],
    model: nn.Module | None,
    data_config: dict[str, Any],
) -> Page:
    """The page of a run.

    Args:
        model_name: For the title.
        result: From `evaluate(..., keep_predictions=True)` on the validation split.
        dataset: The validation split.
        names: The classes.
        epochs: The table of epochs.
        model: To draw its sampling points over the images; None draws none.
        data_config: timm's data_config.
    """
    matrix = torch.zeros(len(names), len(names), dtype=torch.long)
    for _, target, predicted, _ in result.predictions:
        matrix[target, predicted] += 1
    accuracy = column(epochs, "val_top1")
    confusion = _matrix(matrix, names) if len(names) <= _MOST_IN_MATRIX else _confused(matrix, names)
    return Page(
        title=f"{model_name}: {result.top1:.2f} %",
        heading=f"{model_name}, fine-tuned on {len(names)} classes",
        summary=_summary(result, names) + _skipped(result),
        curves=[  # a curve of one point shows no more than the number at the top
            curve("Validation accuracy", "epoch", "top-1, %", [("", "main", accuracy)], most=100.0)
        ]
        * (len(accuracy) > 1),
        sections=[
            ("confusion", "Confusion", confusion),
            ("classes", "Accuracy of each class", _classes(result)),
            ("mistakes", "The worst mistakes", _mistakes(result, dataset, names, model, data_config)),
        ],
        style=_STYLE,
    )


def _summary(result: Evaluation, names: list[str]) -> str:
    more = [f"top-5 {result.top5:.2f} %"] if len(names) > 5 else []  # of five classes all are among the first five
    more.append(f"loss {result.loss:.4f}")
    return (
        f'<p><span class="big">{result.top1:.2f} %</span> top-1 on {result.images} validation images'
        f'<br><span class="pale">{", ".join(more)}</span></p>'
    )


def _skipped(result: Evaluation) -> str:
    if not result.skipped:
        return ""
    files = ", ".join(escape(f"{file} ({reason})") for file, reason in result.skipped[:10])
    rest = f" and {len(result.skipped) - 10} more" if len(result.skipped) > 10 else ""
    return f"<p>{len(result.skipped)} images could not be read and do not count: {files}{rest}.</p>"


def _matrix(matrix: torch.Tensor, names: list[str]) -> str:
    upright = max(map(len, names)) > 4
    head = "".join(
        f'<th class="up"><span>{escape(name)}</span></th>' if upright else f"<th>{escape(name)}</th>" for name in names
    )
    rows = []
    for i, name in enumerate(names):
        whole = max(int(matrix[i].sum()), 1)
        cells = []
        for j, count in enumerate(matrix[i].tolist()):
            share = count / whole
            full = share > 0.7  # on a shade between these neither black nor white letters would stand out
            kind = ("hit" if i == j else "miss") + (" full" if full else "")
            shade = 0.93 + 0.07 * share if full else 0.15 + 0.85 * share
            cells.append(f'<td class="{kind}" style="--share:{shade:.2f}">{count}</td>' if count else
                         "<td></td>")  # fmt: skip
        rows.append(f'<tr><th class="name">{escape(name)}</th>{"".join(cells)}</tr>')
    return (
        "<p>A row for each true class, a column for each predicted class, in numbers of images. Blue is right, red is "
        "wrong; the color is the stronger, the larger the share of the row.</p>"
        f'<div class="scroll"><table class="matrix"><tr><th class="name"></th>{head}</tr>{"".join(rows)}</table></div>'
    )


def _confused(matrix: torch.Tensor, names: list[str]) -> str:
    off = matrix.clone()
    off.fill_diagonal_(0)
    counts, places = off.flatten().topk(min(40, off.numel()))
    rows = [
        f'<tr><td class="name">{escape(names[place // len(names)])}</td>'
        f'<td class="name">{escape(names[place % len(names)])}</td><td>{count}</td></tr>'
        for count, place in zip(counts.tolist(), places.tolist())
        if count
    ]
    if not rows:
        return "<p>No image was wrong.</p>"
    return (
        f"<p>The pairs that were confused most often, of {len(names)} classes.</p>"
        '<div class="scroll"><table><tr><th class="name">true class</th><th class="name">predicted class</th>'
        f"<th>images</th></tr>{''.join(rows)}</table></div>"
    )


def _classes(result: Evaluation) -> str:
    rows = [
        f'<tr><td class="name">{escape(entry["class"])}</td><td>{entry["top1"]:.1f} %</td>'
        f'<td class="bar"><div style="width:{entry["top1"]:.1f}%"></div></td><td>{entry["images"]}</td></tr>'
        for entry in sorted(result.per_class, key=lambda entry: entry["top1"])
    ]
    head = '<tr><th class="name">class</th><th>top-1</th><th></th><th>images</th></tr>'
    return f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>'


def _mistakes(
    result: Evaluation, dataset: MapDataset, names: list[str], model: nn.Module | None, data_config: dict[str, Any]
) -> str:
    wrong = sorted((a for a in result.predictions if a[1] != a[2]), key=lambda a: -a[3])
    shown = wrong[:_MISTAKES]
    if not wrong:
        shown = sorted(result.predictions, key=lambda a: a[3])[:4]
        intro = f"No image was wrong. These are the {len(shown)} predictions with the lowest confidence."
    elif len(wrong) > len(shown):
        intro = f"These are the {len(shown)} of {len(wrong)} wrong predictions with the highest confidence."
    else:
        intro = f"All {len(wrong)} wrong predictions, the highest confidence first."
        intro = "The one wrong prediction." if len(wrong) == 1 else intro
    guarded = GuardedDataset(dataset, lambda image: image)
    images = [(answer, image) for answer in shown if (image := guarded[answer[0]][0]) is not None]
    layers = sampling_layers_of_stage(model, 2) if model is not None else []
    layer = layers[0] if layers else None
    tiles: list[Image.Image] = []
    if model is not None and layers and images:
        _, tiles = point_tiles(model, [image for _, image in images], data_config, layer)
        intro += (
            f" The second picture of each pair shows where the layer {layer} samples the image: the cross is the "
            f"output pixel in the middle, the dots are the points it is computed from: the larger and "
            f"brighter, the larger the weight."
        )
    figures = []
    for i, ((index, target, predicted, sure), image) in enumerate(images):
        pictures = [(_embed(image), f"an image of class {names[target]}")]
        pictures += [(_embed(tiles[i]), "the same with sampled points")] if tiles else []
        shots = "".join(f'<img alt="{escape(words)}" src="{picture}">' for picture, words in pictures)
        caption = f"{names[target]}, predicted {names[predicted]} ({100 * sure:.1f} %)"
        file = Path(guarded.name(index)).name
        figures.append(
            f'<figure><div class="pair">{shots}</div><figcaption>{escape(caption)}<br>'
            f'<span class="pale">{escape(file)}</span></figcaption></figure>'
        )
    kind = "" if tiles else ' class="single"'
    return f'<p>{escape(intro)}</p><div{kind}><div class="mistakes">{"".join(figures)}</div></div>'


def _embed(image: Image.Image) -> str:
    image = image.convert("RGB")
    if (factor := _SIDE // max(image.size)) > 1:  # small ones in sharp squares; browsers would blur them
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((_SIDE, _SIDE))
    return data_uri(png(image))
