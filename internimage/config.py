# SPDX-License-Identifier: MIT
"""Flat typed configs from a recipe (a YAML file) and `key=value` overrides; an unknown key is an error."""

import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from .errors import UserError, one_line
from .values import shown

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")

_MOST_BYTES = 1 << 16  # of a recipe; larger files are no recipes, and PyYAML takes seconds for a megabyte
_MOST_DIGITS = 1000  # of a number: PyYAML's time is quadratic in it and reaches minutes
_NULLS = ("", "~", "null", "Null", "NULL")


class ConfigError(UserError, ValueError):
    """A setting that does not exist, or a value that is not of its type."""


def split_arguments(words: list[str]) -> tuple[str | None, list[str]]:
    """Split the words of a command line into the recipe and the `key=value` overrides, in any order.

    A word is an override if the text before its first `=` is an identifier: `runs/lr=0.1/finetune.yaml` is a file.

    Raises:
        ConfigError: There is more than one recipe.
    """
    overrides = [word for word in words if "=" in word and word.partition("=")[0].strip().isidentifier()]
    recipes = [word for word in words if word not in overrides]
    if len(recipes) > 1:
        raise ConfigError(f"only one recipe is allowed, got {' and '.join(map(repr, recipes))}; settings are KEY=VALUE")
    return (recipes[0] if recipes else None), overrides


def load_config(cls: type[Config], path: str | Path | None = None, overrides: list[str] | None = None) -> Config:
    """A config from a recipe and overrides.

    Args:
        cls: Dataclass whose fields are `str`, `int`, `float`, `bool` or `X | None` of these.
        path: Recipe: YAML file with a mapping of field names to values.
        overrides: `key=value` strings, which take precedence over the recipe. Values are parsed as YAML, except those
            of text fields, which are taken literally: a folder may be called 007, 1e3 or on.

    Raises:
        ConfigError: A key is unknown (the nearest is named), a value is not of its type, or a field is missing.
    """
    kinds = typing.get_type_hints(cls)
    values = {} if path is None else parse_settings(read_text(path), f"'{path}'", cls)
    for override in overrides or []:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals:
            raise ConfigError(f"expected key=value, got '{override}'")
        if _is_text(kinds.get(key)) and text.strip()[:1] not in ("'", '"'):
            values[key] = None if text.strip() in _NULLS else text.strip()
        else:
            values[key] = read_value(text, f"the value of '{key}'")
    return from_dict(cls, values)


def from_dict(cls: type[Config], values: dict[str, Any]) -> Config:
    """A config from a dictionary; raises ConfigError like `load_config`."""
    kinds = typing.get_type_hints(cls)
    checked = {}
    for key, value in values.items():
        if key not in kinds:
            near = difflib.get_close_matches(str(key), kinds, n=1, cutoff=0.4)
            hint = f"; did you mean '{near[0]}'?" if near else f"; there are {', '.join(kinds)}"
            raise ConfigError(f"there is no setting {shown(str(key))}{hint}")
        checked[key] = _convert(key, value, kinds[key])
    required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name not in checked]
    if required:
        raise ConfigError(f"missing: {', '.join(f'{name}=...' for name in required)}")
    return cls(**checked)


def dump(config: "DataclassInstance") -> str:
    """A config as YAML, including every default."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def read_value(text: str, what: str, depth: int = 0) -> Any:
    """Parse a YAML value from the command line.

    Args:
        text: YAML.
        what: Name of the value in messages.
        depth: Maximum nesting of lists and mappings; 0 allows none.

    Raises:
        ConfigError: It is not YAML, or nested deeper.
    """
    node = _compose(text, what, depth)
    return None if node is None else _construct(node, what)


# ---- YAML


def read_text(path: str | Path) -> str:
    """The text of a recipe, whose size is limited.

    Raises:
        ConfigError: It does not exist, is not a regular file, is too large, or cannot be read as UTF-8.
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"'{path}' is a folder; a recipe is a YAML file")
    if not path.exists():
        raise ConfigError(f"there is no recipe '{path}'")
    if not path.is_file():  # reading from a pipe could block forever
        raise ConfigError(f"'{path}' is not a regular file; a recipe is a YAML file")
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise ConfigError(f"'{path}' is too large for a recipe, which is a YAML file of a few settings")
        return data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"'{path}' is not YAML: it is not text in UTF-8") from error
    except OSError as error:
        raise ConfigError(f"'{path}' cannot be read: {error.strerror}") from error


def parse_settings(text: str, what: str, cls: type) -> dict[str, Any]:
    """Parse a YAML mapping of settings to single values; keeps their order.

    Args:
        text: YAML.
        what: Name of the text in messages.
        cls: Dataclass whose text fields take their values literally: 007 and on are text.

    Raises:
        ConfigError: It is not such a mapping, or has a key twice.
    """
    kinds = typing.get_type_hints(cls)
    root = _compose(text, what, 1)
    if not isinstance(root, yaml.MappingNode):
        found = {yaml.SequenceNode: "a list", yaml.ScalarNode: "a single value"}.get(type(root), "nothing")
        raise ConfigError(f"{what} must hold a mapping of keys to values, got {found}")
    values = {}
    for key, node in root.value:  # a key may look like a number or a bool: 1, on
        name = key.value
        if name in values:
            raise ConfigError(f"{what} has {shown(name)} twice")
        if _is_text(kinds.get(name)) and isinstance(node, yaml.ScalarNode) and node.tag in _PLAIN:
            values[name] = node.value
        else:
            values[name] = _construct(node, f"the value of {shown(name)} in {what}")
    return values


_TAG = "tag:yaml.org,2002:"
# tags of scalars that a text field takes literally
_PLAIN = {_TAG + name for name in ("str", "int", "float", "bool", "timestamp")}
# tags that PyYAML trusts -> tags that the value must resolve to without them
_TRUSTED = {
    _TAG + name: {_TAG + looks for looks in (name, *others)}
    for name, *others in (("int",), ("float", "int"), ("bool",), ("null",), ("timestamp",))
}


def _compose(text: str, what: str, depth: int) -> yaml.Node | None:
    """The root node, or None for an empty text. Checks the events first: PyYAML's composer recurses without limit."""
    level = 0
    scalars: set[str | None] = set()  # their anchors
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.ScalarEvent):
                scalars.add(event.anchor)
            elif isinstance(event, yaml.CollectionStartEvent):
                level += 1
                if level > depth:
                    mark = event.start_mark
                    where = f"line {mark.line + 1} has" if mark is not None and "\n" in text else "it has"
                    raise ConfigError(f"{what} must be flat: {where} a list or a mapping where a single value belongs")
            elif isinstance(event, yaml.CollectionEndEvent):
                level -= 1
            elif isinstance(event, yaml.AliasEvent) and event.anchor not in scalars:  # they can expand exponentially
                raise ConfigError(
                    f"{what} has the alias *{str(event.anchor)[:80]}, which does not refer to a single value"
                )
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except ConfigError:
        raise
    except yaml.YAMLError as error:
        raise ConfigError(f"{what} is not YAML: {_reason(error)}") from error
    except (ValueError, OverflowError) as error:  # from int() and chr(): a YAML version, a code point
        raise ConfigError(f"{what} is not YAML: it has a number that is out of range") from error


def _construct(node: yaml.Node, what: str) -> Any:
    _check_scalars(node, what)
    try:
        return yaml.constructor.SafeConstructor().construct_document(node)
    except yaml.YAMLError as error:
        raise ConfigError(f"{what} is not YAML: {_reason(error)}") from error
    except (ValueError, OverflowError, TypeError) as error:  # a date of month 13, a list as a key
        raise ConfigError(f"{what} cannot be read: {one_line(error)}") from error


def _check_scalars(node: yaml.Node, what: str) -> None:
    """Refuse values that would crash or stall PyYAML's constructors, which trust tags."""
    if isinstance(node, yaml.MappingNode):
        children = [child for pair in node.value for child in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    elif node.tag in _TRUSTED:
        if len(node.value) > _MOST_DIGITS:
            raise ConfigError(f"{what} cannot be read: it has too many digits")
        if yaml.resolver.Resolver().resolve(yaml.ScalarNode, node.value, (True, False)) not in _TRUSTED[node.tag]:
            name = node.tag.removeprefix(_TAG)
            raise ConfigError(f"{what} cannot be read: {shown(node.value)} is not what its tag !!{name} says")
        return
    else:
        return
    for child in children:
        _check_scalars(child, what)


def _reason(error: yaml.YAMLError) -> str:
    """PyYAML's message without its multi-line excerpt of the text."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return one_line(error, 200)
    mark = error.problem_mark or error.context_mark
    place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
    return f"{one_line(ValueError(error.problem or error.context), 200)}{place}"


# ---- types


def _is_text(kind: Any) -> bool:
    return kind is str or str in typing.get_args(kind)


def _convert(key: str, value: Any, kind: Any) -> Any:
    allowed = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and type(None) in allowed:
        return None
    (target,) = (k for k in allowed if k is not type(None))
    try:
        if target is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            return float(value)  # YAML 1.1 reads 1e-3 as a string
    except (ValueError, OverflowError):
        pass
    if target is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)  # a folder called 2024
    if isinstance(value, target) and (target is bool or not isinstance(value, bool)):
        return value
    raise ConfigError(f"'{key}' must be {_describe(allowed)}, got {'null' if value is None else shown(value)}")


def _describe(allowed: tuple[type, ...]) -> str:
    words = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    return " or ".join(words[kind] for kind in allowed)
