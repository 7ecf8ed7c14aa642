# SPDX-License-Identifier: MIT
"""Options of the command line as data: their types and ranges, and which of them have no effect with which others.

A verb is a table of `Option`s (`tables.py`), and `add_options` makes its parser: no option is without a type, and none
is ignored in silence. Nothing here imports torch, nor Pillow before a picture is asked for.
"""

import argparse
import difflib
import io
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from ..errors import UserError
from ..files import check_writable
from ..values import BadValue, Choice, Kind, Whole, shown


class UsageError(UserError):
    """Arguments that cannot be used.

    Args:
        message: What is wrong, and what would be right.
        prog: The command that was given them, such as `internimage evaluate`.
    """

    def __init__(self, message: str, prog: str = "internimage") -> None:
        super().__init__(message)
        self.prog = prog


@dataclass(frozen=True)
class Option:
    """An argument of a verb.

    Args:
        name: `--name` of an option, or the name of a positional argument.
        help: One line. The default is added.
        kind: Type and range of a value; None is a switch.
        default: Value if it is not given.
        metavar: Name of a value in the help.
        nargs: As in argparse.
        required: An option that must be given.
        requires: Option -> the value it must have, or None for any, without which this one has no effect.
        excludes: Options with which this one has no effect.
    """

    name: str
    help: str
    kind: Kind | None = None
    default: Any = None
    metavar: str | None = None
    nargs: str | None = None
    required: bool = False
    requires: Mapping[str, Any] = field(default_factory=dict)
    excludes: tuple[str, ...] = ()

    @property
    def dest(self) -> str:
        return self.name.lstrip("-").replace("-", "_")

    @property
    def value_by_default(self) -> Any:
        return False if self.kind is None else list(self.default) if isinstance(self.default, tuple) else self.default


@dataclass(frozen=True)
class Group:
    """Options under a heading of the help."""

    title: str
    options: tuple[Option, ...]


# ---- kinds of values that only the command line has


@dataclass(frozen=True)
class OutputFile(Kind):
    """The name of a file that can be written. `stdout`: `-` stands for standard output."""

    stdout: bool = False
    words = "the name of a file to write"

    def check(self, value: str) -> str:
        if value == "-":
            if self.stdout:
                return value
            raise BadValue(f"{self.words}, which standard output is not")
        if not value.strip() or "\0" in value:
            raise BadValue(self.words)
        try:
            check_writable(value)
        except UserError as error:
            raise BadValue(f"{self.words}; {error}") from error
        return value


@dataclass(frozen=True)
class PictureFile(OutputFile):
    """The name of a picture, with an ending that Pillow can write."""

    words = "the name of a picture to write"

    def check(self, value: str) -> str:
        super().check(value)
        from PIL import Image

        suffix = Path(value).suffix.lower()
        if not suffix and os.path.exists(value) and not os.path.isfile(value):
            return value  # a pipe or a device, which gets a PNG
        format = Image.registered_extensions().get(suffix)
        try:
            if format is None:
                raise ValueError
            Image.new("RGB", (8, 8)).save(io.BytesIO(), format)  # formats have modes, and parts that may be missing
        except (ValueError, KeyError, OSError, RuntimeError, AttributeError) as error:
            raise BadValue(f"{self.words}, ending in .png, .jpg or another format that Pillow can write") from error
        return value


@dataclass(frozen=True)
class Size(Kind):
    """A number of bytes, or of KB, MB, GB or TB (powers of 1000)."""

    words = "a number of bytes or such as '5GB' or '500MB', and more than 0"
    most = 10**18

    def parse(self, text: str) -> int:
        match = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([KMGT]?B)?\s*", text, re.IGNORECASE)
        if match is None:
            raise BadValue(self.words)
        power = ["B", "KB", "MB", "GB", "TB"].index((match[2] or "B").upper())
        return self.check(int(float(match[1]) * 1000**power))

    def check(self, value: int) -> int:
        if not 1 <= value <= self.most:
            raise BadValue(self.words)
        return value


@dataclass(frozen=True)
class OneOf(Kind):
    """A word, or a value of another kind."""

    word: str
    kind: Kind

    @property
    def words(self) -> str:
        return f"'{self.word}' or {self.kind.words}"

    def parse(self, text: str) -> Any:
        try:
            return text if text == self.word else self.kind.parse(text)
        except BadValue as error:
            raise BadValue(self.words) from error


@dataclass(frozen=True)
class KeyValue(Kind):
    """KEY=VALUE with a YAML value, as a pair; `known` has the ranges of keys whose values are numbers."""

    known: Mapping[str, Kind] = field(default_factory=dict)
    words = "KEY=VALUE"

    def parse(self, text: str) -> tuple[str, Any]:
        from ..config import ConfigError, read_value  # YAML

        key, equals, written = text.partition("=")
        if not equals or not key.isidentifier():
            raise BadValue(self.words)
        try:
            value = read_value(written, f"the value of '{key}'", depth=3)
        except ConfigError as error:
            raise BadValue(f"{self.words}; {error}") from error
        if key in self.known:
            try:
                value = self.known[key].check(value)
            except BadValue as error:
                raise BadValue(f"{self.words}, and '{key}' {error}") from error
        return key, tuple(value) if isinstance(value, list) else value


class _Argument:
    """A kind as argparse wants it: a function of a text."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind

    def __call__(self, text: str) -> Any:
        try:
            return self.kind.parse(text)
        except BadValue as error:
            raise argparse.ArgumentTypeError(f"must be {error}, got {shown(text)}") from error


# ---- parsers


class Parser(argparse.ArgumentParser):
    """argparse's parser, whose errors are `UsageError`s and which lets no option pass that has no effect."""

    options: tuple[Option, ...] | None = None  # of a verb; None above the verbs
    hint: Callable[[str], str] | None = None  # what to say about an unknown option

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, self.prog)

    def parse_known_args(self, args=None, namespace=None):
        namespace, extras = super().parse_known_args(args, namespace)
        if self.options is not None:
            if extras:
                self.error(self._unknown(extras))
            self._finish(namespace)
        return namespace, extras

    def _unknown(self, extras: list[str]) -> str:
        first = next((word for word in extras if word.startswith("-")), extras[0])
        near = difflib.get_close_matches(first.partition("=")[0], [o.name for o in self.options or ()], n=1)
        if self.hint is not None and first.startswith("-"):
            return f"there is no option '{first}'; {self.hint(first)}"
        what = "option" if first.startswith("-") else "argument"
        return f"there is no {what} '{first}'; " + (f"did you mean {near[0]}?" if near else f"see {self.prog} --help")

    def _finish(self, namespace: argparse.Namespace) -> None:
        """Refuse what would be ignored, then fill in the defaults: until here only what was given has a value."""
        given = vars(namespace)
        named = {option.name: option for option in self.options}
        for option in self.options:
            if option.dest not in given:
                continue
            for other in option.excludes:
                if named[other].dest in given:
                    self.error(f"{option.name} has no effect with {other}: leave one of them out")
            for other, value in option.requires.items():
                if named[other].dest not in given or (value is not None and given[named[other].dest] != value):
                    needed = other if value is None else f"{other} {value}"
                    self.error(f"{option.name} has no effect without {needed}")
        for option in self.options:
            given.setdefault(option.dest, option.value_by_default)


def add_options(parser: Parser, parts: Iterable[Option | Group]) -> None:
    """Give the parser of a verb its options; to be called once for each parser."""
    options: list[Option] = []
    for part in parts:
        place = parser if isinstance(part, Option) else parser.add_argument_group(part.title)
        for option in (part,) if isinstance(part, Option) else part.options:
            _add(place, option)
            options.append(option)
    parser.options = tuple(options)


def _add(place: Any, option: Option) -> None:
    keywords: dict[str, Any] = {"help": _help(option)}
    if option.name.startswith("-"):
        keywords |= {"dest": option.dest, "required": option.required, "default": argparse.SUPPRESS}
    if option.kind is None:
        place.add_argument(option.name, action="store_true", **keywords)
        return
    metavar = option.metavar
    if metavar is None and isinstance(option.kind, Choice):
        metavar = "{" + ",".join(map(str, option.kind.allowed)) + "}"
    place.add_argument(
        option.name, type=_Argument(option.kind), nargs=option.nargs,
        metavar=metavar or ("N" if isinstance(option.kind, Whole) else None), **keywords,
    )  # fmt: skip


def _help(option: Option) -> str:
    default = option.default
    if isinstance(default, tuple):
        default = " ".join(map(str, default))
    text = option.help if default in (None, "") else f"{option.help} (default: {default})"
    return text.replace("%", "%%")
