# SPDX-License-Identifier: MIT
"""Damaged and hostile files, by the thousand: no code runs, nothing is written, nothing but the package's own errors
comes out, with a short reason, and where a format has checksums nothing is read that was not written."""

import ctypes
import os
import re
import sys
import time
from pathlib import Path

import fuzz
import pytest
from fuzz import Reader, Seed
from fuzz_readers import READERS

QUICK, SLOW = 500, 20_000

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork(), which this system has not")


def share(reader: Reader, cases: int) -> int:
    return -(-int(cases * reader.share) // int(sum(other.share for other in READERS)))


def check(reader: Reader, numbers: range, folder: Path) -> None:
    findings = fuzz.run(reader, numbers, folder)
    assert not findings, f"{len(findings)} findings:\n" + "\n".join(map(str, findings))


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_some_cases(reader, tmp_path):
    check(reader, range(share(reader, QUICK)), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_many_cases(reader, tmp_path):
    check(reader, range(share(reader, SLOW)), tmp_path)


def test_every_kind_has_its_cases():
    for cases in (QUICK, SLOW):
        assert sum(share(reader, cases) for reader in READERS) >= cases
    assert len({reader.name for reader in READERS}) == len(READERS)


# ---- the fuzzer itself


def _runs_code(folder):
    eval("1 + 1")


def _runs_a_program(folder):
    os.system("true")


def _runs_a_program_and_says_damaged(folder):
    try:
        os.system("true")
    except BaseException as error:
        raise ValueError("it is damaged") from error


def _imports_by_pickle(folder):
    import pickle

    pickle.loads(b"cposix\ngetpid\n)R.")


def _writes(folder):
    (folder / "beside").write_bytes(b"")


def _removes(folder):
    (folder / "a").unlink()


def _crashes(folder):
    ctypes.string_at(0)


def _takes_long(folder):
    begun = time.process_time()
    while time.process_time() < begun + 20:
        try:
            sum(range(1000))
        except Exception:
            pass


def _fills_the_memory(folder):
    bytearray(1 << 34)


def _raises(folder):
    raise KeyError("a")


def _long_reason(folder):
    raise ValueError("a" * 10_000)


def _fills_the_memory_and_says_damaged(folder):
    try:
        bytearray(1 << 34)
    except MemoryError as error:
        raise ValueError("it is damaged") from error


def _takes_much_memory(folder):
    bytearray(b"1") * (1 << 30)  # far beyond the limit: the peak so far may count pages that the system has reclaimed


def _no_reason(folder):
    raise ValueError("")


def _raises_its_own(folder):
    raise ValueError("no")


def _changes(folder):
    return (folder / "a").read_bytes()


BROKEN = {
    _runs_code: "it did exec",
    _runs_a_program: "it did os.system",
    _runs_a_program_and_says_damaged: "it did os.system",
    _imports_by_pickle: "it did pickle.find_class",
    _writes: "it did open",
    _removes: "it did os.remove",
    _crashes: r"the process died",
    _takes_long: "TooLong",
    _fills_the_memory: "MemoryError",
    _raises: "KeyError: 'a'",
    _long_reason: "no reason, or a long one: ValueError: 'aaa",
    _no_reason: "no reason, or a long one: ValueError: ''",
    _fills_the_memory_and_says_damaged: "it asked for all of the memory",
    _takes_much_memory: r"it took [01]\.\d GB",
    _changes: "what was read is not what was written",
}


@pytest.mark.parametrize("read", BROKEN, ids=lambda read: read.__name__)
def test_broken_readers_are_found(read, tmp_path, monkeypatch):
    if "memory" in read.__name__ and not sys.platform.startswith("linux"):
        pytest.skip("the limit of the address space is Linux's")
    monkeypatch.setattr(fuzz, "MOST_MEMORY", 1 << 27)
    if read is _takes_long:
        monkeypatch.setattr(fuzz, "CPU_SECONDS", 0.1)
    good = bytes(range(256)) * 8

    def wrong_if_damaged(folder):
        return good if (folder / "a").read_bytes() == good else read(folder)

    seeds = [Seed("seed", {"a": good})]
    reader = Reader(
        "broken", lambda folder: seeds, wrong_if_damaged, (ValueError,), sealed=fuzz.BLIND if read is _changes else ()
    )
    findings = fuzz.run(reader, range(8), tmp_path, most=1)
    assert findings
    assert re.match(BROKEN[read], findings[0].what), findings[0].what
    assert f"python tests/fuzz.py 'broken' {findings[0].number} FOLDER" in str(findings[0])


def test_reader_that_refuses_what_is_not_damaged_is_found(tmp_path):
    reader = Reader("broken", lambda folder: [Seed("seed", {"a": b"1"})], _raises_its_own, (ValueError,))
    (finding,) = fuzz.run(reader, range(8), tmp_path)
    assert finding.what == "it refuses a file that is not damaged: ValueError: no"


def test_good_reader_and_the_same_cases_again(tmp_path):
    seeds = [Seed("seed", {"a": bytes(range(256)) * 8})]
    reader = Reader("good", lambda folder: seeds, lambda folder: None, ())
    assert fuzz.run(reader, range(50), tmp_path) == []
    cases = [fuzz.build(*fuzz.plan(reader, seeds, number)) for number in range(200)]
    assert cases == [fuzz.build(*fuzz.plan(reader, seeds, number)) for number in range(200)]
    changed = [case for case in cases if case != seeds[0].files]
    assert len(changed) > 150 and len({case["a"] for case in changed}) > 140
