# SPDX-License-Identifier: MIT
"""The part of a page that shows where a layer samples: a picture, and with scripts one for each output pixel."""

import base64
import json
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..html_page import data_uri, escape, png
from .canvas import dimmed, pixels_picture
from .colors import css_gradient, scale
from .drawing import draw_sampling
from .maps import LayerMap
from .study import LayerSampling, Study

MOST_BYTES = 3 << 20  # of the locations of all layers but the first
_NOT_FINITE = -(1 << 15)  # int16 of a location that is not finite
_LIMIT = (1 << 15) - 1

STYLE = """
.sampler .stage{position:relative;max-width:560px;line-height:0}
.sampler .stage img{width:100%;height:auto;image-rendering:pixelated}
.sampler .stage canvas{position:absolute;inset:0;width:100%;height:100%;cursor:crosshair;touch-action:manipulation}
.sampler .stage canvas:focus-visible{outline:3px solid var(--main)}
.sampler .still{max-width:100%;height:auto}
.groups{display:grid;grid-template-columns:repeat(auto-fill,minmax(76px,1fr));gap:6px;max-width:560px;
max-height:22rem;overflow-y:auto}
.groups figure{line-height:1.2}.groups canvas{display:block;width:100%;aspect-ratio:1;background:#000}
.groups figcaption{font-size:.75rem}
.controls{display:flex;flex-wrap:wrap;gap:.5rem 1rem;margin:.5rem 0}
.controls label{display:block}.controls select{font:inherit;max-width:100%;color:inherit;background:var(--box);
border:1px solid var(--rule);border-radius:4px;padding:.15rem .3rem}
"""

# Data of a layer: `locations` int16 in 1/unit pixels, (rows, columns, groups, points, 2), and `weights` uint8 as shares
# of the largest. A drawing is of one output pixel, so it takes no time whatever the size of the layer.
SCRIPT = """
'use strict';
for (const box of document.querySelectorAll('.sampler')) {
  const data = JSON.parse(box.querySelector('script').textContent), find = s => box.querySelector(s);
  const image = find('.stage img'), canvas = find('.stage canvas'), groups = find('.groups');
  const layers = find('.layer'), choice = find('.group'), status = find('.status');
  const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer;
  const paint = share => data.scale[Math.round(share * (data.scale.length - 1))];
  let layer, column, row, columns, rows; // columns and rows: of the layer before
  const choose = () => {
    layer = data.layers[layers.selectedIndex];
    layer.places ??= new Int16Array(bytes(layer.locations));
    layer.shares ??= new Uint8Array(bytes(layer.weights));
    const before = column === undefined ? data.at : [(column + .5) / columns, (row + .5) / rows];
    columns = layer.columns; rows = layer.rows;
    move(before[0], before[1]);
    choice.replaceChildren(new Option('all groups'),
      ...Array.from({length: layer.groups}, (_, i) => new Option('group ' + (i + 1))));
    groups.replaceChildren(...Array.from({length: layer.groups}, (_, i) => {
      const figure = document.createElement('figure'), caption = document.createElement('figcaption');
      caption.textContent = 'group ' + (i + 1);
      figure.append(document.createElement('canvas'), caption);
      return figure;
    }));
  };
  const clamp = (value, most) => Math.min(Math.max(value, 0), most - 1);
  const move = (x, y) => {
    column = clamp(Math.floor(x * layer.columns), layer.columns);
    row = clamp(Math.floor(y * layer.rows), layer.rows);
  };
  const points = group => {
    const found = [];
    for (let i = 0; i < layer.points; i++) {
      const at = ((row * layer.columns + column) * layer.groups + group) * layer.points + i;
      const x = layer.places[2 * at], y = layer.places[2 * at + 1];
      if (x !== data.none && y !== data.none)
        found.push([x / layer.unit + .5, y / layer.unit + .5, layer.shares[at] / 255]);
    }
    return found.sort((a, b) => a[2] - b[2]);
  };
  const dot = (pen, x, y, radius, color) => {
    pen.beginPath(); pen.arc(x, y, radius, 0, 2 * Math.PI);
    pen.fillStyle = color; pen.fill(); pen.strokeStyle = '#fff'; pen.stroke();
  };
  const cross = (pen, x, y, arm) => {
    for (const [color, width] of [['#000', 4], ['#fff', 1.5]]) {
      pen.strokeStyle = color; pen.lineWidth = width; pen.beginPath();
      pen.moveTo(x - arm, y); pen.lineTo(x + arm, y); pen.moveTo(x, y - arm); pen.lineTo(x, y + arm); pen.stroke();
    }
    pen.lineWidth = 1;
  };
  const prepare = (target, side) => {
    const ratio = devicePixelRatio || 1;
    target.width = Math.round(side[0] * ratio); target.height = Math.round(side[1] * ratio);
    const pen = target.getContext('2d');
    pen.scale(ratio, ratio); pen.imageSmoothingEnabled = false;
    return pen;
  };
  const draw = () => {
    const width = canvas.clientWidth, height = canvas.clientHeight;
    if (!width) return;
    const pen = prepare(canvas, [width, height]), zoom = width / data.width;
    const each = Array.from({length: layer.groups}, (_, i) => points(i));
    const only = choice.selectedIndex - 1;
    const shown = each.filter((_, i) => only < 0 || i === only).flat().sort((a, b) => a[2] - b[2]);
    for (const [x, y, share] of shown) dot(pen, x * zoom, y * zoom, 2.5 + 3 * share, paint(share));
    const x = (column + .5) * data.width / layer.columns, y = (row + .5) * data.height / layer.rows;
    cross(pen, x * zoom, y * zoom, 8);
    // the panels reach as far as the farthest point of any group, so that they can be compared
    const reach = Math.max(data.width / layer.columns,
      ...each.flat().map(p => Math.max(Math.abs(p[0] - x), Math.abs(p[1] - y)))) * 1.15;
    [...groups.children].forEach((figure, i) => {
      const panel = figure.firstChild, side = panel.clientWidth;
      if (!side) return;
      const pen = prepare(panel, [side, side]), factor = side / (2 * reach);
      pen.drawImage(image, side / 2 - x * factor, side / 2 - y * factor, data.width * factor, data.height * factor);
      for (const [px, py, share] of each[i])
        dot(pen, (px - x) * factor + side / 2, (py - y) * factor + side / 2, 1.5 + 2 * share, paint(share));
      cross(pen, side / 2, side / 2, 4);
    });
    status.textContent = `${layer.name}, column ${column}, row ${row} (pixel ${Math.round(x - .5)},` +
      `${Math.round(y - .5)}): ${layer.groups} groups of ${layer.points} points, ${shown.length} shown; ` +
      `a panel is ${(2 * reach).toFixed(0)} pixels wide`;
    find('.most').textContent = layer.most.toPrecision(3);
  };
  const follow = event => {
    const area = canvas.getBoundingClientRect();
    move((event.clientX - area.left) / area.width, (event.clientY - area.top) / area.height);
    draw();
  };
  canvas.addEventListener('pointermove', follow);
  canvas.addEventListener('pointerdown', follow);
  canvas.addEventListener('keydown', event => {
    const step = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
    if (!step) return;
    event.preventDefault();
    column = clamp(column + step[0], layer.columns); row = clamp(row + step[1], layer.rows);
    draw();
  });
  layers.addEventListener('change', () => { choose(); draw(); });
  choice.addEventListener('change', draw);
  addEventListener('resize', draw);
  find('.still').hidden = true; find('.live').hidden = false;
  choose();
  image.decode().then(draw, draw);
}
"""


def sampler(found: Study, at: tuple[float, float] | None) -> str:
    """The HTML of a model's layers.

    Args:
        found: With sampling.
        at: The pixel (x, y) whose output pixel is shown first; None for the middle.
    """
    height, width = found.pixels.shape[1:]
    x, y = ((width - 1) / 2, (height - 1) / 2) if at is None else at
    share = (x + 0.5) / width, (y + 0.5) / height
    layers = _kept(found.sampling)
    first = layers[0]
    rows, columns, groups, _ = first.weights.shape
    there = LayerMap(first.layer, groups, rows, columns, height, width)
    column, row = there.from_image(x, y)
    at = there.to_image(column, row)
    still = draw_sampling(found.pixels, first.locations[row, column], first.weights[row, column], at)
    data = {
        "width": width,
        "height": height,
        "at": share,
        "none": _NOT_FINITE,
        "scale": [f"rgb({r},{g},{b})" for r, g, b in scale()[::4].tolist()],
        "layers": [_layer(layer, max(height, width)) for layer in layers],
    }
    options = "".join(f"<option>{escape(layer.layer)}</option>" for layer in layers)
    left_out = len(found.sampling) - len(layers)
    note = f" ({left_out} more layers would make the page too large; they are in views.npz)" if left_out else ""
    name = escape(found.model)
    return (
        f'<figure class="sampler"><figcaption><b>{name}</b>, {escape(first.layer)}{note}</figcaption>'
        f'<img class="still" alt="where {escape(first.layer)} samples the image" src="{data_uri(png(still))}">'
        '<div class="live" hidden><div class="controls">'
        f'<label>layer <select class="layer">{options}</select></label>'
        '<label>shown <select class="group"></select></label></div>'
        f'<div class="stage"><img alt="" width="{width}" height="{height}" '
        f'src="{data_uri(png(pixels_picture(dimmed(found.pixels))))}">'
        f'<canvas tabindex="0" role="img" aria-label="sampled points of {name}; arrow keys move the output pixel">'
        "</canvas></div>"
        f'<div class="bar" style="background:{css_gradient()}"></div>'
        '<div class="ticks"><span>0</span><span>weight</span><span class="most"></span></div>'
        '<p class="status pale" aria-live="polite"></p><div class="groups"></div></div>'
        f'<script type="application/json">{_safe(json.dumps(data, allow_nan=False))}</script></figure>'
    )


def _safe(text: str) -> str:
    """JSON inside an element of HTML, which a name of a layer must not end."""
    return text.replace("<", "\\u003c")


def _kept(layers: Sequence[LayerSampling]) -> list[LayerSampling]:
    """The first layer, and the others as long as they are not too large together."""
    kept, size = list(layers[:1]), 0
    for layer in layers[1:]:
        size += 2 * layer.locations.numel() + layer.weights.numel()
        if size <= MOST_BYTES:
            kept.append(layer)
    return kept


def _layer(layer: LayerSampling, side: int) -> dict[str, object]:
    """A layer's numbers for the script."""
    rows, columns, groups, points = layer.weights.shape
    unit = 2.0 ** math.floor(math.log2(_LIMIT / (2 * side)))  # locations up to the image's side beyond it
    unit = min(unit, 16.0)
    there = layer.locations.isfinite() & layer.weights.isfinite()[..., None]
    places = (layer.locations.nan_to_num(0, 0, 0) * unit).round().clamp(-_LIMIT, _LIMIT)
    places = torch.where(there, places, torch.full_like(places, _NOT_FINITE))
    weights = layer.weights.nan_to_num(0, 0, 0).abs()
    most = float(weights.max()) if weights.numel() else 0.0
    shares = (weights / most * 255 if most else weights).round()
    return {
        "name": layer.layer,
        "rows": rows,
        "columns": columns,
        "groups": groups,
        "points": points,
        "unit": unit,
        "most": most,
        "locations": _base64(places, np.int16),
        "weights": _base64(shares, np.uint8),
    }


def _base64(values: Tensor, dtype: type) -> str:
    little = np.dtype(dtype).newbyteorder("<")
    return base64.b64encode(values.numpy().astype(little).tobytes()).decode()
