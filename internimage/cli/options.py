# SPDX-License-Identifier: MIT
"""Command-line options as data: types, ranges, and which options have no effect with or without others.

The options of a verb are a table of `Option`s (`tables.py`), from which `add_options` sets up its parser. Every option
has a type, and none is silently ignored. Nothing here imports torch, and only `PictureFile` imports Pillow.
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
from ..values import BadValue, Choice, Kind, Number, Whole, shown


class UsageError(UserError):
    """Arguments that cannot be used.

    Args:
        message: What is wrong, and what is allowed.
        prog: The command, such as `internimage evaluate`.
    """

    def __init__(self, message: str, prog: str = "internimage") -> None:
        super().__init__(message)
        self.prog = prog


@dataclass(frozen=True)
class Option:
    """An argument of a verb.

    Args:
        name: `--name`, or the name of a positional argument.
        help: One line; the default is appended.
        kind: Type and range of the value; None for a flag without a value.
        default: Default value.
        metavar: Placeholder of the value in the help.
        nargs: As in argparse.
        required: Whether an option must be given.
        requires: Options without which this one has no effect -> the value they must have, or None for any.
        excludes: Options with which this one has no effect.
        repeated: It may be given several times, and its value is a list.
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
    repeated: bool = False

    @property
    def dest(self) -> str:
        return self.name.lstrip("-").replace("-", "_")

    @property
    def default_value(self) -> Any:
        return False if self.kind is None else list(self.default) if isinstance(self.default, tuple) else self.default


@dataclass(frozen=True)
class Group:
    """Options under one heading of the help."""

    title: str
    options: tuple[Option, ...]


# ---- kinds of values that only occur on the command line


@dataclass(frozen=True)
class OutputFile(Kind):
    """The name of a file that can be written. With `stdout`, `-` means standard output."""

    stdout: bool = False
    words = "the name of a file to write"

    def check(self, value: str) -> str:
        if value == "-":
            if self.stdout:
                return value
            raise BadValue(f"{self.words}, not standard output")
        if not value.strip() or "\0" in value:
            raise BadValue(self.words)
        try:
            check_writable(value)
        except UserError as error:
            raise BadValue(f"{self.words}; {error}") from error
        return value


@dataclass(frozen=True)
class PictureFile(OutputFile):
    """The name of a picture file, with an extension that Pillow can write."""

    words = "the name of a picture to write"

    def check(self, value: str) -> str:
        super().check(value)
        from PIL import Image

        suffix = Path(value).suffix.lower()
        if not suffix and os.path.exists(value) and not os.path.isfile(value):
            return value  # a pipe or a device, to which PNG is written
        format = Image.registered_extensions().get(suffix)
        try:
            if format is None:
                raise ValueError
            Image.new("RGB", (8, 8)).save(io.BytesIO(), format)  # a format may not support RGB, or not be installed
        except (ValueError, KeyError, OSError, RuntimeError, AttributeError) as error:
            raise BadValue(f"{self.words}, ending in .png, .jpg or another format that Pillow can write") from error
        return value


@dataclass(frozen=True)
class Size(Kind):
    """A positive number of bytes, or of KB, MB, GB or TB (powers of 1000)."""

    words = "a positive number of bytes, with or without a unit, such as '5GB' or '500MB'"
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
class Threads(Whole):
    """A number of threads, at most one for each core of this machine."""

    @property
    def words(self) -> str:
        return f"{super().words}, the number of cores of this machine"


@dataclass(frozen=True)
class WordOr(Kind):
    """A certain word, or a value of another kind."""

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
class Words(Kind):
    """Some of several words, separated by commas, as a tuple without repetitions."""

    allowed: tuple[str, ...]

    @property
    def words(self) -> str:
        return f"some of {','.join(self.allowed)}, separated by commas"

    def parse(self, text: str) -> tuple[str, ...]:
        given = tuple(dict.fromkeys(word.strip() for word in text.split(",")))
        if not set(given) <= set(self.allowed):
            raise BadValue(self.words)
        return given


@dataclass(frozen=True)
class Pixel(Kind):
    """X,Y: a column and a row of an image, from 0."""

    words = "X,Y: a column and a row of the image, from 0"

    def parse(self, text: str) -> tuple[float, float]:
        x, comma, y = text.partition(",")
        try:
            return Number().parse(x), Number().parse(y)
        except BadValue as error:
            raise BadValue(self.words) from error


@dataclass(frozen=True)
class Sides(Kind):
    """HxW: the height and width of an image in pixels, or one number for both."""

    words = "HxW, the height and width in pixels from 1 to 16384, such as 224x320, or one number for both"

    def parse(self, text: str) -> tuple[int, int]:
        height, cross, width = text.partition("x")
        side = Whole(1, 16384)
        try:
            return side.parse(height), side.parse(width if cross else height)
        except BadValue as error:
            raise BadValue(self.words) from error


@dataclass(frozen=True)
class KeyValue(Kind):
    """KEY=VALUE with a value in YAML, parsed to a pair; `known` has the kinds of the values of some keys."""

    known: Mapping[str, Kind] = field(default_factory=dict)
    words = "KEY=VALUE"

    def parse(self, text: str) -> tuple[str, Any]:
        from ..config import ConfigError, read_value  # YAML

        key, equals, yaml_value = text.partition("=")
        if not equals or not key.isidentifier():
            raise BadValue(self.words)
        try:
            value = read_value(yaml_value, f"the value of '{key}'", depth=3)
        except ConfigError as error:
            raise BadValue(f"{self.words}; {error}") from error
        if key in self.known:
            try:
                value = self.known[key].check(value)
            except BadValue as error:
                raise BadValue(f"{self.words}, and '{key}' {error}") from error
        return key, tuple(value) if isinstance(value, list) else value


class _ArgumentType:
    """A kind as a `type` of argparse: a function of a text."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind

    def __call__(self, text: str) -> Any:
        try:
            return self.kind.parse(text)
        except BadValue as error:
            raise argparse.ArgumentTypeError(f"must be {error}, got {shown(text)}") from error


# ---- parsers


class Parser(argparse.ArgumentParser):
    """argparse's parser that raises `UsageError`, also for options that have no effect."""

    options: tuple[Option, ...] | None = None  # of a verb; None for parsers of verbs
    hint: Callable[[str], str] | None = None  # unknown option -> hint for the message

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, self.prog)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, extras = super().parse_known_args(args, namespace)
        if self.options is not None:
            if extras:
                self.error(self._describe_unknown(extras))
            self._check_given(self.options, parsed)
            self._set_defaults(self.options, parsed)
        return parsed, extras

    def _describe_unknown(self, extras: list[str]) -> str:
        first = next((word for word in extras if word.startswith("-")), extras[0])
        near = difflib.get_close_matches(first.partition("=")[0], [o.name for o in self.options or ()], n=1)
        if self.hint is not None and first.startswith("-"):
            return f"there is no option '{first}'; {self.hint(first)}"
        what = "option" if first.startswith("-") else "argument"
        return f"there is no {what} '{first}'; " + (f"did you mean {near[0]}?" if near else f"see {self.prog} --help")

    def _check_given(self, options: tuple[Option, ...], namespace: argparse.Namespace) -> None:
        """Reject options that have no effect with, or without, the others that were given."""
        given = vars(namespace)
        named = {option.name: option for option in options}
        for option in options:
            if option.dest not in given:
                continue
            for other in option.excludes:
                if named[other].dest in given:
                    self.error(f"{option.name} has no effect with {other}: omit one of them")
            for other, value in option.requires.items():
                if named[other].dest not in given or (value is not None and given[named[other].dest] != value):
                    needed = other if value is None else f"{other} {value}"
                    self.error(f"{option.name} has no effect without {needed}")

    @staticmethod
    def _set_defaults(options: tuple[Option, ...], namespace: argparse.Namespace) -> None:
        """Fill in the defaults, which argparse does not: `_check_given` must see which options were given."""
        for option in options:
            vars(namespace).setdefault(option.dest, option.default_value)


def add_options(parser: Parser, parts: Iterable[Option | Group]) -> None:
    """Add its options to the parser of a verb; to be called once per parser."""
    options: list[Option] = []
    for part in parts:
        place = parser if isinstance(part, Option) else parser.add_argument_group(part.title)
        for option in (part,) if isinstance(part, Option) else part.options:
            _add_option(place, option)
            options.append(option)
    parser.options = tuple(options)


def _add_option(place: "argparse.ArgumentParser | argparse._ArgumentGroup", option: Option) -> None:
    keywords: dict[str, Any] = {"help": _help(option)}
    if option.name.startswith("-"):
        keywords |= {"dest": option.dest, "required": option.required, "default": argparse.SUPPRESS}
    if option.kind is None:
        place.add_argument(option.name, action="store_true", **keywords)
        return
    if option.repeated:
        keywords["action"] = "append"
    metavar = option.metavar
    if metavar is None and isinstance(option.kind, Choice):
        metavar = "{" + ",".join(map(str, option.kind.allowed)) + "}"
    place.add_argument(
        option.name, type=_ArgumentType(option.kind), nargs=option.nargs,
        metavar=metavar or ("N" if isinstance(option.kind, Whole) else None), **keywords,
    )  # fmt: skip


def _help(option: Option) -> str:
    default = option.default
    if isinstance(default, tuple):
        default = " ".join(map(str, default))
    text = option.help if default in (None, "") else f"{option.help} (default: {default})"
    return text.replace("%", "%%")
