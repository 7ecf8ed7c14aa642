# SPDX-License-Identifier: MIT
"""A finished run as one HTML file without scripts, readable in any browser and in twenty years."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..files import write_text
from ..html_page import document, escape
from .config import RunConfig, dump
from .curves import curve
from .log import read_steps

_STYLE = """
.big{display:block;font-size:2.4rem;font-weight:600;line-height:1.2}
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
pre{background:var(--box);padding:.8rem 1rem;overflow-x:auto;overflow-wrap:normal;font-size:.85rem;border-radius:6px}
"""


@dataclass
class Page:
    """What a task shows of a run."""

    title: str  #: of the browser's window
    heading: str  #: of the page
    summary: str  #: HTML below the heading
    curves: list[str] = field(default_factory=list)  #: figures, from `internimage.engine.curves.curve`
    sections: list[tuple[str, str, str]] = field(default_factory=list)  #: anchor, heading, HTML
    style: str = ""  #: CSS for the above


def write_report(path: Path, config: RunConfig, page: Page, epochs: list[dict[str, Any]], loss_unit: str) -> None:
    """Write the report of a run.

    Args:
        path: The HTML file; the table of steps is beside it.
        config: The settings.
        page: What the task shows.
        epochs: The table of epochs.
        loss_unit: For the axes of the losses.
    """
    settings = "\n".join(map(escape, dump(config).splitlines()))
    parts = [
        f"<h1>{escape(page.heading)}</h1>",
        page.summary,
        '<h2 id="curves">Curves</h2><div class="curves">',
        *_curves(read_steps(path.parent), page.curves, epochs, loss_unit),
        "</div>",
        *(f'<h2 id="{anchor}">{escape(heading)}</h2>\n{body}' for anchor, heading, body in page.sections),
        f'<h2 id="settings">Settings</h2><pre>{settings}</pre>',
        f"<footer>internimage {__version__}, torch {torch.__version__}</footer>",
    ]
    write_text(path, document(page.title, "\n".join(parts), _STYLE + page.style))


def column(epochs: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """(epoch, value) of a column of the table of epochs, where it has a value."""
    return [(row["epoch"], row[name]) for row in epochs if name in row]


def _curves(steps: list[dict[str, str]], more: list[str], epochs: list[dict[str, Any]], loss_unit: str) -> list[str]:
    losses = [(float(row["step"]), float(row["loss"])) for row in steps]
    rates = [(float(row["step"]), float(row["lr"])) for row in steps]
    return [
        curve("Training loss", "step", loss_unit,
              [("each step", "faint", losses), ("mean of the last 5 % of the steps", "main", _smooth(losses))]),
        curve("Learning rate", "step", "learning rate", [("", "main", rates)]),
        *more,
        curve("Loss of each epoch", "epoch", loss_unit,
              [("training", "main", column(epochs, "train_loss")),
               ("validation", "other", column(epochs, "val_loss"))]),
    ]  # fmt: skip


def _smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    width = max(len(points) // 20, 1)
    good = [point for point in points if math.isfinite(point[1])]
    return [
        (good[i][0], sum(y for _, y in good[max(0, i - width + 1) : i + 1]) / min(i + 1, width))
        for i in range(0, len(good), max(1, len(good) // 400))
    ]
