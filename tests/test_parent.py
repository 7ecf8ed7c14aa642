# SPDX-License-Identifier: MIT
"""Processes of torchrun exit when it is killed; other processes may outlive their parent."""

import os
import select
import signal
import subprocess
import sys
import time

import pytest
from runs import (
    ROOT,
    arguments,
    environment,
    same_weights,
    settings,
    torchrun_command,
    wait_for_checkpoint,
    write_noise,
)

from internimage.engine import parent
from internimage.locks import check_free

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a parent that is gone is not seen on Windows")


@pytest.mark.parametrize(
    "by_torchrun, done, ends", [(True, False, True), (True, True, False), (False, False, False)], ids=str
)
def test_a_process_whose_parent_is_gone(monkeypatch, by_torchrun, done, ends):
    """Forked twice, so that the process in the middle can exit."""
    monkeypatch.setattr(parent, "_INTERVAL", 0.02)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if by_torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    (started_out, started_in), (life_out, life_in), (stay_out, stay_in) = os.pipe(), os.pipe(), os.pipe()
    middle = os.fork()
    if middle == 0:
        if os.fork() == 0:
            os.close(stay_in)
            parent.end_with_torchrun()
            parent.end_with_torchrun()  # a second command of the same process
            if done:
                parent.outlive_torchrun()
            os.write(started_in, b"x")
            os.read(stay_out, 1)  # until the test closes the pipe
            os.write(life_in, b"x")
            os._exit(0)
        os.read(started_out, 1)
        time.sleep(0.2)  # nothing happens as long as the parent is there
        os._exit(0 if not select.select([life_out], [], [], 0)[0] else 1)
    os.close(life_in), os.close(stay_out)
    assert os.waitpid(middle, 0)[1] == 0
    ended = bool(select.select([life_out], [], [], 60 if ends else 0.5)[0])
    os.close(stay_in)  # a living process now writes to the other pipe
    assert ended is ends and os.read(life_out, 1) == (b"" if ends else b"x")
    for pipe in (started_out, started_in, life_out):
        os.close(pipe)


@pytest.mark.slow
def test_processes_of_a_killed_torchrun_exit_and_the_next_run_resumes(tmp_path):
    data = write_noise(tmp_path / "noise", train=(9, 9, 9), val=(2, 2, 2))
    config = settings(data, tmp_path / "run", epochs=12, workers=1, checkpoint_every=2)
    command = torchrun_command(2, "-m", "internimage", *arguments(config))
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment())
    wait_for_checkpoint(tmp_path / "run", process, 3)
    process.send_signal(signal.SIGKILL)
    err = process.communicate(timeout=120)[1]  # until the last process that has it open exits
    assert b"torchrun was killed" in err
    check_free(tmp_path / "run")
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=environment(), timeout=240)
    command[command.index(f"output={tmp_path / 'run'}")] = f"output={tmp_path / 'whole'}"
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=environment(), timeout=240)
    assert same_weights(tmp_path / "run", tmp_path / "whole")
