# SPDX-License-Identifier: MIT
"""The page of an analysis, opened in a real browser, and its pictures."""

import base64
import dataclasses
import io
import re
from functools import partial

import numpy as np
import pytest
import torch
import views
from browser import browse, console, in_a_window, measured, needs_browser
from PIL import Image

from internimage.analysis import Logit, Position
from internimage.analysis.canvas import to_pixels
from internimage.analysis.colors import rgb
from internimage.analysis.page import page, pictures
from internimage.analysis.sampler import MOST_BYTES, _kept, _layer
from internimage.analysis.study import VIEWS, LayerSampling, Settings, study

NAME = "a <b> & c"
SHOWN = partial(to_pixels, mean=(0.5,) * 3, std=(0.25,) * 3)


@pytest.fixture(scope="module")
def studies():
    settings = Settings(projections=2, cell=8, bound=0.02, budget=60)
    nodes = [Logit(1), Position(3, 1, 0)]
    image = views.image(32, 48)
    deformable = study(views.model("internimage_atto"), NAME, image, SHOWN, nodes, VIEWS, settings)
    plain = study(views.model("resnet10t"), "plain", image, SHOWN, nodes, ("erf", "saliency"), settings)
    return [deformable, plain]


@pytest.fixture(scope="module")
def text(studies):
    return page("my <image>.png", studies, ["a note with <angles>"], pictures(studies))


def test_the_pictures_are_pngs_named_by_model_node_and_layer(studies):
    shown = pictures(studies)
    layers = [f"levels.{i}.blocks.{j}.dcn" for i, j in ((0, 0), (1, 0), (2, 2))]
    points = {f"points-model1-node{j}-{layer}.png" for j in (1, 2) for layer in layers}
    points |= {"points-model1-node1-levels.3.blocks.0.dcn.png"}  # after the map of stage 3
    views_ = {f"{view}-model{i}-node{j}.png" for view in ("erf", "saliency", "masked") for i in (1, 2) for j in (1, 2)}
    assert set(shown) == {"image-model1.png", "image-model2.png"} | views_ | points
    for data in shown.values():
        with Image.open(io.BytesIO(data)) as image:
            assert image.format == "PNG" and image.size == (448, 299)


def test_the_page_holds_everything_and_escapes_names(text):
    sources = re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\')\s>]+)', text)
    assert len(sources) > 20 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'" in text
    assert "<b> & c" not in text and "<image>" not in text and "<angles>" not in text
    assert "<h1>my &lt;image&gt;.png, seen by a &lt;b&gt; &amp; c and plain</h1>" in text
    assert "<b>plain</b> does not have this view." in text
    assert text.count("What it does not mean:") == 1 + 2 * 3
    assert "views.npz" in text and "http" not in text.replace("http-equiv", "")


def test_a_page_without_deformable_layers_has_no_script(studies):
    alone = page("image.png", studies[1:], [], pictures(studies[1:]))
    assert "<script" not in alone and "script-src" not in alone and "Where a layer samples" not in alone


# what a reader does, and what the page then shows
_USE = """<script>addEventListener('load', () => setTimeout(() => {
  const all = s => [...document.querySelectorAll(s)], one = s => document.querySelector(s);
  const canvas = one('.stage canvas'), area = canvas.getBoundingClientRect(), status = () => one('.status').textContent;
  const blank = c => !c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(v => v);
  const at = (x, y) => { const f = canvas.width / area.width;
    return [...canvas.getContext('2d').getImageData(x * f, y * f, 1, 1).data] };
  const result = {first: status(), live: one('.live').hidden, still: one('.still').hidden};
  result.images = all('img').filter(e => !e.closest('[hidden]')).map(
    e => [e.complete, e.naturalWidth, e.getBoundingClientRect().width]);
  const hover = (x, y) => canvas.dispatchEvent(new PointerEvent('pointermove',
    {clientX: area.left + x * area.width, clientY: area.top + y * area.height}));
  hover(HOVER);
  result.hovered = status();
  result.drawn = !blank(canvas);
  result.panels = all('.groups canvas').map(c => !blank(c));
  const select = one('.group');
  select.selectedIndex = 3; select.dispatchEvent(new Event('change'));
  result.group = status();
  result.colors = POINTS.map(p => at(p[0] * area.width, p[1] * area.height));
  canvas.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowLeft'}));
  result.key = status();
  hover(0.999, 0.999);
  for (let i = 0; i < 9; i++) canvas.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowDown'}));
  result.corner = status();
  const layers = one('.layer');
  result.layers = [...layers.options].map(o => o.text);
  layers.selectedIndex = 1; layers.dispatchEvent(new Event('change'));
  result.layer = status();
  result.wide = document.documentElement.scrollWidth;
  result.headings = all('h2').map(e => e.textContent);
  document.body.innerHTML = '<pre id="measured">' +
    JSON.stringify(result).replaceAll('&', '&amp;').replaceAll('<', '&lt;') + '</pre>';
}, 500))</script></body>"""


@needs_browser
def test_the_page_in_a_browser(studies, text, tmp_path):
    """Pictures are drawn, the pointer and the keys show another output pixel at once, nothing is logged or loaded."""
    first = studies[0].sampling[0]  # of 2 x 3 output pixels
    assert first.locations.shape[:2] == (2, 3)
    row, column, group = 1, 2, 2  # the last group
    places, weights = first.locations[row, column, group], first.weights[row, column, group]
    # points that no other one covers, of the group that is shown alone, inside the image and away from the cross
    gaps = (places[:, None] - places[None]).norm(dim=-1) + 1e3 * torch.eye(len(places))
    center = torch.tensor([(column + 0.5) * 16 - 0.5, (row + 0.5) * 16 - 0.5])
    clear = (gaps.min(1).values > 1.5) & ((places - center).abs().min(1).values > 1.5)
    inside = ((places > 0.5) & (places < torch.tensor([46.5, 30.5]))).all(1)
    chosen = [i for i in range(len(places)) if clear[i] and inside[i]]
    assert len(chosen) >= 2
    points = [[(float(places[i, 0]) + 0.5) / 48, (float(places[i, 1]) + 0.5) / 32] for i in chosen]
    used = tmp_path / "used.html"
    hover = f"{(column + 0.3) / 3}, {(row + 0.6) / 2}"
    used.write_text(text.replace("</body>", _USE.replace("HOVER", hover).replace("POINTS", str(points))), "utf-8")
    found = measured(used, "--window-size=1280,1600")
    groups = first.weights.shape[2]
    assert found["first"].startswith("levels.2.blocks.2.dcn, column 1, row 0 (pixel 24,8): ")  # the second node
    assert found["hovered"].startswith(f"levels.2.blocks.2.dcn, column 2, row 1 (pixel 40,24): {groups} groups of 9 ")
    assert f"{groups * 9} shown" in found["hovered"] and "9 shown" in found["group"]
    assert found["live"] is False and found["still"] is True and found["drawn"]
    assert found["panels"] == [True] * groups
    largest = float(first.weights.max())
    for i, color in zip(chosen, found["colors"]):
        # a share of 255 levels, one of 64 colors: at most three of the 256 steps of the scale away
        shades = [rgb(float(weights[i]) / largest + d / 255) for d in range(-4, 5)]
        assert min(max(abs(a - b) for a, b in zip(color, shade)) for shade in shades) <= 3, (i, color)
    assert "column 1, row 1" in found["key"] and "column 2, row 1" in found["corner"]
    assert found["layers"] == [layer.layer for layer in studies[0].sampling]
    assert found["layer"].startswith(f"{found['layers'][1]}, column ")
    assert all(complete and natural > 0 and width > 0 for complete, natural, width in found["images"])
    assert found["wide"] <= 1280
    assert found["headings"] == [
        "Where a layer samples",
        "Node 1: logit of class 1",
        "Node 2: levels.2 at column 1, row 0 / layer3 at column 1, row 0",
    ]
    opened = tmp_path / "page.html"
    opened.write_text(text, "utf-8")
    picture = tmp_path / "page.png"
    _, log = browse(opened, f"--screenshot={picture}", "--window-size=1280,3000")
    assert console(log) == []
    with Image.open(picture) as image:
        assert len(image.convert("RGB").getcolors(1 << 24)) > 500


@needs_browser
def test_points_that_are_not_finite_are_not_shown(studies, tmp_path):
    (first, *others), (row, column) = studies[0].sampling, (0, 1)  # of the second node, which is shown first
    locations, weights = first.locations.clone(), first.weights.clone()
    locations[row, column, 0, 3, 1], weights[row, column, 1, 2] = float("nan"), float("inf")
    broken = dataclasses.replace(first, locations=locations, weights=weights)
    one = dataclasses.replace(studies[0], sampling=(broken, *others))
    page_ = tmp_path / "page.html"
    use = """<script>addEventListener('load', () => setTimeout(() => {
      const shown = JSON.stringify(document.querySelector('.status').textContent);
      document.body.innerHTML = '<pre id="measured">' + shown + '</pre>' }, 500))</script>"""
    page_.write_text(page("image.png", [one], [], pictures([one])).replace("</body>", use + "</body>"), "utf-8")
    points = first.weights.shape[2] * 9
    assert f" {first.weights.shape[2]} groups of 9 points, {points - 2} shown" in measured(page_)


@needs_browser
def test_the_log_of_the_browser_shows_a_request_that_the_page_must_not_make(text, tmp_path):
    """The check of an empty log can fail."""
    page_ = tmp_path / "page.html"
    page_.write_text(text.replace("</body>", '<img src="https://example.com/x.png"></body>'), "utf-8")
    assert any("Content Security Policy" in line for line in console(browse(page_, "--dump-dom")[1]))


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("scripts", [True, False], ids=["scripts", "no scripts"])
def test_the_page_on_a_phone(text, tmp_path, dark, scripts):
    """Nothing is wider than 390 pixels, and all text has WCAG's contrast of 4.5. Without scripts there is a picture."""
    outer = tmp_path / "phone.html"
    texts = ["h1", "h2", "h3", "p", ".pale", "figcaption", "summary", "footer", "label", ".ticks span"]
    outer.write_text(in_a_window(text, 390, texts, scripts), "utf-8")
    found = measured(outer, *["--force-dark-mode"] * dark)
    assert found["wide"] == 390 and found["out"] == []
    assert len(found["text"]) == len(texts) and min(found["text"].values()) >= 4.5, found["text"]
    assert (sum(found["page"]) < 150) == dark
    assert found["hidden"] == (["still"] if scripts else ["live"])
    shown = [width for natural, width in found["pictures"] if width]
    assert all(natural > 0 for natural, _ in found["pictures"]) and len(shown) == len(found["pictures"]) - 1


# ---- the data of the script


def sampling(locations, weights):
    return LayerSampling("layer", torch.as_tensor(locations).float(), torch.as_tensor(weights).float())


def test_locations_are_stored_to_a_sixteenth_of_a_pixel():
    locations = torch.randn(3, 4, 2, 9, 2, generator=torch.Generator().manual_seed(0)) * 60
    weights = torch.rand(3, 4, 2, 9, generator=torch.Generator().manual_seed(1))
    locations[0, 0, 0, 0, 0], locations[0, 0, 0, 1, 1], weights[0, 0, 0, 2] = float("nan"), float("inf"), float("nan")
    stored = _layer(sampling(locations, weights), 224)
    places = np.frombuffer(base64.b64decode(stored["locations"]), "<i2").reshape(locations.shape)
    shares = np.frombuffer(base64.b64decode(stored["weights"]), np.uint8).reshape(weights.shape)
    assert stored["unit"] == 16 and (places[0, 0, 0, :3] == -(1 << 15))[:2].any(1).all()
    good = torch.isfinite(locations).all(-1) & torch.isfinite(weights)
    assert (places[~good.numpy()] == -(1 << 15)).any(-1).all()
    assert np.abs(places / 16 - locations.numpy())[good].max() <= 1 / 32 + 1e-9
    most = weights[good].max()
    assert stored["most"] == pytest.approx(float(most))
    assert np.abs(shares / 255 - (weights / most).numpy())[good].max() <= 0.5 / 255 + 1e-6


def test_locations_of_large_images_fit():
    """Up to the image's side beyond it: 16384 pixels have a unit of one pixel, and what is further is at the limit."""
    stored = _layer(sampling(torch.tensor([[[[[-16000.0, 1e6]]]]]), torch.ones(1, 1, 1, 1)), 16384)
    assert stored["unit"] <= 1
    small = _layer(sampling(torch.zeros(1, 1, 1, 1, 2), torch.zeros(1, 1, 1, 1)), 64)
    assert small["most"] == 0 and small["unit"] == 16


def test_layers_that_are_too_large_together_are_left_out_but_not_the_first():
    large = LayerSampling("large", torch.zeros(1).expand(MOST_BYTES, 2), torch.zeros(1).expand(MOST_BYTES))
    small = sampling(torch.zeros(1, 1, 1, 1, 2), torch.zeros(1, 1, 1, 1))
    assert _kept([large, small]) == [large, small]
    assert _kept([small, large]) == [small]
