# SPDX-License-Identifier: MIT
"""The command line: `internimage VERB`. `tables.py` defines the options of a verb, the module of its name what it does.

Exit status: 0 success, 1 done but incomplete or not as expected, 2 user error, 130 interrupted.
"""

import importlib
import logging
import os
import signal
import sys

from ..errors import UserError, is_disk_full, is_write_protected
from ..malloc import keep_freed_memory
from ..terminal import joined, printable_warnings, say
from .verbs import parser

__all__ = ["main", "parser"]

_RUN_MODELS = ("analyze", "evaluate", "finetune", "predict")  # verbs; a benchmark measures the allocator as it is
_MISSING = (FileNotFoundError, PermissionError, NotADirectoryError)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status. `--help` and `--version` raise SystemExit, as argparse does."""
    prog, running = "internimage", False
    try:
        arguments = parser().parse_args(argv)
        prog = f"internimage {arguments.verb}"
        arguments.check(arguments)
        running = True
        if arguments.verb in _RUN_MODELS:
            keep_freed_memory()
        # now load torch and timm, which takes seconds, and register models and kernels for every verb
        from .. import models, ops  # noqa: F401
        from ..progress import MessageHandler

        logger = logging.getLogger("internimage")  # only ours: other packages have their own handlers
        if not logger.handlers:
            logger.addHandler(MessageHandler())
        with printable_warnings(MessageHandler()):
            return importlib.import_module(f".{arguments.verb}", __name__).run(arguments)
    except UserError as error:
        return _fail(error, getattr(error, "prog", prog), running)
    except BrokenPipeError:  # the reader of a pipe, such as head, has closed it
        sys.stderr.close()
        return 0
    except OSError as error:  # a file is missing or not accessible, or the disk is full
        named = error.filename is not None or isinstance(error, _MISSING)
        if not (named or is_disk_full(error) or is_write_protected(error)):
            raise
        return _fail(error, prog, running)
    except KeyboardInterrupt as interrupt:
        if os.environ.get("RANK", "0") == "0":  # in a torchrun launch, only the first process prints
            say(joined(interrupt) if interrupt.args else "interrupted", sys.stderr)
        return 130


def _fail(error: Exception, prog: str, running: bool) -> int:
    """Print an error in one line and return the exit status.

    In a torchrun launch the first process prints for all, unless the error occurred in another one only.
    """
    rank = os.environ.get("RANK", "0")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # torchrun ends all processes when one ends, which must not happen before the message is printed
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if running:
        prints = rank == "0" or not getattr(error, "everywhere", False)
    else:  # wrong arguments are an error in every process of a machine
        prints = os.environ.get("LOCAL_RANK", "0") == "0"
    if prints:
        process = "" if rank == "0" else f", process {rank}"
        say(f"{prog}{process}: error: {joined(error)}", sys.stderr, flush=True)
    return getattr(error, "status", 2)  # not every error is a UserError
