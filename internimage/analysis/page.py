# SPDX-License-Identifier: MIT
"""The page of an analysis: models side by side, one file, readable without scripts; and its pictures as files."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from PIL import Image

from .. import __version__
from ..html_page import data_uri, document, escape, png
from .canvas import Canvas
from .colors import css_gradient
from .drawing import draw_effective_points, draw_receptive_field, draw_region, strongest
from .folder import GENERATOR
from .results import of_each_resolution, points_with_half
from .sampler import SCRIPT, sampler
from .sampler import STYLE as SAMPLER_STYLE
from .study import NodeViews, Study

_STYLE = """
h3{font-size:1rem;margin:1.75rem 0 .25rem}
.side{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,320px),1fr));gap:1.5rem;margin:1rem 0}
.side figure>img,.many img{display:block;width:100%;max-width:448px;height:auto;background:#000}
.many{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,200px),1fr));gap:.75rem}
figcaption p{margin:.35rem 0}
.bar{max-width:448px;height:.8rem;margin-top:.35rem;border:1px solid var(--rule)}
.ticks{display:grid;grid-template-columns:1fr auto 1fr;gap:.5rem;max-width:448px;font-size:.8rem}
.ticks :last-child{text-align:right}
details{margin:.5rem 0}summary{cursor:pointer}
"""


@dataclass(frozen=True)
class _View:
    """How a view is explained."""

    title: str
    meaning: str
    limits: str


_VIEWS = {
    "erf": _View(
        "Effective receptive field",
        "How much each pixel matters to the node: the length of the node's derivative with respect to the color of the "
        "pixel. The inner square, around the node or the image's middle, holds 50 % of the energy (the squared "
        "lengths), the outer one 99 %.",
        "It says what a small change of one pixel does, not what a region contributes. A model without training has a "
        "receptive field too.",
    ),
    "points": _View(
        "Effective sampling points",
        "Where the layers before the node sample the image, and how much the node changes when a point moves by a "
        "pixel. One picture for each resolution, of the last layer there.",
        "Strength is large where the layer's input changes: edges have it in a model without training too. Compare "
        "with one before you conclude.",
    ),
    "saliency": _View(
        "Saliency region",
        "A small region that gives the node its value: with everything else replaced, the error stays within the "
        "bound. The second picture is what the model saw then, and what the error was measured on.",
        "It is one small region of many, and what replaces the rest decides much of it. It says nothing about other "
        "images, and models without training have convincing ones too.",
    ),
}


def pictures(studies: Sequence[Study]) -> dict[str, bytes]:
    """The pictures of an analysis as PNG files, by name. Models and nodes are counted from 1."""
    found: dict[str, bytes] = {}
    for i, one in enumerate(studies, 1):
        found[f"image-model{i}.png"] = png(_marked(one))
        for j, node in enumerate(one.nodes, 1):
            end = f"model{i}-node{j}"
            if node.field is not None:
                found[f"erf-{end}.png"] = png(draw_receptive_field(one.pixels, node.field, node.center))
            for layer in of_each_resolution(node.points) if node.points is not None else ():
                found[f"points-{end}-{layer.layer}.png"] = png(draw_effective_points(one.pixels, layer, node.center))
            if node.region is not None and node.masked is not None:
                found[f"saliency-{end}.png"] = png(draw_region(one.pixels, node.region))
                found[f"masked-{end}.png"] = png(Canvas(node.masked).picture())
    return found


def _marked(one: Study) -> Image.Image:
    """The image with a cross at each node."""
    canvas = Canvas(one.pixels)
    for node in one.nodes:
        if node.center is not None:
            canvas.cross(*node.center)
    return canvas.picture()


def page(image: str, studies: Sequence[Study], notes: Sequence[str], shown: dict[str, bytes]) -> str:
    """The HTML of an analysis.

    Args:
        image: Name of the image.
        studies: Of each model, with the same number of nodes.
        notes: What the reader should know, such as where the image was cropped.
        shown: Its pictures.
    """
    names = " and ".join(one.model for one in studies)
    parts = [
        f"<h1>{escape(image)}, seen by {escape(names)}</h1>",
        *(f'<p class="pale">{escape(note)}</p>' for note in notes),
        _side(
            _figure(shown[f"image-model{i}.png"], "the image", f"<b>{escape(one.model)}</b>: {_size(one)}")
            for i, one in enumerate(studies, 1)
        ),
    ]
    if any(one.sampling for one in studies):
        parts += [_sampling(studies)]
    for j in range(len(studies[0].nodes)):
        texts = dict.fromkeys(one.nodes[j].node for one in studies)
        parts.append(f'<h2 id="node{j + 1}">Node {j + 1}: {escape(" / ".join(texts))}</h2>')
        for view, draw in (("erf", _field), ("points", _points), ("saliency", _region)):
            if any(_has(one.nodes[j], view) for one in studies):
                parts.append(_explained(_VIEWS[view]))
                parts.append(_side(draw(one, i, j, shown) for i, one in enumerate(studies, 1)))
    parts.append(f"<footer>internimage {__version__}; the arrays are in views.npz</footer>")
    script = SCRIPT if any(one.sampling for one in studies) else ""
    return document(f"{image}: {names}", "\n".join(parts), _STYLE + SAMPLER_STYLE, script, GENERATOR)


def _has(node: NodeViews, view: str) -> bool:
    return {"erf": node.field, "points": node.points, "saliency": node.region}[view] is not None


def _size(one: Study) -> str:
    height, width = one.pixels.shape[1:]
    return f"{width} x {height} pixels; a cross marks each node"


def _side(figures: Iterable[str]) -> str:
    """Figures side by side; one above the other on a phone."""
    return f'<div class="side">{"".join(figures)}</div>'


def _figure(picture: bytes, words: str, caption: str) -> str:
    return f'<figure><img alt="{escape(words)}" src="{data_uri(picture)}"><figcaption>{caption}</figcaption></figure>'


def _explained(view: _View) -> str:
    return f"<h3>{view.title}</h3><p>{view.meaning} <i>What it does not mean:</i> {view.limits}</p>"


def _legend(end: str) -> str:
    """The logarithmic scale, with what is at its end."""
    return (
        f'<div class="bar" style="background:{css_gradient()}"></div>'
        f'<div class="ticks"><span>1 % and less</span><span>10 %</span><span>{end}</span></div>'
    )


def _sampling(studies: Sequence[Study]) -> str:
    """The part with the layers' own sampling."""
    figures = [
        sampler(one, next((node.center for node in one.nodes if node.center is not None), None))
        for one in studies
        if one.sampling
    ]
    return (
        '<h2 id="sampling">Where a layer samples</h2><p>Each output pixel of a deformable layer is a sum of samples of '
        "its input, group by group: a dot is a sample, the larger and the brighter, the larger its weight; the cross "
        "is the output pixel. With scripts, move over the image, or focus it and use the arrow keys. <i>What it does "
        "not mean:</i> a layer that looks at a place need not pass on what is there; effective points say that. "
        f"Points outside the image read zeros.</p>{_side(figures)}"
    )


def _absent(one: Study) -> str:
    return f"<figure><figcaption><b>{escape(one.model)}</b> does not have this view.</figcaption></figure>"


def _field(one: Study, i: int, j: int, shown: dict[str, bytes]) -> str:
    node = one.nodes[j]
    if node.field is None:
        return _absent(one)
    field = node.field
    how = "exact" if field.projections is None else f"estimated by {field.projections} random projections"
    caption = (
        _legend(f"{float(field.sensitivity.max()):.3g} per unit of the preprocessed image")
        + f"<p><b>{escape(one.model)}</b>, {escape(node.node)}: 50 % of the energy in a square of "
        f"{field.square_side(0.5):.0f} pixels, 99 % in one of {field.square_side(0.99):.0f}; {how}.</p>"
    )
    return _figure(shown[f"erf-model{i}-node{j + 1}.png"], "the receptive field over the image", caption)


def _points(one: Study, i: int, j: int, shown: dict[str, bytes]) -> str:
    node = one.nodes[j]
    if node.points is None:
        return _absent(one)
    figures = []
    for layer in of_each_resolution(node.points):
        drawn, height, width = len(strongest(layer)), *layer.strength.shape[:2]
        caption = (
            f"{escape(layer.layer)}{'' if layer.deformable else ' (plain convolution)'}, {width} x {height} output "
            f"pixels: {points_with_half(layer)} of {layer.strength.numel()} points have half of the strength; {drawn} "
            f"are drawn. The scale ends at {float(layer.strength.max()):.3g} per pixel."
        )
        name = f"points-model{i}-node{j + 1}-{layer.layer}.png"
        figures.append(_figure(shown[name], f"points of {layer.layer} over the image", caption))
    rows = "".join(
        f'<tr><td class="name">{escape(layer.layer)}</td><td>{layer.strength.numel()}</td>'
        f"<td>{points_with_half(layer)}</td><td>{float(layer.strength.max()):.3g}</td></tr>"
        for layer in node.points.layers
    )
    how = node.points.projections
    words = "exact" if how is None else f"estimated by {how} random projection{'s' * (how > 1)}"
    return (
        f'<figure><div class="many">{"".join(figures)}</div><figcaption>'
        + _legend("the layer's largest")
        + f"<p><b>{escape(one.model)}</b>, {escape(node.node)}; strengths are {words}.</p></figcaption>"
        f"<details><summary>All {len(node.points.layers)} layers</summary>"
        '<div class="scroll"><table><tr><th class="name">layer</th><th>points</th><th>with half of the strength</th>'
        f"<th>largest strength, per pixel</th></tr>{rows}</table></div></details></figure>"
    )


def _region(one: Study, i: int, j: int, shown: dict[str, bytes]) -> str:
    node = one.nodes[j]
    if node.region is None:
        return _absent(one)
    figures = [
        _figure(shown[f"{kind}-model{i}-node{j + 1}.png"], words, words)
        for kind, words in (("saliency", "the region"), ("masked", "what the model saw"))
    ]
    region = node.region
    return (
        f'<figure><div class="many">{"".join(figures)}</div><figcaption><p><b>{escape(one.model)}</b>, '
        f"{escape(node.node)}: {escape(region.text)}. Masked by {escape(region.fill)}; {region.evaluations} images "
        "evaluated.</p></figcaption></figure>"
    )
