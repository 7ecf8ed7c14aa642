# SPDX-License-Identifier: MIT
"""No file of weights is opened twice: an old pickle is read whole each time, and a large one takes minutes."""

import sys
from collections import Counter
from pathlib import Path

import formats
import pytest
import timm

from internimage.convert.convert import check_folder, convert
from internimage.engine.create import create_model
from internimage.weights import readers

_watched: list[Counter] = []  # an audit hook stays for good


def _note(event, arguments):
    if _watched and event == "open" and isinstance(arguments[0], (str, bytes, Path)):
        _watched[-1][Path(str(arguments[0])).name] += 1


sys.addaudithook(_note)


@pytest.fixture
def opens():
    """How often Python opens the files of each name; `opens.clear()` begins anew."""
    _watched.append(Counter())
    yield _watched[-1]
    _watched.pop()


KINDS = ["official", "official, before torch 1.6", "ours", "Hub, shards"]


def write(kind: str, folder: Path) -> Path:
    return formats.write(kind, folder, timm.create_model("internimage_atto").state_dict())


def opens_of_reading(path: Path, opens: Counter, read: bool = True) -> Counter:
    """Of opening weights and reading each tensor once, which is the least that loading takes."""
    opens.clear()
    for entry in readers.open_weights(path).values():
        if read:
            entry.read()
    return Counter(opens)


@pytest.mark.parametrize("kind", KINDS)
def test_creating_a_model(kind, opens, tmp_path):
    path = write(kind, tmp_path)
    once = opens_of_reading(path, opens)
    assert any(once.values())
    for create in (
        lambda: create_model("internimage_atto", str(path)),
        lambda: create_model("internimage_atto", str(path), num_classes=1000),
        lambda: timm.create_model("internimage_atto", pretrained=True, pretrained_cfg_overlay=dict(file=str(path))),
    ):
        opens.clear()
        create()
        assert {name: count for name, count in opens.items() if name in once} == once
    assert "state_dict" not in create_model("internimage_atto", str(path)).pretrained_cfg


@pytest.mark.parametrize("kind", KINDS)
def test_converting_and_pushing(kind, opens, tmp_path):
    path = write(kind, tmp_path)
    once = opens_of_reading(path, opens)
    opens.clear()
    convert(path, tmp_path / "out", model="internimage_atto")
    assert {name: count for name, count in opens.items() if name in once} == once
    convert(path, tmp_path / "shards", model="internimage_atto", shard_size="1MB")
    for folder in (tmp_path / "out", tmp_path / "shards"):
        once = opens_of_reading(folder, opens, read=False)
        opens.clear()
        files = check_folder(folder)
        assert {name: count for name, count in opens.items() if name in once} == once and set(once) < set(files)
