# SPDX-License-Identifier: MIT
"""What killed processes leave is mended by the next one that writes there; what the living and others have stays.

test_kills.py kills the commands themselves.
"""

import contextlib
import errno
import json
import os
import signal
import threading
import time

import pytest
from runs import listing

from internimage import atomic, locks
from internimage.atomic import JOURNAL, exchange, partial_folder, recover, replacing
from internimage.benchmark.timing import append_csv
from internimage.files import appending, write_text, writing
from internimage.locks import LOCK_FILE, hold, taken_over

pytestmark = pytest.mark.skipif(os.name != "posix", reason="forks and POSIX locks")


@contextlib.contextmanager
def elsewhere(work):
    """Another process that has begun with some work, and is killed at the end."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            locks._held.clear()  # this process's
            with work():
                os.write(writer, b"begun")
                time.sleep(600)
        finally:
            os._exit(1)
    try:
        assert os.read(reader, 5) == b"begun"
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)


@contextlib.contextmanager
def half_written(path):
    with writing(path) as file:
        file.write(b"half")
        file.flush()
        yield


@contextlib.contextmanager
def half_filled(parent):
    with partial_folder(parent) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "tensors").write_text("half")
        yield


WORKS = {
    "a file": lambda folder: half_written(folder / "a.json"),
    "a folder": half_filled,
    "a lock": hold,
}  # fmt: skip


# ---- the dead and the living


@pytest.mark.parametrize("name", WORKS)
def test_what_a_killed_process_left_goes_when_the_next_one_writes_there(tmp_path, name):
    with elsewhere(lambda: WORKS[name](tmp_path)):
        left = listing(tmp_path)
        assert left
        write_text(tmp_path / "b.csv", "text")
        assert listing(tmp_path) == sorted([*left, "b.csv"])  # it lives
    write_text(tmp_path / "b.csv", "text")
    assert listing(tmp_path) == ["b.csv"]


@pytest.mark.parametrize("name", WORKS)
def test_what_this_process_is_writing_stays_and_stays_held(tmp_path, name):
    """POSIX locks would be gone as soon as this process opens and closes the file somewhere else."""
    with WORKS[name](tmp_path):
        left = listing(tmp_path)
        thread = threading.Thread(target=recover, args=(tmp_path,))
        thread.start()
        thread.join(20)
        write_text(tmp_path / "b.csv", "text")
        assert listing(tmp_path) == sorted([*left, "b.csv"])
        with elsewhere(lambda: recovered(tmp_path)):
            assert listing(tmp_path) == sorted([*left, "b.csv"])
    assert listing(tmp_path) == (["a.json", "b.csv"] if name == "a file" else ["b.csv"])


@contextlib.contextmanager
def recovered(folder):
    recover(folder)
    yield


def test_a_file_that_was_taken_for_a_dead_one_before_it_was_held_is_begun_again(tmp_path, monkeypatch):
    found, hold_file = [], locks.hold_file

    def patched(file, path):
        if not found:
            path.unlink()  # by another process, between opening and locking
        found.append(path)
        return hold_file(file, path)

    monkeypatch.setattr(locks, "hold_file", patched)
    write_text(tmp_path / "a", "text")
    assert len(found) == 2 and listing(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "text"


def test_a_folder_that_was_removed_before_it_was_held_is_made_again(tmp_path, monkeypatch):
    found, hold = [], locks.hold

    def patched(folder, warn):
        if not found:
            folder.rmdir()
        found.append(folder)
        return hold(folder, warn)

    monkeypatch.setattr(locks, "hold", patched)
    with partial_folder(tmp_path) as folder:
        (folder / "x").touch()
    assert len(found) == 2 and listing(tmp_path) == []


# ---- what is not ours


def test_what_others_gave_such_names_stays(tmp_path):
    far = tmp_path / "far"
    far.mkdir()
    (far / "mine").write_text("mine")
    folder = tmp_path / "folder"
    for name in (".partial-notes", ".partial-deadbeef/mine", ".partial-0123abcd/.internimage.lock/x", "x.lock"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    (folder / ".partial-00000000").symlink_to(far)
    (folder / ".partial-00000001").symlink_to(far / "mine")
    (folder / LOCK_FILE).symlink_to(far / "mine")
    os.mkfifo(folder / ".partial-00000002")  # opening it would wait
    before = listing(tmp_path)
    for ours in (False, True):
        recover(folder, ours)
        if not ours:
            assert listing(tmp_path) == before
    assert listing(far) == ["mine"] and (far / "mine").read_text() == "mine"
    recover(tmp_path / "nothing")


def test_a_lock_that_is_a_link_does_not_empty_its_target(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / LOCK_FILE).symlink_to("mine")
    with pytest.raises(OSError, match=LOCK_FILE), hold(tmp_path):
        pytest.fail("held")
    assert (tmp_path / "mine").read_text() == "mine"


def test_in_a_folder_of_ours_nothing_of_an_older_version_stays(tmp_path):
    """It did not hold what it wrote."""
    (tmp_path / ".partial-0123abcd").mkdir()
    (tmp_path / ".partial-0123abcd" / "x").touch()
    (tmp_path / ".partial-log.csv-0123abcd").touch()
    with hold(tmp_path):
        recover(tmp_path, ours=True)
        assert listing(tmp_path) == [LOCK_FILE]


def test_without_locks_nobody_can_tell_and_it_stays(tmp_path, monkeypatch):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "no locks")

    for name in (".partial-a.json-0123abcd", ".partial-0123abce/x", f".partial-0123abce/{LOCK_FILE}"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(locks.fcntl, "lockf", lockf)
    before = listing(tmp_path)
    write_text(tmp_path / "b.csv", "text")
    with partial_folder(tmp_path) as folder:
        (folder / "x").touch()
    assert listing(tmp_path) == sorted([*before, "b.csv"])
    with hold(tmp_path):
        recover(tmp_path, ours=True)
    assert listing(tmp_path) == ["b.csv"]


def test_what_cannot_be_removed_is_no_reason_to_fail(tmp_path, monkeypatch):
    (tmp_path / ".partial-a.json-0123abcd").touch()
    refused = lambda *_: (_ for _ in ()).throw(PermissionError(errno.EACCES, "not yours"))  # noqa: E731
    monkeypatch.setattr(locks, "taken_over", refused)
    write_text(tmp_path / "b.csv", "text")
    assert listing(tmp_path) == [".partial-a.json-0123abcd", "b.csv"]


# ---- exchanges


def begin(folder, **changes):
    """A folder in which an exchange was begun, as its journal says."""
    for name in ("a", ".partial-00000000/new/a", ".partial-00000001/x"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    names = {"staged": ".partial-00000000/new", "away": ".partial-00000001", "old": ["a"], "new": ["a"]}
    (folder / JOURNAL).write_text(json.dumps(names | changes))


def test_an_exchange_that_was_begun_is_ended_by_whoever_writes_there(tmp_path):
    begin(tmp_path)
    write_text(tmp_path / "b.csv", "text")
    assert (tmp_path / "a").read_text() == ".partial-00000000/new/a" and not (tmp_path / JOURNAL).exists()
    assert (tmp_path / ".partial-00000001" / "a").read_text() == "a"  # nothing says that this folder is of ours


def test_an_exchange_that_is_under_way_is_left_to_its_process(tmp_path):
    begin(tmp_path)
    before = listing(tmp_path)
    with elsewhere(lambda: hold(tmp_path)):
        write_text(tmp_path / "b.csv", "text")
        assert listing(tmp_path) == sorted([*before, LOCK_FILE, "b.csv"])
    with hold(tmp_path):
        write_text(tmp_path / "b.csv", "text")
        assert listing(tmp_path) == sorted([*before, LOCK_FILE, "b.csv"])


@pytest.mark.parametrize(
    "changes",
    [
        {"staged": "../outside"}, {"staged": "/etc"}, {"staged": "mine"}, {"staged": ".partial-00000000/.."},
        {"staged": 3}, {"staged": ".partial-0000000f"}, {"staged": ".partial-00000002"}, {"away": "../outside"},
        {"away": "mine"}, {"away": None}, {"new": ["../outside/a"]}, {"old": ["../outside/a"]}, {"old": [".."]},
        {"new": [["a"]]}, {"new": "a"}, {"new": ["\0"]}, {"new": [JOURNAL]}, {"old": {"a": 1}},
    ],
    ids=str,
)  # fmt: skip
def test_a_journal_that_we_did_not_write_moves_nothing(tmp_path, changes):
    folder = tmp_path / "folder"
    for name in ("outside/a", "folder/mine/a"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("mine")
    (folder / ".partial-00000002").symlink_to(tmp_path / "outside")
    begin(folder, **changes)
    before = listing(tmp_path)
    recover(folder)
    assert listing(tmp_path) == before and (folder / "a").read_text() == "a"


@pytest.mark.parametrize("text", ["", "[]", "3", "[" * 9**5, "\udcff", '{"cards": []}'], ids=range(6))
def test_a_damaged_journal_is_no_reason_to_fail(tmp_path, text):
    (tmp_path / JOURNAL).write_bytes(text.encode(errors="surrogateescape"))
    write_text(tmp_path / "b.csv", "text")
    assert listing(tmp_path) == [JOURNAL, "b.csv"]


def test_an_exchange_that_fails_at_its_journal_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("old")
    with hold(tmp_path), partial_folder(tmp_path) as staged, pytest.raises(OSError, match="full"):
        (staged / "a").write_text("new")
        monkeypatch.setattr(atomic, "sync_folder", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        exchange(tmp_path, staged, ["a"], ["a"])
    assert listing(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


# ---- tables that several append to


def test_rows_of_processes_that_append_at_once_all_stay(tmp_path):
    path = tmp_path / "rows.csv"
    children = []
    for who in range(3):
        child = os.fork()
        if not child:
            try:
                for i in range(30):
                    append_csv(path, [{"who": who, "i": i}])
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    header, *rows = path.read_text().splitlines()
    assert header == "who,i" and sorted(rows) == sorted(f"{who},{i}" for who in range(3) for i in range(30))
    assert listing(tmp_path) == ["rows.csv"]


def test_appended_rows_begin_a_line_and_a_failure_leaves_the_table(tmp_path, monkeypatch):
    path = tmp_path / "rows.csv"
    path.write_text("a\n1")  # as some editors leave it
    with pytest.raises(KeyboardInterrupt), appending(path) as file:
        file.write(b"half a ro")
        raise KeyboardInterrupt
    assert path.read_text() == "a\n1" and listing(tmp_path) == ["rows.csv"]
    append_csv(path, [{"a": 2}])
    assert path.read_text() == "a\n1\n2\n"
    monkeypatch.setattr(os, "access", lambda path, how: not os.path.isdir(path))  # of the folder, the file alone
    append_csv(path, [{"a": 3}])
    assert path.read_text() == "a\n1\n2\n3\n"


def test_the_lock_of_a_file_is_gone_once_it_has_its_name(tmp_path):
    with replacing(tmp_path / "a") as file:
        file.write(b"text")
    with taken_over(tmp_path / "a") as dead:
        assert dead
