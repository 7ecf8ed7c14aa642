# SPDX-License-Identifier: MIT
"""The allocator's settings: what they do to a process, and when they are left alone."""

import ctypes
import os
import subprocess
import sys

import pytest
from runs import environment

from internimage import cli, malloc

# Counts the page faults of allocating, writing and freeing 64 blocks of 8 MiB. numpy's memory is malloc's.
FAULTS = """
import internimage_command
internimage_command.starting = True  # the models, and torch, take seconds to import
import resource, numpy
from internimage.malloc import keep_freed_memory
print(keep_freed_memory() if {keep} else None)
numpy.ones(1 << 23, numpy.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for size in range(64):
    a = numpy.ones((1 << 23) + 4096 * size, numpy.uint8)
    b = numpy.ones(40 << 20, numpy.uint8)  # more than glibc keeps by itself
    del a, b
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
is_set = any(os.environ.get(name) for name in malloc.SETTINGS)
has_mallopt = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt") and not is_set


def run(keep: bool) -> list[str]:
    command = [sys.executable, "-c", FAULTS.format(keep=keep)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.skipif(not has_mallopt, reason="needs glibc's malloc with its default settings")
def test_freed_memory_is_kept():
    """Without the setting every block of 40 MiB is 10240 fresh pages, or 20 if the system makes them of 2 MiB."""
    (_, before), (is_kept, after) = run(False), run(True)
    before, after = int(before), int(after)
    assert is_kept == "True"
    assert before >= 64 * 20
    assert after < before / 10


@pytest.mark.parametrize("name", malloc.SETTINGS)
def test_settings_of_the_user_are_left_alone(name, monkeypatch):
    monkeypatch.setenv(name, "1")
    assert not malloc.keep_freed_memory()


def test_another_c_library(monkeypatch):
    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda name: object())
    assert not malloc.keep_freed_memory()
    monkeypatch.setattr(malloc.sys, "platform", "darwin")
    assert not malloc.keep_freed_memory()


def test_commands_that_run_models_make_the_settings(monkeypatch, capsys, tmp_path):
    calls = []
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: calls.append(1))
    for verb, expected in (("predict", [1]), ("evaluate", [1, 1]), ("benchmark", [1, 1]), ("info", [1, 1])):
        arguments = {
            "predict": [str(tmp_path / "none.png"), "--model", "internimage_atto"],
            "evaluate": ["--data", str(tmp_path / "none"), "--model", "internimage_atto"],
            "benchmark": ["models", "--quick", "--peers", "none"],
            "info": [],
        }[verb]
        cli.main([verb, *arguments])
        assert calls == expected, capsys.readouterr()
