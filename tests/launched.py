# SPDX-License-Identifier: MIT
"""Launches of several processes like torchrun's, forked from a process that has imported everything.

torchrun imports torch, which takes seconds, in itself and in each process. Only the launch of test_faults.py that gets
signals uses it.
"""

import contextlib
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
        for path in streams:
            path.touch()
        running = []
        for rank in range(processes):
            own = variables | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            method = multiprocessing.get_start_method()
            running.append(_context().Process(target=_run, args=(arguments, own, streams, method)))
        try:
            for process in running:
                process.start()
            _wait(running, timeout)
        finally:
            for process in running:
                with contextlib.suppress(ValueError, AttributeError):  # it was not started
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


def _run(arguments: list[str], variables: dict[str, str], streams: list[Path], method: str) -> None:
    """Do the same as `python ARGUMENTS`, in this process."""
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
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")
