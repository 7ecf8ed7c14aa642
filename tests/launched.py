# SPDX-License-Identifier: MIT
"""Processes like those of `python` and of torchrun, forked from a process that has imported everything.

They are real processes, with signals and limits of their own, but for the import of torch, which takes seconds in each.
torchrun takes as long itself; only the launch of test_faults.py that gets signals uses it.
"""

import functools
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing import connection
from pathlib import Path
from unittest import mock

import pytest  # noqa: F401  (these imports are for the forked processes)
import torch.distributed.checkpoint
import torch.distributed.fsdp

import internimage.tasks.classification.task  # noqa: F401
from internimage.cli import evaluate, finetune  # noqa: F401

TESTS = Path(__file__).parent


class Python:
    """A process that does the same as `python ARGUMENTS` in the project's folder, without an end of its standard input.

    Args:
        arguments: `-c` and code, `-m` and a module, or a script; and its arguments.
        variables: Its environment; that of this process if None.
        new_session: Whether it begins a group of processes, whose number is its own.

    Attributes:
        pid: Its number.
    """

    def __init__(self, arguments: list[str], variables: dict[str, str] | None = None, new_session: bool = False):
        self._arguments = list(map(str, arguments))
        self._folder = tempfile.TemporaryDirectory()
        self._streams = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        variables = dict(os.environ if variables is None else variables)
        self._process = _started(self._arguments, variables, self._streams, new_session)
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Its status, as of subprocess: None while it runs, negative after a signal."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float = 300) -> subprocess.CompletedProcess:
        """Wait for its end, and kill it if that does not come."""
        self._process.join(timeout)
        status = self._process.exitcode
        if status is None:
            self._process.kill()
            self._process.join()
        said = [path.read_text() for path in self._streams]
        self._folder.cleanup()
        if status is None:
            raise subprocess.TimeoutExpired(self._arguments, timeout, *said)
        return subprocess.CompletedProcess(self._arguments, status, *said)


def python(*arguments, variables: dict[str, str] | None = None, timeout: float = 300) -> subprocess.CompletedProcess:
    """Do the same as `python ARGUMENTS`, to its end; see Python."""
    return Python(list(arguments), variables).communicate(timeout)


def launch(processes: int, arguments: list[str], variables: dict[str, str], timeout: float):
    """Do the same as `torchrun --standalone --nproc-per-node PROCESSES ARGUMENTS`.

    When a process fails, the others are terminated, and killed after 30 seconds, as by torchrun.

    Args:
        arguments: A script, or `-m` and a module, and its arguments.
        variables: Environment of the processes.
        timeout: Seconds after which everything is killed.

    Returns:
        A subprocess.CompletedProcess, with status 0 if all processes succeeded.
    """
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("stdout", "stderr")]
        running = []
        try:
            for rank in range(processes):
                own = variables | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                running.append(_started(arguments, own, streams))
            _wait(running, timeout)
        finally:
            for process in running:
                process.kill()
        status = int(any(process.exitcode for process in running))
        return subprocess.CompletedProcess(arguments, status, *(path.read_text() for path in streams))


def _wait(running: list, timeout: float) -> None:
    """Wait for all processes to end; if one fails, end the others."""
    deadline, left = time.monotonic() + timeout, list(running)
    told = False
    while left:
        connection.wait([process.sentinel for process in left], max(0, deadline - time.monotonic()))
        for process in left:
            process.join(0)
        if not told and any(process.exitcode for process in running):
            told, deadline = True, min(deadline, time.monotonic() + 30)
            for process in left:
                process.terminate()
        left = [process for process in left if process.exitcode is None]
        if left and time.monotonic() >= deadline:
            if not told:
                raise subprocess.TimeoutExpired("a launch", timeout)
            for process in left:
                process.kill()
                process.join()
            return


@functools.cache
def _context():
    """The context that forks from a server process, which has no threads, since they would not survive the fork."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")  # each start takes seconds
    from multiprocessing import forkserver

    paths = [str(Path(internimage.__file__).parent.parent), str(TESTS)]
    with mock.patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        forkserver.ensure_running()
    return context


def _end_with(parent: int) -> None:
    """End this process when its parent, pytest, has ended."""
    connection.wait([parent])
    os._exit(1)


def _started(arguments: list[str], variables: dict[str, str], streams: list[Path], new_session: bool = False):
    """A process that runs; what it says is added to the files of `streams`."""
    for path in streams:
        path.touch()
    method = multiprocessing.get_start_method()
    process = _context().Process(target=_run, args=(arguments, variables, streams, method, new_session))
    process.start()
    return process


def _run(arguments: list[str], variables: dict[str, str], streams: list[Path], method: str, new_session: bool) -> None:
    """Do the same as `python ARGUMENTS`, in this process."""
    if new_session:
        os.setsid()
    multiprocessing.set_start_method(method, force=True)  # of loader workers, not the method that started this process
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process().sentinel,), daemon=True).start()
    os.environ.clear()
    os.environ.update(variables)
    torch.set_num_threads(torch.get_num_threads())  # recreates the thread pool, which is not thread-safe
    os.chdir(Path(internimage.__file__).parent.parent)
    for number, path in enumerate(streams, 1):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")
