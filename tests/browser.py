# SPDX-License-Identifier: MIT
"""Opens pages in a real browser, with scripts that measure what it made of them."""

import html
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on PATH")


def browse(page: Path, *options: str) -> tuple[str, str]:
    """Open a page without a window; returns what the options print, and what the browser logs."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory() as profile:
        result = subprocess.run(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
             "--enable-logging=stderr", f"--user-data-dir={profile}", "--virtual-time-budget=5000", *options,
             page.as_uri()],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr


def allowing_scripts(text: str) -> str:
    """A page whose policy lets the test's own scripts run."""
    if "script-src" in text:
        return text
    changed = text.replace("style-src 'unsafe-inline'", "style-src 'unsafe-inline'; script-src 'unsafe-inline'")
    assert changed != text
    return changed


def measured(page: Path, *options: str) -> Any:
    """What a script of the page has put as JSON into `<pre id="measured">`."""
    printed, _ = browse(page, "--dump-dom", *options)
    return json.loads(html.unescape(re.search(r'<pre id="measured">(.*?)</pre>', printed, re.DOTALL)[1]))


def console(log: str) -> list[str]:
    """The lines of a browser's log that pages caused: messages of scripts, errors, and requests that were refused."""
    return [line for line in log.splitlines() if "CONSOLE" in line]


# what a reader's window makes of the page: how wide it is, what sticks out, and how text stands out from what is behind
_LOOK = """<body><script>addEventListener('message', () => 0);
function look() {
  const page = document.querySelector('iframe').contentDocument, view = page.defaultView;
  const parse = text => { const n = text.match(/[0-9.]+/g).map(Number); return [n[0], n[1], n[2], n[3] ?? 1] };
  const light = c => { const [r, g, b] = c.slice(0, 3).map(v => v / 255).map(
    v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b };
  const behind = e => { let layers = [];
    for (; e; e = e.parentElement) layers.push(parse(view.getComputedStyle(e).backgroundColor));
    return layers.reverse().reduce((a, b) => [0, 1, 2].map(i => b[3] * b[i] + (1 - b[3]) * a[i]), [255, 255, 255]) };
  const contrast = (e, ink) => { const pair = [light(ink), light(behind(e))].sort((a, b) => b - a);
    return (pair[0] + 0.05) / (pair[1] + 0.05) };
  const all = s => [...page.querySelectorAll(s)], result = {};
  result.wide = page.documentElement.scrollWidth;
  result.out = all('body *').filter(e => !e.closest('.scroll,pre,svg') && e.getBoundingClientRect().right > WIDTH + 1)
    .map(e => e.tagName + '.' + e.className);
  result.svg = all('svg').map(e => e.getBoundingClientRect().width);
  result.letters = Math.min(...all('svg text').map(e => e.getBoundingClientRect().height));
  result.scrolls = all('.scroll').map(e => [e.scrollWidth, e.clientWidth]);
  result.text = {};
  for (const s of SELECTORS)
    for (const e of all(s))
      result.text[s] = Math.min(result.text[s] ?? 99, contrast(e, parse(view.getComputedStyle(e).color)));
  for (const e of all('svg text'))
    result.text.svg = Math.min(result.text.svg ?? 99, contrast(e, parse(view.getComputedStyle(e).fill)));
  result.lines = Math.min(...all('polyline.s-main,polyline.s-other').map(
    e => contrast(e, parse(view.getComputedStyle(e).stroke))));
  result.page = behind(page.body);
  result.pictures = all('img').map(e => [e.naturalWidth, e.getBoundingClientRect().width]);
  result.hidden = all('[hidden]').map(e => e.className);
  document.body.innerHTML = '<pre id="measured">' + JSON.stringify(result) + '</pre>';
}</script><iframe style="width:WIDTHpx;height:2000px;border:0" onload="look()" srcdoc="PAGE"></iframe></body>"""


def in_a_window(text: str, width: int, selectors: list[str], scripts: bool = True) -> str:
    """A page that opens another in a window of a width, in pixels, and measures it: its width and what is wider, the
    contrast of the texts that the selectors find, and how large its curves are.

    Args:
        text: The other page.
        width: Of the window.
        selectors: Of CSS.
        scripts: Whether the other page may run its own.
    """
    page = _LOOK.replace("WIDTH", str(width)).replace("SELECTORS", json.dumps(selectors))
    if not scripts:
        page = page.replace("<iframe ", '<iframe sandbox="allow-same-origin" ')
    return '<!doctype html><meta charset="utf-8">' + page.replace("PAGE", html.escape(text))
