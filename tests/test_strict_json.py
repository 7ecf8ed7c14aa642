# SPDX-License-Identifier: MIT
"""JSON as the standard has it, and one kind of error for whatever is wrong."""

import os

import pytest

from internimage import strict_json


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"a": 1, "b": {"c": 2, "c": 3}}', "the key 'c' occurs twice in an object"),
        ('{"' + "k" * 500 + '": 1, "' + "k" * 500 + '": 1}', r"the key 'k+\.\.\.k+' occurs twice"),
        (b"[1, NaN]", "NaN is not a number in JSON"),
        (b"[-Infinity]", "-Infinity is not a number in JSON"),
        (b"[" * 100_000, "it is nested too deeply"),
        (b'{"a": "\xff"}', "it is not UTF-8 text"),
        (b"{", "Expecting property name"),
    ],
)
def test_refusals(text, reason):
    with pytest.raises(ValueError, match=reason) as error:
        strict_json.parse(text)
    assert len(str(error.value)) < 200


def test_values():
    assert strict_json.parse(b'{"a": [1, 2.5, null, true, "\xc3\xa9"]}') == {"a": [1, 2.5, None, True, "é"]}
    assert strict_json.parse("[]") == []


def test_files(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b"x" * 2**20)
    assert strict_json.read_bytes(path, 2**20) == path.read_bytes()
    with pytest.raises(ValueError, match="it is larger than 0 MiB"):
        strict_json.read_bytes(path, 2**20 - 1)
    with pytest.raises(ValueError, match="not a regular file"):
        strict_json.read_bytes(tmp_path, 100)
    with pytest.raises(FileNotFoundError):
        strict_json.read_bytes(tmp_path / "y.json", 100)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ValueError, match="not a regular file"):
            strict_json.read_bytes(tmp_path / "pipe", 100)
