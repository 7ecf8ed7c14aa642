# SPDX-License-Identifier: MIT
"""The folder of an analysis: all of its files or none, in place of an earlier analysis only."""

import os
import re

import pytest

from internimage import atomic
from internimage.analysis.folder import GENERATOR, FolderError, check_destination, write
from internimage.html_page import document
from internimage.locks import LockedError, hold

PAGE = document("page", "body", generator=GENERATOR).encode()
FIRST = {"index.html": PAGE, "views.npz": b"1", "erf-model1-node1.png": b"2", "image-model1.png": b"3"}
SECOND = {"index.html": PAGE + b" ", "views.npz": b"4", "points-model1-node2-levels.0.blocks.0.dcn.png": b"5"}


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_new_folder_an_empty_one_and_one_with_an_earlier_analysis(tmp_path):
    folder = tmp_path / "deep" / "new"
    check_destination(folder)
    write(folder, FIRST)
    assert content(folder) == FIRST
    write(folder, SECOND)
    assert content(folder) == SECOND  # nothing is left of the first
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    write(tmp_path / "link", FIRST)
    assert content(tmp_path / "empty") == FIRST and (tmp_path / "link").is_symlink()


@pytest.mark.parametrize(
    "files, reason",
    [
        ({"notes.txt": b"mine"}, "contains 'notes.txt'"),
        ({**FIRST, "notes.txt": b"mine"}, "contains 'notes.txt'"),
        ({**FIRST, "erf-model1.png.bak": b"mine"}, "contains 'erf-model1.png.bak'"),
        ({"image-model1.png": b"mine"}, "has no index.html of an earlier analysis"),
        ({"index.html": b"<html>my page"}, "has no index.html of an earlier analysis"),
        ({"index.html": document("t", "b").encode()}, "has no index.html of an earlier analysis"),
    ],
)
def test_a_folder_that_is_somebodys(tmp_path, files, reason):
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    for call in (lambda: check_destination(tmp_path), lambda: write(tmp_path, FIRST)):
        with pytest.raises(FolderError, match=rf"^the folder '{re.escape(str(tmp_path))}' is not empty, and {reason}"):
            call()
    assert content(tmp_path) == files


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FolderError, match="file' is not a folder; the result is one"):
        check_destination(tmp_path / "file")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("after", range(9))
def test_a_full_disk_or_an_interrupt_leaves_what_was_there(tmp_path, monkeypatch, error, after):
    """A move fails, after so many that did not; writing takes 5 moves into a new folder, and 9 in place of FIRST."""
    old, new = tmp_path / "old", tmp_path / "new"
    write(old, FIRST)
    real, moves = os.replace, []

    def replace(source, target):
        moves.append(target)
        if len(moves) == after + 1:
            raise error
        return real(source, target)

    monkeypatch.setattr(atomic.os, "replace", replace)
    for folder in (old, new):
        moves.clear()
        try:
            write(folder, SECOND)
            assert len(moves) <= after and content(folder) == SECOND
        except type(error):
            assert len(moves) > after and content(folder) == FIRST if folder == old else not folder.exists()


def test_two_analyses_do_not_write_to_one_folder(tmp_path):
    write(tmp_path, FIRST)
    with hold(tmp_path), pytest.raises(LockedError, match="this process"):
        write(tmp_path, SECOND)
    assert content(tmp_path) == FIRST
