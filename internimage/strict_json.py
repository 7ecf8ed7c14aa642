# SPDX-License-Identifier: MIT
"""JSON as its standard has it: no key twice in an object, no NaN, and one kind of error for whatever is wrong."""

import json
from collections import Counter
from pathlib import Path
from reprlib import repr  # shortens, so that a message stays a line whatever the text holds
from typing import Any


def parse(text: str | bytes) -> Any:
    """The value of a JSON text.

    Args:
        text: Bytes must be UTF-8, without a byte order mark.

    Raises:
        ValueError: It is not JSON, an object has a key twice (readers disagree about which value counts), or it is
            nested too deeply for Python's reader.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8 text") from error
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_bytes(path: Path, largest: int) -> bytes:
    """The content of a regular file of bounded size.

    Raises:
        ValueError: It is something else (opening a pipe would wait for its writer forever), or larger than `largest`.
        OSError: It cannot be read.
    """
    size = path.stat().st_size
    if not path.is_file():
        raise ValueError("it is not a regular file")
    if size > largest:
        raise ValueError(f"it is larger than {largest >> 20} MiB")
    return path.read_bytes()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {repr(twice)} occurs twice in an object")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")
