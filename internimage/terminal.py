# SPDX-License-Identifier: MIT
"""What is printed: names and texts come from files of strangers, and a terminal obeys some characters.

All that this package prints passes through `say`, messages through `progress.message`, which calls it: a file called
`\\x1b[2J` must not clear the screen, one with a newline not add a line of its own, and one whose name is no text in the
terminal's encoding not stop the command. Reports in JSON and CSV hold names as they are.
"""

import logging
import sys
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

# They join and part letters in Persian, Hindi and emoji, and nothing else; all other invisible ones are written out,
# among them those that make a text run backwards.
_JOINERS = "\u200c\u200d"


def printable(text: object) -> str:
    """A text on one line, in which control characters and what else cannot be seen are written out, such as `\\x1b`.

    Bytes of names that are not UTF-8, which Python keeps as lone surrogates, are written as `\\udcff`.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in _JOINERS or unicodedata.category(char) == "Zs" else _written(char)
        for char in text
    )


def _written(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def joined(text: object) -> str:
    """The lines of a text that was made for several, such as another library's message, as one."""
    return " ".join(line.strip() for line in str(text).splitlines())


def encoded(text: object, file: TextIO) -> str:
    """`printable`, and without letters that a file's encoding does not have."""
    encoding = getattr(file, "encoding", None) or "utf-8"
    return printable(text).encode(encoding, "backslashreplace").decode(encoding)


def say(text: object, file: TextIO | None = None, flush: bool = False) -> None:
    """Print a line, on stdout if no file is given; nothing where there is none, as under pythonw."""
    file = sys.stdout if file is None else file
    if file is not None:
        print(encoded(text, file), file=file, flush=flush)


@contextmanager
def others_too(handler: logging.Handler) -> Iterator[None]:
    """Context in which warnings are one printable line each, and log records that no handler takes go to this one.

    Other packages quote files, too: timm the keys of a checkpoint, for one.
    """
    before, last = warnings.formatwarning, logging.lastResort

    def formatted(message, category, filename, lineno, line=None) -> str:
        return f"{printable(joined(f'{filename}:{lineno}: {category.__name__}: {message}'))}\n"

    handler.setLevel(logging.WARNING)
    warnings.formatwarning, logging.lastResort = formatted, handler
    try:
        yield
    finally:
        warnings.formatwarning, logging.lastResort = before, last
