# SPDX-License-Identifier: MIT
"""Commands of ours that are killed at a system call of our choice."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from runs import environment

HERE = Path(__file__).parent
COMPILER = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")


@dataclass
class Run:
    """What became of a command."""

    code: int  # exit status, negative for a signal
    calls: list[str]  # that changed a file, in their order: what and which file; the last one was not done after a kill
    said: str

    @property
    def killed(self) -> bool:
        return self.code == -9


class Server:
    """A process that runs the commands of server.py in forks of itself.

    Args:
        folder: For the compiled shim.
    """

    def __init__(self, folder: Path) -> None:
        shim = folder / "shim.so"
        subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-o", str(shim), str(HERE / "shim.c"), "-ldl"], check=True)
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "server.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment() | {"LD_PRELOAD": str(shim)},
        )  # fmt: skip
        assert self.process.stdout.readline() == "ready\n"

    def run(self, name: str, folder: Path, n: int = 0, torn: bool = False) -> Run:
        """Run a command.

        Args:
            name: See `COMMANDS` in server.py.
            folder: That it works in.
            n: It is killed instead of its n-th system call that changes something below the folder; 0: it is not.
            torn: If that call is a write, half of it is done.
        """
        print(
            json.dumps({"name": name, "folder": str(folder), "n": n, "torn": torn}), file=self.process.stdin, flush=True
        )
        return Run(**json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(300)
