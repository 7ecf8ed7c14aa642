# SPDX-License-Identifier: MIT
"""The report of a run, opened in a real browser."""

import html.parser
import math
import re

import pytest
import torch
from browser import allowing_scripts, browse, in_a_window, measured, needs_browser
from PIL import Image

from internimage.engine.curves import _labels, _ticks, curve
from internimage.tasks.classification import report as report_module
from internimage.tasks.classification.config import FinetuneConfig
from internimage.tasks.classification.evaluate import Evaluation
from internimage.tasks.classification.finetune import finetune

CLASSES = ("cat & <dog>", "fox", "owl with a name that is a good deal longer than others")


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


def test_the_report_is_self_contained(report):
    text = report.read_text(encoding="utf-8")
    assert "<script" not in text
    assert (
        '<meta name="viewport" content="width=device-width,initial-scale=1">' in text
    )  # else phones shrink a wide page
    sources = re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\')\s>]+)', text)
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    html.parser.HTMLParser().feed(text)


@needs_browser
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
    text = allowing_scripts(report.read_text(encoding="utf-8"))
    page.write_text(text.replace("</body>", measure), encoding="utf-8")
    found = measured(page, "--window-size=1280,1600")
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


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_report_on_a_phone_by_day_and_by_night(report, tmp_path, dark):
    """Nothing makes the page wider than 390 px, and everything can be read (WCAG's 4.5 for text, 3 for lines)."""
    page = tmp_path / "phone.html"
    matrix = torch.zeros(30, 30, dtype=torch.long)
    for i in range(30):  # every shade of right and wrong
        matrix[i, i], matrix[i, i - 1] = i, 29 - i
    more = report_module._matrix(matrix, [f"a class like no. {i}" for i in range(30)])
    more += report_module._skipped(Evaluation(skipped=[("/folder" * 30 + ".png", "not an image")]))
    text = report.read_text(encoding="utf-8").replace("</body>", more + "</body>")
    texts = [
        "h1",
        "h2",
        "p",
        ".pale",
        "figcaption",
        "td.name",
        ".matrix th",
        ".matrix td.hit",
        ".matrix td.miss",
        "pre",
    ]
    page.write_text(in_a_window(text, 390, [*texts, "footer"]), encoding="utf-8")
    found = measured(page, *["--force-dark-mode"] * dark)
    assert found["wide"] == 390 and found["out"] == []
    assert len(found["svg"]) == 4 and all(340 < width <= 390 for width in found["svg"])
    assert found["letters"] >= 9
    assert found["scrolls"][-1][0] > 900 and found["scrolls"][-1][1] < 390  # the large matrix, in a box of its own
    assert (sum(found["page"]) < 150) == dark
    assert len(found["text"]) == 12 and min(found["text"].values()) >= 4.5, found["text"]
    assert found["lines"] >= 3


def test_top5_is_told_where_it_says_something():
    result = Evaluation(images=8, top1=50.0, top5=100.0, loss=0.5)
    assert "top-5" not in report_module._summary(result, list("abcde"))
    assert "top-5 100.00 %, loss 0.5000" in report_module._summary(result, list("abcdef"))


def sentences(wrong, right=2):
    """The text above the pictures for so many wrong and right predictions."""
    answers = [(i, 0, 1, 0.9) for i in range(wrong)] + [(wrong + i, 1, 1, 0.5 + 0.1 * i) for i in range(right)]
    images = [(Image.new("RGB", (9, 7)), target) for _, target, *_ in answers]
    found = report_module._mistakes(Evaluation(predictions=answers), images, ["a", "b"], None, {})
    assert found.count("<figure>") == min(wrong or right, 16)
    return re.search("<p>(.*?)</p>", found)[1]


def test_the_sentences_about_mistakes():
    assert sentences(0) == "No image was wrong. These are the 2 predictions with the lowest confidence."
    assert sentences(1) == "The one wrong prediction."
    assert sentences(16) == "All 16 wrong predictions, the highest confidence first."
    assert sentences(20) == "These are the 16 of 20 wrong predictions with the highest confidence."


def test_many_classes_get_a_list_of_pairs_in_place_of_a_matrix():
    matrix = torch.eye(50, dtype=torch.long) * 9
    names = [f"class {i}" for i in range(50)]
    assert report_module._confused(matrix, names) == "<p>No image was wrong.</p>"
    matrix[3, 7] = 2
    found = report_module._confused(matrix, names)
    assert '<td class="name">class 3</td><td class="name">class 7</td><td>2</td>' in found and found.count("<tr>") == 2


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0.51, 2.31, ["0.5", "1.0", "1.5", "2.0", "2.5"]),
        (0.0, 3e-3, ["0.000", "0.001", "0.002", "0.003"]),
        (0.0, 4e-5, ["0", "1e-05", "2e-05", "3e-05", "4e-05"]),
        (11.1, 19.4, ["10", "12", "14", "16", "18", "20"]),
        (-3.0, 5.0, ["-4", "-2", "0", "2", "4", "6"]),
        (0.0, 5e7, ["0", "1e+07", "2e+07", "3e+07", "4e+07", "5e+07"]),
    ],
)
def test_ticks(low, high, expected):
    assert _labels(_ticks(low, high, 5, outward=True)) == expected


@pytest.mark.parametrize(
    "points",
    [
        [(1.0, 2.0)],
        [(1.0, 0.0)],
        [(1.0, 7.0), (2.0, 7.0)],
        [(1.0, 1e-30), (2.0, 1e30)],
        [(1.0, float("inf")), (2.0, 3.0), (3.0, float("nan"))],
        [(float(i), math.sin(i)) for i in range(5000)],
    ],
    ids=["one", "zero", "flat", "wide", "odd", "many"],
)
def test_a_curve_stays_in_its_frame(points):
    figure = curve("a & b", "step", "nats", [("loss", "main", points)], most=1e31)
    assert "a &amp; b" in figure and "nan" not in figure and "inf" not in figure
    places = re.search(r'<polyline [^>]*points="([^"]*)"', figure)[1].split()
    assert 1 <= len(places) <= 1000
    width, height = map(float, re.search(r'viewBox="0 0 (\d+) (\d+)"', figure).groups())
    assert all(0 < float(x) < width and 0 < float(y) < height for x, y in (place.split(",") for place in places))
    assert ("<circle" in figure) == (len(places) == 1)
    assert ">step</text>" in figure and ">nats</text>" in figure


def test_a_curve_of_nothing_is_nothing():
    assert curve("loss", "step", "nats", [("loss", "main", []), ("b", "faint", [(1.0, float("nan"))])]) == ""


def test_accuracy_does_not_go_beyond_100_percent():
    for points in ([(1.0, 81.0), (2.0, 100.0)], [(1.0, 100.0), (2.0, 100.0)]):
        figure = curve("accuracy", "epoch", "%", [("", "main", points)], most=100.0)
        assert re.findall(r'text-anchor="end">([^<]*)<', figure)[-1] == "100"
