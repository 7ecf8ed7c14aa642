# SPDX-License-Identifier: MIT
"""Flat typed configuration from a YAML file and `key=value` arguments; an unknown key is an error."""

import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ..errors import UserError

Config = TypeVar("Config")


class ConfigError(UserError, ValueError):
    """A key that does not exist, or a value that is not of its type."""


def load_config(cls: type[Config], path: str | Path | None = None, overrides: list[str] | None = None) -> Config:
    """An instance of a flat dataclass.

    Args:
        cls: Dataclass whose fields are `str`, `int`, `float`, `bool` or `X | None` of these.
        path: YAML file with a mapping of field names to values.
        overrides: `key=value` strings; values are read as YAML.

    Raises:
        ConfigError: A key is unknown (the nearest is named), a value is not of its type, or a field is missing.
    """
    values: dict[str, Any] = {}
    kinds = typing.get_type_hints(cls)
    if path is not None:
        try:
            loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ConfigError(f"there is no configuration at '{path}'") from error
        except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
            raise ConfigError(f"'{path}' is not YAML: {error}") from error
        if not isinstance(loaded, dict):
            raise ConfigError(f"'{path}' must hold a mapping of keys to values, got {type(loaded).__name__}")
        values.update(loaded)
    for override in overrides or []:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"expected key=value, got '{override}'")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"the value of '{key}' is not YAML: {text!r}") from error
        if _is_text(kinds.get(key.strip())) and not isinstance(value, str) and value is not None:
            value = text.strip()  # a folder called 007, 1e3 or on
        values[key.strip()] = value
    return from_dict(cls, values)


def from_dict(cls: type[Config], values: dict[str, Any]) -> Config:
    """An instance of a flat dataclass from a dictionary; raises ConfigError as `load_config`."""
    kinds = typing.get_type_hints(cls)
    checked = {}
    for key, value in values.items():
        if key not in kinds:
            near = difflib.get_close_matches(str(key), kinds, n=1, cutoff=0.4)
            hint = f"; did you mean '{near[0]}'?" if near else f"; there are {', '.join(kinds)}"
            raise ConfigError(f"there is no setting '{key}'{hint}")
        checked[key] = _convert(key, value, kinds[key])
    required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name not in checked]
    if required:
        raise ConfigError(f"missing: {', '.join(f'{name}=...' for name in required)}")
    return cls(**checked)


def dump(config: Any) -> str:
    """The resolved configuration as YAML, every field written out."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def _is_text(kind: Any) -> bool:
    return kind is str or str in typing.get_args(kind)


def _convert(key: str, value: Any, kind: Any) -> Any:
    allowed = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and type(None) in allowed:
        return None
    (target,) = (k for k in allowed if k is not type(None))
    if target is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if target is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as a string
        try:
            return float(value)
        except ValueError:
            pass
    if target is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)  # a folder called 2024
    if isinstance(value, target) and (target is bool or not isinstance(value, bool)):
        return value
    raise ConfigError(f"'{key}' must be {_describe(allowed)}, got {value!r}")


def _describe(allowed: tuple[type, ...]) -> str:
    words = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    return " or ".join(words[kind] for kind in allowed)
