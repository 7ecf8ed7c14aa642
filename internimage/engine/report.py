# SPDX-License-Identifier: MIT
"""A finished run as one HTML file: no scripts, nothing fetched, readable in any browser and in twenty years."""

import html
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..files import write_text
from ..terminal import printable
from .config import RunConfig, dump
from .curves import curve
from .log import read_steps

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
pre{background:var(--box);padding:.8rem 1rem;overflow-x:auto;overflow-wrap:normal;font-size:.85rem;border-radius:6px}
footer{margin:2.5rem 0 1rem;color:var(--pale);font-size:.9rem}
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
    document = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(page.title)}</title><style>{_STYLE}{page.style}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
    write_text(path, document)


def escape(value: object) -> str:
    """Text for HTML. Characters that are not printable or change the direction of text are escaped, as on a terminal:
    names of files and classes come from strangers."""
    return html.escape(printable(value))


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
