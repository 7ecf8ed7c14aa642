# SPDX-License-Identifier: MIT
"""Draws the pictures of architecture.md: `python docs/draw.py` writes them to docs/static.

Plain SVG with a background of its own, so that text is readable in light and dark, on the site and elsewhere.
"""

from html import escape
from pathlib import Path

STATIC = Path(__file__).resolve().parent / "static"

_STYLE = """
  text { font: 13px system-ui, 'Segoe UI', Helvetica, Arial, sans-serif; fill: #1f2328; }
  .title { font-weight: 600; }
  .small { font-size: 11.5px; fill: #59636e; }
  .page { fill: #ffffff; }
  .box { fill: #f3f6fa; stroke: #7d8fa3; }
  .ground { fill: #f7f3ea; stroke: #a8946a; }
  .outside { fill: none; stroke: #7d8fa3; stroke-dasharray: 4 3; }
  .arrow { stroke: #59636e; stroke-width: 1.4; fill: none; marker-end: url(#head); }
  .head { fill: #59636e; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; }
    .small { fill: #9aa7b4; }
    .page { fill: #14181d; }
    .box { fill: #1f2730; stroke: #5d7084; }
    .ground { fill: #2a2619; stroke: #84734a; }
    .outside { stroke: #5d7084; }
    .arrow { stroke: #9aa7b4; }
    .head { fill: #9aa7b4; }
  }
"""
_LINE = 16  # height of a line of text
# the widest that a character is on average, in pixels, so that text fits whatever font is there
_WIDTHS = {"title": 7.8, "small": 6.3}


class Picture:
    """An SVG under construction."""

    def __init__(self, width: int, height: int, description: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img" aria-label="{escape(description)}">',
            f"<style>{_STYLE}</style>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
            'orient="auto"><path class="head" d="M0 0 L8 4 L0 8 z"/></marker></defs>',
            f'<rect class="page" width="{width}" height="{height}" rx="8"/>',
        ]

    def box(self, x: int, y: int, width: int, height: int, title: str, *lines: str, kind: str = "box") -> None:
        """A box with a title and lines of text below it, centered.

        Raises:
            ValueError: The text does not fit.
        """
        self.parts.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="6"/>')
        texts = [("title", title), *(("small", line) for line in lines)]
        if len(texts) * _LINE > height:
            raise ValueError(f"{len(texts)} lines do not fit a height of {height}: {title}")
        top = y + (height - len(texts) * _LINE) / 2
        for i, (style, text) in enumerate(texts):
            if len(text) * _WIDTHS[style] > width - 8:
                raise ValueError(f"a width of {width} is too small for '{text}'")
            self.text(x + width / 2, top + _LINE * (i + 1) - 4, text, style, "middle")

    def text(self, x: float, y: float, text: str, style: str = "small", anchor: str = "start") -> None:
        """A line of text; y is its baseline."""
        self.parts.append(f'<text class="{style}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>')

    def arrow(self, *points: tuple[int, int]) -> None:
        """An arrow along straight lines."""
        path = " ".join(f"{'L' if i else 'M'}{x} {y}" for i, (x, y) in enumerate(points))
        self.parts.append(f'<path class="arrow" d="{path}"/>')

    def __str__(self) -> str:
        return "\n".join([*self.parts, "</svg>"]) + "\n"


def packages() -> str:
    """The packages, each above those that it imports."""
    picture = Picture(900, 494, "The packages of internimage; each imports only from packages below it")
    left, width, height = 20, 620, 46

    picture.box(left, 20, width, height, "cli", "arguments, messages, exit status: one file per verb")
    picture.box(20, 88, 292, height, "tasks/classification", "loss, metrics, report, files of the result")
    picture.box(20, 156, 128, height, "data", "images, datasets")
    picture.box(184, 156, 128, height, "engine", "steps, checkpoints")
    picture.arrow((184, 179), (150, 179))
    for x, title, *lines in ((328, "analysis", "where layers", "sample"), (544, "convert", "folders for", "the Hub")):
        picture.box(x, 88, 96, 114, title, *lines)
        picture.arrow((x + 48, 66), (x + 48, 86))
        picture.arrow((x + 48, 202), (x + 48, 222))
    picture.box(436, 88, 96, height, "benchmark", "times, memory")
    picture.box(436, 156, 96, height, "export", "ONNX, .pt2")
    for y in (66, 134, 202):
        picture.arrow((484, y), (484, y + 20))
    picture.arrow((312, 111), (327, 111))
    picture.arrow((166, 66), (166, 86))
    picture.arrow((84, 134), (84, 154))
    picture.arrow((248, 134), (248, 154))
    picture.arrow((248, 202), (248, 222))
    picture.box(left, 224, width, height, "models", "InternImage, registered with timm")
    picture.box(20, 292, 292, height, "weights", "from a name or a file to tensors, checked")
    picture.box(328, 292, 312, height, "layers", "DCNv3 with its projections, norms, MLP")
    picture.box(left, 360, width, height, "ops", "schemas, derivatives, the plain-torch reference")
    picture.box(left, 428, width, height, "csrc", "CPU kernels (SIMD) and CUDA kernels, stable ABI")
    for x, y in ((166, 270), (484, 270), (484, 338), (484, 406)):
        picture.arrow((x, y), (x, y + 20))
    ground = "errors; files, atomic, locks; config, values; dtypes, strict_json; terminal, progress; extension"
    picture.box(690, 20, 190, 454, "ground floor", *ground.split("; "), kind="ground")
    for y in (43, 145, 247, 315, 383):
        picture.arrow((left + width, y), (688, y))
    return str(picture)


def ways() -> str:
    """The ways of an image, of weights and of a config."""
    picture = Picture(900, 458, "How an image, weights and a configuration pass through the packages")
    width, height, gap = 156, 62, 20

    def lane(y: int, title: str, rows: list[list[tuple[str, ...]]]) -> None:
        picture.text(20, y, title, "title")
        for r, boxes in enumerate(rows):
            top = y + 12 + r * (height + 22)
            for i, box in enumerate(boxes):
                x = 20 + i * (width + gap)
                kind = "outside" if box[0] in _OUTSIDE else "box"
                picture.box(x, top, width, height, *box, kind=kind)
                if i:
                    picture.arrow((x - gap + 1, top + height // 2), (x - 2, top + height // 2))
            if r:  # from the end of the row above to the beginning of this one
                end = 20 + (len(rows[r - 1]) - 1) * (width + gap) + width // 2
                middle = top - 11
                start = 20 + width // 2
                picture.arrow((end, top - 22), (end, middle), (start, middle), (start, top - 2))

    lane(
        30,
        "An image: internimage predict",
        [
            [
                ("photo.jpg",),
                ("data", "decoded, bounded;", "timm's transform"),
                ("models", "stem and stages", "of blocks"),
                ("layers.DCNv3", "projections,", "offsets, mask"),
                ("ops.dcnv3", "schema, autograd,", "autocast"),
            ],
            [
                ("csrc or reference", "the dispatcher", "takes the kernel"),
                ("models", "head: logits"),
                ("tasks", "probabilities,", "class names"),
                ("cli.predict", "text or JSON"),
            ],
        ],
    )
    lane(
        240,
        "Weights: create_model(pretrained=True)",
        [
            [
                ("name or file",),
                ("weights.resolve", "Hub, cache,", "checksum"),
                ("weights.readers", "safetensors; pickles", "as data"),
                ("weights.load", "all names and shapes", "before any write"),
                ("models", "meta device, then", "tensor by tensor"),
            ]
        ],
    )
    lane(
        364,
        "A config: internimage finetune",
        [
            [
                ("recipe, key=value",),
                ("config", "typed, checked", "before torch loads"),
                ("tasks", "data, transforms,", "loss, validation"),
                ("engine", "steps, processes,", "checkpoints"),
                ("run folder", "model, config.json,", "log, report"),
            ]
        ],
    )
    return str(picture)


_OUTSIDE = {"photo.jpg", "name or file", "recipe, key=value", "run folder"}

PICTURES = {"packages.svg": packages, "ways.svg": ways}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (STATIC / name).write_text(draw())
