# SPDX-License-Identifier: MIT
"""The command line: `internimage VERB`. `tables.py` has what each verb takes, and a file of its name what it does.

Exit status: 0 done, 1 done with something left out that was not to be left out, 2 bad input, 130 interrupted.
"""

import importlib
import logging
import os
import signal
import sys

from ..errors import UserError, is_disk_full, is_write_protected
from ..terminal import joined, printable_warnings, say
from .verbs import parser

__all__ = ["main", "parser"]

_MISSING = (FileNotFoundError, PermissionError, NotADirectoryError)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status. `--help` and `--version` raise SystemExit, as argparse does."""
    prog, running = "internimage", False
    try:
        arguments = parser().parse_args(argv)
        prog = f"internimage {arguments.verb}"
        arguments.check(arguments)
        running = True
        # torch and timm, which take seconds; and the models and kernels, which every verb may count on
        from .. import models, ops  # noqa: F401
        from ..progress import MessageHandler

        logger = logging.getLogger("internimage")  # ours alone: other packages have handlers of their own
        if not logger.handlers:
            logger.addHandler(MessageHandler())
        with printable_warnings(MessageHandler()):
            return importlib.import_module(f".{arguments.verb}", __name__).run(arguments)
    except UserError as error:
        return _fail(error, getattr(error, "prog", prog), running)
    except BrokenPipeError:  # the reader of a pipe, such as head, has had enough
        sys.stderr.close()
        return 0
    except OSError as error:  # of a file: it is not there, is not ours, the disk is full
        named = error.filename is not None or isinstance(error, _MISSING)
        if not (named or is_disk_full(error) or is_write_protected(error)):
            raise
        return _fail(error, prog, running)
    except KeyboardInterrupt as interrupt:
        if os.environ.get("RANK", "0") == "0":  # of a torchrun launch, one process speaks
            say(joined(interrupt) if interrupt.args else "interrupted", sys.stderr)
        return 130


def _fail(error: Exception, prog: str, running: bool) -> int:
    """Say what went wrong, in one line: one process of a torchrun launch, unless an error is its alone."""
    rank = os.environ.get("RANK", "0")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # torchrun ends all processes as soon as one has ended: not before the message is there
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if running:
        speaks = rank == "0" or not getattr(error, "everywhere", False)
    else:  # wrong arguments are wrong in every process of a machine
        speaks = os.environ.get("LOCAL_RANK", "0") == "0"
    if speaks:
        process = "" if rank == "0" else f", process {rank}"
        say(f"{prog}{process}: error: {joined(error)}", sys.stderr, flush=True)
    return getattr(error, "status", 2)  # not every error is a UserError
