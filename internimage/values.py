# SPDX-License-Identifier: MIT
"""Types and ranges of the values of options and settings: how to check a value, and how to describe what is allowed.

The command line parses text with `parse`, the settings of `finetune` check values with `check`, and both print the same
descriptions. Nothing here imports torch: arguments are checked before it is loaded.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_LARGEST = 10**9  # limit of whole numbers without a maximum of their own: larger values make sense for no option


class BadValue(ValueError):
    """A value that is not allowed. The message says what is, such as "a whole number of at least 1"."""


class Kind:
    """A type with a range."""

    @property
    def words(self) -> str:
        """Description of the allowed values, such as "a whole number of at least 1"."""
        raise NotImplementedError

    def check(self, value: Any) -> Any:
        """The value in canonical form; BadValue if it is not allowed."""
        raise NotImplementedError

    def parse(self, text: str) -> Any:
        """The value of a text on the command line; BadValue if it is not allowed."""
        return self.check(text)


@dataclass(frozen=True)
class Whole(Kind):
    """A whole number from `at_least` to `at_most`."""

    at_least: int
    at_most: int | None = None

    @property
    def words(self) -> str:
        if self.at_most is None:
            return f"a whole number of at least {self.at_least}"
        return f"a whole number from {self.at_least} to {self.at_most}"

    def check(self, value: Any) -> int:
        if type(value) is not int or value < self.at_least or (self.at_most is not None and value > self.at_most):
            raise BadValue(self.words)
        if value > _LARGEST and self.at_most is None:
            raise BadValue(f"a whole number of at most {_LARGEST}")
        return value

    def parse(self, text: str) -> int:
        if not re.fullmatch(r"\s*[+-]?[0-9]+\s*", text):  # int() also accepts 1_000 and the digits of other scripts
            raise BadValue(self.words)
        try:
            return self.check(int(text))
        except ValueError as error:  # int() raises it for thousands of digits, too
            raise error if isinstance(error, BadValue) else BadValue(self.words) from error


@dataclass(frozen=True)
class Number(Kind):
    """A finite number. `at_least` and `at_most` are inclusive limits, `above` and `below` exclusive ones."""

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None

    @property
    def words(self) -> str:
        if self.at_least is not None and self.at_most is not None:
            return f"a number from {self.at_least:g} to {self.at_most:g}"
        limits = {"of at least": self.at_least, "above": self.above, "of at most": self.at_most, "below": self.below}
        parts = [f"{word} {limit:g}" for word, limit in limits.items() if limit is not None]
        return " ".join(["a number", " and ".join(parts)]).replace("and of at most", "and at most").strip()

    def check(self, value: Any) -> float:
        if type(value) not in (int, float):
            raise BadValue(self.words)
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
        inside = (
            math.isfinite(value)
            and (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )
        if not inside:
            raise BadValue(self.words)
        return value

    def parse(self, text: str) -> float:
        if not re.fullmatch(r"[ 0-9.eE+-]+", text):  # float() also accepts nan, inf, 1_0 and other scripts' digits
            raise BadValue(self.words)
        try:
            return self.check(float(text))
        except ValueError as error:
            raise BadValue(self.words) from error


@dataclass(frozen=True)
class Choice(Kind):
    """One of several words or numbers; `aliases` maps other spellings to them."""

    allowed: tuple[Any, ...]
    aliases: Mapping[str, Any] = field(default_factory=dict)

    @property
    def words(self) -> str:
        known = {value: key for key, value in self.aliases.items()}
        named = [f"{value} ({known[value]})" if value in known else str(value) for value in self.allowed]
        return " or ".join([", ".join(named[:-1]), named[-1]] if len(named) > 1 else named)

    def check(self, value: Any) -> Any:
        value = self.aliases.get(value, value) if isinstance(value, str) else value
        if not any(type(value) is type(one) and value == one for one in self.allowed):
            raise BadValue(self.words)
        return value


@dataclass(frozen=True)
class Flag(Kind):
    """True or false."""

    words = "true or false"

    def check(self, value: Any) -> bool:
        if type(value) is not bool:
            raise BadValue(self.words)
        return value


@dataclass(frozen=True)
class Text(Kind):
    """Text that is not empty and, if there is a pattern, matches it."""

    pattern: str = ""
    form: str = ""  # description of the pattern

    @property
    def words(self) -> str:
        return self.form or "text that is not empty"

    def check(self, value: Any) -> str:
        if not isinstance(value, str) or not value.strip() or "\0" in value:
            raise BadValue(self.words)
        if self.pattern and not re.fullmatch(self.pattern, value):
            raise BadValue(self.words)
        return value


def shown(value: Any) -> str:
    """A value for a message: on one line, and shortened if it is long."""
    if isinstance(value, (dict, list, tuple, set)):
        return {dict: "a mapping", set: "a set"}.get(type(value), "a list")
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python prints
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:60]}...{text[-10:]}"
