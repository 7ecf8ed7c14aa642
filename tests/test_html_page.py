# SPDX-License-Identifier: MIT
"""Pages of HTML: names are text, nothing is loaded, and a page says what wrote it."""

import io

import pytest
from PIL import Image

from internimage.html_page import data_uri, document, escape, png, written_by


def test_names_from_strangers_are_text():
    assert escape('<img src="x">&\'') == "&lt;img src=&quot;x&quot;&gt;&amp;&#x27;"
    assert escape("a\u202eb\n\x1b[31m") == "a\\u202eb\\n\\x1b[31m"
    page = document("</title><script>alert(1)</script>", "<p>body</p>")
    assert "<title>&lt;/title&gt;" in page and "<script" not in page


def test_a_page_may_load_nothing_and_runs_scripts_only_if_it_has_one():
    page = document("t", "b")
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'\"" in page
    scripted = document("t", "b", "p{}", "let a;")
    assert "script-src 'unsafe-inline'\"" in scripted and "<script>let a;</script>" in scripted
    assert scripted.index("p{}") < scripted.index("<body>") < scripted.index("let a;") < scripted.index("</body>")


@pytest.mark.parametrize("generator", ["internimage", "internimage analyze", 'a "quoted" & <other>'])
def test_what_wrote_a_page(tmp_path, generator):
    (tmp_path / "a.html").write_text(document("t" * 5000, "b", generator=generator), encoding="utf-8")
    assert written_by(tmp_path / "a.html") == generator


def test_pages_of_others(tmp_path):
    (tmp_path / "b.html").write_bytes(b"<!doctype html>\xff\xfe" * 100)
    (tmp_path / "folder").mkdir()
    assert [written_by(tmp_path / name) for name in ("b.html", "folder", "none")] == [None] * 3


def test_pictures_are_within_the_page():
    picture = png(Image.new("RGB", (3, 2), (1, 2, 3)))
    with Image.open(io.BytesIO(picture)) as image:
        assert image.size == (3, 2) and image.getpixel((0, 0)) == (1, 2, 3)
    assert data_uri(b"abc") == "data:image/png;base64,YWJj"
