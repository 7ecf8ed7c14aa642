# SPDX-License-Identifier: MIT
"""Printing. Names and texts come from untrusted files, and terminals interpret control characters.

Everything this package prints goes through `say`, or `progress.message` for messages: a file called `\\x1b[2J` must not
clear the screen, a newline in a name must not start another line, and a name that the encoding of the terminal cannot
represent must not end the command. Reports in JSON and CSV contain names unchanged.
"""

import logging
import sys
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

# They only join and separate letters in Persian, Hindi and emoji. All other invisible characters are escaped, including
# those that reverse the direction of text.
_JOINERS = "\u200c\u200d"


def printable(text: object) -> str:
    """A text on one line, with control and other invisible characters escaped, as in `\\x1b`.

    Bytes of names that are not UTF-8, which Python represents as lone surrogates, become `\\udcff` and the like.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in _JOINERS or unicodedata.category(char) == "Zs" else _escaped(char)
        for char in text
    )


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def joined(text: object) -> str:
    """A text of several lines, such as another library's message, as one line."""
    return " ".join(line.strip() for line in str(text).splitlines())


def encoded(text: object, file: TextIO) -> str:
    """`printable`, with characters that the encoding of a file lacks escaped as well."""
    encoding = getattr(file, "encoding", None) or "utf-8"
    return printable(text).encode(encoding, "backslashreplace").decode(encoding)


def say(text: object, file: TextIO | None = None, flush: bool = False) -> None:
    """Print a line, on stdout if no file is given; does nothing without stdout, as under pythonw."""
    file = sys.stdout if file is None else file
    if file is not None:
        print(encoded(text, file), file=file, flush=flush)


@contextmanager
def printable_warnings(handler: logging.Handler) -> Iterator[None]:
    """Context in which warnings are one printable line each, and log records without a handler go to this one.

    Other packages quote files as well: timm, for example, the keys of a checkpoint.
    """
    before, last = warnings.formatwarning, logging.lastResort

    def formatted(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        return f"{printable(joined(f'{filename}:{lineno}: {category.__name__}: {message}'))}\n"

    handler.setLevel(logging.WARNING)
    warnings.formatwarning, logging.lastResort = formatted, handler
    try:
        yield
    finally:
        warnings.formatwarning, logging.lastResort = before, last
