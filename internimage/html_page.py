# SPDX-License-Identifier: MIT
"""A result as one HTML file: nothing fetched, light and dark, readable on a phone and without scripts."""

import base64
import html
import io
import re
from pathlib import Path

from PIL import Image

from .terminal import printable

# Colors are variables, so that a reader's dark mode needs one block. What is wide scrolls in a box of its own: the page
# itself is never wider than the screen.
_STYLE = """
:root{color-scheme:light dark;--page:#fff;--ink:#1a1d21;--pale:#5b636d;--rule:#dde1e6;--box:#f4f6f8;
--main:#1f5d9b;--faint:#9dbbd8;--other:#c2571a;--right:44,110,170;--wrong:196,60,40}
@media (prefers-color-scheme:dark){:root{--page:#15181c;--ink:#e4e7eb;--pale:#a3acb7;--rule:#363c44;--box:#1f242a;
--main:#6cabe8;--faint:#41618a;--other:#f0a068;--right:50,112,172;--wrong:196,68,50}}
*{box-sizing:border-box}[hidden]{display:none!important}
body{font:16px/1.5 system-ui,sans-serif;max-width:1120px;margin:2rem auto;padding:0 1rem;color:var(--ink);
background:var(--page);overflow-wrap:anywhere;-webkit-text-size-adjust:100%}
h1{font-size:1.5rem;line-height:1.25;margin:0 0 1rem}
h2{font-size:1.2rem;margin:2.5rem 0 1rem;padding-bottom:.25rem;border-bottom:1px solid var(--rule)}
p{margin:.5rem 0 1rem}.pale{color:var(--pale)}
figure{margin:0}figcaption{font-size:.9rem}
.scroll{overflow-x:auto;overflow-wrap:normal}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
td,th{padding:.2rem .5rem;text-align:right;white-space:nowrap}th{font-weight:600}
th.name,td.name{text-align:left}td.name{white-space:normal;min-width:6rem}
footer{margin:2.5rem 0 1rem;color:var(--pale);font-size:.9rem}
"""

_START = 1024  # bytes of a page within which its generator is named
# a page loads nothing, and one without scripts runs none, whatever the names and captions in it say
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def document(title: str, body: str, style: str = "", script: str = "", generator: str = "internimage") -> str:
    """A page of HTML.

    Args:
        title: Of the browser's window; text.
        body: HTML.
        style: CSS, beyond that of all pages.
        script: JavaScript, run at the end; without it the page may run none.
        generator: What wrote the page, by which it is recognized.
    """
    policy = f"{_POLICY}; script-src 'unsafe-inline'" if script else _POLICY
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta name="generator" content="{escape(generator)}">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{escape(title)}</title><style>{_STYLE}{style}</style></head>\n<body>\n{body}\n"
        + (f"<script>{script}</script>\n" if script else "")
        + "</body></html>\n"
    )


def written_by(path: Path) -> str | None:
    """What wrote a page, by the start of the file; None if it is none of ours or cannot be read."""
    try:
        with path.open("rb") as file:
            start = file.read(_START).decode(errors="replace")
    except OSError:
        return None
    found = re.search(r'<meta name="generator" content="([^"]*)">', start)
    return None if found is None else html.unescape(found[1])


def escape(value: object) -> str:
    """Text for HTML. Characters that are not printable or change the direction of text are escaped, as on a terminal:
    names of files and classes come from strangers."""
    return html.escape(printable(value))


def png(image: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file."""
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def data_uri(png_file: bytes) -> str:
    """The bytes of a PNG file as the address of an `<img>` that holds it."""
    return f"data:image/png;base64,{base64.b64encode(png_file).decode()}"
