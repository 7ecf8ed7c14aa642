# SPDX-License-Identifier: MIT
"""A finished run as one HTML file: no scripts, nothing fetched, readable in any browser and in twenty years."""

import base64
import html
import io
import math
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

from ... import __version__
from ...analysis.points import point_tiles
from ...config import dump
from ...data.datasets import GuardedDataset
from ...engine.curves import curve
from ...engine.log import read_steps
from ...files import write_text
from ...models.parts import sampling_layers_of_stage
from ...terminal import printable
from .config import FinetuneConfig
from .evaluate import Evaluation

_MOST_IN_MATRIX = 40  # classes; with more, the pairs that are confused most are listed
_MISTAKES = 16
_SIDE = 224  # pixels of a picture's longer side

# Colors are variables, so that a reader's dark mode needs one block. What is wide scrolls in a box of its own: the page
# itself is never wider than the screen.
_STYLE = """
:root{color-scheme:light dark;--page:#fff;--ink:#1a1d21;--pale:#5b636d;--rule:#dde1e6;--box:#f4f6f8;
--main:#1f5d9b;--faint:#9dbbd8;--other:#c2571a;--right:44,110,170;--wrong:196,60,40}
@media (prefers-color-scheme:dark){:root{--page:#15181c;--ink:#e4e7eb;--pale:#a3acb7;--rule:#363c44;--box:#1f242a;
--main:#6cabe8;--faint:#41618a;--other:#f0a068;--right:50,112,172;--wrong:196,68,50}}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;max-width:1120px;margin:2rem auto;padding:0 1rem;color:var(--ink);
background:var(--page);overflow-wrap:anywhere;-webkit-text-size-adjust:100%}
h1{font-size:1.5rem;line-height:1.25;margin:0 0 1rem}
h2{font-size:1.2rem;margin:2.5rem 0 1rem;padding-bottom:.25rem;border-bottom:1px solid var(--rule)}
p{margin:.5rem 0 1rem}.big{display:block;font-size:2.4rem;font-weight:600;line-height:1.2}.pale{color:var(--pale)}
figure{margin:0}figcaption{font-size:.9rem}
.curves{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:1.5rem}
.curves svg{display:block;width:100%;height:auto}
.curves figcaption{display:flex;flex-wrap:wrap;gap:0 1rem;font-weight:600}.curves .key{font-weight:400}
.key::before{content:"";display:inline-block;width:1.2em;height:3px;margin-right:.4em;vertical-align:middle;
background:currentColor}
svg text{font:13px system-ui,sans-serif;fill:var(--pale)}.frame,.grid{stroke:var(--rule);fill:none}
.line{fill:none;stroke-width:1.6;stroke-linejoin:round}.dot{stroke:none}
.s-main{stroke:var(--main)}.s-faint{stroke:var(--faint)}.s-other{stroke:var(--other)}
.f-main{fill:var(--main)}.f-faint{fill:var(--faint)}.f-other{fill:var(--other)}
.k-main::before{background:var(--main)}.k-faint::before{background:var(--faint)}.k-other::before{background:var(--other)}
.scroll{overflow-x:auto;overflow-wrap:normal}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
td,th{padding:.2rem .5rem;text-align:right;white-space:nowrap}th{font-weight:600}
th.name,td.name{text-align:left}td.name{white-space:normal;min-width:6rem}
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
pre{background:var(--box);padding:.8rem 1rem;overflow-x:auto;overflow-wrap:normal;font-size:.85rem;border-radius:6px}
footer{margin:2.5rem 0 1rem;color:var(--pale);font-size:.9rem}
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
    settings = "\n".join(map(_text, dump(config).splitlines()))
    parts = [
        f"<h1>{_text(config.model)}, fine-tuned on {len(names)} classes</h1>",
        _summary(result, names),
        _skipped(result),
        '<h2 id="curves">Curves</h2><div class="curves">',
        *_curves(read_steps(path.parent), epochs),
        "</div>",
        '<h2 id="confusion">Confusion</h2>',
        _matrix(matrix, names) if len(names) <= _MOST_IN_MATRIX else _confused(matrix, names),
        '<h2 id="classes">Accuracy of each class</h2>',
        _classes(result),
        '<h2 id="mistakes">The worst mistakes</h2>',
        _mistakes(result, dataset, names, model, preprocessing),
        f'<h2 id="settings">Settings</h2><pre>{settings}</pre>',
        f"<footer>internimage {__version__}, torch {torch.__version__}</footer>",
    ]
    title = _text(f"{config.model}: {result.top1:.2f} %")
    text = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )
    write_text(path, text)


def _text(text: object) -> str:
    """Names of files and classes for HTML: what is no text or runs backwards is written out, as on a terminal."""
    return html.escape(printable(text))


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
    files = ", ".join(_text(f"{file} ({reason})") for file, reason in result.skipped[:10])
    rest = f" and {len(result.skipped) - 10} more" if len(result.skipped) > 10 else ""
    return f"<p>{len(result.skipped)} images could not be read and do not count: {files}{rest}.</p>"


def _curves(steps: list[dict[str, str]], epochs: list[dict]) -> list[str]:
    losses = [(float(row["step"]), float(row["loss"])) for row in steps]
    rates = [(float(row["step"]), float(row["lr"])) for row in steps]
    accuracy = _column(epochs, "val_top1")
    training, validation = _column(epochs, "train_loss"), _column(epochs, "val_loss")
    return [
        curve("Training loss", "step", "cross entropy, nats",
              [("each step", "faint", losses), ("mean of the last 5 % of the steps", "main", _smooth(losses))]),
        curve("Learning rate", "step", "learning rate", [("", "main", rates)]),
        curve("Validation accuracy", "epoch", "top-1, %", [("", "main", accuracy)], most=100.0)
        if len(accuracy) > 1 else "",  # a curve of one point tells no more than the number at the top
        curve("Loss of each epoch", "epoch", "cross entropy, nats",
              [("training", "main", training), ("validation", "other", validation)]),
    ]  # fmt: skip


def _column(rows: list[dict], name: str) -> list[tuple[float, float]]:
    return [(row["epoch"], row[name]) for row in rows if name in row]


def _smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    width = max(len(points) // 20, 1)
    good = [point for point in points if math.isfinite(point[1])]
    return [
        (good[i][0], sum(y for _, y in good[max(0, i - width + 1) : i + 1]) / min(i + 1, width))
        for i in range(0, len(good), max(1, len(good) // 400))
    ]


def _matrix(matrix: torch.Tensor, names: list[str]) -> str:
    upright = max(map(len, names)) > 4
    head = "".join(
        f'<th class="up"><span>{_text(name)}</span></th>' if upright else f"<th>{_text(name)}</th>" for name in names
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
        rows.append(f'<tr><th class="name">{_text(name)}</th>{"".join(cells)}</tr>')
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
        f'<tr><td class="name">{_text(names[place // len(names)])}</td>'
        f'<td class="name">{_text(names[place % len(names)])}</td><td>{count}</td></tr>'
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
        f'<tr><td class="name">{_text(entry["class"])}</td><td>{entry["top1"]:.1f} %</td>'
        f'<td class="bar"><div style="width:{entry["top1"]:.1f}%"></div></td><td>{entry["images"]}</td></tr>'
        for entry in sorted(result.per_class, key=lambda entry: entry["top1"])
    ]
    head = '<tr><th class="name">class</th><th>top-1</th><th></th><th>images</th></tr>'
    return f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>'


def _mistakes(
    result: Evaluation, dataset: Dataset, names: list[str], model: nn.Module | None, preprocessing: dict
) -> str:
    wrong = sorted((a for a in result.answers if a[1] != a[2]), key=lambda a: -a[3])
    shown = wrong[:_MISTAKES]
    if not wrong:
        shown = sorted(result.answers, key=lambda a: a[3])[:4]
        text = f"No image was wrong. These are the {len(shown)} predictions with the lowest confidence."
    elif len(wrong) > len(shown):
        text = f"These are the {len(shown)} of {len(wrong)} wrong predictions with the highest confidence."
    else:
        text = f"All {len(wrong)} wrong predictions, the highest confidence first."
        text = "The one wrong prediction." if len(wrong) == 1 else text
    guarded = GuardedDataset(dataset, lambda image: image)
    images = [(answer, guarded[answer[0]][0]) for answer in shown]
    images = [(answer, image) for answer, image in images if image is not None]
    layers = sampling_layers_of_stage(model, 2) if model is not None else []
    layer = layers[0] if layers else None
    tiles = []
    if layer is not None and images:
        _, tiles = point_tiles(model, [image for _, image in images], preprocessing, layer)
        text += (
            f" The second picture of each pair shows where the layer {layer} samples the image: the cross is the "
            f"output pixel in the middle, the dots are the points it is computed from. The color of a dot tells its "
            f"group, its size the weight."
        )
    figures = []
    for i, ((index, target, predicted, sure), image) in enumerate(images):
        pictures = [(_embed(image), f"an image of class {names[target]}")]
        pictures += [(_embed(tiles[i]), "the same with sampled points")] if tiles else []
        shots = "".join(f'<img alt="{_text(words)}" src="{picture}">' for picture, words in pictures)
        caption = f"{names[target]}, predicted {names[predicted]} ({100 * sure:.1f} %)"
        file = Path(guarded.name(index)).name
        figures.append(
            f'<figure><div class="pair">{shots}</div><figcaption>{_text(caption)}<br>'
            f'<span class="pale">{_text(file)}</span></figcaption></figure>'
        )
    kind = "" if tiles else ' class="single"'
    return f'<p>{_text(text)}</p><div{kind}><div class="mistakes">{"".join(figures)}</div></div>'


def _embed(image: Image.Image) -> str:
    image = image.convert("RGB")
    if (factor := _SIDE // max(image.size)) > 1:  # small ones in sharp squares; browsers would blur them
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((_SIDE, _SIDE))
    data = io.BytesIO()
    image.save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
