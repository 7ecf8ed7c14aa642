# SPDX-License-Identifier: MIT
"""The report of a run, opened in a real browser."""

import html.parser
import json
import re
import shutil
import subprocess
import tempfile

import pytest
import torch
from PIL import Image

from internimage.engine.finetune import finetune
from internimage.engine.settings import FinetuneConfig

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
CLASSES = ("cat & <dog>", "fox", "owl")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A run on noise, so that there are mistakes; one class has a name that HTML must escape."""
    folder = tmp_path_factory.mktemp("report")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 9), ("val", 6)):
        for name in CLASSES:
            (folder / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = (torch.rand(20, 24, 3, generator=generator) * 255).byte().numpy()
                Image.fromarray(pixels).save(folder / "data" / split / name / f"{i}.png")
    config = FinetuneConfig(
        data=str(folder / "data"), output=str(folder / "run"), model="internimage_atto", pretrained=False, img_size=32,
        epochs=3, batch_size=8, workers=0, warmup_epochs=1, device="cpu",
    )  # fmt: skip
    finetune(config, progress=False)
    return folder / "run" / "report.html"


def browse(page, *options):
    with tempfile.TemporaryDirectory() as profile:
        result = subprocess.run(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
             f"--user-data-dir={profile}", "--virtual-time-budget=5000", *options, page.as_uri()],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_report_is_self_contained(report):
    text = report.read_text(encoding="utf-8")
    assert "<script" not in text
    sources = re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\')\s>]+)', text)
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    html.parser.HTMLParser().feed(text)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on PATH")
def test_the_report_in_a_browser(report, tmp_path):
    """Everything is drawn: a script that the test adds measures what the browser made of it."""
    measure = """<script>addEventListener('load', () => {
      const table = document.querySelector('.matrix'), all = s => [...document.querySelectorAll(s)];
      document.body.innerHTML = '<pre id="measured">' + JSON.stringify({
        title: document.title,
        headings: all('h2').map(e => e.textContent),
        images: all('img').map(e => [e.complete, e.naturalWidth, e.getBoundingClientRect().width]),
        curves: all('polyline').map(e => { const b = e.getBBox(); return [b.width, b.height, e.points.length] }),
        inside: all('svg').every(s => [...s.querySelectorAll('polyline,rect')].every(e => {
          const a = s.getBoundingClientRect(), b = e.getBoundingClientRect();
          return b.left >= a.left - 2 && b.right <= a.right + 2 && b.top >= a.top - 2 && b.bottom <= a.bottom + 2 })),
        matrix: [...table.rows].map(r => [...r.cells].map(c => c.textContent)),
        classes: all('.bar div').map(e => e.getBoundingClientRect().width),
        captions: all('.mistakes figcaption').map(e => e.textContent),
        wide: document.documentElement.scrollWidth,
      }).replaceAll('&', '&amp;').replaceAll('<', '&lt;') + '</pre>' })</script></body>"""
    page = tmp_path / "measured.html"
    page.write_text(report.read_text(encoding="utf-8").replace("</body>", measure), encoding="utf-8")
    dom = browse(page, "--dump-dom", "--window-size=1280,1600")
    found = json.loads(html.unescape(re.search(r'<pre id="measured">(.*?)</pre>', dom, re.DOTALL)[1]))
    assert found["headings"] == ["Curves", "Confusion", "Accuracy of each class", "The worst mistakes", "Settings"]
    assert found["title"].startswith("internimage_atto: ")
    assert len(found["curves"]) >= 5 and all(width > 100 for width, _, _ in found["curves"]) and found["inside"]
    assert max(points for *_, points in found["curves"]) == 9  # a point a step
    assert found["matrix"][0] == ["", *CLASSES] and [row[0] for row in found["matrix"][1:]] == list(CLASSES)
    counts = [[int(cell or 0) for cell in row[1:]] for row in found["matrix"][1:]]
    assert [sum(row) for row in counts] == [6, 6, 6]
    mistakes = 18 - sum(counts[i][i] for i in range(3))
    assert 0 < mistakes == len(found["captions"]) or len(found["captions"]) == 16
    assert all(", predicted " in caption for caption in found["captions"])
    assert len(found["images"]) == 2 * len(found["captions"])
    assert all(complete and natural > 0 and 200 < width < 230 for complete, natural, width in found["images"])
    assert len(found["classes"]) == 3 and found["wide"] <= 1280

    picture = tmp_path / "report.png"
    browse(report, f"--screenshot={picture}", "--window-size=1280,1600")
    with Image.open(picture) as image:
        assert image.size == (1280, 1600)
        assert len(image.convert("RGB").getcolors(1 << 24)) > 50  # not a blank page
